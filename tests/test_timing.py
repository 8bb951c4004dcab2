"""Candidates take turns, ratios are taken within a round; the FLOPs of a step are those that PyTorch counts."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import make_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bench.training import FROZEN, TRAINED, best_size, product_flops, product_seconds, training_flops
from utils.adapters import attach
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


@pytest.mark.parametrize(("method", "per_weight"), [("ia3", FROZEN), ("full", TRAINED)])
def test_the_flops_of_a_step_are_those_that_are_done(method, per_weight):
    model = make_tiny_model(layers=3)
    model.set_attn_implementation("eager")  # its products are counted one by one
    rows, length, width = 2, 16, model.config.n_embd
    model = attach(model, method).train()
    ids = torch.randint(0, 300, (rows, length))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    predicted = rows * length * training_flops(model.config, length, per_weight)
    spared = 2 * 3 * width**2 * rows * length if method == "ia3" else 0  # no gradient of the first layer's input
    assert counter.get_total_flops() == predicted - spared and spared < 0.04 * predicted


def test_the_machines_best_product_is_one_of_those_tried():
    assert product_flops(10) == 2000
    assert product_seconds(8, torch.bfloat16, "cpu", repeats=1) > 0
    assert best_size(torch.float32, "cpu", (4, 8)) in (4, 8)
