"""The figures of 01 to 03: palette, alt texts, and one function a figure (data in, `Axes` out).

The palette is that of Okabe and Ito (2008), which colour-blind readers can tell apart; markers, line styles or labels
do the same on a grey printer.
"""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator, PercentFormatter
from torch import Tensor

from utils.metrics import Estimate

BLUE, ORANGE, BLACK, GREEN, RED, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#000000", "#009E73", "#C04F00", "#CC79A7", "#767676",
)  # fmt: skip
STYLES: dict[str, tuple[str, str, str]] = {  # method -> colour, marker, line style
    "ia3": (BLUE, "o", "-"),
    "ia3_kv": (BLUE, "d", (0, (1, 1))),
    "lora": (ORANGE, "s", "--"),
    "full": (BLACK, "D", "-."),
    "bitfit": (GREEN, "^", ":"),
    "prefix": (PURPLE, "v", (0, (5, 1))),
    "bottleneck": (RED, "P", (0, (3, 1, 1, 1))),
    "base": (GREY, "x", ":"),
}
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # behind a label that may cross a line


def apply_style() -> None:
    """Set matplotlib's defaults for the course: notebook width (8 x 4 inches, 100 dpi), light grid, no box."""
    plt.rcParams.update(
        {
            "figure.figsize": (8, 4),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E3E3E3",
            "legend.frameon": False,
            "lines.linewidth": 2,
        }
    )


def luminance(colour: object) -> float:
    """Relative luminance, 0 (black) to 1 (white), of any colour matplotlib knows (W3C, WCAG 2.2, section 1.4.3)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: object, second: object) -> float:
    """Contrast of two colours, 1 to 21 (W3C, WCAG 2.2, section 1.4.3, which asks 4.5 for text)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink_on(background: object) -> str:
    """Black or white, whichever is better read on `background`; one of the two always has a contrast of 4.5."""
    return max(("white", BLACK), key=lambda ink: contrast(ink, background))


def show(figure: Figure, alt: str) -> None:
    """Put `figure` into the notebook as a PNG with `alt` text (which nbconvert keeps), and close it."""
    from IPython.display import display

    if not alt.strip():
        raise ValueError("a figure needs an alt text: one sentence that says what it shows")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same bytes from every matplotlib
    plt.close(figure)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    display({"image/png": png, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


def new_axes(ax: Axes | None, **options: object) -> Axes:
    """`ax`, or the axes of a new figure in the course's style."""
    if ax is not None:
        return ax
    apply_style()
    return plt.subplots(**options)[1]


def block_drawing(width: int | None = None) -> Axes:
    """One GPT-2 block with the three (IA)³ vectors in it (Liu et al. 2022); lengths in d, or numbers of `width`."""
    apply_style()
    _, ax = plt.subplots(figsize=(8, 4.9))
    size = (lambda n: f"{n * width:,}") if width else (lambda n: "d" if n == 1 else f"{n}d")
    for y, top, name, start, end in (
        (7.0, 9.15, "attention", "x", "x′"),
        (2.0, 3.75, "feed-forward", "x′", "next\nblock"),
    ):
        ax.text(1.25, top + 0.12, name, fontweight="bold", va="bottom")
        ax.text(0.25, y, start, ha="center", va="center", fontsize=13, style="italic")
        ax.text(16.45, y, end, ha="center", va="center", fontsize=13 if end == "x′" else 9, style="italic")
        ax.plot([0.75, 0.75, 15.2, 15.2], [y, top, top, y + 0.35], color=GREY, linewidth=1.3)
        ax.plot(15.2, y, marker="o", markersize=15, color="white", markeredgecolor=BLACK)
        ax.text(15.2, y, "+", ha="center", va="center_baseline", fontsize=13)
        _arrows(ax, y, [(0.5, 1.2), (2.4, 2.9), (14.5 if y > 5 else 12.5, 14.8), (15.6, 16.1)])
        _box(ax, 1.2, y, 1.2, "layer\nnorm")
    _box(ax, 2.9, 7.0, 2.0, f"c_attn\n{size(1)} → {size(3)}")
    for y, letter in ((8.2, "q"), (7.0, "k"), (5.8, "v")):
        ax.annotate("", (5.6, y), (4.9, 7.0), arrowprops={"arrowstyle": "-", "color": BLACK})
        _box(ax, 5.6, y, 0.8, letter, 0.8)
        _arrows(ax, y, [(6.4, 7.2), (9.0, 9.8)])
        _box(ax, 7.2, y, 1.8, f"× $l_{letter}$", 0.8, trained=True, outside_paper=letter == "q")
    _box(ax, 9.8, 7.0, 2.2, "softmax\n(q · k) · v", 3.2)
    _box(ax, 12.5, 7.0, 2.0, f"c_proj\n{size(1)} → {size(1)}")
    _arrows(ax, 7.0, [(12.0, 12.5)])
    _box(ax, 2.9, 2.0, 2.0, f"c_fc\n{size(1)} → {size(4)}")
    _box(ax, 5.4, 2.0, 1.2, "GELU")
    _box(ax, 7.2, 2.0, 1.8, "× $l_{ff}$", trained=True)
    _box(ax, 10.1, 2.0, 2.4, f"mlp.c_proj\n{size(4)} → {size(1)}")
    _arrows(ax, 2.0, [(4.9, 5.4), (6.6, 7.2), (9.0, 10.1)])
    ax.text(
        8.1, 5.1, f"one vector of length {size(3)} on GPT-2; the paper has no $l_q$", ha="center", va="top", color=RED
    )
    ax.text(8.1, 1.1, f"one vector of length {size(4)}", ha="center", va="top", color=RED)
    _box(ax, 1.2, 0.15, 0.7, "", 0.5)
    ax.text(2.1, 0.15, "frozen", va="center")
    _box(ax, 4.0, 0.15, 0.7, "×", 0.5, trained=True)
    ax.text(4.9, 0.15, "trained by (IA)³: multiplies unit by unit", va="center")
    ax.set(xlim=(-0.1, 17.0), ylim=(-0.3, 9.9))
    ax.axis("off")
    return ax


def _box(
    ax: Axes, x: float, y: float, wide: float, text: str, high: float = 1.3, trained: bool = False,
    outside_paper: bool = False,
) -> None:  # fmt: skip
    """Frozen ones grey and thin, trained ones orange with a thick edge (dashed: not in the paper)."""
    style = {"facecolor": "#FCE3B4", "edgecolor": RED, "linewidth": 2.4} if trained else {
        "facecolor": "#EEEEEE", "edgecolor": BLACK, "linewidth": 1}  # fmt: skip
    style["linestyle"] = "--" if outside_paper else "-"
    ax.add_patch(FancyBboxPatch((x, y - high / 2), wide, high, boxstyle="round,pad=0,rounding_size=0.15", **style))
    ax.text(x + wide / 2, y, text, ha="center", va="center", fontsize=12 if trained else 10)


def _arrows(ax: Axes, y: float, spans: Sequence[tuple[float, float]]) -> None:
    """Arrows from left to right at the height y."""
    for start, end in spans:
        ax.annotate(
            "", (end, y), (start, y), arrowprops={"arrowstyle": "->", "color": BLACK, "shrinkA": 0, "shrinkB": 0}
        )


def loss_curve(
    history: Sequence[Mapping[str, float]],
    baseline: float | None = None,
    ax: Axes | None = None,
    *,
    band: tuple[float, float] | None = None,
    rows: str = "reviews",
    label: str = "token",
    baseline_name: str = "base model",
) -> Axes:
    """Held-out loss (nats per `label`) against the step; without `ax` also the training batches' loss, beside it.

    `baseline` is a held-out loss to compare with, the base model's unless `baseline_name` says another, and `band` its
    95 % interval. The two losses are of different `rows`, so they stand beside each other, on one scale.
    """
    train, held_out = ([(r["step"], r[k]) for r in history if k in r] for k in ("train_loss", "eval_loss"))
    if ax is None and train:
        apply_style()
        _, (batches, ax) = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
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
    if band is not None:
        ax.axhspan(*band, color=GREY, alpha=0.18, linewidth=0)
        ax.annotate(f"grey: 95 % interval of the {baseline_name}", (0.02, band[1]), (0, -4), va="top",
                    xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
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
    """Each learned number as a coloured stripe, sorted within its layer and group: blue below 1, red above."""
    ax, parts = new_axes(ax), {name: np.sort(part, axis=1) for name, part in _split(vectors).items()}
    values = np.concatenate(list(parts.values()), axis=1)
    reach = max(np.percentile(np.abs(values - 1), 99), 1e-6)  # a few outliers must not bleach the rest
    image = ax.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(1, 1 - reach, 1 + reach), aspect="auto",
                      interpolation="nearest")  # fmt: skip
    edges = np.cumsum([0, *(part.shape[1] for part in parts.values())])
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color=BLACK, linewidth=1)
    ax.set(title="every unit, sorted within its group", ylabel="layer", yticks=range(len(values)))
    names = [f"{name}\n{part.shape[1]:,}" for name, part in parts.items()]
    ax.set_xticks((edges[:-1] + edges[1:]) / 2, names)
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False)
    bar = ax.figure.colorbar(image, ax=ax, extend="both", pad=0.02)
    bar.set_label("learned factor l")
    return ax


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


def word_figure(
    probabilities: Mapping[float, Tensor], words: Callable[[list[int]], str], shown: int = 6, ax: Axes | None = None
) -> Axes:
    """The next words that rise and fall most from the lowest strength to the highest, a bar a strength.

    `probabilities`: {strength a: (vocabulary,) probabilities of the next token}; `words` turns a list of token ids into
    text (a tokenizer's `decode`). `shown` words fall (above) and as many rise (below), by absolute change.
    """
    ax = new_axes(ax, figsize=(8, 0.42 * 2 * shown + 1))
    strengths = sorted(probabilities)
    change = probabilities[strengths[-1]] - probabilities[strengths[0]]
    order = change.argsort().tolist()
    chosen = [*order[:shown], *order[-shown:]]
    colours = dict(zip(strengths, (RED, GREY, BLUE), strict=False))
    height = 0.8 / len(strengths)
    for row, strength in enumerate(strengths):
        places = [place + (row - (len(strengths) - 1) / 2) * height for place in range(len(chosen))]
        values = [probabilities[strength][token].item() for token in chosen]
        label = f"a = {strength:+g}" if strength else "a = 0 (base)"
        ax.barh(places, values, height, color=colours.get(strength, BLACK), label=label)
    ax.axhline(shown - 0.5, color=BLACK, linewidth=1)
    ax.set_yticks(range(len(chosen)), [repr(words([token]).strip()) for token in chosen])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("probability of being the next token")
    ax.set_ylabel("rise with a          fall with a")
    ax.legend(loc="center right", bbox_to_anchor=(1, 0.68))
    return ax


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
