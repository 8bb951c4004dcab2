"""The processes of one launched run: how many there are, which one this is, and what process 0 decides for all.

A launcher (`torchrun`, `accelerate launch`, Accelerate's `notebook_launcher`) starts them and tells each in `RANK`,
`LOCAL_RANK` and `WORLD_SIZE`; without one there is a single process. Not for: sharing out rows (`shares.py`), or
starting processes (`scripts/train.py`).
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

Decision = TypeVar("Decision")


class ProcessError(RuntimeError):
    """There are not as many processes as were asked for; the message names the remedy."""


def process_count() -> int:
    """How many processes run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Which of them this is; 0 writes."""
    return int(os.environ.get("RANK", "0"))


def was_launched() -> bool:
    """Whether a launcher started this process: `torchrun` sets `RANK`, `accelerate launch` of one process does not."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def require_processes(asked: int) -> None:
    """Raise ProcessError unless there are `asked` processes.

    `accelerate launch --cpu --num_processes 2` starts one process without a word, and would train half as fast.
    """
    if process_count() != asked:
        raise ProcessError(
            f"{asked} processes were asked for, and {process_count()} run: start them with `make train-distributed "
            f"PROCESSES={asked}` or `torchrun --nproc_per_node {asked}`; `accelerate launch --cpu` always starts one"
        )


def use_own_gpu() -> None:
    """Let "cuda" mean this process's GPU; call it before a model is loaded. Without CUDA it does nothing."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def join(device: torch.device) -> None:
    """Connect this process with the others of its launch: gloo on a CPU, NCCL on GPUs, as Accelerate chooses."""
    if process_count() > 1:
        PartialState(cpu=device.type == "cpu")


def decided_by_first(value: Decision) -> Decision:
    """Process 0's `value`, in every process; all of them must call this."""
    if process_count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Return when every process is here."""
    if process_count() > 1:
        distributed.barrier()


def leave() -> None:
    """Part from the other processes, at the end of a script."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
