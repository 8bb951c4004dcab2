"""Time of an optimiser step of several models, as ratios from one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from datasets import Dataset

from utils.gpu import autocast


def step_ratios(
    models: Mapping[str, torch.nn.Module], blocks: Dataset, batch_size: int, rounds: int = 7
) -> dict[str, float]:
    """Time of one optimiser step of each model as a ratio to the last one's, from one interleaved run.

    The models take turns on the same batch (the first of `blocks`) with AdamW at rate 0, so nothing is learned; the
    first round warms up, and the ratio is the median of those within the rounds. Above 1 is slower.
    """
    inputs = {name: blocks[:batch_size][name] for name in ("input_ids", "labels")}
    optimizers = {name: idle_optimizer(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            seconds[name].append(step_seconds(model, optimizers[name], inputs))
    *_, yardstick = seconds.values()
    return {
        name: statistics.median(a / b for a, b in zip(values[1:], yardstick[1:], strict=True))
        for name, values in seconds.items()
    }


def idle_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over what `model` trains, at rate 0: it does its work and changes nothing."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)


def step_seconds(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict) -> float:
    """Wall-clock seconds of a forward pass, a backward pass and an update; `inputs`: the model's, (batch, length)."""
    batch = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    started = time.perf_counter()
    with autocast(model.device):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
