"""What the parts of the benchmark share: a row, the sizes, models of a shape, reviews, a process of one's own.

For: `bench.py` and the modules `bench_*.py` beside it. Not for: measuring.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from statistics import median

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from utils import generation
from utils.adapters import load_base
from utils.config import PROFILES
from utils.data import load_reviews, read_packaged_reviews, select_reviews
from utils.generation import ratios
from utils.gpu import pick_device

Row = dict[str, object]
MINI = PROFILES["mini"]
NOT_MEASURED = "not measured"
PROCESSOR_TIME = "BENCH_PROCESSOR_TIME"  # an environment variable, so that processes started from here read it too
# (layers, width, heads, vocabulary): the embedded model's relatives, then GPT-2's four sizes (Radford et al. 2019)
SHAPES = {
    "tiny": (2, 32, 2, 8192),
    "5M": (4, 256, 4, 8192),
    "7M": (6, 256, 4, 8192),
    "21M": (8, 416, 8, 8192),
    "51M": (12, 576, 9, 8192),
    "124M": (12, 768, 12, 50257),
    "355M": (24, 1024, 16, 50257),
    "774M": (36, 1280, 20, 50257),
    "1558M": (48, 1600, 25, 50257),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `rounds` of every interleaved run, and `steps` of training a turn."""

    models: tuple[str, ...] = ("mini", "124M")
    rounds: int = 5
    rounds_large: int = 2  # for what takes many seconds a turn
    steps: int = 4
    steps_large: int = 1
    reviews: int = MINI.train_reviews
    prompts: int = 64
    new_tokens: int = 60
    products: tuple[int, ...] = (1024, 2048)
    growth_models: tuple[str, ...] = ("5M", "7M", "21M", "51M", "124M")
    growth_tokens: int = 1024
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    residents: tuple[int, ...] = (1, 4, 16, 64, 256)
    isolated: bool = True  # each measurement in a fresh process

    def turns(self, model: str) -> tuple[int, int]:
        """(rounds, training steps a turn) for this model: fewer for GPT-2's size."""
        small = model in ("mini", "tiny") or torch.cuda.is_available()
        return (self.rounds, self.steps) if small else (self.rounds_large, self.steps_large)


ON_CUDA = {
    "products": (4096, 8192), "growth_models": tuple(name for name in SHAPES if name != "tiny"), "growth_tokens": 8192,
    "lengths": (128, 256, 512, 1024, 2048, 4096), "batches": (1, 4, 16, 64, 128), "rounds": 7, "steps": 20,
    "residents": (1, 4, 16, 64, 256, 1024),
}  # fmt: skip
QUICK = {
    "models": ("tiny",), "rounds": 1, "rounds_large": 1, "steps": 2, "steps_large": 2, "reviews": 24, "prompts": 2,
    "new_tokens": 3, "products": (32,), "growth_models": ("tiny",), "growth_tokens": 32, "lengths": (16, 32),
    "batches": (1, 2), "residents": (1, 2), "isolated": False,
}  # fmt: skip


def sizes(quick: bool) -> Sizes:
    """Those of this machine, or those of a trial run."""
    if quick:
        return Sizes(**QUICK)
    return Sizes(**(ON_CUDA if pick_device().type == "cuda" else {}))


def row(
    name: str,
    what: str,
    against: str,
    values: Sequence[float],
    yardstick: Sequence[float],
    *,
    unit: str,
    better: str = "higher",
    reach: float | None = None,
    **settings: object,
) -> Row:
    """One line of the benchmark: `values` over `yardstick`, which are in `unit`, round by round.

    `better`: whether a "higher" or a "lower" ratio is. `reach`: the ratio that was aimed at.
    """
    ratio = ratios(values, yardstick)
    return {
        "name": name, "what": what, "against": against, "unit": unit, "better": better, "reach": reach,
        "value": median(values), "yardstick": median(yardstick),
        "ratio": ratio.median, "low": ratio.low, "high": ratio.high, "rounds": len(values), "settings": settings,
    }  # fmt: skip


def unmeasured(name: str, what: str, against: str, reason: str) -> Row:
    """The line of something that this machine cannot measure."""
    return {"name": name, "what": what, "against": against, "ratio": None, "reason": f"{NOT_MEASURED}: {reason}"}


def reached(line: Row) -> bool | None:
    """Whether the ratio is as good as was aimed at; None where nothing was aimed at, or measured."""
    if line["ratio"] is None or line["reach"] is None:
        return None
    return line["ratio"] >= line["reach"] if line["better"] == "higher" else line["ratio"] <= line["reach"]


def shape_config(shape: str, positions: int = 1024) -> GPT2Config:
    """GPT-2 of this shape without dropout, with the fused GELU of the embedded model."""
    layers, width, heads, vocabulary = SHAPES[shape]
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=positions, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0,
        loss_type="ForCausalLM",
    )  # fmt: skip


def make_model(shape: str, positions: int = 1024, attention: str = "sdpa") -> GPT2LMHeadModel:
    """The embedded model for "mini", else random weights of this shape; on the session's device, evaluation mode."""
    if shape == "mini":
        return load_base(MINI)[0]
    torch.manual_seed(0)
    config = shape_config(shape, positions)
    config._attn_implementation = attention
    return GPT2LMHeadModel(config).to(pick_device()).eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's, for every shape: what is timed is the number of tokens."""
    return load_base(MINI, "cpu")[1]


def now() -> float:
    """Seconds by the clock; of this process's processor time where `PROCESSOR_TIME` is set to 1.

    On a machine that others use as well the clock measures them too. Processor time, on one thread, does not: several
    threads wait for each other, and their waiting counts as work.
    """
    return time.process_time() if os.environ.get(PROCESSOR_TIME) == "1" else time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one call (`now`)."""
    return generation.seconds(run, now)


def positive_reviews(count: int) -> list[str]:
    """The first `count` positive reviews that adapters train on; of a few, whichever come first in the file."""
    if count < 100:
        return [review["text"] for review in islice((r for r in read_packaged_reviews() if r["label"]), count)]
    return list(select_reviews(load_reviews(MINI)["adapter"], "positive", count)["text"])


Call = Callable[..., object]  # call(function, *arguments, **options)


@contextmanager
def own_process(isolated: bool = True) -> Iterator[Call]:
    """Yields `call(function, ...)`, which runs a module's function in one fresh process: its memory and its settings
    are its own, and what it keeps in a `functools.cache` is there at the next call. Not `isolated`: runs it here."""
    if not isolated:
        yield lambda function, *arguments, **options: function(*arguments, **options)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(quiet_process).result()
        yield lambda function, *arguments, **options: pool.submit(partial(function, *arguments, **options)).result()


def quiet_process() -> None:
    """What a notebook does at its start, the profile apart."""
    from utils.config import quiet
    from utils.memory import reuse_freed_memory

    quiet()
    reuse_freed_memory()
