"""Figures: the data arrive on the axes unchanged, axes are labelled, and the alt text reaches the notebook."""

from __future__ import annotations

import base64
import math

import IPython.display
import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from study.plots import (
    cost_bars,
    cost_vs_quality,
    few_shot_curves,
    interval_rows,
    learning_curves,
    rate_curves,
    rival_figure,
)
from utils.metrics import Estimate
from utils.plots import (
    block_drawing,
    dial_figure,
    loss_curve,
    parameter_bar,
    show,
    unit_map,
    vector_heatmap,
    word_figure,
)
from utils.runs import RunRecord


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def labelled(ax) -> bool:
    return bool(ax.get_xlabel()) and bool(ax.get_ylabel())


def line(ax, label):
    return next(drawn for drawn in ax.get_lines() if str(drawn.get_label()).startswith(label))


def dial_rows(curves=("dial", "contrast"), seeds=(0, 1), strengths=(-1, 0, 1, 2)):
    return [
        {
            "seed": seed, "curve": curve, "strength": a,
            "held_out_loss": Estimate(4.5 + 0.1 * a * a, 4, 5, 9).to_dict(),
            "perplexity": Estimate(100 + 5 * a * a, 90, 130, 9).to_dict(),
            "positivity": Estimate(0.5 + 0.1 * a + 0.02 * seed, 0.1, 0.9, 9),
            "positivity_chars": Estimate(0.5 + 0.05 * a, 0.1, 0.9, 9).to_dict(),
        }
        for seed in seeds for curve in curves for a in strengths
    ]  # fmt: skip


def test_dial_shows_mean_positivity_of_both_judges_and_a_band_over_all_seeds():
    top = dial_figure(dial_rows())
    data = [drawn for drawn in top.get_lines() if len(drawn.get_xdata()) == 4]
    assert [drawn.get_linestyle() for drawn in data] == ["-", "--", "-", "--"]
    assert np.allclose(data[0].get_xdata(), [-1, 0, 1, 2])
    assert np.allclose(data[0].get_ydata(), [0.41, 0.51, 0.61, 0.71])  # mean over the two seeds
    assert np.allclose(data[1].get_ydata(), [0.45, 0.5, 0.55, 0.6])
    assert data[0].get_color() != data[2].get_color()
    assert len(top.collections) == 2  # one band a curve
    rows = dial_rows(curves=("dial",))
    rows[0] = rows[0] | {"positivity": Estimate(0.4, 0.02, 0.97, 9)}
    (band,) = dial_figure(rows).collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.02, 0.97))


def test_dial_perplexity_is_relative_to_the_base():
    _, reviews, texts = dial_figure(dial_rows()).figure.axes
    drawn = [[d for d in ax.get_lines() if len(d.get_xdata()) == 4] for ax in (reviews, texts)]
    assert [len(lines) for lines in drawn] == [2, 2]
    assert np.allclose(drawn[0][0].get_ydata(), np.exp([0.1, 0, 0.1, 0.4]))
    assert np.allclose(drawn[1][0].get_ydata(), [1.05, 1, 1.05, 1.2])
    assert labelled(texts) and "real" in reviews.get_ylabel() and "own" in texts.get_ylabel()


def test_dial_needs_the_base_model_and_neither_seed_nor_curve():
    with pytest.raises(ValueError, match="measure strength 0"):
        dial_figure(dial_rows(strengths=(1, 2)))
    rows = [{k: v for k, v in row.items() if k not in ("seed", "curve")} for row in dial_rows(("dial",), (0,))]
    top = dial_figure(rows[::-1])  # any order
    assert list(top.get_lines()[0].get_xdata()) == [-1, 0, 1, 2]
    assert len(top.collections) == 1


def test_bars_count_what_they_are_given():
    ax = parameter_bar({"attention": 750, "feed-forward": 250}, {"(IA)³": 1})
    assert [round(bar.get_width() * 1e6) for bar in ax.patches] == [750, 250, 1]
    texts = [text.get_text().split() for text in ax.texts]
    assert texts == [["750", "(75.0", "%)"], ["250", "(25.0", "%)"], ["1", "(0.1", "%)"]]


def test_loss_curve_keeps_steps_and_marks_the_best():
    history = [
        {"step": 0, "eval_loss": 5.0},
        {"step": 5, "train_loss": 4.9},
        {"step": 10, "train_loss": 4.8, "eval_loss": 4.7},
    ]
    ax = loss_curve(history, baseline=5.0)
    batches, held_out = ax.figure.axes
    assert held_out is ax and [a.get_title(loc="left") for a in (batches, ax)] == [
        "training batches",
        "held-out reviews",
    ]
    assert list(ax.get_lines()[0].get_xdata()) == [0, 10]
    assert list(batches.get_lines()[0].get_ydata()) == [4.9, 4.8]
    assert "best: 4.700 at step 10" in [text.get_text() for text in ax.texts]
    assert labelled(ax)
    assert "nats" in ax.get_ylabel()


def vectors(layers=11, width=8):
    torch.manual_seed(0)
    made = {}
    for layer in reversed(range(layers)):  # any order: "10" must come after "9"
        made[f"{layer}.attention"] = torch.cat([torch.full((width,), 1 + 0.1 * layer * part) for part in (1, 2, 3)])
        made[f"{layer}.feedforward"] = torch.full((4 * width,), 1 - 0.01 * layer)
    return made


def test_heatmap_is_the_mean_distance_from_one_and_the_unit_map_is_centred_there():
    ax = vector_heatmap(vectors())
    means = ax.images[0].get_array()
    assert means.shape == (11, 4)
    assert np.allclose(means[10], [1.0, 2.0, 3.0, 0.1])
    assert np.allclose(means[2], [0.2, 0.4, 0.6, 0.02])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q", "k", "v", "ff"]
    ax = unit_map(vectors())
    image = ax.images[0]
    assert image.get_array().shape == (11, 3 * 8 + 32)
    assert image.norm(1.0) == pytest.approx(0.5)
    untouched = {key: torch.ones_like(value) for key, value in vectors().items()}
    assert unit_map(untouched).images[0].norm(1.0) == pytest.approx(0.5)  # a fresh adapter draws too


def run(method, seed, losses):
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)] + [{"step": 9, "train_loss": 1.0}]
    return RunRecord("finished", method, "mini", "id", {}, seed, history=history)


def test_learning_curves_are_means_over_seeds_measured_from_the_base():
    ax = learning_curves([run("ia3", 0, [5, 4]), run("prefix", 0, [9, 4.5])])
    assert list(line(ax, "prefix tuning: best -0.5000").get_ydata()) == [4, -0.5]
    assert ax.get_ylim()[1] < 4  # its start is outside
    ax = learning_curves([run("ia3", 0, [5, 4]), run("ia3", 1, [5, 3]), run("new-method", 0, [5, 2])])
    mean = line(ax, "(IA)³: best -1.5000")
    assert list(mean.get_ydata()) == [0, -1.5]
    assert list(line(ax, "new-method: best -3.0000").get_ydata()) == [0, -3]
    assert labelled(ax)


ROWS = [
    {"method": "base", "trainable": 0, "positivity": 0.5, "test_loss": 5.0},
    {"method": "ia3", "trainable": 100, "positivity": Estimate(0.7, 0.6, 0.8, 9), "test_loss": 4.0},
    {"method": "lora", "trainable": 1000, "positivity": Estimate(0.65, 0.6, 0.7, 9), "test_loss": 3.5},
    {"method": "full", "trainable": 10000, "positivity": Estimate(0.9, 0.8, 0.95, 9), "test_loss": 3.8},
]


@pytest.mark.parametrize(("quality", "front"), [("positivity", [100, 10000]), ("test_loss", [100, 1000])])
def test_cost_vs_quality_joins_the_pareto_front(quality, front):
    ax = cost_vs_quality(ROWS, quality=quality)
    assert list(line(ax, "Pareto").get_xdata()) == front
    assert ax.get_xscale() == "log"
    assert "parameters" in ax.get_xlabel()
    assert {"(IA)³", "LoRA r=8", "full fine-tuning"} <= {text.get_text() for text in ax.get_legend().get_texts()}
    low, high = ax.get_ylim()
    assert quality == "test_loss" or 0 <= low < high <= 1  # a share has no other values


def test_given_axes_are_drawn_on():
    _, ax = plt.subplots()
    assert loss_curve([{"step": 0, "eval_loss": 1.0}], ax=ax) is ax
    assert vector_heatmap(vectors(), ax=ax) is ax


@pytest.fixture
def displayed(monkeypatch):
    calls = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **options: calls.append((data, options)))
    return calls


def test_show_sends_a_png_with_its_alt_text_and_closes_the_figure(displayed):
    ax = loss_curve([{"step": 0, "eval_loss": 1.0}])
    show(ax.figure, "One loss.")
    ((data, options),) = displayed
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert options["metadata"] == {"image/png": {"alt": "One loss."}}
    assert options["raw"] is True
    assert not plt.get_fignums()


def test_show_draws_the_same_bytes_twice_and_nothing_without_alt_text(displayed):
    for _ in range(2):
        show(dial_figure(dial_rows()).figure, "The dial.")
    assert displayed[0][0] == displayed[1][0]
    with pytest.raises(ValueError, match="alt text"):
        show(plt.figure(), " ")
    assert len(displayed) == 2


# --- the study's --------------------------------------------------------------------------------------------------


def words(ax) -> list[str]:
    return [text.get_text().strip() for text in ax.texts]


def test_rates_are_drawn_as_gains_with_a_ring_at_the_best():
    ax = rate_curves({"ia3": {1e-3: 3.9, 1e-2: 3.8, 1e-1: math.inf}, "full": {1e-4: 3.7}}, start=4.0)
    curve, ring = ax.lines[:2]
    assert list(curve.get_ydata())[:2] == pytest.approx([-0.1, -0.2])
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (1e-2, pytest.approx(-0.2))
    low, high = ax.get_ylim()
    assert low < -0.3 and high > 0 and ax.get_xscale() == "log"


def test_bars_are_shares_of_full_and_a_missing_cost_says_so():
    rows = [
        {"method": "ia3", "bytes_on_disk": 5, "step_ratio": 0.9, "peak": None},
        {"method": "full", "bytes_on_disk": 1000, "step_ratio": 1.0, "peak": 7},
    ]
    panels = cost_bars(rows, {"bytes_on_disk": "bytes", "step_ratio": "time", "peak": "memory"})
    assert [ax.patches[0].get_width() for ax in panels] == pytest.approx([0.005, 0.9, 0])
    assert [words(ax) for ax in panels] == [["0.5 %", "100 %"], ["90 %", "100 %"], ["not measured", "100 %"]]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["(IA)³", "full fine-tuning"]


def test_rows_show_their_intervals_and_the_levels():
    rows = [{"label": name, "positivity": Estimate(v, v - 0.1, v + 0.2, 9)} for name, v in (("a", 0.5), ("b", 0.7))]
    ax = interval_rows(rows, "positivity", {"base": Estimate(0.48, 0.4, 0.5, 9), "(IA)³": Estimate(0.68, 0.6, 0.7, 9)})
    assert list(ax.lines[2].get_xdata()) == pytest.approx([0.6, 0.9]) and list(ax.lines[3].get_xdata()) == [0.7]
    assert words(ax) == ["base", "(IA)³"] and ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_few_reviews_have_a_line_for_each_method_in_each_panel():
    rows = [
        {"method": m, "train_reviews": n, "best_loss": 4 - n / 1000, "positivity": Estimate(0.6, 0.5, 0.7, 8)}
        for m in ("ia3", "full")
        for n in (128, 8)
    ]
    panels = few_shot_curves(rows, ("best_loss", "positivity"), {"best_loss": 4.1, "positivity": 0.5})
    losses = [line for line in panels[0].lines if line.get_label() in ("(IA)³", "full fine-tuning")]
    assert len(losses) == 2 and list(losses[0].get_ydata()) == pytest.approx([3.992, 3.872])
    assert all([tick.get_text() for tick in ax.get_xticklabels()] == ["8", "128"] for ax in panels)
    assert len(panels[1].collections) == 2  # intervals


def test_rivals_are_drawn_through_the_base_against_both_prices():
    rows = [
        row for row in dial_rows(("contrast", "steering", "shuffled")) if row["curve"] == "contrast" or row["strength"]
    ]
    for row in rows:
        row["positivity"] = Estimate.from_dict(row["positivity_chars"]).to_dict()
    real, own = rival_figure(rows)
    lines = [[drawn for drawn in ax.lines if len(drawn.get_xdata()) == 4] for ax in (real, own)]
    assert [drawn.get_label() for drawn in lines[0]] == [
        "contrast of two adapters", "steering vector", "contrast, shuffled"
    ]  # fmt: skip
    for drawn in lines[0]:
        assert np.allclose(drawn.get_xdata(), np.exp([0.1, 0, 0.1, 0.4]))  # in the order of the strengths
        assert np.allclose(drawn.get_ydata(), [0.45, 0.5, 0.55, 0.6])
    assert all(np.allclose(drawn.get_xdata(), [1.05, 1, 1.05, 1.2]) for drawn in lines[1])
    assert lines[0][2].get_linestyle() == "None" and labelled(real) and "own text" in own.get_xlabel()


def test_next_words_that_fall_stand_above_those_that_rise():
    first, last = torch.tensor([0.6, 0.1, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.2, 0.6])
    ax = word_figure({2: last, -2: first, 0: (first + last) / 2}, lambda ids: f" w{ids[0]}", shown=1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["'w0'", "'w3'"] and labelled(ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a = -2", "a = 0 (base)", "a = +2"]
    assert [bars.patches[0].get_width() for bars in ax.containers] == pytest.approx([0.6, 0.35, 0.1])


def test_drawing_of_a_block_names_the_three_vectors_and_their_lengths():
    texts = " ".join(text.get_text() for text in block_drawing(256).texts)
    assert all(f"$l_{name}$" in texts for name in ("k", "v", "{ff}"))
    assert "256 → 768" in texts and "1,024 → 256" in texts
