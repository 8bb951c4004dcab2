"""Using adapters: batched writing, latency attached and merged, switching, mixed batches, what an import costs.

Not for: training (`bench_training.py`), growth (`bench_growth.py`).
"""

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

from bench.rows import PROCESSOR_TIME, Row, Sizes, make_model, now, row, seconds, tokenizer
from utils.adapters import AdapterLibrary, attach, ia3_parameters, merge
from utils.config import PROFILES
from utils.data import PROMPTS
from utils.generation import evaluation_mode, generate, interleave, latency, mixed_adapters
from utils.gpu import pick_device
from utils.settings import ROOT
from utils.storage import save_adapter

SAMPLING = {name: PROFILES["mini"].sampling[name] for name in ("temperature", "top_p")}
ADAPTERS = 8
YARDSTICKS = {  # the bare import loads no model's code: transformers does that when a class is asked for
    "bare": "import torch, transformers",
    "libraries": "import torch\nfrom transformers import AutoTokenizer, GPT2LMHeadModel",
}
AGAINST = {"bare": "import torch, transformers", "libraries": "the same with GPT-2 and a tokenizer of transformers"}
NOTEBOOKS = ("01-Setup.ipynb", "02-Train.ipynb", "03-Inference.ipynb", "04-Compare.ipynb")


def prompts(count: int) -> list[str]:
    """The course's openings, over and over."""
    return [PROMPTS[number % len(PROMPTS)] for number in range(count)]


def endless(model: torch.nn.Module) -> torch.nn.Module:
    """The model without an end token: every text has all the tokens that were asked for."""
    model.generation_config.eos_token_id = None
    return model


def one_by_one(model: torch.nn.Module, texts: list[str], new_tokens: int) -> list[str]:
    """One `generate` call for each prompt, as the documents do, sampling as the course does."""
    tok, written = tokenizer(), []
    with evaluation_mode(model):
        for text in texts:
            inputs = tok(text, return_tensors="pt").to(model.device)
            ids = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=True, top_k=0, pad_token_id=tok.eos_token_id, **SAMPLING
            )
            written.append(tok.decode(ids[0, inputs["input_ids"].shape[1] :]))
    return written


def generating_rows(sizes: Sizes, model: str) -> list[Row]:
    """Writing for many prompts at once against one after the other; every text has `new_tokens` tokens."""
    base, texts = endless(make_model(model)), prompts(sizes.prompts)
    ways = {
        "together": lambda: generate(base, tokenizer(), texts, new_tokens=sizes.new_tokens, **SAMPLING),
        "one by one": lambda: one_by_one(base, texts, sizes.new_tokens),
    }
    rounds = sizes.turns(model)[0]
    times = interleave({name: partial(seconds, way) for name, way in ways.items()}, rounds)
    tokens = sizes.prompts * sizes.new_tokens
    together, apart = ([tokens / value for value in times[name]] for name in ways)
    return [row(
        f"generating-{model}", f"writing {sizes.prompts} x {sizes.new_tokens} tokens on {model}, one batch",
        "one generate call a prompt", together, apart, unit="tokens/s", reach=6.0, **SAMPLING,
    )]  # fmt: skip


@torch.no_grad()
def random_factors(model: PeftModel, seed: int, name: str = "default") -> None:
    """Fill an adapter's vectors with numbers around 1, as learned ones are."""
    stream = torch.Generator().manual_seed(seed)
    for parameter in ia3_parameters(model, name).values():
        parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=stream))


def latency_rows(sizes: Sizes, model: str) -> list[Row]:
    """Time to write a token with (IA)³ attached and merged, against the base, greedy, one text."""
    attached = attach(make_model(model), "ia3").eval()
    random_factors(attached, 0)
    models = {"base": make_model(model), "attached": attached, "merged": merge(attached)}
    rounds = 3 * sizes.turns(model)[0]
    found = {r["name"]: r for r in latency(models, tokenizer(), new_tokens=sizes.new_tokens, repeats=rounds)}
    base = found["base"]["ms_per_token_median"]
    return [
        {
            "name": f"latency-{model}-{name}", "what": f"writing a token on {model}, (IA)³ {name}",
            "against": "the base model", "unit": "ms/token", "better": "lower", "reach": reach,
            "value": found[name]["ms_per_token_median"], "yardstick": base, "ratio": found[name]["ratio_to_first"],
            "low": found[name]["ratio_low"], "high": found[name]["ratio_high"], "rounds": rounds,
            "settings": {"new_tokens": sizes.new_tokens, "batch": 1},
        }
        for name, reach in (("attached", 1.07), ("merged", 1.01))
    ]  # fmt: skip


@contextmanager
def stored_adapters(model: str, count: int) -> Iterator[Path]:
    """A temporary folder with the base in `base` and `count` adapters in `task0`, `task1`, ...; yields it."""
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), make_model(model)
        base.save_pretrained(folder / "base")
        attached = attach(base, "ia3").eval()
        for number in range(count):
            random_factors(attached, number)
            save_adapter(attached, tokenizer(), folder / f"task{number}")
        yield folder


def filled_library(model: str, folder: Path, count: int) -> AdapterLibrary:
    """A library with the adapters of `stored_adapters`."""
    library = AdapterLibrary(GPT2LMHeadModel.from_pretrained(folder / "base").eval(), tokenizer())
    library.base.to(pick_device())
    for number in range(count):
        library.load(f"task{number}", folder / f"task{number}")
    return library


def switching_rows(sizes: Sizes, model: str) -> list[Row]:
    """Switching the adapter of a library (half of going there and back), against reading base and adapter again."""
    with stored_adapters(model, 2) as folder:
        library = filled_library(model, folder, 2)
        times = 200

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
    """One batch in which each of eight rows has its own adapter, against eight passes: writing, and reading."""
    texts = prompts(ADAPTERS)
    ids = torch.randint(0, 8192, (ADAPTERS, 128))
    with stored_adapters(model, ADAPTERS) as folder:
        library = filled_library(model, folder, ADAPTERS)
    endless(library.base)
    names = library.tasks
    ids = ids.to(library.base.device)

    def write_mixed() -> None:
        with mixed_adapters(library.model, names) as ready:
            generate(ready, library.tokenizer, texts, new_tokens=sizes.new_tokens, do_sample=False)

    def write_in_turn() -> None:
        for name, text in zip(names, texts, strict=True):
            library.generate(name, [text], new_tokens=sizes.new_tokens, do_sample=False)

    @torch.inference_mode()
    def read_mixed() -> None:
        with mixed_adapters(library.model, names) as ready:
            ready(input_ids=ids)

    @torch.inference_mode()
    def read_in_turn() -> None:
        for number, name in enumerate(names):
            with library.use(name) as ready:
                ready(input_ids=ids[number : number + 1])

    runs = (write_mixed, write_in_turn, read_mixed, read_in_turn)
    times = interleave({run.__name__: partial(seconds, run) for run in runs}, sizes.turns(model)[0])
    cases = (("write", f"writing {ADAPTERS} x {sizes.new_tokens} tokens", 4.0), ("read", "one pass of 8 x 128", None))
    return [
        row(
            f"mixed-{model}-{kind}", f"{model}, {what}: {ADAPTERS} passes, an adapter each",
            "one batch, each row its adapter", times[f"{kind}_in_turn"], times[f"{kind}_mixed"], unit="s", reach=reach,
        )
        for kind, what, reach in cases
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


def course_imports() -> str:
    """Every import of the course's own modules that the four notebooks make, as one program."""
    code = [
        line
        for name in NOTEBOOKS
        for cell in json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
        for line in "".join(cell["source"]).splitlines()
        if line.startswith("from utils")
    ]
    modules = sorted({line.split()[1] for line in code})
    return "import " + ", ".join(modules)


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


def opening_programs() -> dict[str, tuple[str, str]]:
    """By name, what is run and against which of the two yardsticks: the import of the course, first results."""
    course = course_imports()
    return {
        "all that the notebooks import of utils": (course, "libraries"),
        "the same import": (course, "bare"),
        **{f"first result of {name[:2]}": (first_cells(ROOT / name), "bare") for name in NOTEBOOKS},
    }


def opening_rows(sizes: Sizes) -> list[Row]:
    """Importing the course, and each notebook's first result, in fresh processes, against the libraries alone."""
    programs = opening_programs()
    codes = dict.fromkeys([*YARDSTICKS.values(), *(code for code, _ in programs.values())])
    times = interleave({code: partial(process_seconds, code) for code in codes}, sizes.rounds)
    return [
        row(f"opening-{name.replace(' ', '-')}", name, AGAINST[yardstick], times[code], times[YARDSTICKS[yardstick]],
            unit="s", better="lower", reach=1.2)
        for name, (code, yardstick) in programs.items()
    ]  # fmt: skip
