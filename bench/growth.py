"""How cost grows: memory of training by method, and tokens a second and memory against size, length, batch, adapters.

Every point comes from a fresh process, so that its memory is its own. Not for: comparing with others' code.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from transformers import GPT2LMHeadModel

from bench.rows import NOT_MEASURED, Row, Sizes, make_model, own_process, row, seconds, shape_config, tokenizer
from bench.use import ADAPTERS, endless, prompts, random_factors
from study.cost import training_cost
from utils.adapters import METHODS, attach
from utils.config import PROFILES
from utils.generation import generate, interleave, mixed_adapters
from utils.gpu import estimate_memory, pick_device
from utils.places import ia3_config

Point = dict[str, object]
GROWING = ("ia3", "full")  # the methods whose growth is drawn
METHODS_OF = {
    "mini": ("full", "ia3", "ia3_kv", "lora", "bitfit", "prefix", "bottleneck"),
    "124M": ("full", "ia3", "lora"),
}
METHODS_OF["tiny"] = METHODS_OF["124M"]
BATCH_OF = {"mini": "mini", "tiny": "mini", "124M": "gpt2"}  # whose batch and block length


@dataclass(frozen=True)
class Place:
    """One training set-up: rows x tokens of random text on a model of a shape."""

    shape: str
    batch: int
    length: int

    def positions(self) -> int:
        """What the model's context must hold, with room for a prefix."""
        return max(1024, self.length + 64)


def train_point(place: Place, method: str, rounds: int) -> Row:
    """Seconds a step, tokens a second and peak bytes of one method, weights included; see `cost.training_cost`."""
    return training_cost(
        partial(make_model, place.shape, place.positions()), [method], place.batch, place.length, rounds
    )[0]


def memory_rows(sizes: Sizes, model: str) -> list[Row]:
    """Peak memory of a training step of every method over that of full fine-tuning, a fresh process each."""
    profile = PROFILES[BATCH_OF[model]]
    place = Place(model, profile.batch_size, profile.block_length)

    def peak(method: str) -> float:
        with own_process(sizes.isolated) as call:
            return call(train_point, place, method, 1)["peak_bytes"] / 2**20

    methods, rounds = METHODS_OF[model], 1 if model == "124M" else 2
    peaks = interleave({method: partial(peak, method) for method in methods}, rounds, warm_up=False)
    return [
        row(f"memory-{model}-{method}", f"peak memory of training on {model}, {METHODS[method]}", METHODS["full"],
            peaks[method], peaks["full"], unit="MiB", better="lower", batch=place.batch, length=place.length)
        for method in methods if method != "full"
    ]  # fmt: skip


def places(sizes: Sizes, series: str) -> dict[float, Place]:
    """The points of a series by their place on its axis: parameters, tokens a row, rows, or adapters."""
    tokens = sizes.growth_tokens
    small = sizes.growth_models[0] if not sizes.isolated else "7M"
    if series == "size":
        shapes = {count_parameters(shape): shape for shape in sizes.growth_models}
        return {count: Place(shape, max(1, tokens // 256), min(256, tokens)) for count, shape in shapes.items()}
    if series == "length":
        return {n: Place(small, max(1, 4 * tokens // n), n) for n in sizes.lengths}
    return {n: Place(small, n, 128) for n in sizes.batches}


def count_parameters(shape: str) -> int:
    """Parameters of a shape, without memory for them."""
    with torch.device("meta"):
        return GPT2LMHeadModel(shape_config(shape)).num_parameters()


def growth_points(sizes: Sizes, series: str, x: float) -> list[Point]:
    """The point of both methods at `x`, or why it is not measured."""
    place, points = places(sizes, series)[x], []
    for method in GROWING:
        with torch.device("meta"):
            need = estimate_memory(
                GPT2LMHeadModel(shape_config(place.shape, place.positions())), method, place.batch, place.length,
                pick_device(),
            )  # fmt: skip
        point = {"x": x, "method": method, "shape": place.shape, "batch": place.batch, "length": place.length}
        if not need.fits:
            points.append(point | {"reason": f"{NOT_MEASURED}: needs about {need.total / 2**30:.0f} GiB"})
            continue
        with own_process(sizes.isolated) as call:
            found = call(train_point, place, method, sizes.rounds_large)
        points.append(point | {name: found[name] for name in ("tokens_per_second", "peak_bytes", "step_seconds")})
    return points


def resident_points(sizes: Sizes, count: int) -> list[Point]:
    """Writing with `count` adapters on one base: one of them active, and a mixed batch; and what they take."""
    shape = "tiny" if not sizes.isolated else "mini"
    with own_process(sizes.isolated) as call:
        return [{"x": count, "shape": shape} | call(resident_point, shape, count, sizes.new_tokens, sizes.rounds_large)]


def resident_point(shape: str, count: int, new_tokens: int, rounds: int) -> Point:
    """Tokens a second of a batch of eight, and memory of the adapters."""
    base = endless(make_model(shape))
    before = memory_used()
    model = attach(base, "ia3").eval()
    for number in range(1, count):
        model.add_adapter(f"task{number}", ia3_config())
    names = list(model.peft_config)
    for number, name in enumerate(names):
        random_factors(model, number, name)
    taken = memory_used() - before
    chosen = [names[number % count] for number in range(ADAPTERS)]
    texts = prompts(ADAPTERS)

    def one() -> None:
        generate(model, tokenizer(), texts, new_tokens=new_tokens, do_sample=False)

    def mixed() -> None:
        with mixed_adapters(model, chosen) as ready:
            generate(ready, tokenizer(), texts, new_tokens=new_tokens, do_sample=False)

    times = interleave({run.__name__: partial(seconds, run) for run in (one, mixed)}, rounds)
    typical = {name: statistics.median(values) for name, values in times.items()}
    tokens = ADAPTERS * new_tokens
    return {
        "one_tokens_per_second": tokens / typical["one"], "mixed_tokens_per_second": tokens / typical["mixed"],
        "adapters_bytes": taken,
        "numbers_bytes": 4 * sum(p.numel() for n, p in model.named_parameters() if "ia3_l" in n),
    }  # fmt: skip


def memory_used() -> int:
    """Bytes in use now: those PyTorch has allocated on the GPU, else this process's resident ones."""
    if pick_device().type == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss
