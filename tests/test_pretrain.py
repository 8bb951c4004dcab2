"""The pretraining script on a few reviews: exact resume, the recipe guarded, an export that loads."""

import json
from dataclasses import replace

import pretrain
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

RECIPE = pretrain.Recipe(
    layers=1, width=16, heads=2, context=32, vocabulary=300, dropout=0.1, epochs=2.0, batch=4, warmup_steps=2
)


@pytest.fixture(autouse=True)
def few_reviews(monkeypatch, reviews):
    monkeypatch.setattr(pretrain, "read_packaged_reviews", lambda: iter(reviews))
    monkeypatch.setattr(
        pretrain, "split_reviews", lambda rows: dict.fromkeys(("pretrain", "validation", "test"), list(rows))
    )
    yield
    torch.optim._muon._zeropower_via_newtonschulz = ORIGINAL


ORIGINAL = torch.optim._muon._zeropower_via_newtonschulz


def weights(folder):
    return {name: t for name, t in load_file(folder / "checkpoint.safetensors").items() if not name.startswith("rng")}


def run(folder, recipe=RECIPE, save_every=0.0):
    folder.mkdir(exist_ok=True)
    pretrain.train(recipe, folder, save_every, compile_model=False)
    return weights(folder)


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    original = pretrain.batch_at

    def killer(blocks, at, recipe):
        if at == step:
            raise Killed
        return original(blocks, at, recipe)

    monkeypatch.setattr(pretrain, "batch_at", killer)
    return original


def test_resume_is_exact_with_dropout(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "HISTORY_EVERY", 5)
    whole = run(tmp_path / "whole")
    original = kill_at(monkeypatch, 13)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.setattr(pretrain, "batch_at", original)
    resumed = run(tmp_path / "cut")
    assert whole.keys() == resumed.keys() and len(whole) > 10
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_recipe_is_refused_but_a_longer_hold_is_the_same_path(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "HISTORY_EVERY", 5)
    kill_at(monkeypatch, 7)
    with pytest.raises(Killed):
        run(tmp_path)
    with pytest.raises(SystemExit, match="another recipe"):
        run(tmp_path, replace(RECIPE, seed=1))
    with pytest.raises(Killed):
        run(tmp_path, replace(RECIPE, epochs=3.0))  # step 5 lies before either decay
    with pytest.raises(SystemExit, match="another recipe"):
        run(tmp_path, replace(RECIPE, epochs=0.2))  # step 5 would lie in its decay


def test_rate_warms_up_holds_and_decays():
    recipe = replace(RECIPE, warmup_steps=10, decay_share=0.5)
    rates = [pretrain.rate_at(step, 100, recipe) for step in range(100)]
    assert rates[0] == 0.1 and rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5) and 0 < rates[-1] <= 0.02
    assert rates[:50] == [pretrain.rate_at(step, 200, recipe) for step in range(50)]


def test_each_epoch_sees_every_block_once():
    blocks = torch.arange(24).view(12, 2)
    epochs = [torch.cat([pretrain.batch_at(blocks, 3 * e + i, RECIPE) for i in range(3)]) for e in range(2)]
    assert [sorted(e[:, 0].tolist()) for e in epochs] == [list(range(0, 24, 2))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()


def test_float32_newton_schulz_is_muons_own_to_bf16_accuracy():
    grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    coefficients = (3.4445, -4.7750, 2.0315)
    ours, theirs = (f(grad, coefficients, 5, 1e-7).float() for f in (pretrain.newton_schulz_float32, ORIGINAL))
    assert torch.allclose(ours, theirs, atol=0.05)
    assert ours.shape == grad.shape and ours.svd().S.min() > 0.3


def test_bits_per_byte_of_a_uniform_model():
    """A model with equal logits spends log2(V) bits a token, whatever the text."""
    model = pretrain.build_model(RECIPE, 256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    blocks = torch.randint(1, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    assert pretrain.bits_per_byte(model, blocks, torch.full((256,), 2), "cpu") == pytest.approx(8 / 2)


def test_token_bytes_add_up_to_the_text(tmp_path, reviews):
    tokenizer, _ = pretrain.prepare(RECIPE, tmp_path)
    text = "It’s a naïve café – 3 < 5"
    ids = tokenizer(text)["input_ids"]
    assert pretrain.token_bytes(tokenizer)[ids].sum() == len(text.encode("utf-8"))
    assert pretrain.token_bytes(tokenizer)[tokenizer.eos_token_id] == 0


def test_export_loads_and_its_card_tells_the_record(tmp_path):
    run(tmp_path / "work")
    target = tmp_path / "mini"
    pretrain.export(RECIPE, tmp_path / "work", target)
    model = GPT2LMHeadModel.from_pretrained(target, dtype=torch.float32)
    trained = weights(tmp_path / "work")["model/transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, trained.half().float())
    assert AutoTokenizer.from_pretrained(target)("a")["input_ids"]
    record = json.loads((target / "pretraining.json").read_text(encoding="utf-8"))
    card = (target / "README.md").read_text(encoding="utf-8")
    assert f"{record['parameters']:,} parameters" in card and str(record["bits_per_byte"]["test"]) in card
    assert (target / "model.safetensors").stat().st_size < 25e6
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in target.iterdir())
