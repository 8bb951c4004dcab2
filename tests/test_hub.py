"""GPT-2 and the reviews from a local Hub, its cache, or a folder: pinned, and every failure is one clear error."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import constants

from utils import config
from utils.adapters import load_base
from utils.config import MODEL_FILES, PROFILES, ROOT, HubError
from utils.data import read_hub_reviews

GPT2 = PROFILES["gpt2"]
WAYS = ("HF_HOME", "LAB_GPT2_DIR", "LAB_PROFILE=mini")


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict:
    """What the Hub has: the embedded model in GPT-2's place, four reviews."""
    mini = PROFILES["mini"].local_model
    files = {path.name: path.read_bytes() for path in mini.iterdir() if path.is_file()}
    parquet = tmp_path_factory.mktemp("reviews") / "train.parquet"
    Dataset.from_list([{"text": f"good<br />{i}", "label": 1} for i in range(4)]).to_parquet(parquet)
    name = "plain_text/{}-00000-of-00001.parquet"
    reviews = {name.format("train"): parquet.read_bytes(), name.format("test"): b"never asked for"}
    return {
        ("model", GPT2.model): {GPT2.model_revision: files | {"pytorch_model.bin": b"never asked for"}},
        ("dataset", GPT2.reviews): {GPT2.reviews_revision: reviews},
    }


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def point(monkeypatch, tmp_path):
    """point(endpoint) is where the Hub is looked for, with an empty cache and no proxy on the way."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    huggingface_hub.close_session()
    return lambda endpoint: monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def failure(call, *words: str) -> None:
    """`call()` raises a HubError that names all ways out, and `words`."""
    with pytest.raises(HubError) as caught:
        call()
    for word in (*WAYS, *words):
        assert word in str(caught.value)


def both_fail(*words: str, profile=GPT2) -> None:
    """Neither the model nor the reviews can be had, and both errors say so."""
    failure(lambda: load_base(profile, "cpu"), profile.model, *words)
    failure(lambda: list(read_hub_reviews(profile)), profile.reviews, *words)


@pytest.mark.slow
def test_a_server_that_never_answers(point):
    assert config.ANSWER_SECONDS <= 5  # asked once, then given up
    with HubServer({}, silent=True) as server:
        point(server.endpoint)
        both_fail()
        assert [line for line in server.requests if "/revision/" in line] == [
            f"GET /api/models/{GPT2.model}/revision/{GPT2.model_revision}",
            f"GET /api/datasets/{GPT2.reviews}/revision/{GPT2.reviews_revision}",
        ]
        assert not any("/resolve/" in line for line in server.requests)


def test_a_refused_connection(point):
    with HubServer({}) as server:
        pass
    point(server.endpoint)
    both_fail("ConnectError")


def test_a_name_that_is_never_resolved(point, monkeypatch):
    """No time limit of the libraries covers this."""
    import threading

    released = threading.Event()
    monkeypatch.setattr(config, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: released.wait(60) or [])
    point("http://the-hub.invalid")
    both_fail("did not answer within 1 seconds")
    released.set()


def test_what_the_hub_does_not_have(point, repos):
    with HubServer(repos) as server:
        point(server.endpoint)
        both_fail("RepositoryNotFound", profile=replace(GPT2, model="nobody/gpt2", reviews="nobody/imdb"))
        other = "1" * 40
        both_fail("RevisionNotFound", "11111111", profile=replace(GPT2, model_revision=other, reviews_revision=other))


def test_offline_asks_nobody(point, monkeypatch):
    with HubServer({}) as server:
        point(server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        both_fail("OfflineModeIsEnabled")
        assert server.requests == []


def test_a_malformed_endpoint_is_the_same_kind_of_error(point):
    point("not-an-address")
    both_fail()


# --- what is there ------------------------------------------------------------------------------------------------

SCRIPT = """
from utils.adapters import base_fingerprint, load_base
from utils.config import load_profile
from utils.data import read_hub_reviews
profile = load_profile("gpt2")
model, tokenizer = load_base(profile, "cpu")
print("GOT", base_fingerprint(model), model.name_or_path, len(tokenizer), [row["text"] for row in read_hub_reviews(profile)])
"""  # noqa: E501


def in_a_fresh_process(tmp_path: Path, **environment: str) -> str:
    """The last line that SCRIPT prints, or raises, with these variables set before the libraries are imported."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LAB_OVERRIDE", "LAB_GPT2_DIR", "HF_HUB_CACHE")}
    variables = {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=kept | variables | environment, capture_output=True, text=True, timeout=240
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_cold_cache_then_a_warm_one_then_a_damaged_one(repos, tmp_path):
    with HubServer(repos) as server:
        cold = in_a_fresh_process(tmp_path, HF_ENDPOINT=server.endpoint)
        asked = "\n".join(server.requests)
    expected = f"GOT f1689d4925410fac {GPT2.model}"
    assert expected in cold and "['good 0', 'good 1', 'good 2', 'good 3']" in cold
    assert f"Downloading the model {GPT2.model} at 607a30d7" in cold
    assert "pytorch_model.bin" not in asked and "test-00000" not in asked
    for line in server.requests:
        assert any(word in line for word in (GPT2.model_revision, GPT2.reviews_revision, "/api/agent")), line
    warm = in_a_fresh_process(tmp_path, HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
    assert expected in warm and "Downloading" not in warm
    (weights,) = tmp_path.glob("hub/*/snapshots/*/model.safetensors")
    weights.resolve().write_bytes(weights.read_bytes()[:-1000])
    damaged = in_a_fresh_process(tmp_path, HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
    assert "GOT" not in damaged and "HubError" in damaged and all(word in damaged for word in WAYS)


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, tiny_model, tokenizer) -> Path:
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def from_folder(folder: Path):
    return load_base(replace(GPT2, model=str(folder), model_revision=None, reviews="package"), "cpu")


def test_a_whole_folder_is_taken_as_it_is(folder, tiny_model, tokenizer):
    model, loaded = from_folder(folder)
    assert all(map(lambda a, b: a.equal(b), model.state_dict().values(), tiny_model.state_dict().values()))
    assert loaded("a dull film")["input_ids"] == tokenizer("a dull film")["input_ids"]
    assert (model.name_or_path, loaded.pad_token) == (folder.name, loaded.eos_token) and not model.training


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    failure(lambda: from_folder(folder), f"{name} missing", "pytorch_model.bin is not read")


@pytest.mark.parametrize("weights", ["", "version git-lfs/spec/v1\noid sha256:0\n", "cut"])
def test_weights_that_are_cut_off_or_never_came(folder, weights):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if weights == "cut" else weights.encode())
    failure(lambda: from_folder(folder), "no usable model", "Safetensor")


def test_weights_of_another_model_are_not_filled_up_with_random_ones(folder, tiny_model):
    short = {name: value for name, value in tiny_model.state_dict().items() if not name.startswith("transformer.h.1.")}
    tiny_model.save_pretrained(folder, state_dict=short)
    failure(lambda: from_folder(folder), "have no transformer.h.1.attn.c_attn.bias")


def test_mini_comes_with_the_course(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    with pytest.raises(HubError, match=r"(?s)config.json.* missing.*git checkout"):
        load_base(PROFILES["mini"], "cpu")
