"""Two processes give what one gives: the same steps, losses and numbers; process 0 writes; resuming on another number.

Tolerances: two processes may add in another order, and Adam divides by the size of a gradient, so that one that is only
rounding (a key's bias has none) moves its number too. Measured with one thread a process: losses within 1e-6, vectors
within 3e-7. Where one process accumulates the batches that two compute side by side ("classes", "answers"), what is
learned is equal to the bit; with other batches all weights of the classifier were seen 3e-5 apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import launched
import pytest
import torch
from conftest import make_tiny_model
from launched import SIZES, VECTORS, WEIGHTS, assert_same_history
from safetensors.torch import load_file

from utils import processes, scale, training
from utils.processes import ProcessError, require_processes
from utils.runs import RunRecord
from utils.settings import ROOT

RUNS = list(launched.RUNS)
TO_THE_END = [*RUNS, "blocks.resumed"]


@pytest.fixture(scope="module", autouse=True)
def float32():
    """Rounding to bfloat16 would hide what is compared; one thread, as `torchrun` gives each process."""
    original, threads = training.fast_bf16, torch.get_num_threads()
    training.fast_bf16 = lambda _device: False
    torch.set_num_threads(1)
    yield
    training.fast_bf16 = original
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, tuple]:
    """What a single process gives, by run."""
    return {name: launched.run(name, tmp_path_factory.mktemp(name)) for name in RUNS}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of a launch of two processes with all runs; that of "blocks.resumed" was begun by a single one."""
    folder = tmp_path_factory.mktemp("two")
    launched.run("blocks.resumed", folder / "blocks.resumed", kill=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(ROOT / "tests" / "launched.py"), str(folder), *RUNS, "blocks.resumed", "blocks.killed", *SIZES]
    done = subprocess.run(command + arguments, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def told(folder: Path, name: str) -> list[dict]:
    """What each of the two processes told of a run."""
    return [json.loads((folder / f"{name}-{index}.json").read_text(encoding="utf-8")) for index in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_both_together_see_the_rows_of_one_process_each_once(one, two, name):
    first, second = (process["seen"] for process in told(two, name))
    together = [a + b for a, b in zip(first, second, strict=True)]
    assert [len(step) for step in together[:3]] in ([8, 8, 1], [8, 1, 8]) and [] in first
    assert list(chain(*together)) == list(chain(*one[name][2]))


@pytest.mark.parametrize("name", TO_THE_END)
def test_losses_are_those_of_one_process(one, two, name):
    """Training losses a step, held-out losses with every row counted once; after a resume on two processes too."""
    whole = one[name.split(".")[0]][0]
    for process in told(two, name):
        assert_same_history(process["record"]["history"], whole.history)
        assert process["record"]["config_id"] == whole.config_id and process["record"]["config"] == whole.config


@pytest.mark.parametrize("name", TO_THE_END)
def test_the_numbers_learned_are_those_of_one_process(one, two, name):
    states = [load_file(two / f"{name}-{index}.safetensors") for index in (0, 1)]
    alone = one[name.split(".")[0]][1]
    assert all(torch.equal(states[0][key], states[1][key]) for key in alone)
    tolerance = WEIGHTS if name == "classes" else VECTORS
    assert max((states[0][key] - alone[key]).abs().max().item() for key in alone) < tolerance


def test_process_0_alone_writes_and_prints(two):
    first, second = told(two, "blocks")
    assert first["saved"] == ["running.json", "run.json"] and second["saved"] == []
    assert first["printed"].count("held-out loss") == 3 and second["printed"] == ""
    record = RunRecord.load(two / "blocks" / "run.json")
    assert record.hardware["processes"] == 2 and record.hardware["batch"] == 4


def test_a_run_killed_in_two_processes_goes_on_in_one(one, two):
    record, state, _ = launched.run("blocks", two / "blocks.killed")
    whole, numbers, _ = one["blocks"]
    assert record.time["steps_timed"] == 8  # from the checkpoint of step 4, not from the start
    assert_same_history(record.history, whole.history)
    assert max((state[key] - numbers[key]).abs().max().item() for key in numbers) < VECTORS


def test_a_run_killed_in_one_process_goes_on_in_two(two):
    assert [process["record"]["time"]["steps_timed"] for process in told(two, "blocks.resumed")] == [8, 8]


def test_processes_with_other_settings_are_told_so(tmp_path, monkeypatch):
    """What process 1 does when process 0 sends the decision of a run at another learning rate."""
    _, model, rows, held_out = launched.RUNS["blocks"]()
    monkeypatch.setattr(training, "decided_by_first", lambda value: (None, [], value[2] | {"learning_rate": 1.0}))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(training.TrainingError, match="process 1 and process 0 differ in learning_rate"):
        training.train(
            model, rows, launched.PROFILE, method="ia3", eval_blocks=held_out, folder=tmp_path, learning_rate=0.1
        )


def test_an_evaluation_leaves_no_mark_that_would_keep_processes_apart(tmp_path):
    """With Accelerate's mark on it a model is not wrapped for DDP: each process trains alone and nothing says so."""
    _, model, rows, held_out = launched.RUNS["blocks"]()
    seen = []

    class Watcher(training.BlockTrainer):
        def train(self, *arguments, **options):
            seen.append(vars(self.model).get("_is_accelerate_prepared"))
            return super().train(*arguments, **options)

    original, training.BlockTrainer = training.BlockTrainer, Watcher
    try:
        training.train(
            model, rows, launched.PROFILE, method="ia3", eval_blocks=held_out, folder=tmp_path, learning_rate=0.1
        )
    finally:
        training.BlockTrainer = original
    assert seen == [None] and "_is_accelerate_prepared" not in vars(model)


def test_without_a_launcher_there_is_one_process():
    assert processes.process_count() == 1 and processes.process_index() == 0
    assert processes.decided_by_first({"a": 1}) == {"a": 1}
    processes.wait_for_all()
    require_processes(1)


@pytest.mark.parametrize("running", [1, 2, 4])
def test_another_number_of_processes_than_asked_for_is_an_error(monkeypatch, running):
    monkeypatch.setenv("WORLD_SIZE", str(running))
    require_processes(running)
    with pytest.raises(ProcessError, match=f"3 processes were asked for, and {running} run: .*torchrun"):
        require_processes(3)


def accelerate_launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *arguments]
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "RANK", "WORLD"))}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=outside)


def test_accelerates_silent_single_process_is_refused(tmp_path):
    """What we guard against is real: asked for two, it starts one. Our command says so, and trains nothing."""
    script = tmp_path / "count.py"
    script.write_text("import os\nprint('processes', os.environ.get('WORLD_SIZE', '1'))\n", encoding="utf-8")
    assert accelerate_launch(str(script)).stdout.split() == ["processes", "1"]
    refused = accelerate_launch("scripts/train.py", "--processes", "2", "--folder", str(tmp_path / "run"))
    assert refused.returncode != 0 and "2 processes were asked for, and 1 run" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", SIZES)
def test_communication_is_what_the_formulas_say(two, size):
    """On two sizes: gradients all-reduced; weights gathered, and held, where they are sharded (docs/scale.md)."""
    config = make_tiny_model(**SIZES[size]).config
    shape, blocks = scale.gpt2_size(size, config), config.n_layer
    padding = 4 * blocks * scale.sharding_padding(config, processes=2)
    vectors = scale.task_bytes(shape)
    for seen in told(two, size):
        assert seen["all_reduced"] == scale.all_reduced_bytes(shape.trained) == vectors
        assert seen["gathered"] == scale.gathered_bytes(shape, weight=4) + 2 * (vectors + padding)
        assert seen["scattered"] == vectors + padding
        assert max(seen["parallel_gap"], seen["sharded_gap"]) < 1e-7
    held = sum(seen["held"] for seen in told(two, size))
    assert held == 4 * (shape.parameters + shape.trained)
    assert max(seen["held"] for seen in told(two, size)) < 0.53 * held
