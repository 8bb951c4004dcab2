"""Every method behind `attach`: its size, its start, what it may change, and that it comes back from disk."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import logits, make_tiny_model, moved
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from utils.adapters import (
    MERGEABLE,
    METHODS,
    AdapterError,
    attach,
    base_fingerprint,
    load_trainable_state,
    merge,
    scaling_vectors,
    trainable_state,
)
from utils.config import PROFILES
from utils.evaluation import held_out_loss
from utils.generation import generate
from utils.saving import load_adapter, save_adapter
from utils.sizes import count_parameters, predict_gpt2_groups, predict_ia3_count, predict_lora_count, predict_trainable
from utils.training import train

TRAINED = [method for method in METHODS if method != "base"]
PROFILE = replace(PROFILES["mini"], block_length=16, batch_size=2, steps=4, eval_every=2, eval_blocks=2)


# --- size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_the_count_for_random_sizes(method, seed):
    generator = torch.Generator().manual_seed(seed)
    layers, heads, inner = (int(torch.randint(1, 5, (1,), generator=generator)) for _ in range(3))
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=12 * heads * layers, n_inner=8 * inner, vocab_size=97, n_positions=40
    )
    with torch.device("meta"):
        base, model = GPT2LMHeadModel(config), attach(GPT2LMHeadModel(config), method)
    assert count_parameters(base).groups == predict_gpt2_groups(config)
    assert count_parameters(model).trainable == predict_trainable(config, method)


def test_counts_on_gpt2_by_method_part_and_rank():
    counts = {}
    for method in METHODS:
        with torch.device("meta"):
            counts[method] = count_parameters(attach(GPT2LMHeadModel(GPT2Config()), method)).trainable
    assert counts == {
        "base": 0, "ia3": 64_512, "ia3_kv": 55_296, "lora": 294_912, "bitfit": 102_144, "prefix": 368_640,
        "bottleneck": 1_189_632, "full": 124_439_808,
    }  # fmt: skip
    config = GPT2Config()
    assert predict_ia3_count(config, feedforward=False) == 27_648
    assert predict_ia3_count(config, attention=False) == 36_864
    assert predict_lora_count(config, rank=16) == 2 * predict_lora_count(config)
    for method in ("ia3", "lora", "prefix", "bottleneck"):
        count = count_parameters(attach(make_tiny_model(), method))
        assert count.groups["adapter"] == count.trainable == count.total - count_parameters(make_tiny_model()).total


# --- start and training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_method_leaves_the_logits_alone_but_prefix_tuning_does_not(tiny_model, method):
    before = logits(tiny_model)
    after = logits(attach(tiny_model, method))
    assert torch.equal(before, after) is (method != "prefix")


@pytest.mark.parametrize("method", TRAINED)
def test_only_the_methods_own_numbers_move(tiny_model, blocks, tmp_path, method):
    before = {n: p.clone() for n, p in tiny_model.named_parameters()}
    fingerprint = base_fingerprint(tiny_model)
    model = attach(tiny_model, method)
    start = trainable_state(model)
    record = train(
        model, blocks, PROFILE, method=method, eval_blocks=blocks, folder=tmp_path, learning_rate=3e-2, steps=8
    )
    assert record.metrics["best_loss"] < record.metrics["start_loss"]
    assert any(not torch.equal(start[n], p) for n, p in trainable_state(model).items())
    if method not in ("full", "bitfit"):
        assert base_fingerprint(model) == fingerprint
        now = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
        assert all(torch.equal(p, next(q for m, q in now.items() if m.endswith(n))) for n, p in before.items())
    if method == "bitfit":
        now = dict(model.named_parameters())
        assert all(torch.equal(p, now[n]) for n, p in before.items() if not n.endswith(".bias"))


def test_a_second_method_or_a_state_of_another_is_refused(tiny_model):
    for method in ("prefix", "bottleneck"):
        model = attach(copy.deepcopy(tiny_model), method)
        with pytest.raises(AdapterError, match="already carries an adapter"):
            attach(model, "ia3")
    state = trainable_state(attach(make_tiny_model(), "bitfit"))
    with pytest.raises(KeyError, match="is on one side only"):
        load_trainable_state(attach(make_tiny_model(), "ia3"), state)


# --- keys and values only ---------------------------------------------------------------------------------------


def queries(model: torch.nn.Module) -> torch.Tensor:
    """The query thirds of all `c_attn` vectors, one behind the other."""
    attention = [v for key, v in scaling_vectors(model).items() if key.endswith("attention")]
    return torch.cat([v[: len(v) // 3] for v in attention])


def test_queries_stay_at_one_through_training_resuming_saving_and_merging(tokenizer, blocks, tmp_path, monkeypatch):
    """Killed at step 2 of 4, resumed by a new model, saved, loaded, merged: the query third is exactly 1 all along."""
    run = {"method": "ia3_kv", "eval_blocks": blocks, "folder": tmp_path / "run", "learning_rate": 0.05}
    model = attach(make_tiny_model(), "ia3_kv")
    saving = torch.save

    def killed(value: object, path: object, *args: object, **options: object) -> None:
        saving(value, path, *args, **options)
        if "checkpoint-4" in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(model, blocks, PROFILE, **run)
    monkeypatch.undo()
    model = attach(make_tiny_model(), "ia3_kv")
    train(model, blocks, PROFILE, **run)
    assert torch.equal(queries(model), torch.ones_like(queries(model)))
    moved_parts = torch.cat(list(scaling_vectors(model).values())) != 1
    assert moved_parts.sum() > 0.9 * predict_trainable(model.config, "ia3_kv")

    folder = save_adapter(model, tokenizer, tmp_path / "adapter")
    again = load_adapter(make_tiny_model(), folder)
    assert torch.equal(queries(again), torch.ones_like(queries(again)))
    merged, base, width = merge(again), make_tiny_model(), again.config.n_embd
    for plain, block in zip(base.transformer.h, merged.transformer.h, strict=True):
        assert torch.equal(block.attn.c_attn.weight[:, :width], plain.attn.c_attn.weight[:, :width])
        assert not torch.equal(block.attn.c_attn.weight[:, width:], plain.attn.c_attn.weight[:, width:])


def test_owner_s_configuration_does_move_the_queries(blocks, tmp_path):
    model = attach(make_tiny_model(), "ia3")
    train(model, blocks, PROFILE, method="ia3", eval_blocks=blocks, folder=tmp_path, learning_rate=0.05)
    assert (queries(model) != 1).all()


# --- disk, merging, generating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_saved_and_loaded_equals(tmp_path: Path, method):
    model = moved(attach(make_tiny_model(), method))
    save_file(trainable_state(model), tmp_path / "state.safetensors")
    again = attach(make_tiny_model(), method, seed=9)
    assert not torch.equal(logits(model), logits(again))
    load_trainable_state(again, load_file(tmp_path / "state.safetensors"))
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("method", MERGEABLE)
def test_what_can_be_merged_gives_the_same_logits(method):
    model = moved(attach(make_tiny_model(), method))
    merged = merge(model)
    assert type(merged) is GPT2LMHeadModel
    assert torch.allclose(logits(model), logits(merged), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_text_whatever_the_padding_and_its_held_out_loss_is_its_own(tokenizer, method, blocks):
    model = moved(attach(make_tiny_model(), method))
    prompts = ["the acting is", "I saw this at the cinema and it"]
    options = {"new_tokens": 8, "do_sample": False}
    together = [s.text for s in generate(model, tokenizer, prompts, **options)]
    alone = [generate(model, tokenizer, [prompt], **options)[0].text for prompt in prompts]
    assert together == alone and any(alone)
    ids = torch.tensor(blocks[:]["input_ids"])
    labels = torch.tensor(blocks[:]["labels"])
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=labels).loss)
    assert held_out_loss(model, blocks).value == pytest.approx(expected, rel=1e-5)
