"""Which rows each process computes in each optimiser step, so that any number of processes sees the same steps.

A step's rows (the global batch) are cut into as many neighbouring shares as there are processes, a share into batches
that fit into memory. Where a share has too few rows, at the end of an epoch for instance, a row without labels takes
the place: its loss and its gradients are 0. Accelerate's own sharding repeats other rows there, which then count twice,
or leaves a process without a batch, for which the others wait for ever. Not for: losses (`trainer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler

FILLER = -1  # the index of a row without labels
IGNORED = -100  # a label that no loss counts


@dataclass(frozen=True)
class Plan:
    """How a global batch of `rows` rows is computed: by `processes`, each in `accumulation` batches of `batch` rows."""

    rows: int
    processes: int
    accumulation: int
    batch: int

    @classmethod
    def make(cls, rows: int, processes: int, largest: int) -> Plan:
        """The plan with the fewest batches of at most `largest` rows. Raises ValueError with more processes than rows.

        8 rows for 2 processes and batches of at most 4: one batch of 4 each; of at most 2: two batches of 2 each.
        """
        if processes > rows:
            raise ValueError(f"{processes} processes cannot share {rows} rows: use at most {rows}")
        share = -(-rows // processes)
        accumulation = -(-share // min(largest, share))
        return cls(rows, processes, accumulation, -(-share // accumulation))

    def halved(self) -> Plan | None:
        """The plan with batches of half the size, rounded up; None where a batch is one row already."""
        return None if self.batch == 1 else Plan.make(self.rows, self.processes, (self.batch + 1) // 2)


class ShareSampler(Sampler[list[int]]):
    """The batches of process `index` in one epoch: always `plan.accumulation` of them a step, as row numbers.

    `seed` None: the rows in their order; else shuffled by seed and epoch, in the order of the Trainer's own sampler.
    """

    def __init__(self, rows: int, plan: Plan, index: int, seed: int | None = None) -> None:
        self.order = range(rows) if seed is None else SeedableRandomSampler(range(rows), data_seed=seed)
        self.plan, self.index = plan, index

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order."""
        if isinstance(self.order, SeedableRandomSampler):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // self.plan.rows) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        plan, order = self.plan, list(self.order)
        for start in range(0, len(order), plan.rows):
            step = order[start : start + plan.rows]
            first, last = (len(step) * i // plan.processes for i in (self.index, self.index + 1))
            share = step[first:last]
            for batch in range(plan.accumulation):
                yield share[batch * plan.batch : (batch + 1) * plan.batch] or [FILLER]


class WithFiller(torch.utils.data.Dataset):
    """`rows`, and under the index `FILLER` their first one without labels."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = dict(self.rows[max(index, 0)])
        return row | {"labels": without_labels(row["labels"])} if index == FILLER else row


def without_labels(labels: torch.Tensor | list[int] | int) -> torch.Tensor | list[int] | int:
    """`labels` of the same kind and shape, all of them `IGNORED`."""
    if isinstance(labels, torch.Tensor):
        return torch.full_like(labels, IGNORED)
    return [IGNORED] * len(labels) if isinstance(labels, list) else IGNORED
