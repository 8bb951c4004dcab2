"""The picture of the course: how positive the text is, and what that costs, against the strength of the dial.

For: `dial_figure`. Not for: measuring the points (`steering.py`), other figures (`plots.py`).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator, PercentFormatter

from utils.metrics import Estimate
from utils.style import BLACK, BLUE, GREY, RED, apply_style

CURVES = {"dial": ("one adapter", BLUE, "o"), "contrast": ("contrast of two", RED, "s")}
JUDGES = {"positivity": "-", "positivity_chars": "--"}

Points = dict[float, list[Estimate]]  # strength -> one estimate a seed


def dial_figure(rows: Sequence[Mapping[str, object]]) -> Axes:
    """Positivity of the generated text and its two prices, as multiples of the base's, against the strength a.

    A row is one point: `strength`; `positivity` and `positivity_chars` (shares, 0 to 1); `held_out_loss` (nats per
    token of the turned model on real reviews) and `perplexity` (of the turned model's text under the frozen base), each
    an Estimate or its dict; where there are several also `curve` ("dial" or "contrast") and `seed`.
    Lines are means over seeds; a band covers the 95 % intervals of all seeds. Returns the upper Axes. Raises
    ValueError where a curve has no row at strength 0, the base model that both prices are compared with.
    """
    apply_style()
    figure, (top, middle, low) = plt.subplots(3, 1, figsize=(8, 7.2), sharex=True, height_ratios=(2.5, 1, 1))
    curves: dict[str, list[Mapping[str, object]]] = defaultdict(list)
    for row in rows:
        curves[str(row.get("curve", "dial"))].append(row)
    for name, points in curves.items():
        for score in JUDGES:
            _line(top, _by_strength(points, score), name, JUDGES[score], band=score == "positivity")
        _end_values(top, _by_strength(points, "positivity"), CURVES[name][1])
        _line(middle, _relative(points, "held_out_loss", math.exp), name, "-", band=False)
        _line(low, _relative(points, "perplexity", float), name, "-", band=False)
    _landmarks(top, middle, low)
    _legends(top, list(curves))
    return top


def _by_strength(rows: Sequence[Mapping[str, object]], key: str) -> Points:
    points: Points = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["strength"]):
        value = row[key]
        points[row["strength"]].append(value if isinstance(value, Estimate) else Estimate.from_dict(value))
    return points


def _relative(rows: Sequence[Mapping[str, object]], key: str, perplexity: Callable[[float], float]) -> Points:
    """The `perplexity` of `key`, divided by that of the same seed at strength 0.

    No interval: both levels are of the same blocks, or the same prompts, so theirs say little about the ratio.
    """
    points: Points = defaultdict(list)
    for seed in sorted({row.get("seed", 0) for row in rows}):
        own = _by_strength([row for row in rows if row.get("seed", 0) == seed], key)
        if 0 not in own:
            raise ValueError("a dial curve needs the base model: measure strength 0 as well")
        base = perplexity(own[0][0].value)
        for strength, (estimate, *_) in own.items():
            ratio = perplexity(estimate.value) / base
            points[strength].append(Estimate(ratio, ratio, ratio, estimate.n))
    return dict(sorted(points.items()))


def _line(ax: Axes, points: Points, curve: str, style: str, band: bool) -> None:
    """Mean over seeds, and the band from the lowest to the highest end of the seeds' intervals."""
    _, colour, marker = CURVES[curve]
    means = [statistics.fmean(e.value for e in estimates) for estimates in points.values()]
    solid = style == "-"
    ax.plot(list(points), means, color=colour, linestyle=style, marker=marker, linewidth=2.4 if solid else 1.8,
            markerfacecolor=colour if solid else "white", markersize=6 if solid else 4)  # fmt: skip
    if band:
        ends = [(min(e.low for e in es), max(e.high for e in es)) for es in points.values()]
        ax.fill_between(list(points), *zip(*ends, strict=True), color=colour, alpha=0.18, linewidth=0)


def _end_values(ax: Axes, points: Points, colour: str) -> None:
    """The share at both ends of a curve, written beside it."""
    for strength, offset, side in ((min(points), -9, "right"), (max(points), 9, "left")):
        share = statistics.fmean(estimate.value for estimate in points[strength])
        ax.annotate(f"{share:.0%}", (strength, share), (offset, 0), textcoords="offset points", ha=side, va="center",
                    color=colour, fontsize=12)  # fmt: skip


def _landmarks(top: Axes, middle: Axes, low: Axes) -> None:
    """Axis labels, the base at a = 0, one adapter as trained at a = 1."""
    for ax in (top, middle, low):
        for strength in (0, 1):
            ax.axvline(strength, color=GREY, linewidth=1, linestyle=":")
    for strength, text, side in ((0, "a = 0: base model ", "right"), (1, " a = 1: one adapter as trained", "left")):
        top.annotate(text, (strength, 1.01), xycoords=("data", "axes fraction"), ha=side, va="bottom", fontsize=10)
    top.set(ylabel="texts judged positive", ylim=(-0.03, 1.03))
    left, right = top.dataLim.intervalx
    top.set_xlim(left - 0.09 * (right - left), right + 0.09 * (right - left))  # room for the values at both ends
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    top.yaxis.set_major_locator(MultipleLocator(0.25))
    for ax, what in ((middle, "of real\nreviews"), (low, "of its\nown text")):
        ax.axhline(1, color=BLACK, linewidth=1)
        ax.set_ylabel(f"perplexity {what}\n(x base model)", fontsize=10)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))
    low.set_xlabel("← more negative        strength a        more positive →")
    low.xaxis.set_major_locator(MultipleLocator(1))


def _legends(top: Axes, names: Sequence[str]) -> None:
    """Who is who: a colour a curve (lower right), a line style a judge and the band (upper left)."""
    curves = [Line2D([], [], color=c, marker=m, label=label) for label, c, m in (CURVES[name] for name in names)]
    judges = [
        Line2D([], [], color=BLACK, label="judge: words"),
        Line2D([], [], color=BLACK, linestyle="--", label="judge: characters"),
        Patch(color=GREY, alpha=0.3, label="95 % interval (solid line)"),
    ]
    top.add_artist(top.legend(handles=curves, loc="lower right"))
    top.legend(handles=judges, loc="upper left", fontsize=10)
