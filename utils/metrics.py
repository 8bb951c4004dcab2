"""A measured value with its interval, what it is called, and how values stand side by side.

An `Estimate` says how sure a number is. `METRICS` declares each metric once: label, unit, good direction; every table,
arrow, mark and Pareto front uses that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval `[low, high]`, from `n` observations."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """ "0.67 [0.61, 0.73]" with this many digits."""
        return f"{self.value:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"

    def to_dict(self) -> dict[str, float]:
        """The four numbers by name, as a run record stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> Estimate:
        """Inverse of `to_dict`."""
        return cls(**values)


def middle(number: Estimate | float) -> float:
    """The number, or the value of an `Estimate`."""
    return number.value if isinstance(number, Estimate) else number


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's 95 % t-interval; one value has no width. ValueError for none.

    Source: Student 1908; half width t(0.975, n - 1) s / sqrt(n).
    """
    from scipy.stats import t

    if not len(values):
        raise ValueError("no values to average: no run has measured this")
    n, mean = len(values), statistics.fmean(values)
    half = 0.0 if n == 1 else float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> Estimate:
    """Share `successes / n` with the Wilson score interval (Wilson 1927), 95 % by default; ValueError for none."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"a share needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    share, weight = successes / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def bootstrap_interval(
    sums: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    transform: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    resamples: int = 2000,
) -> Estimate:
    """`transform(sum(sums) / sum(weights))` with the 95 % percentile bootstrap over units (Efron 1979).

    `sums` and `weights` are (n,): one total and one size (tokens, say) a unit; sizes of 1 give the mean. The seed is
    fixed, so equal input gives equal bounds. One unit alone says nothing about the spread: low = high = value, n = 1.
    ValueError where there is nothing to average.
    """
    units = np.stack([np.asarray(sums, float), np.ones(len(sums)) if weights is None else np.asarray(weights, float)])
    n = units.shape[1]
    if n == 0 or units[1].sum() <= 0:
        raise ValueError("nothing to average: there is no text, no token or no block")
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    totals = counts @ units.T
    totals = totals[totals[:, 1] > 0]
    low, high = np.percentile(transform(totals[:, 0] / totals[:, 1]), [2.5, 97.5])
    value = transform(np.array(units[0].sum() / units[1].sum()))
    return Estimate(float(value), float(low), float(high), n)


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: `better` is the good direction (None: neither), `digits` those after the point."""

    label: str
    unit: str
    better: str | None
    digits: int

    @property
    def title(self) -> str:
        """Column heading or axis label: name, unit, and an arrow that points in the good direction."""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return f"{self.label}{f' ({self.unit})' if self.unit else ''}{arrow}"


METRICS: dict[str, Metric] = {
    "trainable": Metric("trainable", "parameters", "lower", 0),
    "bytes_on_disk": Metric("on disk", "bytes", "lower", 0),
    "start_loss": Metric("loss before", "nats/token", None, 3),
    "best_loss": Metric("held-out loss", "nats/token", "lower", 3),
    "best_step": Metric("best step", "", None, 0),
    "steps_to_1_percent": Metric("steps to within 1 %", "", "lower", 0),
    "steps_to_90_percent": Metric("steps to 90 % of its gain", "", "lower", 0),
    "test_loss": Metric("test loss", "nats/token", "lower", 3),
    "held_out_loss": Metric("held-out loss", "nats/token", "lower", 3),
    "test_loss_positive": Metric("test loss, positive", "nats/token", "lower", 3),
    "test_loss_negative": Metric("test loss, negative", "nats/token", None, 3),
    "base_test_loss_positive": Metric("base, positive", "nats/token", None, 3),
    "base_test_loss_negative": Metric("base, negative", "nats/token", None, 3),
    "loss_change": Metric("loss, minus the base's", "nats/token", "lower", 4),
    "accuracy": Metric("accuracy", "share", "higher", 2),
    "f1": Metric("F1", "share", "higher", 2),
    "majority": Metric("commonest answer", "share", None, 2),
    "exact_match": Metric("exact match", "share", "higher", 2),
    "label_loss": Metric("test loss", "nats/label", "lower", 3),
    "positivity": Metric("positive, words", "share", "higher", 2),
    "positivity_chars": Metric("positive, characters", "share", "higher", 2),
    "perplexity": Metric("perplexity of the text", "base model", None, 1),
    "relevance": Metric("relevance", "nats/token", None, 3),
    "distinct_1": Metric("distinct-1", "share", "higher", 2),
    "distinct_2": Metric("distinct-2", "share", "higher", 2),
    "repeated_4grams": Metric("repeated 4-grams", "share", "lower", 3),
    "empty": Metric("empty", "share", "lower", 3),
    "step_seconds": Metric("a step", "s", "lower", 3),
    "step_seconds_median": Metric("a step", "s, median", "lower", 3),
    "peak_bytes": Metric("peak memory", "bytes", "lower", 0),
    "ms_per_token_median": Metric("a token", "ms, median", "lower", 2),
    "tokens_per_second": Metric("speed", "tokens/s", "higher", 0),
    "step_ratio": Metric("a step", "x full", "lower", 2),
    "latency_ratio": Metric("a token", "x base", "lower", 2),
    "merged_latency_ratio": Metric("a token, merged", "x base", "lower", 2),
    "saved_bytes": Metric("kept for backward", "bytes", "lower", 0),
    "no_label": Metric("no label", "share", "lower", 2),
    "ratio_to_first": Metric("time", "x first row", "lower", 2),
}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by rising cost, of the `(cost, value)` points that no other one beats: costs less and is worth more."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Aligned plain text: one line a row, METRICS' heading for each known column, `*` at the best value of a column.

    A value is text, a number, an `Estimate`, or None (printed "-"). A column that METRICS does not know is printed
    under its own name, without a mark.
    """
    cells = [[cell(row.get(column), METRICS.get(column)) for row in rows] for column in columns]
    marks = [best([row.get(column) for row in rows], METRICS.get(column)) for column in columns]
    for texts, marked in zip(cells, marks, strict=True):
        if marked:
            texts[:] = [text + ("*" if index in marked else " ") for index, text in enumerate(texts)]
    titles = [METRICS[column].title if column in METRICS else column for column in columns]
    notes = ["* best value of its column"] if any(marks) else []
    if notes and any(isinstance(row.get(column), Estimate) for row in rows for column in columns):
        notes = ["* best value of its column; where the 95 % intervals overlap much, that may be chance"]
    return "\n".join([*_align(titles, [list(line) for line in zip(*cells, strict=True)]), *notes])


def compare_table(rows: Sequence[tuple[str, object, object]]) -> str:
    """`(what, predicted, measured)` rows as "predicted | measured | match"; equal means exactly equal."""
    lines = [[what, cell(a, None), cell(b, None), "yes" if a == b else "NO"] for what, a, b in rows]
    return "\n".join(_align(["", "predicted", "measured", "match"], lines))


def cell(value: object, metric: Metric | None) -> str:
    """A value as text: integers with thousands separators, other numbers with the metric's digits (default 3)."""
    digits = metric.digits if metric else 3
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return value.text(digits)
    if isinstance(value, (bool, str)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def best(values: Sequence[object], metric: Metric | None) -> list[int]:
    """Where the best value stands (ties all count); nowhere without a direction or with fewer than two numbers."""
    numbers = {i: middle(v) for i, v in enumerate(values)}
    numbers = {i: v for i, v in numbers.items() if isinstance(v, (int, float))}
    if metric is None or metric.better is None or len(numbers) < 2:
        return []
    top = (max if metric.better == "higher" else min)(numbers.values())
    return [index for index, value in numbers.items() if value == top]


def _align(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Heading, rule and rows, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    rows = [titles, ["-" * width for width in widths], *lines]
    return ["  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]).rstrip()
            for r in rows]  # fmt: skip
