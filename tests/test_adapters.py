"""What the notebooks state about (IA)³ and peft, proven on tiny models and on the meta device."""

import copy

import pytest
import torch
from conftest import logits, make_tiny_model, moved
from peft import IA3Config, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from utils import adapters
from utils.adapters import METHODS, AdapterError, attach
from utils.evaluation import contrast, dial
from utils.sizes import count_parameters, predict_gpt2_groups, predict_ia3_count

# --- counts ---------------------------------------------------------------------------------------------------


def meta_gpt2() -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config())


def test_gpt2_counts_on_the_meta_device():
    model = meta_gpt2()
    plain = count_parameters(model)
    assert plain.total == 124_439_808 == sum(predict_gpt2_groups(model.config).values())
    assert plain.groups == predict_gpt2_groups(model.config)
    counted = count_parameters(attach(model, "ia3"))
    assert (counted.trainable, counted.total) == (64_512, 124_504_320)
    assert counted.trainable == predict_ia3_count(GPT2Config()) == counted.groups["adapter"]
    assert counted.percent == pytest.approx(0.0518, abs=5e-5)


@pytest.mark.parametrize(
    ("targets", "feedforward", "count"),
    [
        (["c_attn", "c_proj"], ["c_proj"], 73_728),  # bare c_proj matches attn.c_proj too
        (["c_attn", "mlp.c_proj"], [], 36_864),  # feed-forward forgotten: scaled on its output
        (["c_attn", "mlp.c_proj"], ["c_attn"], 18_432),  # roles swapped: the lab sheet's number
        (["c_attn"], [], 27_648),
        (["mlp.c_proj"], ["mlp.c_proj"], 36_864),
    ],
)
def test_counts_of_the_classic_mistakes(targets, feedforward, count):
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=True
    )
    assert count_parameters(get_peft_model(meta_gpt2(), config)).trainable == count


# --- configuration ----------------------------------------------------------------------------------------------


def test_the_owners_configuration(tiny_model):
    config = adapters.ia3_config(tiny_model)
    assert config.target_modules == {"c_attn", "mlp.c_proj"} and config.feedforward_modules == {"mlp.c_proj"}
    assert config.task_type == "CAUSAL_LM" and config.fan_in_fan_out is True


def test_a_model_without_the_targets_is_refused_with_its_own_modules_listed():
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(AdapterError, match=r"no c_attn.*query_key_value"):
        adapters.ia3_config(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_module_stays_in_its_mode_and_what_is_added_follows_the_model(method, training):
    base = make_tiny_model().train(training)
    base.transformer.h[0].train(not training)
    before = {module: module.training for module in base.modules()}
    model = attach(base, method)
    assert {module: module.training for module in before} == before
    assert {module.training for module in model.modules() if module not in before} <= {training}


def test_unknown_method_and_double_attach(tiny_model):
    with pytest.raises(AdapterError, match="choose from base, ia3, ia3_kv, lora"):
        attach(tiny_model, "ia4")
    attach(tiny_model, "ia3")
    with pytest.raises(AdapterError, match="already carries"):
        attach(tiny_model, "lora")


# --- what (IA)³ computes ----------------------------------------------------------------------------------------


def test_peft_equals_ia3_written_by_hand(trained):
    """(xW + b) * l on c_attn; gelu(...) * l before mlp.c_proj; nothing else."""
    vectors = adapters.scaling_vectors(trained)
    by_hand = make_tiny_model()
    for i, block in enumerate(by_hand.transformer.h):
        attention, inner = vectors[f"{i}.attention"], vectors[f"{i}.feedforward"]
        block.attn.c_attn.register_forward_hook(lambda module, args, out, l=attention: out * l)
        block.mlp.c_proj.register_forward_pre_hook(lambda module, args, l=inner: (args[0] * l,))
    assert torch.allclose(logits(by_hand), logits(trained), atol=1e-5)
    assert not torch.allclose(logits(make_tiny_model()), logits(trained), atol=1e-2)


def test_the_query_third_can_be_folded_into_the_key(trained):
    before, vectors = logits(trained), adapters.scaling_vectors(trained)
    width = trained.config.n_embd
    for key in [k for k in vectors if k.endswith("attention")]:
        vectors[key][width : 2 * width] *= vectors[key][:width]
        vectors[key][:width] = 1
    adapters.set_scaling_vectors(trained, vectors)
    assert torch.allclose(logits(trained), before, atol=1e-5)


def test_scaling_vectors_round_trip_and_refusal(trained):
    vectors = adapters.scaling_vectors(trained)
    assert {key: len(l) for key, l in vectors.items()} == {
        "0.attention": 96, "0.feedforward": 128, "1.attention": 96, "1.feedforward": 128,
    }  # fmt: skip
    changed = {key: l * 2 for key, l in vectors.items()}
    adapters.set_scaling_vectors(trained, changed)
    assert all(torch.equal(adapters.scaling_vectors(trained)[key], changed[key]) for key in changed)
    with pytest.raises(AdapterError, match="do not fit"):
        adapters.set_scaling_vectors(trained, {"0.attention": torch.ones(96)})
    with pytest.raises(AdapterError, match="no \\(IA\\)³ adapter named"):
        adapters.scaling_vectors(make_tiny_model())


def test_vectors_that_would_act_on_merged_weights_are_not_set(trained):
    vectors = adapters.scaling_vectors(trained)
    trained.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        adapters.set_scaling_vectors(trained, vectors)
    trained.unmerge_adapter()
    adapters.set_scaling_vectors(trained, vectors)


def test_dial_and_contrast(trained):
    vectors = adapters.scaling_vectors(trained)
    other = {key: l.flip(0) for key, l in vectors.items()}
    assert all((l == 1).all() for l in dial(vectors, 0).values())
    assert all(torch.allclose(dial(vectors, 1)[key], vectors[key]) for key in vectors)
    assert all((l == 1).all() for l in contrast(vectors, vectors, 2.5).values())
    for key in vectors:
        assert torch.allclose(contrast(vectors, other, -2)[key], 1 - 2 * (vectors[key] - other[key]))
    base = logits(make_tiny_model())
    adapters.set_scaling_vectors(trained, dial(vectors, 0))
    assert torch.equal(logits(trained), base)


# --- merging ----------------------------------------------------------------------------------------------------


def test_merge_is_close_and_leaves_the_base_alone(trained):
    fingerprint = adapters.base_fingerprint(trained)
    merged = adapters.merge(trained)
    assert torch.allclose(logits(merged), logits(trained), atol=1e-5)
    assert adapters.base_fingerprint(trained) == fingerprint != adapters.base_fingerprint(merged)
    assert not adapters.carries_adapter(merged) and adapters.carries_adapter(trained)


def test_merge_by_hand_columns_bias_and_rows(trained):
    vectors, base, merged = adapters.scaling_vectors(trained), make_tiny_model(), adapters.merge(trained)
    ours, plain = merged.transformer.h[0], base.transformer.h[0]
    l, inner = vectors["0.attention"], vectors["0.feedforward"]
    assert torch.allclose(ours.attn.c_attn.weight, plain.attn.c_attn.weight * l)
    assert torch.allclose(ours.attn.c_attn.bias, plain.attn.c_attn.bias * l)
    assert torch.allclose(ours.mlp.c_proj.weight, plain.mlp.c_proj.weight * inner[:, None])
    assert torch.equal(ours.mlp.c_proj.bias, plain.mlp.c_proj.bias)


def test_merge_in_place_changes_the_base(tiny_model):
    model = moved(attach(tiny_model, "ia3"))
    assert adapters.merge(model, in_place=True) is tiny_model


def test_merge_refuses_a_plain_model():
    with pytest.raises(AdapterError, match="plain"):
        adapters.merge(make_tiny_model())


@pytest.mark.parametrize("in_place", [False, True])
def test_merging_looks_before_it_leaps(trained, in_place):
    """NaN in the last layer only: the layers before it must not be merged when the error comes."""
    before = {n: p.clone() for n, p in trained.named_parameters() if "ia3_" not in n}
    *_, last = adapters.ia3_parameters(trained).values()
    last.data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="not merged.*holds NaN"):
        adapters.merge(trained, in_place=in_place)
    now = dict(trained.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in before.items())


def test_fingerprint_ignores_adapters_and_sees_one_changed_weight(tiny_model):
    before = adapters.base_fingerprint(tiny_model)
    twin = copy.deepcopy(tiny_model)
    assert adapters.base_fingerprint(attach(tiny_model, "ia3")) == before
    twin.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 1e-6
    assert adapters.base_fingerprint(twin) != before
