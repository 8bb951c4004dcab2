"""Exercises 2.9 and 3.6, whose answers are files: what a training saves passes, what went wrong is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from datasets import Dataset
from safetensors.torch import load_file, save_file

from exercises import FAIL, PASS, TODO, check
from utils.adapters import attach
from utils.config import PROFILES
from utils.data import review_blocks
from utils.saving import save_adapter
from utils.training import train


@pytest.fixture(scope="module")
def artefacts(tokenizer, reviews, tmp_path_factory) -> Path:
    """What a short training saves, as in 02."""
    place, profile = tmp_path_factory.mktemp("artefacts"), replace(PROFILES["mini"], batch_size=2, eval_every=1)
    model = attach(make_tiny_model(), "ia3")
    blocks = review_blocks(Dataset.from_list(reviews), "positive", tokenizer=tokenizer, block_length=16)
    settings = {"method": "ia3", "folder": place / "train" / "positive", "learning_rate": 0.03, "steps": 6}
    record = train(model, blocks, profile, eval_blocks=blocks, **settings)
    save_adapter(model, tokenizer, place / "adapters" / "positive", config_id=record.config_id)
    return place


@pytest.fixture
def folder(artefacts, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return shutil.copytree(artefacts, tmp_path / "artefacts")


def test_what_a_training_saves_passes_however_often_it_is_looked_at(folder):
    assert [check("2.9", folder, seed).state for seed in (0, 1)] == [PASS, PASS]


def test_nothing_saved_yet_is_todo_and_no_folder_at_all_is_wrong(tmp_path):
    assert [check("2.9", answer).state for answer in (tmp_path, None, ...)] == [TODO, TODO, TODO]
    assert str(check("2.9", tmp_path)).endswith("no trained adapter, or no curve, in artifacts/: run the cells above")
    for answer in (5, "artifacts", print):
        verdict = check("2.9", answer)
        assert verdict.state == FAIL and "a folder is due" in verdict.hint


@pytest.mark.parametrize(
    "damage", [shutil.rmtree, lambda f: next(f.rglob("adapter_model.safetensors")).write_bytes(b"")]
)
def test_a_checkpoint_that_cannot_be_read_is_no_mistake(folder, damage):
    checkpoint = folder / "train" / "positive" / "checkpoints"
    assert len(list(checkpoint.glob("checkpoint-*/adapter_model.safetensors"))) == 1  # the best step's
    damage(checkpoint)
    assert check("2.9", folder).state == PASS


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapters" / "positive" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def cut_short(folder: Path) -> None:
    path = folder / "train" / "positive" / "run.json"
    edit_json(path, history=json.loads(path.read_text(encoding="utf-8"))["history"][:-1])


def run(folder: Path, **changes: object) -> None:
    edit_json(folder / "train" / "positive" / "run.json", **changes)


WRONG = {
    "ones": (lambda f: edit_tensors(f, lambda t: {k: torch.ones_like(v) for k, v in t.items()}), "every factor is 1"),
    "nan": (lambda f: edit_tensors(f, lambda t: {k: v * torch.nan for k, v in t.items()}), "diverged"),
    "lora": (
        lambda f: edit_tensors(f, lambda t: {k.replace("ia3_l", "lora_A"): v for k, v in t.items()}),
        "other tens",
    ),
    "truncated": (lambda f: (f / "adapters/positive/adapter_model.safetensors").write_bytes(b"12345678"), "damaged"),
    "no probe": (lambda f: (f / "adapters/positive/probe.json").unlink(), "run 02-Train.ipynb first"),
    "not json": (lambda f: (f / "train/positive/run.json").write_text("{"), "delete it and run the training again"),
    "running": (lambda f: run(f, status="running"), "cut off"),
    "cut": (cut_short, "cut off"),
    "other run": (lambda f: run(f, config_id="another"), "different runs"),
    "worse": (lambda f: run(f, metrics={"start_loss": 4.0, "best_loss": 4.1}), "has not fallen"),
    "trained on": (lambda f: edit_tensors(f, lambda t: {k: v + 1e-4 for k, v in t.items()}), "other vectors than"),
    "other shapes": (lambda f: edit_tensors(f, lambda t: {k: v[:3] for k, v in t.items()}), "other vectors than"),
    "no metrics": (lambda f: run(f, metrics={}), "has not fallen"),
}


def test_an_own_style_is_read_from_its_own_folders_and_is_not_the_adapter_of_02(folder):
    assert check("3.6", folder).state == TODO
    for place in ("adapters", "train"):
        shutil.copytree(folder / place / "positive", folder / place / "style")
    assert "the adapter of 02 again" in check("3.6", folder).hint
    shutil.rmtree(folder / "adapters" / "positive")
    assert check("3.6", folder).state == PASS
    (folder / "train" / "style" / "run.json").write_text("{")
    assert "train/style/run.json is damaged" in check("3.6", folder).hint
    assert [check("3.6", answer).state for answer in (5, None)] == [FAIL, TODO]


@pytest.mark.parametrize("name", WRONG)
def test_what_went_wrong_is_named_in_one_line(folder, name):
    spoil, said = WRONG[name]
    spoil(folder)
    verdict = check("2.9", folder)
    assert verdict.state == FAIL and said in verdict.hint, verdict
    assert "\n" not in str(verdict) and len(str(verdict)) < 150
