"""What a method costs beside its parameters: bytes, time of a step, stored activations, latency. One row per method.

`python -m study` writes `cost_rows` (the profile's own model, anywhere) to `cost.json`, and `training_cost` with
`latency_cost` (GPT-2's shape, on a GPU) to `gpu-cost.json`. Nothing here learns: the steps are taken at a rate of 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from study.comparison import Bench
from utils.adapters import MERGEABLE, attach, load_base, merge
from utils.config import ASSETS, PROFILES, Profile
from utils.generation import interleave, latency, ratios, seconds
from utils.gpu import PeakMemory, autocast
from utils.runs import read_json
from utils.sizes import count_parameters, saved_for_backward
from utils.training import trainable_bytes

Row = dict[str, str | float | int | None]


def cost_rows(bench: Bench, methods: Sequence[str], rounds: int = 7) -> list[Row]:
    """`trainable`, `total`, `bytes_on_disk`, `saved_bytes` and three ratios for each of `methods`; "full" among them.

    `step_ratio`: time of a training step over that of full fine-tuning. `latency_ratio` and `merged_latency_ratio`:
    time to write one token over the base's, with the method attached, and merged (None where it cannot be). The times
    of each kind come from one interleaved run. `saved_bytes`: what one batch keeps for the backward pass, in float32.
    """
    profile = bench.profile
    blocks = bench.blocks("adapter", "positive", limit=profile.batch_size)
    models = {method: attach(load_base(profile)[0], method).train() for method in methods}
    trained = {method: model for method, model in models.items() if method not in ("base", "full")}
    steps = step_ratios(trained | {"full": models["full"]}, blocks, profile.batch_size, rounds)
    merged = {f"{method}, merged": merge(models[method]) for method in methods if method in MERGEABLE}
    running = {"base": bench.base} | models | merged
    times = {row["name"]: row["ratio_to_first"] for row in latency(running, bench.tokenizer, repeats=rounds)}
    batch, rows = {name: blocks[: profile.batch_size][name] for name in ("input_ids", "labels")}, []
    for method, model in models.items():
        counts = count_parameters(model)
        with saved_for_backward(model) as saved:
            model(**on_device(model, batch), use_cache=False)
        rows.append({
            "trainable": counts.trainable, "total": counts.total, "bytes_on_disk": trainable_bytes(model),
            "method": method, "step_ratio": steps.get(method), "latency_ratio": times[method],
            "merged_latency_ratio": times.get(f"{method}, merged"), "saved_bytes": saved.bytes,
        })  # fmt: skip
    return rows


def on_device(model: torch.nn.Module, batch: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, (rows, tokens), where the model is."""
    return {name: torch.as_tensor(rows, device=model.device) for name, rows in batch.items()}


def step_ratios(
    models: Mapping[str, torch.nn.Module], blocks: Dataset, batch_size: int, rounds: int = 7
) -> dict[str, float]:
    """Time of one optimiser step of each model as a ratio to the last one's, from one interleaved run.

    The models take turns on the same batch (the first of `blocks`) with AdamW at rate 0, so nothing is learned; the
    first round warms up, and the ratio is the median of those within the rounds. Above 1 is slower.
    """
    inputs = {name: blocks[:batch_size][name] for name in ("input_ids", "labels")}
    times = interleave(
        {name: partial(step_seconds, model, idle_optimizer(model), inputs) for name, model in models.items()}, rounds
    )
    *_, yardstick = times.values()
    return {name: ratios(values, yardstick).median for name, values in times.items()}


def idle_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over what `model` trains, at rate 0: it does its work and changes nothing."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)


def step_seconds(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: Mapping[str, object]) -> float:
    """Seconds of a forward pass, a backward pass and an update; `inputs`: `input_ids` and `labels`, (rows, tokens)."""
    batch = on_device(model, inputs)

    def step() -> None:
        with autocast(model.device):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds(step)


def reference_costs(profile: Profile, assets: Path = ASSETS) -> tuple[dict[str, Row], str]:
    """The rows of `cost.json` by method, and the profile they are of: `profile`, else the embedded `mini`.

    A file that was made with another configuration is passed over; with none, no rows.
    """
    for candidate in dict.fromkeys((profile, PROFILES["mini"])):
        found = read_json(assets / "runs" / candidate.name / "cost.json")
        if found.get("config_id") == candidate.config_id():
            return {row["method"]: row for row in found["rows"]}, candidate.name
    return {}, profile.name


def training_cost(
    make_base: Callable[[], GPT2LMHeadModel], methods: Iterable[str], batch: int, length: int, rounds: int = 10
) -> list[Row]:
    """Seconds of a step (median), tokens per second and peak bytes of each method, one after the other.

    Random tokens, (batch, length); autocast to bfloat16 where the device is fast at it. Each model is alone on the
    device, so that the peak, the weights included, is its own; the first two steps warm up. On a CPU give each method
    a process of its own: memory that an earlier one has freed and not given back does not show in the next one's peak.
    """
    rows = []
    for method in methods:
        with PeakMemory() as peak:
            model = attach(make_base(), method).train()
            optimizer = idle_optimizer(model)
            ids = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)
            inputs = {"input_ids": ids, "labels": ids}
            times = [step_seconds(model, optimizer, inputs) for _ in range(rounds + 2)][2:]
        step = statistics.median(times)
        rows.append({"method": method, "trainable": count_parameters(model).trainable, "step_seconds": step,
                     "tokens_per_second": batch * length / step, "peak_bytes": peak.bytes})  # fmt: skip
        del model, optimizer
    return rows


def latency_cost(
    make_base: Callable[[], GPT2LMHeadModel], tokenizer: PreTrainedTokenizerBase, repeats: int = 7
) -> list[Row]:
    """Rows of `generation.latency`: base, (IA)³ attached and (IA)³ merged, eager; then the base and all three compiled.

    Each half is one interleaved run whose yardstick is the eager base. What compiling costs is not in the times.
    """
    attached = attach(make_base(), "ia3").eval()
    models = {"base": make_base(), "attached": attached, "merged": merge(attached)}
    rows = latency(models, tokenizer, repeats=repeats)
    for model in models.values():
        model.forward = torch.compile(model.forward)
    compiled = {f"{name}, compiled": model for name, model in models.items()}
    return rows + latency({"base": make_base()} | compiled, tokenizer, repeats=repeats)[1:]
