"""Profiles: chosen by name or environment, frozen, overridden by numbers only; a bad value is one clear error."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch

from utils import config
from utils.config import PROFILES, ROOT, ConfigError, load_profile


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("LAB_PROFILE", "LAB_OVERRIDE", "LAB_GPT2_DIR", "LAB_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)


def test_argument_then_environment_then_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_profile() is not None and load_profile().name == "mini"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_profile().name == "gpt2"
    monkeypatch.setenv("LAB_PROFILE", "mini")
    assert load_profile().name == "mini"
    assert load_profile("gpt2").name == "gpt2"
    monkeypatch.setenv("LAB_PROFILE", "")
    assert load_profile().name == "gpt2"


@pytest.mark.parametrize("name", ["gtp2", "Mini", "mini "])
def test_a_misspelt_profile_lists_the_names(monkeypatch, name):
    monkeypatch.setenv("LAB_PROFILE", name)
    with pytest.raises(ConfigError, match="(?s)" + name + ".*mini, gpt2"):
        load_profile()


def test_profiles_pin_what_comes_from_the_hub():
    gpt2, mini = PROFILES["gpt2"], PROFILES["mini"]
    assert len(gpt2.model_revision) == len(gpt2.reviews_revision) == 40
    assert gpt2.local_model is None and mini.local_model == ROOT / "assets" / "mini-gpt2"
    assert set(gpt2.learning_rates) == set(mini.learning_rates)


def test_a_profile_is_frozen_all_through_and_travels():
    mini = PROFILES["mini"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        mini.steps = 1
    for change in (lambda: mini.learning_rates.update(ia3=1.0), lambda: mini.learning_rates.__setitem__("ia3", 1.0)):
        with pytest.raises(TypeError, match="replace"):
            change()
    assert pickle.loads(pickle.dumps(mini)) == mini and hash(mini) == hash(dataclasses.replace(mini))
    assert json.loads(json.dumps(dataclasses.asdict(mini)))["learning_rates"]["ia3"] == mini.learning_rates["ia3"]


def test_override_replaces_numbers_and_nothing_else(monkeypatch):
    monkeypatch.setenv("LAB_OVERRIDE", " steps=4, train_reviews = 60,warmup_ratio=0, temperature=0.5,")
    profile = load_profile("mini")
    assert (profile.steps, profile.train_reviews, profile.warmup_ratio, profile.temperature) == (4, 60, 0.0, 0.5)
    assert (
        dataclasses.replace(profile, steps=120, train_reviews=1500, warmup_ratio=0.06, temperature=0.8)
        == PROFILES["mini"]
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("stesp=4", "stesp.*steps"),
        ("model=other", "model.*steps"),
        ("name=x", "name.*steps"),
        ("steps", "steps=<int>"),
        ("steps=4.5", "steps=4.5.*<int>"),
        ("steps=four", "steps=four"),
        ("steps=0", "steps=0.*more than 0"),
        ("steps=-3", "steps=-3.*more than 0"),
        ("seed=-1", "seed=-1.*0 or more"),
        ("temperature=nan", "temperature=nan"),
        ("top_p=1.5", "top_p=1.5.*at most 1"),
        ("temperature=inf", "temperature=inf"),
    ],
)
def test_a_bad_override_says_what_is_wrong(monkeypatch, text, words):
    monkeypatch.setenv("LAB_OVERRIDE", text)
    with pytest.raises(ConfigError, match=words):
        load_profile("mini")


def test_a_wrong_kind_of_number_is_refused():
    for steps in ("4", 4.0, True):
        with pytest.raises(ConfigError, match="steps"):
            dataclasses.replace(PROFILES["mini"], steps=steps)


def test_a_folder_for_gpt2_uses_no_network_and_leaves_mini_alone(monkeypatch, tmp_path):
    (tmp_path / "my-gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAB_GPT2_DIR", "my-gpt2")
    profile = load_profile("gpt2")
    assert profile.local_model == (tmp_path / "my-gpt2").resolve()
    assert (profile.model_revision, profile.reviews, profile.reviews_revision) == (None, "package", None)
    assert profile.model_name == "my-gpt2" and str(tmp_path) not in json.dumps(profile.settings()) + str(profile)
    assert load_profile("mini") == PROFILES["mini"]
    monkeypatch.setenv("LAB_GPT2_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere.*model.safetensors"):
        load_profile("gpt2")


def test_config_id_is_of_what_decides_a_training_result(tmp_path):
    mini = PROFILES["mini"]
    same = dataclasses.replace(
        mini, seed=3, samples_per_prompt=2, new_tokens=5, temperature=0.5, top_p=0.9, learning_rates={"ia3": 0.1}
    )
    assert mini.config_id() == same.config_id() and len(mini.config_id()) == 12
    others = [{"steps": 4}, {"model": "assets/other"}, {"train_reviews": 60}]
    assert len({dataclasses.replace(mini, **other).config_id() for other in others} | {mini.config_id()}) == 4
    here, there = (dataclasses.replace(mini, model=str(tmp_path / place / "gpt2")) for place in ("here", "there"))
    assert here.config_id() == there.config_id()


def test_a_profile_prints_as_one_line_with_all_that_was_chosen():
    line = str(PROFILES["gpt2"])
    for part in ("gpt2", "openai-community/gpt2", "607a30d7", "stanfordnlp/imdb", "400 steps", "2,048 tokens"):
        assert part in line
    assert "\n" not in line and "package" in str(PROFILES["mini"])


def test_artifacts_go_where_they_are_sent(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "out"))
    folder = config.artifacts_dir(PROFILES["mini"])
    assert folder == (tmp_path / "out" / "mini").resolve() and folder.is_dir()
    assert config.artifacts_dir(PROFILES["mini"]) == folder


def test_importing_the_configuration_is_cheap():
    code = "import sys, utils.config; print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "set()", done.stderr
