"""What the notebooks state about (IA)³ and peft, proven on tiny models and on the meta device."""

import copy
import json

import pytest
import torch
from conftest import make_tiny_model
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from utils import adapter_files, adapters, steering, storage
from utils.adapter_files import AdapterError
from utils.adapters import AdapterLibrary, attach
from utils.config import PROFILES

IDS = torch.tensor([[5, 9, 40, 77, 3, 120, 8, 11]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def randomise(model, seed=0, scale=0.3):
    """Move every adapter parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_" in name or "lora_" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def trained(tiny_model):
    return randomise(attach(tiny_model, "ia3")).eval()


@pytest.fixture
def saved(trained, tokenizer, tmp_path):
    return adapters.save_adapter(trained, tokenizer, tmp_path / "adapter")


# --- counts ---------------------------------------------------------------------------------------------------


def meta_gpt2() -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config())


def test_gpt2_counts_on_the_meta_device():
    model = meta_gpt2()
    plain = adapters.count_parameters(model)
    assert plain.total == 124_439_808 == sum(adapters.predict_gpt2_groups(model.config).values())
    assert plain.groups == adapters.predict_gpt2_groups(model.config)
    counted = adapters.count_parameters(attach(model, "ia3"))
    assert (counted.trainable, counted.total) == (64_512, 124_504_320)
    assert counted.trainable == adapters.predict_ia3_count(GPT2Config()) == counted.groups["adapter"]
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
    assert adapters.count_parameters(get_peft_model(meta_gpt2(), config)).trainable == count


@pytest.mark.parametrize("seed", range(4))
def test_closed_forms_for_random_sizes(seed):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    config = GPT2Config(
        n_layer=pick(1, 5), n_embd=4 * pick(2, 12), n_head=4, vocab_size=pick(50, 400), n_positions=pick(8, 64)
    )
    with torch.device("meta"):
        models = [GPT2LMHeadModel(config) for _ in range(3)]
    assert adapters.count_parameters(models[0]).groups == adapters.predict_gpt2_groups(config)
    assert adapters.count_parameters(attach(models[1], "ia3")).trainable == adapters.predict_ia3_count(config)
    assert adapters.count_parameters(attach(models[2], "lora")).trainable == adapters.predict_lora_count(config)


def test_lora_count_on_gpt2():
    assert adapters.predict_lora_count(GPT2Config()) == 294_912


# --- configuration ----------------------------------------------------------------------------------------------


def test_the_owners_configuration(tiny_model):
    config = adapters.ia3_config(tiny_model)
    assert config.target_modules == {"c_attn", "mlp.c_proj"} and config.feedforward_modules == {"mlp.c_proj"}
    assert config.task_type == "CAUSAL_LM" and config.fan_in_fan_out is True


def test_a_model_without_the_targets_is_refused_with_its_own_modules_listed():
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(AdapterError, match=r"no c_attn.*query_key_value"):
        adapters.ia3_config(model)


def test_unknown_method_and_double_attach(tiny_model):
    with pytest.raises(AdapterError, match="choose from base, ia3, ia3_kv, lora"):
        attach(tiny_model, "ia4")
    attach(tiny_model, "ia3")
    with pytest.raises(AdapterError, match="already carries"):
        attach(tiny_model, "lora")


# --- what (IA)³ computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_a_fresh_adapter_changes_nothing(tiny_model, method):
    before = logits(tiny_model)
    assert torch.equal(logits(attach(tiny_model, method).eval()), before)


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


def test_dial_and_contrast(trained):
    vectors = adapters.scaling_vectors(trained)
    other = {key: l.flip(0) for key, l in vectors.items()}
    assert all((l == 1).all() for l in steering.dial(vectors, 0).values())
    assert all(torch.allclose(steering.dial(vectors, 1)[key], vectors[key]) for key in vectors)
    assert all((l == 1).all() for l in steering.contrast(vectors, vectors, 2.5).values())
    for key in vectors:
        assert torch.allclose(steering.contrast(vectors, other, -2)[key], 1 - 2 * (vectors[key] - other[key]))
    base = logits(make_tiny_model())
    adapters.set_scaling_vectors(trained, steering.dial(vectors, 0))
    assert torch.equal(logits(trained), base)


# --- merging ----------------------------------------------------------------------------------------------------


def test_merge_is_close_and_leaves_the_base_alone(trained):
    fingerprint = adapters.base_fingerprint(trained)
    merged = adapters.merge(trained)
    assert torch.allclose(logits(merged), logits(trained), atol=1e-5)
    assert adapters.base_fingerprint(trained) == fingerprint != adapters.base_fingerprint(merged)
    assert not storage.carries_adapter(merged) and storage.carries_adapter(trained)


def test_merge_by_hand_columns_bias_and_rows(trained):
    vectors, base, merged = adapters.scaling_vectors(trained), make_tiny_model(), adapters.merge(trained)
    ours, plain = merged.transformer.h[0], base.transformer.h[0]
    l, inner = vectors["0.attention"], vectors["0.feedforward"]
    assert torch.allclose(ours.attn.c_attn.weight, plain.attn.c_attn.weight * l)
    assert torch.allclose(ours.attn.c_attn.bias, plain.attn.c_attn.bias * l)
    assert torch.allclose(ours.mlp.c_proj.weight, plain.mlp.c_proj.weight * inner[:, None])
    assert torch.equal(ours.mlp.c_proj.bias, plain.mlp.c_proj.bias)


def test_merge_in_place_changes_the_base(tiny_model):
    model = randomise(attach(tiny_model, "ia3"))
    assert adapters.merge(model, in_place=True) is tiny_model


def test_merge_refuses_nan_and_a_plain_model(trained):
    adapters.ia3_parameters(trained)["0.attention"].data[3] = float("nan")
    with pytest.raises(AdapterError, match="not merged"):
        adapters.merge(trained)
    with pytest.raises(AdapterError, match="plain"):
        adapters.merge(make_tiny_model())


# --- saving and loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_saved_and_reloaded_is_equal(tiny_model, tokenizer, tmp_path, method):
    model = randomise(attach(tiny_model, method)).eval()
    adapters.save_adapter(model, tokenizer, tmp_path / "a")
    reloaded = adapters.load_adapter(make_tiny_model(), tmp_path / "a")
    assert torch.equal(logits(reloaded), logits(model))
    assert not any(p.requires_grad for p in reloaded.parameters())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(adapter_files.FILES)


def test_reload_to_train_on(saved):
    model = adapters.load_adapter(make_tiny_model(), saved, trainable=True)
    assert adapters.count_parameters(model).trainable == adapters.predict_ia3_count(model.config)


def test_saving_again_replaces_and_leaves_no_rubbish(trained, tokenizer, saved):
    first = (saved / "adapter_model.safetensors").read_bytes()
    adapters.save_adapter(randomise(trained, seed=1), tokenizer, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() != first
    assert {p.name for p in saved.parent.iterdir()} == {"adapter", ".adapter.lock"}  # the lock stays, empty


def test_no_path_of_this_machine_in_a_saved_adapter(trained, tokenizer, tmp_path):
    folder = adapters.save_adapter(trained, tokenizer, tmp_path / "a")
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in folder.iterdir())


def test_another_base_is_refused(saved):
    other = make_tiny_model(seed=7)
    with pytest.raises(AdapterError, match="another base"):
        adapters.load_adapter(other, saved)
    assert not storage.carries_adapter(other)


def test_a_merged_base_is_refused(trained, saved):
    with pytest.raises(AdapterError, match="apply it twice"):
        adapters.load_adapter(adapters.merge(trained), saved)


def test_a_base_with_foreign_layers_is_refused(saved):
    base = make_tiny_model()
    attach(base, "ia3")
    with pytest.raises(AdapterError, match="already carries"):
        adapters.load_adapter(base, saved)


def test_nan_is_refused(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="NaN"):
        adapters.load_adapter(make_tiny_model(), saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_truncated_file_is_refused(saved, keep):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        adapters.load_adapter(make_tiny_model(), saved)


def test_missing_adapter_says_which_notebook_to_run(tmp_path):
    with pytest.raises(AdapterError, match=r"run 02-Train\.ipynb"):
        adapters.load_adapter(make_tiny_model(), tmp_path / "none")


def test_a_damaged_probe_is_refused(saved):
    (saved / "probe.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match=r"probe\.json is damaged"):
        adapters.load_adapter(make_tiny_model(), saved)


def test_changed_vectors_fail_the_probe_and_leave_a_clean_base(saved):
    path = saved / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    base = make_tiny_model()
    before = logits(base)
    with pytest.raises(AdapterError, match="logits differ"):
        adapters.load_adapter(base, saved)
    assert not storage.carries_adapter(base) and torch.equal(logits(base), before)


def test_saving_nonsense_is_refused(trained, tokenizer, tmp_path):
    with pytest.raises(AdapterError, match="attach one first"):
        adapters.save_adapter(make_tiny_model(), tokenizer, tmp_path / "a")
    adapters.ia3_parameters(trained)["0.attention"].data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="not saved"):
        adapters.save_adapter(trained, tokenizer, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_probe_holds_what_it_promises(saved):
    probe = json.loads((saved / "probe.json").read_text())
    assert probe["base_fingerprint"] == adapters.base_fingerprint(make_tiny_model())
    assert set(probe["versions"]) == {"torch", "transformers", "peft"}
    assert len(probe["logits"]) == storage.PROBE_LOGITS


# --- several adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def two(tokenizer, tmp_path):
    """Folders of two different adapters, and the logits each should give."""
    folders, expected = {}, {}
    for seed, task in enumerate(("positive", "negative")):
        model = randomise(attach(make_tiny_model(), "ia3"), seed).eval()
        folders[task] = adapters.save_adapter(model, tokenizer, tmp_path / task)
        expected[task] = logits(model)
    return folders, expected


def test_library_keeps_tasks_apart(two, tokenizer):
    folders, expected = two
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    for task, folder in folders.items():
        library.load(task, folder)
    assert library.tasks == ["positive", "negative"]
    for task in ("positive", "negative", "positive"):
        with library.use(task) as model:
            assert torch.equal(logits(model), expected[task])
            assert not any(p.requires_grad for p in model.parameters())
    with library.use(None) as model:
        assert torch.equal(logits(model), logits(make_tiny_model()))
    with library.use("positive") as model:
        with library.use("negative"):
            pass
        assert torch.equal(logits(model), expected["positive"])


def test_library_removes_down_to_the_plain_base(two, tokenizer):
    folders, expected = two
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    for task, folder in folders.items():
        library.load(task, folder)
    library.remove("positive")
    with library.use("negative") as model:
        assert torch.equal(logits(model), expected["negative"])
    library.remove("negative")
    assert library.tasks == [] and not storage.carries_adapter(library.base)
    with library.use(None) as model:
        assert torch.equal(logits(model), logits(make_tiny_model()))
    library.load("again", folders["positive"])
    with library.use("again") as model:
        assert torch.equal(logits(model), expected["positive"])


def test_library_errors(two, tokenizer):
    folders, _ = two
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    with pytest.raises(AdapterError, match="loaded are none"), library.use("positive"):
        pass
    library.load("positive", folders["positive"])
    with pytest.raises(AdapterError, match="loaded are positive"):
        library.generate("happy", ["I"])
    with pytest.raises(AdapterError, match="loaded already"):
        library.load("positive", folders["negative"])
    with pytest.raises(AdapterError, match="clean base"):
        AdapterLibrary(library.base, tokenizer)


def test_library_generates_by_task(two, tokenizer):
    folders, _ = two
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    library.load("positive", folders["positive"])
    options = {"new_tokens": 8, "do_sample": False}
    alone = adapters.generate(library.base, tokenizer, ["I saw"], **options)
    assert library.generate("positive", ["I saw"], **options) == alone  # the base carries the active adapter
    assert library.generate(None, ["I saw"], **options) == adapters.generate(
        make_tiny_model(), tokenizer, ["I saw"], **options
    )


def test_the_lab_sheets_manager_mixes_its_tasks(two):
    """Why AdapterLibrary exists: two PeftModels on one base share layers, so the first runs the second's vectors."""
    from peft import PeftModel

    folders, expected = two
    base = make_tiny_model()
    with pytest.warns(UserWarning):
        first = PeftModel.from_pretrained(base, folders["positive"])
        PeftModel.from_pretrained(base, folders["negative"])
    assert not torch.equal(logits(first.eval()), expected["positive"])


def test_fingerprint_ignores_adapters_and_sees_one_changed_weight(tiny_model):
    before = adapters.base_fingerprint(tiny_model)
    twin = copy.deepcopy(tiny_model)
    assert adapters.base_fingerprint(attach(tiny_model, "ia3")) == before
    twin.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 1e-6
    assert adapters.base_fingerprint(twin) != before


def test_a_bad_adapter_leaves_the_library_as_it_was(two, tokenizer):
    folders, expected = two
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    library.load("positive", folders["positive"])
    path = folders["negative"] / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="logits differ"):
        library.load("negative", folders["negative"])
    assert library.tasks == ["positive"]
    assert torch.equal(logits(library.model), expected["positive"])


# --- what a hostile reader found ---------------------------------------------------------------------------------


def test_a_name_in_use_is_refused_and_the_adapter_of_that_name_stays(saved, trained, tokenizer, tmp_path):
    other = adapters.save_adapter(randomise(attach(make_tiny_model(), "ia3"), 7).eval(), tokenizer, tmp_path / "other")
    model = adapters.load_adapter(make_tiny_model(), saved)
    before = logits(model)
    with pytest.raises(AdapterError, match="named 'default' is loaded already"):
        adapters.load_adapter(model, other)
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        adapters.load_adapter(model, other, name="a.b")
    assert torch.equal(logits(model), before)


def spoil_shape(folder) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key].flatten()[:3].clone()}, path)


def spoil_config(folder) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:40])


def spoil_probe(folder) -> None:
    path = folder / "probe.json"
    probe = json.loads(path.read_text())
    path.write_text(json.dumps(probe | {"logits": probe["logits"][:5]}))


@pytest.mark.parametrize("spoil", [spoil_shape, spoil_config, spoil_probe])
@pytest.mark.parametrize("beside", [False, True], ids=["on a plain base", "beside another adapter"])
def test_whatever_is_wrong_is_one_error_and_leaves_the_base_as_it_was(saved, two, spoil, beside):
    base = (
        adapters.load_adapter(make_tiny_model(), two[0]["positive"], name="positive") if beside else make_tiny_model()
    )
    before, flags = logits(base), [p.requires_grad for p in base.parameters()]
    spoil(saved)
    with pytest.raises(AdapterError):
        adapters.load_adapter(base, saved, name="new")
    assert torch.equal(logits(base), before) and [p.requires_grad for p in base.parameters()] == flags
    assert beside or not (storage.carries_adapter(base) or hasattr(base, "peft_config"))
    assert not beside or list(base.peft_config) == ["positive"]


def test_an_untrained_adapter_is_no_merged_base(tokenizer, tmp_path):
    folder = adapters.save_adapter(attach(make_tiny_model(), "ia3").eval(), tokenizer, tmp_path / "fresh")
    assert torch.equal(logits(adapters.load_adapter(make_tiny_model(), folder)), logits(make_tiny_model()))


def test_a_task_inside_the_bare_base_is_the_task_and_nothing_becomes_trainable(two, tokenizer):
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    for task, folder in two[0].items():
        library.load(task, folder)
    with library.use("positive") as model:
        positive = logits(model)
    with library.use(None) as model:
        base = logits(model)
        with library.use("positive") as inner:
            assert torch.equal(logits(inner), positive)
        assert torch.equal(logits(model), base) and not torch.equal(base, positive)
    assert not any(p.requires_grad for p in library.model.parameters())
    with library.use("positive") as model:
        assert torch.equal(logits(model), positive)


def test_merging_in_place_looks_before_it_leaps(trained):
    """NaN in the last layer only: the layers before it must not be merged when the error comes."""
    before = {n: p.clone() for n, p in trained.named_parameters() if "ia3_" not in n}
    *_, last = adapters.ia3_parameters(trained).values()
    with torch.no_grad():
        last.fill_(float("nan"))
    with pytest.raises(AdapterError, match="holds NaN"):
        adapters.merge(trained, in_place=True)
    now = dict(trained.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in before.items())


def test_find_adapter_passes_over_what_does_not_fit_and_says_so(trained, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ASSETS", tmp_path / "assets")
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    profile, base = PROFILES["mini"], make_tiny_model()
    with pytest.raises(AdapterError, match="no positive adapter for profile mini: run 02"):
        adapters.find_adapter(profile, "positive", base)
    shipped = tmp_path / "assets" / "adapters" / "mini" / "positive-seed0"
    adapters.save_adapter(trained, tokenizer, shipped, config_id=profile.config_id())
    assert adapters.find_adapter(profile, "positive", base) == (shipped, "reference run")
    yours = tmp_path / "artifacts" / "mini" / "adapters" / "positive"
    adapters.save_adapter(trained, tokenizer, yours, config_id="another")
    assert adapters.find_adapter(profile, "positive", base)[1] == "reference run"
    adapters.save_adapter(trained, tokenizer, yours, config_id=profile.config_id())
    assert adapters.find_adapter(profile, "positive", base) == (yours, "yours")
    with pytest.raises(AdapterError, match="yours: made with another base.*reference run: made with another base"):
        adapters.find_adapter(profile, "positive", make_tiny_model(seed=5))
