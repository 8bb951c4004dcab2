"""What tests/test_processes.py runs in two processes, and in one to compare: small runs of every kind of loss.

    python -m torch.distributed.run --nproc_per_node 2 tests/launched.py FOLDER RUN ...

Each run trains in FOLDER/<run>; each process keeps what it saw in FOLDER/<run>-<rank>.json and .safetensors.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import make_tiny_model  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import distributed  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification  # noqa: E402

from extensions.recipes import BERT_MINI, BLOOM_MINI  # noqa: E402
from utils import training  # noqa: E402
from utils.adapters import attach  # noqa: E402
from utils.config import PROFILES  # noqa: E402
from utils.processes import join, process_index, wait_for_all  # noqa: E402
from utils.rivals import trainable_state  # noqa: E402
from utils.runs import RunRecord  # noqa: E402

PROFILE = replace(PROFILES["mini"], block_length=16, batch_size=8, steps=12, eval_every=4, eval_blocks=9)
CLASSES = replace(BERT_MINI, batch_size=4, accumulation=2, epochs=4)
ANSWERS = replace(BLOOM_MINI, batch_size=4, accumulation=2, epochs=4)
RATE = 3e-2
# How far rounding may move a loss, a learned vector, and any weight of a classifier; tests/test_processes.py.
LOSS, VECTORS, WEIGHTS = 5e-6, 5e-6, 3e-4


def ids(rows: int, length: int, seed: int) -> list[list[int]]:
    """Random tokens; 0 pads."""
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()


def packed(rows: int, seed: int = 1) -> Dataset:
    """Blocks as `data.to_blocks` makes them: every row has as many labels as any other."""
    blocks = ids(rows, PROFILE.block_length, seed)
    labels = [[-100, *block[1:]] for block in blocks]
    return Dataset.from_dict({"input_ids": blocks, "labels": labels}).with_format("torch")


def sentences(rows: int, seed: int = 2) -> Dataset:
    """Rows of one class each; whether the first token is an even number decides it."""
    blocks = ids(rows, 12, seed)
    return Dataset.from_dict({"input_ids": blocks, "labels": [block[0] % 2 for block in blocks]}).with_format("torch")


def answers(rows: int, seed: int = 3) -> Dataset:
    """Rows of which 1 to 11 tokens are an answer: no two shares of a step have as many labels."""
    blocks = ids(rows, 12, seed)
    labels = [[-100] * (1 + 5 * i % 11) + block[1 + 5 * i % 11 :] for i, block in enumerate(blocks)]
    return Dataset.from_dict({"input_ids": blocks, "labels": labels}).with_format("torch")


def classifier() -> torch.nn.Module:
    """A BERT of one layer without dropout, all of it trained."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


# by name: profile or recipe, the model with what is trained, training rows, held-out rows. Every run has 8 rows a step
# and one row too many for whole steps: the last step of an epoch leaves a process without a row.
RUNS = {
    "blocks": lambda: (PROFILE, attach(make_tiny_model(), "ia3"), packed(17), packed(9, seed=4)),
    "classes": lambda: (CLASSES, classifier(), sentences(9), sentences(9, seed=5)),
    "answers": lambda: (ANSWERS, attach(make_tiny_model(), "ia3"), answers(17), answers(9, seed=6)),
}
KILLED_AT = 7
SIZES = {"small": {"layers": 2, "width": 32}, "larger": {"layers": 4, "width": 64}}


def communicated(size: str) -> dict[str, float]:
    """Bytes that one step of (IA)³ moves between two processes, data-parallel and sharded, as the engines hand them on.

    Also each process's share of a sharded model, and how far its gradients are from those of a single process.
    """
    ids = torch.arange(64).reshape(4, 16)
    mine = ids[2 * process_index() : 2 * process_index() + 2]
    whole, parallel, sharded = (attach(make_tiny_model(**SIZES[size]), "ia3").train() for _ in range(3))
    whole(input_ids=ids, labels=ids).loss.backward()
    seen: dict[str, float] = {"all_reduced": 0, "gathered": 0, "scattered": 0}

    def count(_state, bucket):  # without annotations: DDP compares them with its own
        seen["all_reduced"] += bucket.buffer().nbytes
        return distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / 2)

    wrapped = torch.nn.parallel.DistributedDataParallel(parallel)
    wrapped.register_comm_hook(None, count)
    wrapped(input_ids=mine, labels=mine).loss.backward()
    for module in (*sharded.get_base_model().transformer.h, sharded):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    with counted("all_gather_single", seen, "gathered"), counted("reduce_scatter_single", seen, "scattered"):
        sharded(input_ids=mine, labels=mine).loss.backward()
    seen["held"] = sum(p.to_local().nbytes for p in sharded.parameters())
    wanted = [p.grad for p in whole.parameters() if p.requires_grad]
    for name, model in (("parallel_gap", parallel), ("sharded_gap", sharded)):
        found = [p.grad for p in model.parameters() if p.requires_grad]
        found = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
        seen[name] = max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    return seen


@contextlib.contextmanager
def counted(collective: str, seen: dict[str, float], name: str) -> Iterator[None]:
    """Add up the larger of both tensors of each call of `torch.distributed.<collective>`: the gathered whole."""
    original = getattr(distributed, collective)

    def counting(*arguments: object, **named: object) -> object:
        tensors = [t for t in (*arguments, *named.values()) if isinstance(t, torch.Tensor)]
        seen[name] += max(t.nbytes for t in tensors)
        return original(*arguments, **named)

    setattr(distributed, collective, counting)
    try:
        yield
    finally:
        setattr(distributed, collective, original)


def assert_same_history(a: list[dict], b: list[dict]) -> None:
    """Row by row the same steps and, within rounding, losses."""
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for ours, theirs in zip(a, b, strict=True):
        assert ours == pytest.approx(theirs, abs=LOSS)


class Killed(Exception):
    """Ends a run in the middle."""


def run(
    name: str, folder: Path, kill: bool = False, **options: object
) -> tuple[RunRecord | None, dict, list[list[list[int]]]]:
    """Train `name` in `folder`; the record, what was trained, and two tokens of each row of each forward pass.

    With `kill`, no record: the run ends after step `KILLED_AT`, with a checkpoint behind it.
    """
    profile, model, rows, held_out = RUNS[name.split(".")[0]]()
    seen: list[list[list[int]]] = []
    forward, on_step_end = type(model).forward, training.Progress.on_step_end

    @functools.wraps(forward)  # the Trainer keeps the columns that its signature names
    def watched(self: torch.nn.Module, *arguments: object, **inputs: torch.Tensor) -> object:
        if self.training:
            real = inputs["labels"].reshape(len(inputs["labels"]), -1).ne(-100).any(1)
            seen.append(inputs["input_ids"][real, :2].tolist())
        return forward(self, *arguments, **inputs)

    def killer(self: training.Progress, args: object, state: object, control: object, **named: object) -> None:
        if kill and state.global_step == KILLED_AT:
            raise Killed
        on_step_end(self, args, state, control, **named)

    type(model).forward, training.Progress.on_step_end = watched, killer
    record = None
    try:
        record = training.train(
            model, rows, profile, method="ia3", eval_blocks=held_out, folder=folder, learning_rate=RATE, **options
        )
    except Killed:
        pass
    finally:
        type(model).forward, training.Progress.on_step_end = forward, on_step_end
    return record, trainable_state(model), seen


def main(folder: Path, names: list[str]) -> None:
    """Command line: "blocks" trains to the end, "blocks.killed" is killed, "blocks.resumed" goes on in its folder.

    "small" and "larger" train nothing: they count what one step communicates.
    """
    training.fast_bf16 = lambda _device: False  # rounding to bfloat16 would hide what is compared
    save, saved = RunRecord.save, []
    RunRecord.save = lambda self, path: saved.append(Path(path).name) or save(self, path)
    for name in names:
        if name in SIZES:
            join(torch.device("cpu"))
            (folder / f"{name}-{process_index()}.json").write_text(json.dumps(communicated(name)), encoding="utf-8")
            continue
        saved.clear()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            record, state, seen = run(name, folder / name, kill=name.endswith(".killed"))
        what = {"record": record and asdict(record), "seen": seen, "saved": saved, "printed": printed.getvalue()}
        (folder / f"{name}-{process_index()}.json").write_text(json.dumps(what), encoding="utf-8")
        save_file(state, folder / f"{name}-{process_index()}.safetensors")
        wait_for_all()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
