"""Where memory ends: batches halve, the run stays the same; activations computed anew give the same gradients."""

from __future__ import annotations

import functools
import json

import launched
import pytest
import torch
import train as train_script
from conftest import make_tiny_model
from launched import VECTORS, assert_same_history
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from utils import training
from utils.adapters import attach
from utils.batches import SMALLER, batch_that_fitted, plan_of, smaller
from utils.shares import Plan
from utils.sizes import saved_for_backward

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
CONFIG = {"learning_rate": 0.1}


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """As in test_processes.py; models this small gain nothing from a second thread."""
    monkeypatch.setattr(training, "fast_bf16", lambda _device: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_memory(monkeypatch, rows: int, after: int) -> list[int]:
    """From the training forward pass number `after` on, more than `rows` rows do not fit; the sizes that were tried."""
    model = type(launched.RUNS["blocks"]()[1])
    forward, tried = model.forward, []

    @functools.wraps(forward)
    def limited(self, *arguments, **inputs):
        if self.training:
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > rows and len(tried) > after:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(model, "forward", limited)
    return tried


@pytest.mark.parametrize("after", [0, 6])
@pytest.mark.parametrize("rows", [4, 2])
def test_out_of_memory_halves_the_batch_and_leaves_the_run_as_it_was(tmp_path, monkeypatch, capsys, rows, after):
    """At the first step, and after a checkpoint (steps 4 and 8 have one): the same rows a step, losses and vectors."""
    whole, vectors, seen = launched.run("blocks", tmp_path / "whole")
    tried = small_memory(monkeypatch, rows, after)
    record, state, seen_now = launched.run("blocks", tmp_path / "short")
    assert max(tried) == 8 and tried[-1] <= rows
    assert_same_history(record.history, whole.history)
    assert max((state[key] - vectors[key]).abs().max().item() for key in vectors) < VECTORS
    assert record.hardware["batch"] == rows and record.config == whole.config
    steps_after = (8 if after else 12) * (8 // rows)  # with what was tried in vain before them
    together = [sum(seen_now[-steps_after:][i : i + 8 // rows], []) for i in range(0, steps_after, 8 // rows)]
    assert together == seen[-(8 if after else 12) :]
    assert "going on with 4" in capsys.readouterr().out and not (tmp_path / "short" / SMALLER).exists()


def test_out_of_memory_with_one_row_is_an_error(tmp_path, monkeypatch):
    small_memory(monkeypatch, rows=0, after=0)
    with pytest.raises(training.TrainingError, match="out of memory with one row at a time: use checkpointing"):
        launched.run("blocks", tmp_path)


def test_one_process_uses_one_gpu_where_there_are_several(tmp_path, monkeypatch):
    """Left alone, the Trainer takes all GPUs it sees, and as many batches for a step: another run than on one GPU."""

    class TwoGpus(training.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(training, "TrainingArguments", TwoGpus)
    device, options = torch.device("cpu"), {"learning_rate": 0.1, "steps": 4, "seed": 0}
    assert training.training_arguments(launched.PROFILE, tmp_path, device, **options).train_batch_size == 8
    assert TwoGpus(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True).train_batch_size == 16


def test_another_error_is_not_taken_for_a_full_memory(tmp_path, monkeypatch):
    def broken(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(training.BlockTrainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        launched.run("blocks", tmp_path)


def test_of_several_processes_the_next_start_goes_on_with_half(tmp_path):
    """One process cannot change its batch while the others wait for it."""
    plan = plan_of(launched.PROFILE, processes=2)
    with pytest.raises(training.TrainingError, match="start the same command again, it goes on with 2"):
        smaller(plan, tmp_path, CONFIG, torch.OutOfMemoryError(OUT_OF_MEMORY))
    assert batch_that_fitted(tmp_path, CONFIG) == 2
    assert plan_of(launched.PROFILE, 2, batch_that_fitted(tmp_path, CONFIG)) == Plan(8, 2, 2, 2)
    assert batch_that_fitted(tmp_path, CONFIG | {"steps": 3}) is None  # the note is of another run


def test_the_launcher_starts_again_only_where_batches_became_smaller(tmp_path, monkeypatch):
    batches, started = iter([8, 4]), []

    def processes(command: list[str], env: dict[str, str]) -> int:
        started.append(env["OMP_NUM_THREADS"])
        if batch := next(batches, None):
            (tmp_path / SMALLER).write_text(json.dumps({"batch": batch}), encoding="utf-8")
        return 1

    monkeypatch.setattr(train_script.subprocess, "call", processes)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert train_script.start(2, ["--processes", "2", "--folder", str(tmp_path)]) == 1
    assert started == ["1", "1", "1"]  # two with news about memory, one without


@pytest.mark.parametrize("method", ["ia3", "ia3_kv", "lora", "bitfit", "bottleneck", "full"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(method):
    """Without `enable_input_require_grads`: the non-reentrant kind needs no input that wants a gradient."""
    gradients, kept = [], []
    ids = torch.arange(32).reshape(2, 16)
    for checkpointing in (False, True):
        model = attach(make_tiny_model(), method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with saved_for_backward(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        kept.append(saved.bytes)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.6 * kept[0]


def test_train_with_checkpointing_is_the_same_run(tmp_path, monkeypatch):
    forward, passes = GPT2MLP.forward, []
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: passes.append(self.training) or forward(self, x))
    whole, vectors, _ = launched.run("blocks", tmp_path / "whole")
    once = sum(passes)
    passes.clear()
    record, state, _ = launched.run("blocks", tmp_path / "short", checkpointing=True)
    assert sum(passes) == 2 * once > 0  # each block forward, and once more on the way back
    assert_same_history(record.history, whole.history)
    assert max((state[key] - vectors[key]).abs().max().item() for key in vectors) < VECTORS


def test_checkpointing_is_off_again_after_training(tmp_path):
    _, model, rows, held_out = launched.RUNS["blocks"]()
    options = {"method": "ia3", "eval_blocks": held_out, "learning_rate": 0.1, "steps": 1, "checkpointing": True}
    training.train(model, rows, launched.PROFILE, folder=tmp_path, **options)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_prefix_tuning_cannot_be_checkpointed(tmp_path):
    _, _, rows, held_out = launched.RUNS["blocks"]()
    model = attach(make_tiny_model(), "prefix")
    with pytest.raises(training.TrainingError, match="cache, which checkpointing switches off"):
        training.train(
            model, rows, launched.PROFILE, method="prefix", eval_blocks=held_out, folder=tmp_path, checkpointing=True
        )
