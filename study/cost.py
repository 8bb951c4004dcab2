"""What a method costs beside its parameters: bytes, time of a step, stored activations, latency. One row per method.

For: `cost_rows` (the profile's own model, anywhere) and `training_cost`, `latency_cost` (GPT-2's shape on a GPU), which
`python -m study` writes to `cost.json` and `gpu-cost.json`; `reference_costs`, `gpu_costs`, which read them.
Not for: quality. Nothing here trains for more than a few steps at a learning rate of 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from study.comparison import Bench
from utils.adapters import MERGEABLE, attach, load_base, merge
from utils.config import ASSETS, PROFILES, Profile
from utils.counts import count_parameters
from utils.generation import latency, seconds
from utils.gpu import PeakMemory
from utils.memory import saved_for_backward
from utils.runs import read_json
from utils.step_times import idle_optimizer, step_ratios, step_seconds
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
    return [
        _sizes(model) | {
            "method": method, "step_ratio": steps.get(method), "latency_ratio": times[method],
            "merged_latency_ratio": times.get(f"{method}, merged"),
            "saved_bytes": _saved(model, blocks[: profile.batch_size]),
        }
        for method, model in models.items()
    ]  # fmt: skip


def reference_costs(profile: Profile, assets: Path = ASSETS) -> tuple[dict[str, Row], str]:
    """The rows of `cost.json` by method, and the profile they are of: `profile`, else the embedded `mini`.

    A file that was made with another configuration is passed over; with none, no rows.
    """
    for candidate in dict.fromkeys((profile, PROFILES["mini"])):
        found = read_json(assets / "runs" / candidate.name / "cost.json")
        if found.get("config_id") == candidate.config_id():
            return {row["method"]: row for row in found["rows"]}, candidate.name
    return {}, profile.name


def gpu_costs(assets: Path = ASSETS) -> dict:
    """What `python -m study --gpu-cost` wrote; empty where it was never run on a GPU."""
    return read_json(assets / "runs" / "gpu-cost.json")


def _sizes(model: torch.nn.Module) -> Row:
    counts = count_parameters(model)
    return {"trainable": counts.trainable, "total": counts.total, "bytes_on_disk": trainable_bytes(model)}


def _saved(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that one forward pass on `batch` (input_ids and labels, (batch, length)) keeps; nothing for the base."""
    ids, labels = (torch.as_tensor(batch[name], device=model.device) for name in ("input_ids", "labels"))
    with saved_for_backward(model) as saved:
        model(input_ids=ids, labels=labels, use_cache=False)
    return saved.bytes


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
            one_step = partial(step_seconds, model, optimizer, {"input_ids": ids, "labels": ids})
            times = [seconds(one_step) for _ in range(rounds + 2)][2:]
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
