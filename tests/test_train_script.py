"""scripts/train.py: notebook 02's run from the command line; two processes end as one does; the engines' files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_tiny_model
from safetensors.torch import load_file

from utils.adapters import scaling_vectors
from utils.config import ROOT
from utils.runs import RunRecord
from utils.saving import load_adapter

LOSS, VECTORS = 5e-6, 5e-6  # two processes add in another order; docs/scale.md says these
LAUNCHED = str(ROOT / "tests" / "launched.py")
ENVIRONMENT = os.environ | {"LAB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
LAUNCHERS = (
    ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    ("accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "ddp.yaml"), "--num_processes", "2"),
)


def run(folder: Path, *before: str) -> str:
    """Train in `folder`, in a process or what `before` starts; what was printed."""
    command = [sys.executable, *before, LAUNCHED, "--folder", str(folder), "--task", "negative", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder)
    return folder


@pytest.mark.slow
def test_one_process_trains_records_and_saves_an_adapter(alone):
    record = RunRecord.load(alone / "run.json")
    assert (record.status, record.method, record.task, record.seed) == ("finished", "ia3", "negative", 1)
    model = load_adapter(make_tiny_model(), alone / "adapter")
    assert any((l != 1).any() for l in scaling_vectors(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher[0].split(".")[0])
def test_two_processes_end_as_one_does_and_only_process_0_writes(alone, tmp_path, launcher):
    """Each step's rows are the same, half of them in each process."""
    printed = run(tmp_path / "run", "-m", *launcher)
    one, two = (RunRecord.load(folder / "run.json") for folder in (alone, tmp_path / "run"))
    assert two.hardware["processes"] == 2 and printed.count("held-out loss") == 3 + 1
    assert [row.keys() for row in two.history] == [row.keys() for row in one.history]
    for ours, theirs in zip(two.history, one.history, strict=True):
        assert ours == pytest.approx(theirs, abs=LOSS)
    assert (two.config, two.config_id, two.metrics["best_step"]) == (
        one.config,
        one.config_id,
        one.metrics["best_step"],
    )
    vectors = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (alone, tmp_path / "run")]
    assert max((vectors[0][name] - vectors[1][name]).abs().max().item() for name in vectors[0]) < VECTORS


def test_accelerate_reads_the_engines_files_as_meant():
    """Its own loader, which refuses unknown keys."""
    ddp, fsdp = (load_config_from_file(str(ROOT / "configs" / f"{name}.yaml")) for name in ("ddp", "fsdp"))
    assert (ddp.distributed_type, fsdp.distributed_type) == ("MULTI_GPU", "FSDP") and not ddp.use_cpu
    assert fsdp.fsdp_config["fsdp_version"] == 2 and fsdp.fsdp_config["fsdp_reshard_after_forward"]
