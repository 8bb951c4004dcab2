"""Data in, matplotlib `Axes` out: every figure of the course, in one style.

For: figures that are read in five seconds: labelled axes with units, direct labels where they fit.
Not for: computing anything but means over seeds; numbers come from run records and `evaluation.py`. Colours and
`show` are in `style.py`, the strength dial in `dial_plot.py`, 04's other figures in `comparison_plots.py`; all can be
had from here too.

Each function takes an optional `Axes` and returns it; `show(axes.figure, "alt text")` puts it into the notebook.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from torch import Tensor

from utils.adapters import METHODS
from utils.comparison_plots import cost_bars, few_shot_curves, interval_rows, rate_curves
from utils.dial_plot import dial_figure
from utils.metrics import METRICS, Estimate, pareto_front
from utils.runs import RunRecord
from utils.style import BLACK, BLUE, GREEN, GREY, ORANGE, RED, STYLES, WHITE, apply_style, ink_on, new_axes, show

__all__ = [
    "apply_style", "cost_bars", "cost_vs_quality", "dial_figure", "few_shot_curves", "interval_rows",
    "learning_curves", "lengths_histogram", "loss_curve", "parameter_bar", "rate_curves", "show", "unit_map",
    "vector_heatmap",
]  # fmt: skip


def lengths_histogram(
    lengths: Mapping[str, Sequence[int]], unit: str = "words", block_length: int | None = None, ax: Axes | None = None
) -> Axes:
    """How long the reviews of each label are, in `unit`; a dashed line at each median, a grey one at `block_length`."""
    ax = new_axes(ax)
    longest = np.percentile(np.concatenate([np.asarray(v) for v in lengths.values()]), 99)
    bins = np.linspace(0, longest, 41)
    for (label, values), colour, style in zip(lengths.items(), (BLUE, ORANGE, GREEN), ("-", "--", ":"), strict=False):
        median = statistics.median(values)
        ax.hist(values, bins, histtype="step", color=colour, linestyle=style, linewidth=2,
                label=f"{label}: {len(values):,}, median {median:,.0f} {unit}")  # fmt: skip
        ax.axvline(median, color=colour, linestyle=style, linewidth=1)
    if block_length:
        ax.axvline(block_length, color=GREY, linewidth=3, alpha=0.5, label=f"one training block: {block_length}")
    ax.set(xlabel=f"length of a review ({unit}), the longest 1 % not shown", ylabel="reviews", xlim=(0, longest))
    ax.legend(loc="upper right")
    return ax


def parameter_bar(
    groups: Mapping[str, int], highlight: Mapping[str, int] | None = None, ax: Axes | None = None
) -> Axes:
    """Where the parameters sit: a bar a group with count and share of `groups`; `highlight` adds more bars."""
    total, highlight = sum(groups.values()), highlight or {}
    bars = {**groups, **highlight}
    ax = new_axes(ax, figsize=(8, 0.9 + 0.42 * len(bars)))
    ax.barh(list(bars), [count / 1e6 for count in bars.values()], color=BLUE)
    for row, (name, count) in enumerate(bars.items()):
        share = 100 * count / total
        text = f"  {count:,}  ({share:.{1 if share >= 0.1 else 3}f} %)"
        mark = {"color": RED} if name in highlight else {}
        ax.text(count / 1e6, row, text, va="center", **mark)
    ax.set(xlabel="parameters (millions)", xlim=(0, 1.45 * max(bars.values()) / 1e6))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    return ax


def loss_curve(
    history: Sequence[Mapping[str, float]],
    baseline: float | None = None,
    ax: Axes | None = None,
    *,
    rows: str = "reviews",
    label: str = "token",
    baseline_name: str = "base model",
) -> Axes:
    """Held-out loss (nats per `label`) against the step; without `ax` also the training batches' loss, beside it.

    `baseline` is a held-out loss to compare with, the base model's unless `baseline_name` says another. The two losses
    are of different `rows`, so they share no axis.
    """
    train, held_out = ([(r["step"], r[k]) for r in history if k in r] for k in ("train_loss", "eval_loss"))
    if ax is None and train:
        apply_style()
        _, (batches, ax) = plt.subplots(1, 2, figsize=(8, 3.4))
        batches.plot(*zip(*train, strict=True), color=GREY, linewidth=1)
        batches.set(title="training batches", xlabel="optimiser step", ylabel=f"loss (nats/{label})")
    ax = new_axes(ax)
    ax.plot(*zip(*held_out, strict=True), color=BLUE, marker="o")
    step, loss = min(held_out, key=lambda point: point[1])
    side = "right" if step > held_out[-1][0] / 2 else "left"
    ax.annotate(f"best: {loss:.3f} at step {step:,.0f}", (step, loss), (0, -24), textcoords="offset points",
                ha=side, color=BLUE, bbox=WHITE)  # fmt: skip
    if baseline is not None:
        ax.axhline(baseline, color=BLACK, linestyle="--", linewidth=1.2)
        ax.annotate(f"{baseline_name}: {baseline:.3f}", (held_out[-1][0], baseline), (0, 4), textcoords="offset points",
                    ha="right")  # fmt: skip
    ax.set(title=f"held-out {rows}", xlabel="optimiser step", ylabel=f"loss (nats/{label})")
    ax.margins(y=0.2)
    return ax


def _split(vectors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """`adapters.scaling_vectors` as arrays (layers, units): "q", "k", "v" of width d, "ff" of the inner width."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for key in sorted(vectors, key=lambda k: int(k.split(".")[0])):
        values = vectors[key].detach().float().cpu().numpy()
        names = ("q", "k", "v") if key.endswith("attention") else ("ff",)
        for name, piece in zip(names, np.split(values, len(names)), strict=True):
            parts[name].append(piece)
    return {name: np.stack(parts[name]) for name in ("q", "k", "v", "ff") if name in parts}


def vector_heatmap(vectors: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """The learned vectors, layer by (q, k, v, ff): mean |l - 1| written out; without `ax` also each unit, beside it."""
    parts = _split(vectors)
    if ax is None:
        apply_style()
        layers = len(next(iter(parts.values())))
        figure, (ax, units) = plt.subplots(1, 2, figsize=(8, 1.7 + 0.3 * layers), width_ratios=(1, 1.9))
        unit_map(vectors, units)
    means = np.stack([np.abs(values - 1).mean(axis=1) for values in parts.values()], axis=1)
    image = ax.imshow(means, cmap="Blues", vmin=0, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        ink = ink_on(image.cmap(image.norm(mean)))
        ax.text(column, row, f"{mean:.3f}", ha="center", va="center", fontsize=10, color=ink)
    ax.set(title="mean distance from 1", ylabel="layer", xticks=range(len(parts)), yticks=range(len(means)))
    ax.set_xticklabels(parts)
    ax.grid(visible=False)
    return ax


def unit_map(vectors: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Each learned number as a coloured stripe, layer by unit (q, k, v, ff side by side): blue below 1, red above."""
    ax, parts = new_axes(ax), _split(vectors)
    values = np.concatenate(list(parts.values()), axis=1)
    reach = max(np.percentile(np.abs(values - 1), 99), 1e-6)  # a few outliers must not bleach the rest
    image = ax.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(1, 1 - reach, 1 + reach), aspect="auto",
                      interpolation="nearest")  # fmt: skip
    edges = np.cumsum([0, *(part.shape[1] for part in parts.values())])
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color=BLACK, linewidth=1)
    ax.set(title="every unit: inhibited or amplified", ylabel="layer", yticks=range(len(values)))
    names = [f"{name}\n{part.shape[1]:,}" for name, part in parts.items()]
    ax.set_xticks((edges[:-1] + edges[1:]) / 2, names)
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False)
    bar = ax.figure.colorbar(image, ax=ax, extend="both", pad=0.02)
    bar.set_label("learned factor l")
    return ax


def learning_curves(records: Sequence[RunRecord], ax: Axes | None = None) -> Axes:
    """Change of the held-out loss (nats per token) against the step: a bold line per method, a thin one per seed.

    The base's loss is the lowest one at step 0: a method that does not start as the base (prefix tuning) starts far
    above it. What is far above it is not shown.
    """
    ax, methods = new_axes(ax), defaultdict(list)
    points = [{row["step"]: row["eval_loss"] for row in r.history if "eval_loss" in row} for r in records]
    base = min((losses[min(losses)] for losses in points if losses), default=0.0)
    for record, losses in zip(records, points, strict=True):
        if losses:
            methods[record.method].append({step: loss - base for step, loss in losses.items()})
    for method, runs in methods.items():
        colour, marker, line = STYLES.get(method, (GREY, ".", "-"))
        steps = sorted(set.intersection(*map(set, runs)))
        mean = [statistics.fmean(run[step] for run in runs) for step in steps]
        for run in runs if len(runs) > 1 else ():
            ax.plot(list(run), list(run.values()), color=colour, linewidth=0.8, alpha=0.3)
        label = f"{METHODS.get(method, method)}: best {min(mean):+.4f}{_seeds(len(runs))}"
        ax.plot(steps, mean, color=colour, marker=marker, linestyle=line, label=label)
    low, high = ax.get_ylim()
    lowest = min((loss for runs in methods.values() for run in runs for loss in run.values()), default=0)
    if lowest < 0:
        ax.set_ylim(1.1 * lowest, min(high, -1.5 * lowest))
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set(xlabel="optimiser step", ylabel="held-out loss, minus the base's\n(nats/token)")
    ax.legend(fontsize=9)
    return ax


def _seeds(count: int) -> str:
    return f" (mean of {count} seeds)" if count > 1 else ""


def cost_vs_quality(
    rows: Sequence[Mapping[str, object]], cost: str = "trainable", quality: str = "positivity", ax: Axes | None = None
) -> Axes:
    """One point a row (`method`, `cost`, `quality`: numbers or Estimates) over a logarithmic cost axis.

    Points on the Pareto front are joined: no other method costs less and is better. The direction of `quality` comes
    from METRICS. A row that costs nothing (the base) is a dashed level line.
    """
    ax, metric = new_axes(ax), METRICS[quality]
    sign = -1 if metric.better == "lower" else 1
    paid = [row for row in rows if row[cost]]
    for row in rows:
        value, low, high = _interval(row[quality])
        label, (colour, marker, _) = (
            METHODS.get(row["method"], row["method"]),
            STYLES.get(row["method"], STYLES["base"]),
        )
        if not row[cost]:
            ax.axhline(value, color=GREY, linestyle="--", linewidth=1.5)
            ax.annotate(f"{label}: {value:.{metric.digits}f}", (0.01, value), (0, 4), color=GREY,
                        xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
            continue
        ax.errorbar(row[cost], value, [[value - low], [high - value]], color=colour, marker=marker, markersize=9,
                    capsize=4, linestyle="none", label=label)  # fmt: skip
    front = pareto_front([(row[cost], sign * _interval(row[quality])[0]) for row in paid])
    ax.plot([paid[i][cost] for i in front], [_interval(paid[i][quality])[0] for i in front], color=GREY, linewidth=1,
            zorder=0, label="Pareto front:\nnothing cheaper is better")  # fmt: skip
    ax.set(
        xscale="log", xlabel=f"← better: {_axis(cost)}, log scale", ylabel=f"{_axis(quality)}{_BETTER[metric.better]}"
    )
    ax.margins(x=0.1, y=0.15)
    if metric.unit == "share":
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 1))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10)
    return ax


_BETTER = {"higher": ", better: ↑", "lower": ", better: ↓", None: ""}


def _axis(name: str) -> str:
    metric = METRICS[name]
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def _interval(value: object) -> tuple[float, float, float]:
    """Value, low and high of an Estimate; a bare number has no width."""
    return (value.value, value.low, value.high) if isinstance(value, Estimate) else (float(value),) * 3
