"""A step's rows, shared out: each row once, every process as many batches, none larger than asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset

from utils.shares import FILLER, IGNORED, Plan, ShareSampler, WithFiller, without_labels
from utils.trainer import count_labels

CASES = list(itertools.product((1, 7, 8, 9, 23), (8, 6), (1, 2, 3, 6), (1, 3, 8)))


def steps(rows: int, plan: Plan, seed: int | None = None, epoch: int = 0) -> list[list[list[list[int]]]]:
    """Row numbers by process, step and batch."""
    shares = []
    for index in range(plan.processes):
        sampler = ShareSampler(rows, plan, index, seed)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        a = plan.accumulation
        shares.append([batches[i : i + a] for i in range(0, len(batches), a)])
    return shares


@pytest.mark.parametrize(("rows", "step", "processes", "largest"), CASES)
def test_each_step_has_the_rows_of_a_single_process(rows, step, processes, largest):
    plan = Plan.make(step, processes, largest)
    shares = steps(rows, plan)
    assert len({len(share) for share in shares}) == 1  # nobody waits for ever
    for number in range(-(-rows // step)):
        batches = [batch for share in shares for batch in share[number]]
        together = [row for batch in batches for row in batch if row != FILLER]
        assert together == list(range(rows))[number * step : (number + 1) * step]
        assert max(map(len, batches)) <= largest and all(batches)


@pytest.mark.parametrize(("step", "processes", "largest"), [(16, 1, 16), (16, 2, 16), (16, 4, 2), (6, 3, 8), (7, 2, 2)])
def test_a_plan_covers_the_step_with_the_fewest_batches(step, processes, largest):
    plan = Plan.make(step, processes, largest)
    share = -(-step // processes)
    assert plan.batch <= largest and plan.batch * plan.accumulation >= share
    assert (plan.accumulation - 1) * largest < share


def test_halving_ends_at_one_row():
    plans = [Plan.make(16, 1, 16)]
    while halved := plans[-1].halved():
        plans.append(halved)
    assert [(plan.batch, plan.accumulation) for plan in plans] == [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]
    assert Plan.make(10, 2, 5).halved() == Plan(10, 2, 2, 3)


def test_more_processes_than_rows_is_an_error():
    with pytest.raises(ValueError, match="9 processes cannot share 8 rows"):
        Plan.make(8, 9, 8)


def test_shuffling_depends_on_seed_and_epoch_alone():
    plans = [Plan.make(8, processes, 4) for processes in (1, 2)]

    def order(plan: Plan, **options: int) -> list[list[int]]:
        together = zip(*steps(20, plan, **options), strict=True)
        return [[row for share in step for batch in share for row in batch if row != FILLER] for step in together]

    assert order(plans[0], seed=3) == order(plans[1], seed=3)
    assert sorted(itertools.chain(*order(plans[0], seed=3))) == list(range(20))
    assert order(plans[0], seed=3) != order(plans[0], seed=4) != order(plans[0], seed=4, epoch=1)


@pytest.mark.parametrize("labels", [[[1, 2], [3, 4]], [0, 1]])
@pytest.mark.parametrize("kind", [None, "torch"])
def test_the_filler_has_the_first_rows_shape_and_no_label(labels, kind):
    rows = WithFiller(Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": labels}).with_format(kind))
    filler, first = rows[FILLER], rows[0]
    assert torch.equal(torch.as_tensor(filler["input_ids"]), torch.as_tensor(first["input_ids"])) and len(rows) == 2
    assert torch.as_tensor(filler["labels"]).shape == torch.as_tensor(first["labels"]).shape
    assert (torch.as_tensor(filler["labels"]) == IGNORED).all() and type(filler["labels"]) is type(first["labels"])


def test_labels_are_counted_as_the_loss_counts_them():
    rows = Dataset.from_dict({"labels": [[1, IGNORED, 2], [IGNORED, 3, 4]]})
    assert (count_labels(rows), count_labels(rows, first=1)) == (4, 3)
    assert count_labels(Dataset.from_dict({"labels": [0, 1, 1]}).with_format("torch")) == 3
    assert without_labels([1, 2]) == [IGNORED, IGNORED] and without_labels(1) == IGNORED
