"""Recipes: chosen, checked, counted at full size without a download, and trained by the main course's `train`."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model
from datasets import Dataset
from labs import tiny, tiny_model
from peft import IA3Config, get_peft_model
from transformers import BertModel

from extensions import recipes
from extensions.encoding import make_collator
from extensions.models import build_model, model_config
from extensions.recipes import BERT_DOCUMENT, RECIPES, describe_recipe, load_recipe
from extensions.training import PREDICTED_BY_TYPE, PerLabelTrainer, attach_recipe, predict_bert_count, recipe_config
from utils import training
from utils.adapters import AdapterError, base_fingerprint
from utils.config import PROFILES, ConfigError
from utils.runs import RunRecord
from utils.sizes import count_parameters

LABS = tuple(RECIPES)
ALL = [recipe for sizes in RECIPES.values() for recipe in sizes.values()]
BERT, MT0, BLOOM = (RECIPES[lab]["full"] for lab in LABS)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("LAB_PROFILE", "LAB_OVERRIDE", "LAB_MODELS_DIR", "LAB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


# --- choosing -----------------------------------------------------------------------------------------------------


def test_argument_then_environment_then_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_recipe("mt0-sentiment") == RECIPES["mt0-sentiment"]["mini"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_recipe("mt0-sentiment").size == "full"
    monkeypatch.setenv("LAB_PROFILE", "mini")
    assert load_recipe("mt0-sentiment").size == "mini" and load_recipe("mt0-sentiment", "full") == MT0
    monkeypatch.setenv("LAB_PROFILE", "gpt2")  # the large profile of the main course
    assert load_recipe("mt0-sentiment").size == "full"


def test_overrides_and_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_OVERRIDE", "epochs=1,train_examples=60,eval_examples=0")
    recipe = load_recipe("bert-paraphrase", "mini")
    assert (recipe.epochs, recipe.train_examples, recipe.eval_examples) == (1, 60, 0)
    monkeypatch.delenv("LAB_OVERRIDE")
    (tmp_path / "mt0-large").mkdir()
    (tmp_path / "financial_phrasebank").mkdir()
    monkeypatch.setenv("LAB_MODELS_DIR", str(tmp_path))
    monkeypatch.setenv("LAB_DATA_DIR", str(tmp_path))
    recipe = load_recipe("mt0-sentiment", "full")
    assert recipe.local_model == (tmp_path / "mt0-large").resolve() and recipe.model_revision is None
    assert recipe.local_data == (tmp_path / "financial_phrasebank").resolve()
    assert str(tmp_path) not in json.dumps(recipe.settings()) + describe_recipe(recipe)
    mini = load_recipe("mt0-sentiment", "mini")
    assert mini.model == "flan-t5-small" and mini.labels == MT0.labels and mini.local_data == recipe.local_data
    with pytest.raises(ConfigError, match="LAB_DATA_DIR: there is no folder .*mrpc"):
        load_recipe("bert-paraphrase", "mini")


@pytest.mark.parametrize(
    ("lab", "size", "override", "words"),
    [
        ("bert", None, "", "unknown lab 'bert': choose from bert-paraphrase"),
        ("bert-paraphrase", "large", "", "unknown size 'large'.*mini, full"),
        ("bert-paraphrase", "mini", "steps=4", "unknown field 'steps'.*epochs"),
        ("bert-paraphrase", "mini", "epochs=0", "epochs=0.*more than 0"),
    ],
)
def test_a_bad_choice_says_what_there_is(monkeypatch, lab, size, override, words):
    monkeypatch.setenv("LAB_OVERRIDE", override)
    with pytest.raises(ConfigError, match=words):
        load_recipe(lab, size or "mini")


def test_a_wrong_task_type_lists_the_right_ones():
    with pytest.raises(ConfigError, match="'SEQ_CLASSIFICATION'.*SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM"):
        replace(BERT, task_type="SEQ_CLASSIFICATION")  # as document 001 spells it


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_what_comes_from_the_hub_is_pinned_and_everything_is_said_in_one_line(recipe):
    pins = (recipe.model_revision, recipe.data_revision)
    if recipe.size == "full":
        assert all(len(pin) == 40 or pin.startswith("refs/pr/") for pin in pins)
    else:
        assert pins == (None, None)
    line = describe_recipe(recipe)
    assert all(part in line for part in (recipe.name, recipe.model, recipe.data)) and "\n" not in line
    assert json.loads(json.dumps(recipe.settings()))["expected"] == dict(recipe.expected)


@pytest.mark.parametrize(
    ("examples", "batch", "accumulation", "epochs", "evals", "schedule"),
    [(100, 10, 1, 3, 1, (30, 10)), (101, 10, 1, 3, 1, (33, 11)), (100, 1, 8, 1, 4, (12, 3)), (3, 1, 1, 2, 8, (6, 1))],
)
def test_epochs_become_steps(examples, batch, accumulation, epochs, evals, schedule):
    recipe = tiny(LABS[0], batch_size=batch, accumulation=accumulation, epochs=epochs, evals_per_epoch=evals)
    assert recipe.schedule(examples) == schedule
    assert PROFILES["mini"].schedule(examples) == (120, 20)  # the main course counts steps


# --- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_counts_of_every_model_without_a_download(recipe):
    counted = count_parameters(attach_recipe(build_model(recipe, "meta"), recipe))
    assert {"trainable": counted.trainable, "total": counted.total} == dict(recipe.expected)
    assert counted.trainable == PREDICTED_BY_TYPE[recipe.model_type](model_config(recipe))


def test_counts_groups_and_the_commit_are_those_the_documents_name():
    assert (BERT.expected["trainable"], MT0.expected["trainable"], BLOOM.expected["trainable"]) == (
        56_834, 282_624, 344_064,
    )  # fmt: skip
    assert (MT0.expected["total"], BLOOM.expected["total"]) == (1_229_863_936, 1_303_455_744)
    assert recipe_config(MT0).revision == MT0.model_revision and recipe_config(MT0).task_type == "SEQ_2_SEQ_LM"
    groups = count_parameters(build_model(BERT, "meta")).groups
    assert groups["attention"] == 12 * 4 * (768 * 768 + 768) and groups["head"] == 2 * 769
    assert groups["feed-forward"] == 12 * (2 * 768 * 3072 + 768 + 3072)


def test_bert_at_the_documents_places_and_without_a_task_type():
    document = replace(BERT, **BERT_DOCUMENT)
    counted = count_parameters(attach_recipe(build_model(BERT, "meta"), document))
    assert (counted.trainable, counted.total) == (29_186, 109_512_964)
    assert predict_bert_count(model_config(BERT), inside=False) == 29_186
    silent = recipe_config(document)
    silent.task_type = None
    model = get_peft_model(build_model(BERT, "meta"), silent)
    assert (count_parameters(model).trainable, count_parameters(model).total) == (27_648, 109_511_426)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "classifier" in name)


@pytest.mark.parametrize("recipe", [MT0, BLOOM], ids=lambda recipe: recipe.name)
def test_the_places_are_pefts_own_for_these_architectures(recipe):
    ours = attach_recipe(build_model(recipe, "meta"), recipe)
    theirs = get_peft_model(build_model(recipe, "meta"), IA3Config(task_type=recipe.task_type))
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]


# --- places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lab", LABS)
def test_unknown_targets_list_what_the_model_has(lab):
    recipe = tiny(lab, target_modules=("key_proj", "ffn_out"))
    known = {"bert": "self.key", "t5": "SelfAttention.k", "bloom": "self_attention.query_key_value"}[recipe.model_type]
    with pytest.raises(AdapterError, match=rf"no key_proj and no ffn_out.*{known}"):
        attach_recipe(tiny_model(recipe), recipe)
    with pytest.raises(AdapterError, match=r"has no \.\*nothing"):
        recipe_config(replace(recipe, target_modules=".*nothing", feedforward_modules=()), tiny_model(recipe))


def test_places_and_task_types_that_are_not_the_models_are_refused():
    recipe = tiny("bert-paraphrase", target_modules=("key", "value"), feedforward_modules=("intermediate.dense",))
    with pytest.raises(AdapterError, match=r"no intermediate\.dense"):
        recipe_config(recipe, tiny_model(recipe))
    bert, mt0, bloom = (tiny(lab) for lab in LABS)
    for recipe, other, does in ((bert, mt0, "SEQ_2_SEQ_LM"), (mt0, bloom, "CAUSAL_LM"), (bloom, bert, "SEQ_CLS")):
        with pytest.raises(AdapterError, match=f"{recipe.task_type} does not fit .*{does}"):
            recipe_config(recipe, tiny_model(other))
    with pytest.raises(AdapterError, match="SEQ_CLS does not fit BertModel, which is for FEATURE_EXTRACTION"):
        recipe_config(bert, BertModel(model_config(bert)))
    with pytest.raises(AdapterError, match="no query_key_value"):
        recipe_config(RECIPES["bloom-chinese-instructions"]["mini"], make_tiny_model())


def test_methods():
    recipe = tiny("bert-paraphrase")
    head = attach_recipe(tiny_model(recipe), recipe, "head")
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    full = count_parameters(attach_recipe(tiny_model(recipe), recipe, "full"))
    assert full.trainable == full.total
    with pytest.raises(AdapterError, match="choose from ia3, head, full, base"):
        attach_recipe(tiny_model(recipe), recipe, "lora")
    with pytest.raises(AdapterError, match="SEQ_CLS does not fit"):
        attach_recipe(tiny_model(tiny("mt0-sentiment")), tiny("mt0-sentiment"), "head")
    with pytest.raises(AdapterError, match="already carries"):
        attach_recipe(attach_recipe(tiny_model(recipe), recipe), recipe)


# --- training -----------------------------------------------------------------------------------------------------


def examples(lab: str, count: int = 16) -> Dataset:
    """Encoded examples of unequal length, the second half of them with more labels where labels are tokens."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(5, 300, (n,), generator=generator).tolist()  # noqa: E731
    rows = []
    for number in range(count):
        ids = draw(5 + number % 4)
        if lab == "bert-paraphrase":
            labels = number % 2
        elif lab == "mt0-sentiment":
            labels = draw(1 + 3 * (number >= count // 2))
        else:
            labels = [-100, -100, *ids[2:]]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Dataset.from_list(rows)


def run(lab, folder, tokenizer, **changes):
    recipe = tiny(lab, learning_rates={"ia3": 3e-2}, **changes)
    model, data = attach_recipe(tiny_model(recipe), recipe), examples(lab)
    record = training.train(
        model, data, recipe, method="ia3", eval_blocks=data, folder=folder, collator=make_collator(recipe, tokenizer),
        trainer_class=PerLabelTrainer,
    )  # fmt: skip
    return model, record


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(training, "fast_bf16", lambda _: False)


@pytest.mark.parametrize("lab", LABS)
def test_a_recipe_trains_its_adapter_and_head_and_nothing_else(lab, tokenizer, tmp_path):
    before = base_fingerprint(tiny_model(tiny(lab)))
    model, record = run(lab, tmp_path, tokenizer)
    assert record.status == "finished" and RunRecord.load(tmp_path / "run.json") == record
    assert [row["step"] for row in record.history if "eval_loss" in row] == [0, 4, 8]
    assert record.metrics["best_loss"] < record.metrics["start_loss"]
    assert record.profile == f"{lab}-mini" and record.config["train_examples"] == 16
    assert base_fingerprint(model) == before
    fresh = dict(attach_recipe(tiny_model(tiny(lab)), tiny(lab)).named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, fresh[name])}
    assert moved == {name for name, p in fresh.items() if p.requires_grad}


@pytest.mark.parametrize("lab", LABS)
def test_accumulation_changes_nothing_but_memory(lab, tokenizer, tmp_path):
    """The plain Trainer takes BERT and T5 for models that divide by all labels of a step, and doubles their loss."""
    _, whole = run(lab, tmp_path / "whole", tokenizer)
    _, halves = run(lab, tmp_path / "halves", tokenizer, batch_size=2, accumulation=2)
    assert [row["step"] for row in whole.history] == [row["step"] for row in halves.history]
    for a, b in zip(whole.history, halves.history, strict=True):
        assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize("lab", LABS)
@torch.no_grad()
def test_the_held_out_loss_is_the_mean_over_labels_however_they_are_batched(lab, tokenizer, tmp_path):
    recipe = tiny(lab)
    model, data = tiny_model(recipe), examples(lab)
    sums, counts = 0.0, 0
    for example in data:
        batch = make_collator(recipe, tokenizer)([example])
        labels = (batch["labels"] != -100).sum().item()
        sums, counts = sums + model(**batch).loss.item() * labels, counts + labels
    with torch.enable_grad():
        _, record = run(lab, tmp_path, tokenizer, batch_size=3)
    assert record.history[0]["eval_loss"] == pytest.approx(sums / counts, abs=1e-4)


def test_too_few_examples_say_so(tokenizer, tmp_path):
    with pytest.raises(training.TrainingError, match="16 examples are less than one batch of 32"):
        run("bert-paraphrase", tmp_path, tokenizer, batch_size=32)


def test_a_lab_starts_quiet_and_seeded():
    recipe = recipes.setup_lab("bert-paraphrase", "mini")
    drawn = torch.rand(1)
    recipes.setup_lab("bert-paraphrase", "mini")
    assert recipe == RECIPES["bert-paraphrase"]["mini"] and torch.equal(torch.rand(1), drawn)
