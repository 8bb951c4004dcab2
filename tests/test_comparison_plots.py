"""What 04's figures say is what they were given: positions, labels, and what is missing is said to be missing."""

from __future__ import annotations

import math

import pytest

from study.plots import cost_bars, few_shot_curves, interval_rows, rate_curves
from utils.metrics import Estimate


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
