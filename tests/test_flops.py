"""The FLOPs of a step are those that PyTorch counts; processor time is that of work alone."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import make_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bench.rows import PROCESSOR_TIME, seconds
from bench.training import FROZEN, TRAINED, best_size, product_flops, product_seconds, training_flops
from utils.adapters import attach


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


def test_processor_time_does_not_count_waiting(monkeypatch):
    monkeypatch.setenv(PROCESSOR_TIME, "1")
    assert seconds(lambda: time.sleep(0.2)) < 0.1
    monkeypatch.delenv(PROCESSOR_TIME)
    assert seconds(lambda: time.sleep(0.2)) > 0.1
