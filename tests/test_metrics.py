"""Intervals against their definitions, the declarations of the metrics, tables and Pareto fronts."""

from __future__ import annotations

import numpy as np
import pytest

from utils.metrics import (
    METRICS,
    Estimate,
    bootstrap_interval,
    compare_table,
    mean_interval,
    pareto_front,
    table,
    wilson_interval,
)


def test_estimate_as_text_and_dict():
    estimate = Estimate(0.674, 0.612, 0.731, 256)
    assert str(estimate) == "0.67 [0.61, 0.73]"
    assert Estimate.from_dict(estimate.to_dict()) == estimate


def test_mean_interval_is_students():
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert estimate.value == 2
    assert estimate.high - 2 == pytest.approx(4.302653 / 3**0.5)  # t(0.975, 2) from a table
    assert mean_interval([5.0]) == Estimate(5.0, 5.0, 5.0, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_wilson_known_values():
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    many, none = wilson_interval(81, 263), wilson_interval(0, 20)
    assert (many.low, many.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(0.1611, abs=5e-5))
    assert wilson_interval(20, 20).low == pytest.approx(1 - 0.1611, abs=5e-5) and wilson_interval(20, 20).high == 1


@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 2)])
def test_impossible_shares_are_refused(counts):
    with pytest.raises(ValueError, match="share"):
        wilson_interval(*counts)


def test_bootstrap_of_a_mean_agrees_with_its_standard_error():
    values = np.random.default_rng(1).normal(5, 2, 400)
    found, error = bootstrap_interval(values), 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.low == pytest.approx(values.mean() - error, abs=0.03)
    assert found.high == pytest.approx(values.mean() + error, abs=0.03)


def test_bootstrap_weighs_units_and_repeats_itself():
    found = bootstrap_interval([2.0, 30.0], [1.0, 9.0])
    assert (found.value, found.low, found.high) == (3.2, 2.0, pytest.approx(30 / 9))
    assert bootstrap_interval([1, 2, 5], transform=np.exp) == bootstrap_interval([1, 2, 5], transform=np.exp)
    assert bootstrap_interval([4.0]).low == 4.0 == bootstrap_interval([4.0]).high
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_interval([])


def test_pareto_front_is_what_nothing_beats():
    assert pareto_front([(10, 0.5), (1, 0.3), (5, 0.6), (7, 0.55), (1, 0.2), (20, 0.6)]) == [1, 2]
    assert pareto_front([]) == []
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 8, (30, 2)).tolist()]

    def beaten(a):
        return any(b != a and b[0] <= a[0] and b[1] >= a[1] for b in points)

    assert {points[i] for i in pareto_front(points)} == {p for p in points if not beaten(p)}


def test_table_marks_the_best_in_the_good_direction():
    rows = [
        {"method": "ia3", "trainable": 64512, "positivity": Estimate(0.7, 0.6, 0.8, 9), "test_loss": 4.5},
        {"method": "full", "trainable": 124439808, "positivity": Estimate(0.6, 0.5, 0.7, 9), "test_loss": None},
    ]
    text = table(rows, ["method", "trainable", "positivity", "test_loss"])
    heading, _, ia3, full, note = text.splitlines()
    assert "trainable (parameters) ↓" in heading
    assert "positive, words (share) ↑" in heading
    assert "64,512*" in ia3
    assert "0.70 [0.60, 0.80]*" in ia3
    assert "4.500" in ia3
    assert "4.500*" not in ia3  # nothing to compare it with
    assert "*" not in full
    assert full.rstrip().endswith("-")
    assert "intervals" in note


def test_table_without_a_direction_has_no_marks():
    assert "*" not in table([{"name": "a", "best_step": 1}, {"name": "b", "best_step": 2}], ["name", "best_step"])
    assert table([], ["name"]).splitlines() == ["name", "----"]


def test_compare_table_says_match_only_for_equal():
    lines = compare_table([("(IA)³", 64512, 64512), ("LoRA", 294912, 294913)]).splitlines()
    assert lines[2].split() == ["(IA)³", "64,512", "64,512", "yes"]
    assert lines[3].endswith("NO")


def test_every_metric_is_declared_completely():
    for name, metric in METRICS.items():
        assert metric.better in ("higher", "lower", None), name
        assert metric.label and metric.digits >= 0
        assert metric.title.endswith({"higher": "↑", "lower": "↓", None: metric.title[-1]}[metric.better])


def test_text_in_a_column_of_numbers_is_no_best_value():
    assert "*" not in table(
        [{"m": "a", "best_loss": "not measured"}, {"m": "b", "best_loss": "not measured"}], ["m", "best_loss"]
    )
    lines = table(
        [{"m": "a", "best_loss": "not measured"}, {"m": "b", "best_loss": 4.0}, {"m": "c", "best_loss": 5.0}],
        ["m", "best_loss"],
    )
    assert [line.rstrip().endswith("*") for line in lines.splitlines()[2:5]] == [False, True, False]
