"""The labs' models: read from packages' files where they are installed, of the same shape and random where not."""

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hub_server import HubServer
from labs import tiny, tiny_model
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification

from utils import standins, training
from utils.adapters import AdapterError, attach_recipe, base_fingerprint, load_adapter, merge, save_adapter
from utils.checks import read_pins
from utils.encoding import encode, make_collator
from utils.hub import HubError
from utils.made_tokenizers import made_tokenizer
from utils.onnx_weights import read_weights
from utils.recipes import RECIPES
from utils.settings import ROOT
from utils.standins import WHEELS, StandInError, Wheel, load_model, wheel_folder
from utils.tasks import STS, load_task
from utils.trainer import PerLabelTrainer

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
    wheel = WHEELS[model]
    if wheel_folder(wheel) is None or (model == "flan-t5-small" and importlib.util.find_spec("onnx") is None):
        pytest.skip(f"{wheel.package} is not installed: make env-extensions")


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
    with pytest.raises(StandInError, match=r"config.json has SHA-256.*pip install .*some-package==1.0"):
        wheel_folder(replace(wheel, files=(("config.json", "0" * 64),)))
    with pytest.raises(StandInError, match="weights.bin is missing"):
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


@pytest.mark.parametrize("lab", LABS)
def test_without_its_package_a_lab_gets_random_weights_and_is_told_so(lab, monkeypatch):
    monkeypatch.setattr(standins, "wheel_folder", lambda wheel: None)
    recipe = replace(tiny(lab), model=RECIPES[lab]["mini"].model, shape={**tiny(lab).shape, "vocab_size": 1024})
    model, tokenizer, what = load_model(recipe)
    assert "RANDOM weights" in what and ("make env-extensions" in what) == (recipe.model in WHEELS)
    assert len(tokenizer) <= 1024 and not model.training
    again, _, _ = load_model(recipe)
    assert base_fingerprint(again) == base_fingerprint(model)
    encoded = encode(recipe, load_task(replace(recipe, data="nothing"))["train"].select(range(4)), tokenizer)
    assert torch.isfinite(model(**make_collator(recipe, tokenizer)(list(encoded))).loss)
    shutil.rmtree(standins.artifacts_dir(recipe) / "standins")  # this shape is the test's own


def test_without_onnx_flan_t5_is_random_too(monkeypatch, tmp_path):
    monkeypatch.setattr(standins, "wheel_folder", lambda wheel: tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = replace(tiny("mt0-sentiment"), model="flan-t5-small")
    _, _, what = load_model(recipe)
    assert "the package onnx is not installed" in what
    shutil.rmtree(standins.artifacts_dir(recipe) / "standins")


def test_made_tokenizers_follow_their_models_rules_and_are_always_the_same():
    bert, t5, bloom = made_tokenizer("bert"), made_tokenizer("mt5"), made_tokenizer("bloom")
    pair = bert("A film", "A Film")
    assert bert.decode(pair["input_ids"]) == "[CLS] a film [SEP] a film [SEP]" and set(pair["token_type_ids"]) == {0, 1}
    assert t5("a film")["input_ids"][-1] == t5.eos_token_id == 1 and t5.pad_token_id == 0
    assert bloom.decode(bloom("龘 and 苹果")["input_ids"]) == "龘 and 苹果"
    for kind, tokenizer in (("bert", bert), ("t5", t5), ("bloom", bloom)):
        assert made_tokenizer(kind).get_vocab() == tokenizer.get_vocab() and len(tokenizer) <= 1024


def test_the_full_model_comes_from_the_hub_at_its_revision(monkeypatch, tmp_path, tokenizer):
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    close_session()
    recipe = replace(
        tiny("bert-paraphrase"), size="full", model="google-bert/bert-base-uncased", model_revision="a" * 40
    )
    made = tiny_model(recipe)
    made.save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    with HubServer({("model", recipe.model): {recipe.model_revision: files}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        model, _, what = load_model(recipe)
        assert base_fingerprint(model) == base_fingerprint(made) and "at aaaaaaaa on the Hub" in what
        assert model.config._name_or_path == recipe.model
        with pytest.raises(
            HubError, match="(?s)no such revision.*recipe bert-paraphrase-full.*LAB_MODELS_DIR.*bert-base"
        ):
            load_model(replace(recipe, model_revision="b" * 40))


# --- saved and loaded again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lab", LABS)
def test_one_step_moves_the_adapter_alone_and_what_is_saved_comes_back(lab, tmp_path):
    """On the real stand-in where it is installed: train a step, save, reload with peft's own AutoPeftModel."""
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
    model = attach_recipe(tiny_model(recipe), recipe).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(5, 300, (2, 6))
    merged = merge(model)
    assert type(merged).__name__ == "BertForSequenceClassification"
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
