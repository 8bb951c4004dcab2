"""Candidates take turns, ratios are taken within a round."""

from __future__ import annotations

import time

import pytest

from utils.timing import PROCESSOR_TIME, Spread, interleave, ratios, seconds


def test_candidates_take_turns_and_the_first_round_warms_up():
    order = []

    def candidate(name):
        def run():
            order.append(name)
            return float(len(order))

        return run

    values = interleave({"a": candidate("a"), "b": candidate("b")}, 2)
    assert order == ["a", "b"] * 3 and values == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert interleave({"a": candidate("a")}, 2, warm_up=False) == {"a": [7.0, 8.0]}


def test_ratios_are_taken_round_by_round():
    assert ratios([2.0, 30.0, 400.0], [1.0, 10.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="shorter|longer"):
        ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one value"):
        ratios([], [])


def test_processor_time_does_not_count_waiting(monkeypatch):
    monkeypatch.setenv(PROCESSOR_TIME, "1")
    assert seconds(lambda: time.sleep(0.2)) < 0.1
    monkeypatch.delenv(PROCESSOR_TIME)
    assert seconds(lambda: time.sleep(0.2)) > 0.1


def test_seconds_are_those_of_the_call():
    ran = []
    assert seconds(lambda: ran.append(1)) >= 0 and ran == [1]
