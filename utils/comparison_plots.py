"""Figures of 04 that set methods or variants side by side: learning rates, relative costs, few reviews, ablations.

For: data in, `Axes` out, as in `plots.py`, through which they can be had. Not for: computing anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from utils.adapters import METHODS
from utils.metrics import METRICS, Estimate
from utils.style import BLACK, BLUE, GREY, STYLES, WHITE, apply_style, new_axes


def rate_curves(losses: Mapping[str, Mapping[float, float]], start: float, ax: Axes | None = None) -> Axes:
    """Lowest validation loss, minus `start` (nats per token), against the learning rate; a ring at each method's best.

    `losses`: by method and rate, as `comparison.sweep_losses` gives them. What lies above `start` is not shown.
    """
    ax = new_axes(ax)
    for method, by_rate in losses.items():
        colour, marker, line = STYLES[method]
        gains = {rate: loss - start for rate, loss in by_rate.items()}
        ax.plot(list(gains), list(gains.values()), color=colour, marker=marker, linestyle=line, label=METHODS[method])
        best = min(gains, key=gains.get)
        ax.plot(best, gains[best], marker="o", markersize=12, markerfacecolor="none", markeredgecolor=colour)
    lowest = min(loss - start for by_rate in losses.values() for loss in by_rate.values())
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set(xscale="log", xlabel="learning rate (log scale)", ylim=(1.15 * lowest, -0.1 * lowest),
           ylabel="best validation loss, minus\nthe base's (nats/token)")  # fmt: skip
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10, title="ring: chosen")
    return ax


def cost_bars(rows: Sequence[Mapping[str, object]], costs: Mapping[str, str]) -> list[Axes]:
    """A panel for each of `costs` (key of a row -> title), a bar for each row: its share of the row "full".

    The panels share one linear axis from 0, so that what shrinks and what does not can be seen together. A row in
    which a cost is missing (None) reads "not measured".
    """
    apply_style()
    whole = next(row for row in rows if row["method"] == "full")
    names = [METHODS[row["method"]] for row in rows]
    figure, panels = plt.subplots(1, len(costs), figsize=(8, 0.9 + 0.34 * len(rows)), sharey=True)
    for ax, (cost, title) in zip(panels, costs.items(), strict=True):
        for position, row in enumerate(rows):
            share = None if row[cost] is None else row[cost] / whole[cost]
            ax.barh(position, share or 0, color=STYLES[row["method"]][0], zorder=2)
            text = "not measured" if share is None else _percent(share)
            ax.annotate(text, (share or 0, position), (5, 0), textcoords="offset points", va="center", fontsize=9,
                        bbox=WHITE | {"pad": 0})  # fmt: skip
        ax.set(xlim=(0, 1.7), xticks=(0, 0.5, 1), yticks=range(len(rows)))
        ax.set_xticklabels(("0", "", "100 %"))
        ax.set_title(title, fontsize=11)
        ax.axvline(1, color=GREY, linewidth=1, zorder=1)
        ax.grid(visible=False, axis="y")
    panels[0].set_yticklabels(names)
    panels[0].invert_yaxis()
    figure.supxlabel("share of full fine-tuning; better: ←", fontsize=11)
    return list(panels)


def _percent(share: float) -> str:
    """A share in per cent with two significant digits."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %"


def interval_rows(
    rows: Sequence[Mapping[str, object]], metric: str, levels: Mapping[str, Estimate], ax: Axes | None = None
) -> Axes:
    """One line a row (`label`, `metric` an Estimate), top to bottom; a labelled vertical line for each of `levels`.

    The last level, which the rows are compared with, shows its interval as a band.
    """
    ax = new_axes(ax, figsize=(8, 1.2 + 0.36 * len(rows)))
    for position, row in enumerate(rows):
        estimate = row[metric]
        ax.plot([estimate.low, estimate.high], [position, position], color=BLUE, linewidth=2)
        ax.plot(estimate.value, position, "o", color=BLUE, markersize=7)
    ax.axvspan(list(levels.values())[-1].low, list(levels.values())[-1].high, color=GREY, alpha=0.15, linewidth=0)
    for (name, level), line in zip(levels.items(), ("--", "-", ":"), strict=False):
        ax.axvline(level.value, color=GREY, linestyle=line, linewidth=1.2)
        ax.annotate(name, (level.value, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", color=GREY, fontsize=10)  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    ax.set(xlabel=METRICS[metric].title, ylim=(len(rows) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")
    return ax


def few_shot_curves(
    rows: Sequence[Mapping[str, object]], metrics: Sequence[str], levels: Mapping[str, float]
) -> list[Axes]:
    """A panel for each metric against the number of training reviews (log axis), a line for each method.

    A row has `method`, `train_reviews` and each metric, a number or an Estimate (then with its interval). `levels`:
    the base's values, dotted.
    """
    apply_style()
    _, panels = plt.subplots(1, len(metrics), figsize=(8, 3.6))
    counts = sorted({row["train_reviews"] for row in rows})
    for ax, metric in zip(panels, metrics, strict=True):
        for step, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            colour, marker, line = STYLES[method]
            points = sorted((r["train_reviews"], r[metric]) for r in rows if r["method"] == method)
            shift = 1 + 0.06 * (step - 1)  # so that intervals stand beside each other
            x, values = [count * shift for count, _ in points], [value for _, value in points]
            middle = [v.value if isinstance(v, Estimate) else v for v in values]
            if isinstance(values[0], Estimate):
                ax.vlines(x, [v.low for v in values], [v.high for v in values], color=colour, linewidth=1.5)
            ax.plot(x, middle, color=colour, marker=marker, linestyle=line, label=METHODS[method])
        ax.axhline(levels[metric], color=BLACK, linestyle=":", linewidth=1.2)
        ax.annotate("base", (1, levels[metric]), (-2, 3), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", fontsize=10)  # fmt: skip
        ax.set(xscale="log", xlabel="positive reviews trained on", ylabel=METRICS[metric].title, xticks=counts)
        ax.set_xticklabels([f"{count:,}" for count in counts])
        if levels[metric] == 0:
            ax.set_yscale("symlog", linthresh=0.005)  # a difference: both signs, several orders of size
        ax.minorticks_off()
    panels[0].legend(fontsize=10)
    return list(panels)
