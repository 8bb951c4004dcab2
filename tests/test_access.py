"""Accessibility: what notebooks and pages must have, and figures that need neither colours nor eyes of one kind."""

from __future__ import annotations

import itertools
from pathlib import Path

import access_rules
import matplotlib
import nbformat
import pytest
import torch
from access_rules import page
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import headings_in_order
from replay import EXTENSIONS, NOTEBOOKS, ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from study.plots import (
    RIVALS,
    cost_bars,
    cost_vs_quality,
    few_shot_curves,
    interval_rows,
    learning_curves,
    rate_curves,
    rival_figure,
)
from utils.adapters import METHODS
from utils.metrics import Estimate
from utils.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    STYLES,
    contrast,
    dial_figure,
    ink_on,
    loss_curve,
    parameter_bar,
    vector_heatmap,
)
from utils.runs import RunRecord

PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md")))]
PAGES += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("assets/**/*.md"))]
RULES = (*access_rules.RULES, headings_in_order)
PALETTE = (BLUE, ORANGE, BLACK, GREEN, RED, PURPLE, GREY)
TEXT_CONTRAST = 4.5  # WCAG 2.2, 1.4.3


def read(name: str) -> NotebookNode:
    if name.endswith(".md"):
        return page((ROOT / name).read_text(encoding="utf-8"))
    return nbformat.read(ROOT / name, as_version=4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", [*NOTEBOOKS, *EXTENSIONS, *PAGES])
def test_notebook_or_page_keeps_the_rule(name: str, rule) -> None:
    problems = rule(read(name))
    assert not problems, f"{name}:\n" + "\n".join(problems)


def with_alt(alt: str) -> NotebookNode:
    output = new_output("display_data", {"image/png": "aaaa"}, metadata={"image/png": {"alt": alt}})
    return new_notebook(cells=[new_code_cell("show()", outputs=[output])])


def test_rules_find_what_breaks_them() -> None:
    good = "Left, the loss of the batches goes up and down; right, that of held-out reviews falls."
    assert access_rules.alt_says_what_is_seen(with_alt(good)) == []
    named = "Figure of the loss of the training batches, and of held-out reviews, which is lower."
    listed = "Two panels against the step in nats per token: training batches; held-out reviews of both labels."
    for alt in ("A rising line.", named, listed, good.rstrip("."), " ".join([good] * 5)):
        assert access_rules.alt_says_what_is_seen(with_alt(alt)), alt
    assert access_rules.alt_says_what_is_seen(page("![dial](dial.png)"))
    assert access_rules.tables_have_headers(page("| a | b |\n|---|:-:|\n| 1 | |\n")) == []
    for table in ("| | b |\n|---|---|\n| 1 | 2 |", "| 1 | 2 |\n| 3 | 4 |", "text\n<table><tr></tr></table>"):
        assert access_rules.tables_have_headers(page(table)), table
    assert access_rules.links_say_where(page("See [the card](a.md), `https://b` and ![x](c.png).")) == []
    for text in ("Read [here](a.md).", "[](a.md)", "[https://a](https://a)", "Go to https://a.example."):
        assert access_rules.links_say_where(page(text)), text
    for code in ('plt.plot(x, color="#FF0000")', 'plt.imshow(x, cmap="jet")', "plot(x, color='tab:blue')"):
        assert access_rules.colours_are_not_alone(new_notebook(cells=[new_code_cell(code)])), code
    assert headings_in_order(new_notebook(cells=[new_markdown_cell("# A\n\n### B")]))


# --- colours ------------------------------------------------------------------------------------------------------


def test_contrast_is_that_of_the_standard_and_methods_have_marks_besides_their_colour() -> None:
    assert contrast("white", "black") == pytest.approx(21) and contrast("#777777", "white") < 4.5
    assert contrast("#767676", "white") > 4.5  # the grey that WCAG's own examples stop at
    for level in range(256):
        background = [level / 255] * 3
        assert contrast(ink_on(background), background) >= TEXT_CONTRAST
    marks = [(marker, line) for _, marker, line in STYLES.values()]
    assert STYLES.keys() == METHODS.keys()
    assert len({marker for marker, _ in marks}) == len(marks)


# --- figures ------------------------------------------------------------------------------------------------------


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, 9)


def dial() -> Axes:
    keys = ("held_out_loss", "perplexity", "positivity", "positivity_chars")
    rows = [
        {"curve": curve, "strength": a} | {key: estimate(0.5 + 0.1 * a) for key in keys}
        for curve in ("dial", "contrast") for a in (-1, 0, 1)
    ]  # fmt: skip
    return dial_figure(rows)


def curves() -> Axes:
    losses = [{"step": step, "eval_loss": 5.0 - step} for step in (0, 1, 2)]
    runs = [RunRecord("finished", m, "mini", "id", {}, seed, history=losses) for m in METHODS for seed in (0, 1)]
    return learning_curves(runs)


def costs() -> Axes:
    rows = [{"method": m, "trainable": 10 * n, "positivity": estimate(0.5)} for n, m in enumerate(METHODS)]
    return cost_vs_quality(rows)


def few() -> Axes:
    rows = [
        {"method": m, "train_reviews": n, "positivity": estimate(0.5), "test_loss": 4.0}
        for m in METHODS for n in (8, 128)
    ]  # fmt: skip
    return few_shot_curves(rows, ("positivity", "test_loss"), {"positivity": 0.5, "test_loss": 4.1})[0]


def bars() -> Axes:
    rows = [{"method": m, "bytes": 10 * n + 1, "time": None} for n, m in enumerate(METHODS)]
    return cost_bars(rows, {"bytes": "bytes", "time": "time"})[0]


def vectors() -> Axes:
    made = {f"{n}.{part}": 1 + 0.1 * n * torch.ones(24) for n in range(5) for part in ("attention", "feedforward")}
    return vector_heatmap(made)


def levels() -> Axes:
    rows = [{"label": name, "positivity": estimate(0.6)} for name in ("keys", "values")]
    return interval_rows(rows, "positivity", {"base": estimate(0.5), "(IA)³": estimate(0.7)})


def rivals() -> Axes:
    keys = ("held_out_loss", "perplexity", "positivity")
    rows = [
        {"seed": 0, "curve": curve, "strength": a} | {key: estimate(0.5 + 0.1 * a).to_dict() for key in keys}
        for curve in RIVALS for a in ((-1, 0, 1) if curve == "contrast" else (-1, 1))
    ]  # fmt: skip
    return rival_figure(rows)[0]


FIGURES = {
    "dial": dial, "curves": curves, "costs": costs, "few": few, "bars": bars,
    "vectors": vectors, "levels": levels, "rivals": rivals,
    "rates": lambda: rate_curves({m: {1e-3: 3.9, 1e-2: 3.8} for m in METHODS}, 4.0),
    "loss": lambda: loss_curve([{"step": s, "train_loss": 4.0, "eval_loss": 5.0 - s} for s in (0, 1)], 5.0),
    "parameters": lambda: parameter_bar({"attention": 750, "feed-forward": 250}, {"(IA)³": 1}),
}  # fmt: skip


@pytest.fixture(params=FIGURES)
def axes(request: pytest.FixtureRequest):
    """All axes of one of the course's figures."""
    yield FIGURES[request.param]().figure.axes
    plt.close("all")


def series(ax: Axes) -> list[tuple[str, object]]:
    """(colour, mark besides it) of whatever stands for data: lines with points, error bars, outlines of histograms.

    Left out: level lines, what is faint because a bold line of its colour lies beside it, rings and the ends of error
    bars, which lie on a point that is marked.
    """
    caps = {cap for box in ax.containers if isinstance(box, ErrorbarContainer) for cap in box.lines[1]}
    error_bars = {box.lines[0] for box in ax.containers if isinstance(box, ErrorbarContainer)}
    found = []
    for line in ax.lines:
        level = line.get_transform() != ax.transData
        ring = line.get_markerfacecolor() == "none"
        if line not in caps and not level and not ring and (line.get_alpha() or 1) > 0.5:
            found.append((to_hex(line.get_color()), mark(line, line in error_bars)))
    outlines = [patch for patch in ax.patches if isinstance(patch, Polygon)]
    return found + [(to_hex(patch.get_edgecolor()), patch.get_linestyle()) for patch in outlines]


def mark(line: Line2D, alone: bool) -> object:
    """What tells a line apart without its colour: marker, whether that is filled, dashes; of error bars the marker."""
    dashes = None if alone else (line.get_linestyle(), str(line._unscaled_dash_pattern))
    return line.get_marker(), to_hex(line.get_markerfacecolor()) == "#ffffff", dashes


def test_series_differ_by_more_than_colour_every_bar_is_named_and_the_palette_is_used(axes: list[Axes]) -> None:
    for ax in axes:
        for (colour, one), (other, two) in itertools.combinations(series(ax), 2):
            assert colour == other or one != two, f"{colour} and {other} are both drawn as {one}"
    for ax in axes:
        patches = [bar for box in ax.containers if not isinstance(box, ErrorbarContainer) for bar in box.patches]
        rows = {round(bar.get_y() + bar.get_height() / 2) for bar in patches}
        assert not patches or {round(tick) for tick in ax.get_yticks()} >= rows
    known = {colour.lower() for colour in PALETTE}
    assert {colour for ax in axes for colour, _ in series(ax)} <= known


def test_text_is_read_on_what_lies_behind_it(axes: list[Axes]) -> None:
    for ax in axes:
        for text in (*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()):
            behind = background(ax, text)
            assert contrast(text.get_color(), behind) >= TEXT_CONTRAST, (text, behind)


def background(ax: Axes, text: plt.Text) -> object:
    """The colour of the field of a heat map that a text stands in, else white."""
    if not ax.images or text not in ax.texts:
        return "white"
    column, row = text.get_position()
    image = ax.images[0]
    return image.cmap(image.norm(image.get_array()[int(row), int(column)]))


def test_the_picture_of_the_pages_has_its_alt_text() -> None:
    (text,) = {alt for name in PAGES for _, alt in access_rules.alt_texts(read(name))}
    assert len(text.split()) > 30 and Path(ROOT / "docs/images/dial.png").is_file()
