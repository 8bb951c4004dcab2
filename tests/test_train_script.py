"""scripts/train.py: notebook 02's run from the command line; as many processes as were asked for, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import train as train_script
from conftest import make_tiny_model
from datasets import Dataset

from utils import adapters, config, data
from utils.adapters import scaling_vectors
from utils.config import PROFILES
from utils.runs import RunRecord
from utils.storage import load_adapter

SMALL = {"block_length": 16, "batch_size": 4, "steps": 3, "eval_every": 1, "eval_blocks": 4, "train_reviews": 16}


@pytest.fixture
def course(monkeypatch, reviews, tokenizer, tmp_path):
    """Notebook 02's surroundings on the tiny model."""
    parts = {part: Dataset.from_list(reviews) for part in ("adapter", "validation")}
    monkeypatch.setattr(adapters, "load_base", lambda _profile: (make_tiny_model(), tokenizer))
    monkeypatch.setattr(data, "load_reviews", lambda _profile: parts)
    monkeypatch.setattr(config, "setup_notebook", lambda: replace(PROFILES["mini"], **SMALL))
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    monkeypatch.setenv("LAB_PROFILE", "mini")
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path


def test_one_process_trains_records_and_saves_an_adapter(course, capsys):
    assert train_script.main(["--task", "negative", "--seed", "1", "--folder", str(course / "run")]) == 0
    record = RunRecord.load(course / "run" / "run.json")
    assert (record.status, record.method, record.task, record.seed) == ("finished", "ia3", "negative", 1)
    model = load_adapter(make_tiny_model(), course / "run" / "adapter")
    assert any((l != 1).any() for l in scaling_vectors(model).values())
    assert "3 steps on 1 process\n" in capsys.readouterr().out


def test_without_a_folder_the_run_goes_where_artefacts_go(course):
    options = train_script.parse(["--method", "lora", "--seed", "2"])
    assert train_script.folder_of(options) == course / "artifacts" / "mini" / "train" / "positive-lora-seed2"
    options = train_script.parse(["--lab", "bert-paraphrase"])
    where = "artifacts/bert-paraphrase-mini/train/bert-paraphrase-ia3-seed0"
    assert train_script.folder_of(options) == course / where


def test_inside_a_launcher_the_number_must_agree(course, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit, match="2 processes were asked for, and 4 run"):
        train_script.main(["--processes", "2"])


def test_outside_a_launcher_they_are_started(course, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    commands = []
    monkeypatch.setattr(train_script.subprocess, "call", lambda command, env: commands.append(command) or 0)
    assert train_script.main(["--processes", "2", "--seed", "5"]) == 0
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert commands[0][-4:] == ["--processes", "2", "--seed", "5"]
