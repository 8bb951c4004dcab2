"""What the parts of the benchmark share: a row, how much is measured, models, a process of one's own."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from utils import generation
from utils.adapters import load_base
from utils.config import PROFILES, Profile
from utils.generation import ratios
from utils.gpu import pick_device
from utils.session import quiet, reuse_freed_memory

Row = dict[str, object]
PROCESSOR_TIME = "BENCH_PROCESSOR_TIME"  # an environment variable, so that processes started from here read it too
PROFILE_OF: dict[str, Profile] = {"mini": PROFILES["mini"], "tiny": PROFILES["mini"], "124M": PROFILES["gpt2"]}
SHAPES = {"tiny": (2, 32, 2, 8192), "124M": (12, 768, 12, 50257)}  # layers, width, heads, vocabulary


@dataclass(frozen=True)
class Sizes:
    """How much is measured of one model; `rounds` of every interleaved run, `steps` of training a turn."""

    rounds: int = 5
    steps: int = 4
    reviews: int = PROFILES["mini"].train_reviews
    samples: int = 16  # of each of the course's prompts
    new_tokens: int = 60
    products: tuple[int, ...] = (1024, 2048)  # sizes of the square products, the fastest of which is the yardstick
    isolated: bool = True  # training in processes of its own


def sizes(quick: bool) -> dict[str, Sizes]:
    """By model: what takes minutes on this machine, or seconds for a trial."""
    if quick:
        small = {"rounds": 1, "steps": 2, "reviews": 24, "samples": 1, "new_tokens": 3, "products": (32,)}
        return {"tiny": Sizes(**small, isolated=False)}
    if pick_device().type == "cuda":
        return dict.fromkeys(("mini", "124M"), Sizes(rounds=7, steps=20, products=(4096, 8192)))
    return {"mini": Sizes(), "124M": Sizes(rounds=2, steps=1, samples=1)}


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
        "value": statistics.median(values), "yardstick": statistics.median(yardstick),
        "ratio": ratio.median, "low": ratio.low, "high": ratio.high, "rounds": len(values), "settings": settings,
    }  # fmt: skip


def make_model(shape: str) -> GPT2LMHeadModel:
    """The embedded model for "mini", else random weights of this shape; on the session's device, evaluation mode."""
    if shape == "mini":
        return load_base(PROFILES["mini"])[0]
    torch.manual_seed(0)
    layers, width, heads, vocabulary = SHAPES[shape]
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0,
        loss_type="ForCausalLM",
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(pick_device()).eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's, for every shape: what is timed is the number of tokens."""
    return load_base(PROFILES["mini"], "cpu")[1]


@contextmanager
def own_process(isolated: bool = True) -> Iterator[Callable[..., object]]:
    """Yields `call(function, ...)`, which runs a module's function in one fresh process: its memory and its settings
    are its own, and what it keeps in a `functools.cache` is there at the next call. Not `isolated`: runs it here."""
    if not isolated:
        yield lambda function, *arguments: function(*arguments)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(quiet).result()
        pool.submit(reuse_freed_memory).result()  # as a notebook does at its start
        yield lambda function, *arguments: pool.submit(partial(function, *arguments)).result()


def now() -> float:
    """Seconds by the clock; of this process's processor time where `PROCESSOR_TIME` is set to 1.

    On a machine that others use as well the clock measures them too. Processor time, on one thread, does not: several
    threads wait for each other, and their waiting counts as work.
    """
    return time.process_time() if os.environ.get(PROCESSOR_TIME) == "1" else time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one call (`now`)."""
    return generation.seconds(run, now)
