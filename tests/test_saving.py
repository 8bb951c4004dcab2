"""Adapters on disk: equal when they come back, refused when they would not be, kept apart on one base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import logits, make_tiny_model, moved
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from utils import adapters, saving
from utils.adapters import AdapterError, attach
from utils.config import PROFILES
from utils.generation import generate
from utils.saving import AdapterLibrary, find_adapter, load_adapter, save_adapter
from utils.sizes import count_parameters, predict_ia3_count


@pytest.fixture
def saved(trained, tokenizer, tmp_path):
    return save_adapter(trained, tokenizer, tmp_path / "adapter")


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_saved_and_reloaded_is_equal_and_names_no_path_of_this_machine(tiny_model, tokenizer, tmp_path, method):
    model = moved(attach(tiny_model, method))
    save_adapter(model, tokenizer, tmp_path / "a")
    reloaded = load_adapter(make_tiny_model(), tmp_path / "a")
    assert torch.equal(logits(reloaded), logits(model))
    assert not any(p.requires_grad for p in reloaded.parameters())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(saving.FILES)
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in (tmp_path / "a").iterdir())


def test_reload_to_train_on(saved):
    model = load_adapter(make_tiny_model(), saved, trainable=True)
    assert count_parameters(model).trainable == predict_ia3_count(model.config)


def test_saving_again_replaces_and_leaves_no_rubbish(trained, tokenizer, saved):
    first = (saved / "adapter_model.safetensors").read_bytes()
    save_adapter(moved(trained, seed=1), tokenizer, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() != first
    assert {p.name for p in saved.parent.iterdir()} == {"adapter", ".adapter.lock"}  # the lock stays, empty


def test_a_base_that_is_another_merged_or_carries_an_adapter_is_refused(trained, saved):
    other, adapted = make_tiny_model(seed=7), make_tiny_model()
    attach(adapted, "ia3")
    for base, words in (
        (other, "another base"),
        (adapters.merge(trained), "apply it twice"),
        (adapted, "already carr"),
    ):
        with pytest.raises(AdapterError, match=words):
            load_adapter(base, saved)
    assert not adapters.carries_adapter(other)


def test_missing_adapter_says_which_notebook_to_run(tmp_path):
    with pytest.raises(AdapterError, match=r"run 02-Train\.ipynb"):
        load_adapter(make_tiny_model(), tmp_path / "none")


def test_saving_nonsense_is_refused(trained, tokenizer, tmp_path):
    with pytest.raises(AdapterError, match="attach one first"):
        save_adapter(make_tiny_model(), tokenizer, tmp_path / "a")
    adapters.ia3_parameters(trained)["0.attention"].data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="not saved"):
        save_adapter(trained, tokenizer, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_probe_holds_what_it_promises(saved):
    probe = json.loads((saved / "probe.json").read_text())
    assert probe["base_fingerprint"] == adapters.base_fingerprint(make_tiny_model())
    assert set(probe["versions"]) == {"torch", "transformers", "peft"}
    assert len(probe["logits"]) == saving.PROBE_LOGITS


def test_a_merged_adapter_is_not_saved_over_a_good_one(trained, tokenizer, saved):
    before, files = logits(trained), {path.name: path.read_bytes() for path in saved.iterdir()}
    trained.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        save_adapter(trained, tokenizer, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert torch.equal(logits(load_adapter(make_tiny_model(), saved)), before)


def test_saving_and_loading_leave_every_module_in_its_mode(tiny_model, tokenizer, tmp_path):
    """As of a model that generates: what peft wraps around it is in training mode, and no dropout may go on with it."""
    model = get_peft_model(tiny_model, adapters.ia3_config())
    tiny_model.transformer.h[1].train()
    modes = {module: module.training for module in model.modules()}
    assert set(modes.values()) == {False, True}
    folder = save_adapter(model, tokenizer, tmp_path / "adapter")
    assert {module: module.training for module in modes} == modes
    base = make_tiny_model(seed=3)
    base.transformer.h[1].train()
    modes = {module: module.training for module in base.modules()}
    with pytest.raises(AdapterError):
        load_adapter(base, folder)
    assert {module: module.training for module in modes} == modes
    assert not any(module.training for module in load_adapter(make_tiny_model(), folder).modules())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped into memory")
def test_no_file_of_an_adapter_stays_mapped(saved, tokenizer):
    """Windows replaces and deletes no file that is."""
    tensors, model = saving.check_tensors(saved), load_adapter(make_tiny_model(), saved)
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    library.load("positive", saved)
    assert tensors and model and str(saved) not in Path("/proc/self/maps").read_text()
    kept = load_file(saved / "adapter_model.safetensors")
    assert kept and str(saved) in Path("/proc/self/maps").read_text(), "what the check above would see"


# --- several adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def two(tokenizer, tmp_path):
    """Folders of two different adapters, and the logits each should give."""
    folders, expected = {}, {}
    for seed, task in enumerate(("positive", "negative")):
        model = moved(attach(make_tiny_model(), "ia3"), seed)
        folders[task] = save_adapter(model, tokenizer, tmp_path / task)
        expected[task] = logits(model)
    return folders, expected


@pytest.fixture
def library(two, tokenizer):
    """Both tasks in one library."""
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    for task, folder in two[0].items():
        library.load(task, folder)
    return library


def test_library_keeps_tasks_apart(two, library):
    _, expected = two
    assert library.tasks == ["positive", "negative"]
    for task in ("positive", "negative", "positive"):
        with library.use(task) as model:
            assert torch.equal(logits(model), expected[task])
            assert not any(p.requires_grad for p in model.parameters())
    expected[None] = logits(make_tiny_model())
    for outer, inner in (("positive", "negative"), (None, "positive"), ("positive", None)):
        with library.use(outer) as model:
            with library.use(inner) as other:
                assert torch.equal(logits(other), expected[inner])
            assert torch.equal(logits(model), expected[outer])
    assert not torch.equal(expected[None], expected["positive"])
    assert not any(p.requires_grad for p in library.model.parameters())


def test_library_removes_down_to_the_plain_base(two, library):
    folders, expected = two
    library.remove("positive")
    with library.use("negative") as model:
        assert torch.equal(logits(model), expected["negative"])
    library.remove("negative")
    assert library.tasks == [] and not adapters.carries_adapter(library.base)
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
    alone = generate(library.base, tokenizer, ["I saw"], **options)
    assert library.generate("positive", ["I saw"], **options) == alone  # the base carries the active adapter
    assert library.generate(None, ["I saw"], **options) == generate(make_tiny_model(), tokenizer, ["I saw"], **options)


def test_the_lab_sheets_manager_mixes_its_tasks(two):
    """Why AdapterLibrary exists: two PeftModels on one base share layers, so the first runs the second's vectors."""
    folders, expected = two
    base = make_tiny_model()
    with pytest.warns(UserWarning):
        first = PeftModel.from_pretrained(base, folders["positive"])
        PeftModel.from_pretrained(base, folders["negative"])
    assert not torch.equal(logits(first.eval()), expected["positive"])


def test_a_bad_adapter_leaves_the_library_as_it_was(two, tokenizer):
    folders, expected = two
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    library.load("positive", folders["positive"])
    SPOILS["other vectors"][0](folders["negative"])
    with pytest.raises(AdapterError, match="logits differ"):
        library.load("negative", folders["negative"])
    assert library.tasks == ["positive"]
    assert torch.equal(logits(library.model), expected["positive"])


def test_a_name_in_use_is_refused_and_the_adapter_of_that_name_stays(saved, trained, tokenizer, tmp_path):
    other = save_adapter(moved(attach(make_tiny_model(), "ia3"), 7), tokenizer, tmp_path / "other")
    model = load_adapter(make_tiny_model(), saved)
    before = logits(model)
    with pytest.raises(AdapterError, match="named 'default' is loaded already"):
        load_adapter(model, other)
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        load_adapter(model, other, name="a.b")
    assert torch.equal(logits(model), before)


def tensors_with(change):
    """A change of the adapter's tensors as a change of its folder."""

    def spoil(folder) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return spoil


def first_changed(change):
    return tensors_with(lambda tensors: tensors | {key: change(tensors[key].clone()) for key in [min(tensors)]})


def cut_at(name: str, keep: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def probe_of(text: str):
    return lambda folder: (folder / "probe.json").write_text(text, encoding="utf-8")


def short_probe(folder) -> None:
    probe = json.loads((folder / "probe.json").read_text())
    probe_of(json.dumps(probe | {"logits": probe["logits"][:5]}))(folder)


SPOILS = {
    "NaN": (first_changed(lambda tensor: tensor.fill_(torch.nan)), "NaN"),
    "other vectors": (tensors_with(lambda tensors: {n: 1.5 * t for n, t in tensors.items()}), "logits differ"),
    "shape": (first_changed(lambda tensor: tensor.flatten()[:3].clone()), None),
    "short probe": (short_probe, None),
    "configuration": (cut_at("adapter_config.json", 40), None),
    **{f"cut at {n}": (cut_at("adapter_model.safetensors", n), "truncated or corrupt") for n in (0, 4, 100, -8)},
    **{
        f"probe {text}": (probe_of(text), r"probe\.json is damaged")
        for text in ("{", "[]", "{}", "null", "\0", '{"ids": [], "logits": [], "base_fingerprint": "a"}')
    },
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("beside", [False, True], ids=["on a plain base", "beside another adapter"])
def test_whatever_is_wrong_is_one_error_and_leaves_the_base_as_it_was(saved, two, spoil, beside):
    base = load_adapter(make_tiny_model(), two[0]["positive"], name="positive") if beside else make_tiny_model()
    before, flags = logits(base), [p.requires_grad for p in base.parameters()]
    change, words = SPOILS[spoil]
    change(saved)
    with pytest.raises(AdapterError, match=words):
        load_adapter(base, saved, name="new")
    assert torch.equal(logits(base), before) and [p.requires_grad for p in base.parameters()] == flags
    assert beside or not (adapters.carries_adapter(base) or hasattr(base, "peft_config"))
    assert not beside or list(base.peft_config) == ["positive"]


def test_an_untrained_adapter_is_no_merged_base(tokenizer, tmp_path):
    folder = save_adapter(attach(make_tiny_model(), "ia3").eval(), tokenizer, tmp_path / "fresh")
    assert torch.equal(logits(load_adapter(make_tiny_model(), folder)), logits(make_tiny_model()))


def test_a_library_with_a_merged_adapter_does_nothing_under_another_name(two, library):
    folders, expected = two
    with library.use("positive") as model:
        model.merge_adapter()
        for work in (
            lambda: library.use("negative").__enter__(),
            lambda: library.generate(None, ["I"]),
            lambda: library.remove("negative"),
            lambda: library.remove("positive"),
            lambda: library.load("third", folders["negative"]),
        ):
            with pytest.raises(AdapterError, match="merged into the weights"):
                work()
        assert library.tasks == ["positive", "negative"]
        model.unmerge_adapter()
    with library.use("negative") as model:
        assert torch.allclose(logits(model), expected["negative"], atol=1e-4)


def test_a_library_loads_and_removes_while_the_bare_base_is_in_use(two, tokenizer):
    folders, expected = two
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    library.load("positive", folders["positive"])
    with library.use(None) as model:
        with pytest.raises(AdapterError, match="loaded already"):
            library.load("positive", folders["negative"])
        assert torch.equal(logits(model), logits(make_tiny_model()))
        library.load("negative", folders["negative"])
        library.remove("positive")
    assert library.tasks == ["negative"]
    with library.use("negative") as model:
        assert torch.equal(logits(model), expected["negative"])
        library.remove("negative")
    assert torch.equal(logits(library.base), logits(make_tiny_model()))


def test_find_adapter_passes_over_what_does_not_fit_and_says_so(trained, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "ASSETS", tmp_path / "assets")
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    profile, base = PROFILES["mini"], make_tiny_model()
    with pytest.raises(AdapterError, match="no positive adapter for profile mini: run 02"):
        find_adapter(profile, "positive", base)
    shipped = tmp_path / "assets" / "adapters" / "mini" / "positive-seed0"
    save_adapter(trained, tokenizer, shipped, config_id=profile.config_id())
    assert find_adapter(profile, "positive", base) == (shipped, "reference run")
    yours = tmp_path / "artifacts" / "mini" / "adapters" / "positive"
    save_adapter(trained, tokenizer, yours, config_id="another")
    assert find_adapter(profile, "positive", base)[1] == "reference run"
    save_adapter(trained, tokenizer, yours, config_id=profile.config_id())
    assert find_adapter(profile, "positive", base) == (yours, "yours")
    with pytest.raises(AdapterError, match="yours: made with another base.*reference run: made with another base"):
        find_adapter(profile, "positive", make_tiny_model(seed=5))
