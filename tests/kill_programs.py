"""Small programs to be killed at a moment, and the child process that runs one (tests/test_kills.py forks it).

A process that multiprocessing's fork server starts has everything imported. An event is a change of a file or folder
that Python announces (open for writing, rename, remove, mkdir): a child killed at event n dies just before it. "torn":
killed when half of the n-th file that torch or safetensors write is on the disk.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import conftest
import safetensors.torch
import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from study import __main__ as compare
from study import ablations, comparison, cost, records
from utils.adapters import attach
from utils.config import PROFILES
from utils.data import to_blocks
from utils.saving import save_adapter
from utils.session import quiet
from utils.training import train

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.link", "os.symlink", "os.truncate"}
PROFILE = replace(
    PROFILES["mini"], block_length=16, batch_size=4, steps=6, eval_every=2, eval_blocks=4, train_reviews=8,
    samples_per_prompt=1, new_tokens=4, learning_rates={"ia3": 3e-2, "full": 1e-2},
)  # fmt: skip


def tiny_model() -> GPT2LMHeadModel:
    """Two layers with dropout: a run that is continued needs the random state to give the same numbers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


REVIEWS = conftest.reviews.__wrapped__()
TOKENIZER: PreTrainedTokenizerFast = conftest.tokenizer.__wrapped__(REVIEWS)


# --- the programs ---


def run_train(folder: Path, method: str = "ia3") -> None:
    """Train the tiny model in `folder`, as a notebook's cell does."""
    blocks = to_blocks(Dataset.from_list(REVIEWS), TOKENIZER, 16)
    model = attach(tiny_model(), method)
    train(model, blocks, PROFILE, method=method, eval_blocks=blocks.select(range(4)), folder=folder / method)


def run_full(folder: Path) -> None:
    """The same with all weights trained: checkpoints hold a whole model."""
    run_train(folder, "full")


def run_older(folder: Path) -> None:
    """An adapter in the place of which `run_save` puts another."""
    save_vectors(folder / "positive adapter", 0.5)


def run_save(folder: Path) -> None:
    """Replace the adapter in `folder` by one whose vectors are all 1.5."""
    save_vectors(folder / "positive adapter", 1.5)


def save_vectors(folder: Path, value: float) -> None:
    """An adapter of the tiny model with every scaling vector at `value`."""
    model = attach(tiny_model(), "ia3")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    save_adapter(model, TOKENIZER, folder, config_id="tiny")


def run_compare(folder: Path) -> None:
    """The comparison of `python -m study`: the base, (IA)³ on both tasks, its adapters."""
    os.environ["LAB_ARTIFACTS"] = str(folder / "artifacts")
    parts = DatasetDict({name: Dataset.from_list(REVIEWS) for name in ("pretrain", "adapter", "validation", "test")})
    comparison.load_reviews = lambda profile: parts
    comparison.load_judges = lambda profile, reviews: {"words": conftest.EveryOther()}
    model = tiny_model()
    for module in (ablations, comparison, cost):
        module.load_base = lambda profile: (copy.deepcopy(model), TOKENIZER)
    compare.ASSETS = records.ASSETS = folder / "assets"
    bench = comparison.Bench(PROFILE)
    records.make_all(bench, compare.comparison_jobs(bench, ["base", "ia3"], [0]))


PROGRAMS = {
    "train": run_train, "full": run_full, "older": run_older, "save": run_save, "compare": run_compare,
}  # fmt: skip


# --- one child ---


def watch(folder: Path, at: int | None) -> dict:
    """Count changes below `folder`; the process ends by SIGKILL just before change number `at`."""
    seen = {"events": 0}

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(str(folder)):
            seen["events"] += 1
            if seen["events"] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def tear(at: int | None) -> list[str]:
    """List the files that torch and safetensors write; when half of the `at`-th is there, SIGKILL."""
    written: list[str] = []

    def watched(write: Callable) -> Callable:
        def wrote(what: object, path: str, *arguments: object, **options: object) -> None:
            write(what, path, *arguments, **options)
            if isinstance(path, (str, Path)):  # not torch.save into memory
                written.append(str(path))
                if len(written) == at:
                    os.truncate(path, os.path.getsize(path) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrote

    safetensors.torch.serialize_file, torch.save = watched(safetensors.torch.serialize_file), watched(torch.save)
    return written


def child(program: str, folder: Path, kill: dict, report: Connection) -> None:
    """Run the program; what it prints, and its error, go to a log in its folder."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    torn, seen = tear(kill.get("torn")), watch(folder, kill.get("event"))
    PROGRAMS[program](folder)
    report.send({"events": seen["events"], "torn": len(torn)})


if os.environ.get("KILLED_FROM_HERE"):  # in the fork server: run all once, so that no child imports anything late
    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        run_full(Path(scratch))
        run_compare(Path(scratch))
    gc.freeze()  # or each child's first collection copies every page of the imported libraries
