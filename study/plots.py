"""Figures that set methods or variants side by side: learning rates, costs, few reviews, ablations, curves, rivals.

Data in, `Axes` out, as in `utils/plots.py`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from utils.adapters import METHODS
from utils.metrics import METRICS, Estimate, middle, pareto_front
from utils.plots import BLACK, BLUE, GREY, RED, STYLES, WHITE, apply_style, new_axes
from utils.runs import RunRecord


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
            if isinstance(values[0], Estimate):
                ax.vlines(x, [v.low for v in values], [v.high for v in values], color=colour, linewidth=1.5)
            ax.plot(x, [middle(v) for v in values], color=colour, marker=marker, linestyle=line, label=METHODS[method])
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
        label = f"{METHODS.get(method, method)}: best {min(mean):+.4f}"
        ax.plot(steps, mean, color=colour, marker=marker, linestyle=line, label=label)
    low, high = ax.get_ylim()
    lowest = min((loss for runs in methods.values() for run in runs for loss in run.values()), default=0)
    if lowest < 0:
        ax.set_ylim(1.1 * lowest, min(high, -1.5 * lowest))
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set(xlabel="optimiser step", ylabel="held-out loss, minus the base's\n(nats/token)")
    most = max(map(len, methods.values()), default=1)
    title = f"mean of {most} seeds" if most > 1 else "one seed"
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10, title=title)
    return ax


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
        value = middle(row[quality])
        label = METHODS.get(row["method"], row["method"])
        colour, marker, _ = STYLES.get(row["method"], STYLES["base"])
        if not row[cost]:
            ax.axhline(value, color=GREY, linestyle="--", linewidth=1.5)
            ax.annotate(f"{label}: {value:.{metric.digits}f}", (0.01, value), (0, 4), color=GREY,
                        xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
            continue
        low, high = (row[quality].low, row[quality].high) if isinstance(row[quality], Estimate) else (value, value)
        ax.errorbar(row[cost], value, [[value - low], [high - value]], color=colour, marker=marker, markersize=9,
                    capsize=4, linestyle="none", label=label)  # fmt: skip
    front = pareto_front([(row[cost], sign * middle(row[quality])) for row in paid])
    ax.plot([paid[i][cost] for i in front], [middle(paid[i][quality]) for i in front], color=GREY, linewidth=1,
            zorder=0, label="Pareto front:\nnothing cheaper is better")  # fmt: skip
    arrow = {"higher": ", better: ↑", "lower": ", better: ↓", None: ""}[metric.better]
    ax.set(xscale="log", xlabel=f"← better: {_axis(cost)}, log scale", ylabel=f"{_axis(quality)}{arrow}")
    ax.margins(x=0.1, y=0.15)
    if metric.unit == "share":
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 1))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10)
    return ax


RIVALS = {
    "contrast": ("contrast of two adapters", RED, "s", "-"), "steering": ("steering vector", BLUE, "o", "--"),
    "shuffled": ("contrast, shuffled", GREY, "x", "none"),
}  # fmt: skip


def rival_figure(rows: Sequence[Mapping[str, object]]) -> list[Axes]:
    """Share of positive texts (judge of words) against each of the two prices, a line a rival, through the base.

    `rows` as `steering.load_rivals` gives them. A point is a strength: means over seeds, and a bar that covers the
    95 % intervals of all seeds. A price is a perplexity, divided by the base's with the same seed.
    """
    apply_style()
    _, panels = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True)
    base = {row["seed"]: row for row in rows if row["strength"] == 0}
    prices = {
        "real reviews": lambda row, own: math.exp(row["held_out_loss"]["value"] - own["held_out_loss"]["value"]),
        "its own text": lambda row, own: row["perplexity"]["value"] / own["perplexity"]["value"],
    }
    for ax, (what, price) in zip(panels, prices.items(), strict=True):
        for curve, (label, colour, marker, line) in RIVALS.items():
            points = defaultdict(list)
            for row in (row for row in rows if row["curve"] == curve or row["strength"] == 0):
                points[row["strength"]].append((price(row, base[row["seed"]]), row["positivity"]))
            found = [points[strength] for strength in sorted(points)]
            x = [statistics.fmean(cost for cost, _ in point) for point in found]
            y = [statistics.fmean(share["value"] for _, share in point) for point in found]
            ends = [[end(share[side] for _, share in point) for point in found]
                    for side, end in (("low", min), ("high", max))]  # fmt: skip
            ax.vlines(x, *ends, color=colour, linewidth=1.2)
            ax.plot(x, y, color=colour, marker=marker, linestyle=line, label=label)
        ax.axvline(1, color=BLACK, linewidth=1)
        ax.set(xlabel=f"perplexity of {what}\n(x base model)", ylim=(-0.03, 1.03))
    panels[0].set_ylabel("texts judged positive")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[1].legend(loc="center right", fontsize=10)
    return list(panels)


def _axis(name: str) -> str:
    metric = METRICS[name]
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label
