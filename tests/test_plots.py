"""Figures: the data arrive on the axes unchanged, axes are labelled, and the alt text reaches the notebook."""

from __future__ import annotations

import base64

import IPython.display
import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from utils import plots
from utils.metrics import Estimate
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


def test_dial_shows_mean_positivity_of_both_judges_for_both_curves():
    top = plots.dial_figure(dial_rows())
    data = [drawn for drawn in top.get_lines() if len(drawn.get_xdata()) == 4]
    assert [drawn.get_linestyle() for drawn in data] == ["-", "--", "-", "--"]
    assert np.allclose(data[0].get_xdata(), [-1, 0, 1, 2])
    assert np.allclose(data[0].get_ydata(), [0.41, 0.51, 0.61, 0.71])  # mean over the two seeds
    assert np.allclose(data[1].get_ydata(), [0.45, 0.5, 0.55, 0.6])
    assert data[0].get_color() != data[2].get_color()
    assert len(top.collections) == 2  # one band a curve


def test_dial_band_covers_the_intervals_of_all_seeds():
    rows = dial_rows(curves=("dial",))
    rows[0] = rows[0] | {"positivity": Estimate(0.4, 0.02, 0.97, 9)}
    (band,) = plots.dial_figure(rows).collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.02, 0.97))


def test_dial_perplexity_is_relative_to_the_base():
    _, reviews, texts = plots.dial_figure(dial_rows()).figure.axes
    drawn = [[d for d in ax.get_lines() if len(d.get_xdata()) == 4] for ax in (reviews, texts)]
    assert [len(lines) for lines in drawn] == [2, 2]
    assert np.allclose(drawn[0][0].get_ydata(), np.exp([0.1, 0, 0.1, 0.4]))
    assert np.allclose(drawn[1][0].get_ydata(), [1.05, 1, 1.05, 1.2])
    assert labelled(texts) and "real" in reviews.get_ylabel() and "own" in texts.get_ylabel()


def test_dial_needs_the_base_model():
    with pytest.raises(ValueError, match="measure strength 0"):
        plots.dial_figure(dial_rows(strengths=(1, 2)))


def test_dial_of_one_adapter_without_seed_or_curve():
    rows = [{k: v for k, v in row.items() if k not in ("seed", "curve")} for row in dial_rows(("dial",), (0,))]
    top = plots.dial_figure(rows[::-1])  # any order
    assert list(top.get_lines()[0].get_xdata()) == [-1, 0, 1, 2]
    assert len(top.collections) == 1


def test_lengths_histogram_counts_every_label():
    ax = plots.lengths_histogram({"positive": [100, 200, 300], "negative": [50, 60, 90]}, block_length=128)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"positive: 3, median 200 words", "negative: 3, median 60 words", "one training block: 128"} == set(texts)
    assert labelled(ax)


def test_parameter_bar_writes_counts_and_shares():
    ax = plots.parameter_bar({"attention": 750, "feed-forward": 250}, {"(IA)³": 1})
    assert [round(bar.get_width() * 1e6) for bar in ax.patches] == [750, 250, 1]
    texts = [text.get_text().split() for text in ax.texts]
    assert texts == [["750", "(75.0", "%)"], ["250", "(25.0", "%)"], ["1", "(0.1", "%)"]]


def test_loss_curve_keeps_steps_and_marks_the_best():
    history = [
        {"step": 0, "eval_loss": 5.0},
        {"step": 5, "train_loss": 4.9},
        {"step": 10, "train_loss": 4.8, "eval_loss": 4.7},
    ]
    ax = plots.loss_curve(history, baseline=5.0)
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


def test_heatmap_is_the_mean_distance_from_one_by_layer_and_part():
    ax = plots.vector_heatmap(vectors())
    means = ax.images[0].get_array()
    assert means.shape == (11, 4)
    assert np.allclose(means[10], [1.0, 2.0, 3.0, 0.1])
    assert np.allclose(means[2], [0.2, 0.4, 0.6, 0.02])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q", "k", "v", "ff"]


def test_unit_map_is_centred_at_one():
    ax = plots.unit_map(vectors())
    image = ax.images[0]
    assert image.get_array().shape == (11, 3 * 8 + 32)
    assert image.norm(1.0) == pytest.approx(0.5)
    untouched = {key: torch.ones_like(value) for key, value in vectors().items()}
    assert plots.unit_map(untouched).images[0].norm(1.0) == pytest.approx(0.5)  # a fresh adapter draws too


def run(method, seed, losses):
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)] + [{"step": 9, "train_loss": 1.0}]
    return RunRecord("finished", method, "mini", "id", {}, seed, history=history)


def test_a_curve_that_starts_above_the_base_is_measured_from_the_base():
    ax = plots.learning_curves([run("ia3", 0, [5, 4]), run("prefix", 0, [9, 4.5])])
    assert list(line(ax, "prefix tuning: best -0.5000").get_ydata()) == [4, -0.5]
    assert ax.get_ylim()[1] < 4  # its start is outside


def test_learning_curves_are_means_over_seeds():
    ax = plots.learning_curves([run("ia3", 0, [5, 4]), run("ia3", 1, [5, 3]), run("new-method", 0, [5, 2])])
    mean = line(ax, "(IA)³: best -1.5000 (mean of 2 seeds)")
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
    ax = plots.cost_vs_quality(ROWS, quality=quality)
    assert list(line(ax, "Pareto").get_xdata()) == front
    assert ax.get_xscale() == "log"
    assert "parameters" in ax.get_xlabel()
    assert {"(IA)³", "LoRA r=8", "full fine-tuning"} <= {text.get_text() for text in ax.get_legend().get_texts()}
    low, high = ax.get_ylim()
    assert quality == "test_loss" or 0 <= low < high <= 1  # a share has no other values


def test_given_axes_are_drawn_on():
    _, ax = plt.subplots()
    assert plots.loss_curve([{"step": 0, "eval_loss": 1.0}], ax=ax) is ax
    assert plots.vector_heatmap(vectors(), ax=ax) is ax


@pytest.fixture
def displayed(monkeypatch):
    calls = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **options: calls.append((data, options)))
    return calls


def test_show_sends_a_png_with_its_alt_text_and_closes_the_figure(displayed):
    ax = plots.loss_curve([{"step": 0, "eval_loss": 1.0}])
    plots.show(ax.figure, "One loss.")
    ((data, options),) = displayed
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert options["metadata"] == {"image/png": {"alt": "One loss."}}
    assert options["raw"] is True
    assert not plt.get_fignums()


def test_show_draws_the_same_bytes_twice(displayed):
    for _ in range(2):
        plots.show(plots.dial_figure(dial_rows()).figure, "The dial.")
    assert displayed[0][0] == displayed[1][0]


def test_a_figure_without_alt_text_is_refused(displayed):
    with pytest.raises(ValueError, match="alt text"):
        plots.show(plt.figure(), " ")
    assert not displayed
