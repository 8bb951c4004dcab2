"""Using adapters: writing, switching, mixed batches, memory of training by method, and how soon a notebook answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GPT2LMHeadModel

from bench.rows import PROCESSOR_TIME, PROFILE_OF, Row, Sizes, make_model, now, own_process, row, seconds, tokenizer
from extensions.mixed import mixed_adapters
from study.cost import training_cost
from utils.adapters import METHODS, attach, ia3_parameters
from utils.config import PROFILES, ROOT
from utils.data import PROMPTS
from utils.generation import evaluation_mode, generate, interleave
from utils.gpu import pick_device
from utils.saving import AdapterLibrary, save_adapter

SAMPLING = {name: PROFILES["mini"].sampling[name] for name in ("temperature", "top_p")}
ADAPTERS = 8
LIBRARIES = "import torch, transformers"
NOTEBOOKS = ("01-Setup.ipynb", "02-Train.ipynb", "03-Inference.ipynb", "04-Compare.ipynb")
MEMORY_OF = {  # the methods whose memory is measured: all of them where a step takes seconds
    "mini": ("full", "ia3", "ia3_kv", "lora", "bitfit", "prefix", "bottleneck"),
    "124M": ("full", "ia3", "lora"),
    "tiny": ("full", "ia3"),
}


def endless(model: torch.nn.Module) -> torch.nn.Module:
    """The model without an end token: every text has all the tokens that were asked for."""
    model.generation_config.eos_token_id = None
    return model


def library_texts(model: GPT2LMHeadModel, samples: int, new_tokens: int) -> list[str]:
    """What `generate` of ours writes, by transformers' own `generate`: the same batch and the same distribution."""
    tok = tokenizer()
    inputs = tok(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    with evaluation_mode(model):
        ids = model.generate(
            **inputs, num_return_sequences=samples, max_new_tokens=new_tokens, do_sample=True, top_k=0,
            pad_token_id=tok.pad_token_id, **SAMPLING,
        )  # fmt: skip
    return tok.batch_decode(ids[:, inputs["input_ids"].shape[1] :])


def generating_rows(sizes: Sizes, model: str) -> list[Row]:
    """Sampling `samples` texts of each of the course's prompts, all in one batch; no text ends early."""
    base, rows = endless(make_model(model)), len(PROMPTS) * sizes.samples
    options = {"samples": sizes.samples, "new_tokens": sizes.new_tokens}
    ways = {
        "ours": lambda: generate(base, tokenizer(), PROMPTS, batch_size=rows, **options, **SAMPLING),
        "theirs": lambda: library_texts(base, **options),
    }
    times = interleave({name: partial(seconds, way) for name, way in ways.items()}, sizes.rounds)
    ours, theirs = ([rows * sizes.new_tokens / value for value in times[name]] for name in ways)
    return [row(
        f"generating-{model}", f"writing {rows} x {sizes.new_tokens} tokens on {model}, the course's generate",
        "model.generate on the same batch", ours, theirs, unit="tokens/s", reach=3.0, **SAMPLING,
    )]  # fmt: skip


@contextmanager
def stored_adapters(model: str, count: int) -> Iterator[Path]:
    """A temporary folder with the base in `base` and `count` adapters in `task0`, `task1`, ...; yields it."""
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), make_model(model)
        base.save_pretrained(folder / "base")
        attached = attach(base, "ia3").eval()
        for number in range(count):
            stream = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for parameter in ia3_parameters(attached).values():
                    parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=stream))
            save_adapter(attached, tokenizer(), folder / f"task{number}")
        yield folder


def filled_library(folder: Path, count: int) -> AdapterLibrary:
    """A library with the adapters of `stored_adapters`."""
    library = AdapterLibrary(GPT2LMHeadModel.from_pretrained(folder / "base").eval().to(pick_device()), tokenizer())
    for number in range(count):
        library.load(f"task{number}", folder / f"task{number}")
    return library


def switching_rows(sizes: Sizes, model: str) -> list[Row]:
    """Switching the adapter of a library (half of going there and back), against reading base and adapter again."""
    times = 200
    with stored_adapters(model, 2) as folder:
        library = filled_library(folder, 2)

        def switch() -> None:
            for _ in range(times):
                with library.use("task1"):
                    pass

        def reload() -> None:
            base = GPT2LMHeadModel.from_pretrained(folder / "base")
            PeftModel.from_pretrained(base, folder / "task1").eval().to(library.model.device)

        measured = interleave(
            {"switch": lambda: seconds(switch) / (2 * times), "reload": partial(seconds, reload)}, sizes.rounds
        )
    return [row(
        f"switching-{model}", f"{model}: reading base and adapter from disk again",
        "a switch by AdapterLibrary.use", measured["reload"], measured["switch"], unit="s", reach=1000.0,
    )]  # fmt: skip


def mixed_rows(sizes: Sizes, model: str) -> list[Row]:
    """Writing with one batch in which each of eight rows has its own adapter, against eight passes."""
    with stored_adapters(model, ADAPTERS) as folder:
        library = filled_library(folder, ADAPTERS)
    endless(library.base)
    texts, names = PROMPTS[:ADAPTERS], library.tasks
    options = {"new_tokens": sizes.new_tokens, "do_sample": False}

    def mixed() -> None:
        with mixed_adapters(library.model, names) as ready:
            generate(ready, library.tokenizer, texts, **options)

    def in_turn() -> None:
        for name, text in zip(names, texts, strict=True):
            library.generate(name, [text], **options)

    times = interleave({run.__name__: partial(seconds, run) for run in (mixed, in_turn)}, sizes.rounds)
    return [row(
        f"mixed-{model}-write",
        f"{model}, writing {ADAPTERS} x {sizes.new_tokens} tokens: {ADAPTERS} passes, an adapter each",
        "one batch, each row its adapter", times["in_turn"], times["mixed"], unit="s", reach=4.0,
    )]  # fmt: skip


def memory_rows(sizes: Sizes, model: str) -> list[Row]:
    """Peak memory of a training step of each method over that of full fine-tuning, a fresh process each."""
    profile = PROFILE_OF[model]
    batch, length = profile.batch_size, profile.block_length

    def peak(method: str) -> float:
        with own_process(sizes.isolated) as call:
            (cost,) = call(training_cost, partial(make_model, model), [method], batch, length, 1)
        return cost["peak_bytes"] / 2**20

    peaks = interleave({m: partial(peak, m) for m in MEMORY_OF[model]}, min(sizes.rounds, 2), warm_up=False)
    full = peaks.pop("full")
    return [
        row(f"memory-{model}-{method}", f"peak memory of training on {model}, {METHODS[method]}", METHODS["full"],
            values, full, unit="MiB", better="lower", batch=batch, length=length)
        for method, values in peaks.items()
    ]  # fmt: skip


def first_cells(notebook: Path) -> str:
    """The code cells of a notebook up to the first one that has shown something."""
    lines = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            lines.append("".join(cell["source"]))
            if cell["outputs"]:
                break
    return "\n".join(lines)


def process_seconds(code: str) -> float:
    """Seconds of a fresh Python process that runs `code` in the course's folder. Raises RuntimeError where it fails."""
    started, before = now(), os.times()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    elapsed, after = now() - started, os.times()
    if result.returncode:
        raise RuntimeError(f"a fresh process failed: {result.stderr.decode(errors='replace')[-300:]}")
    if os.environ.get(PROCESSOR_TIME) == "1":  # that of the process that was started, not of this one
        return after.children_user + after.children_system - before.children_user - before.children_system
    return elapsed


def opening_rows(sizes: Sizes) -> list[Row]:
    """From a fresh process to the first result of each notebook, against importing torch and transformers in one."""
    programs = {name: first_cells(ROOT / name) for name in NOTEBOOKS}
    codes = dict.fromkeys((LIBRARIES, *programs.values()))  # notebooks that begin alike are timed once
    times = interleave({code: partial(process_seconds, code) for code in codes}, sizes.rounds)
    return [
        row(f"opening-{name[:2]}", f"first result of {name[:2]}", LIBRARIES, times[code], times[LIBRARIES],
            unit="s", better="lower", reach=1.2)
        for name, code in programs.items()
    ]  # fmt: skip
