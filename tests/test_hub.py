"""Pinned files from a local Hub, its cache and folders: what is returned is whole, every failure is one clear error."""

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants

from utils import hub
from utils.config import PROFILES
from utils.settings import ROOT

GPT2 = PROFILES["gpt2"]
MODEL, REVIEWS = ("model", GPT2.model), ("dataset", GPT2.reviews)
OTHER = "0" * 40


def safetensors(size: int, fill: int = 7) -> bytes:
    header = json.dumps({"wte": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes([fill]) * size


def model_files(fill: int = 7) -> dict:
    return {
        "config.json": b'{"model_type": "gpt2"}',
        "tokenizer.json": b"{}",
        "merges.txt": b"#version",
        "model.safetensors": safetensors(600_000, fill),
        "pytorch_model.bin": b"never asked for",
    }


@pytest.fixture
def repos() -> dict:
    train = b"PAR1" + bytes(300_000) + b"PAR1"
    return {
        MODEL: {GPT2.model_revision: model_files(), OTHER: model_files(fill=9)},
        REVIEWS: {GPT2.reviews_revision: {f"plain_text/{s}-00000-of-00001.parquet": train for s in ("train", "test")}},
    }


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """An empty cache, and no proxy between here and the loopback interface."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    huggingface_hub.close_session()


@pytest.fixture
def serve(monkeypatch):
    """serve(repos, mode) starts a server and points HF_ENDPOINT at it."""
    running = []

    def start(repos: dict, mode: str = "ok") -> HubServer:
        running.append(HubServer(repos, mode).__enter__())
        monkeypatch.setenv("HF_ENDPOINT", running[-1].endpoint)
        return running[-1]

    yield start
    for server in running:
        if not server.closing.is_set():
            server.close()


def failure(call, *words: str) -> str:
    """The message of the HubError that `call()` raises; it must name all ways out, and `words`."""
    with pytest.raises(hub.HubError) as caught:
        call()
    for word in ("HF_HOME", "LAB_GPT2_DIR", "LAB_PROFILE=mini", *words):
        assert word in str(caught.value)
    return str(caught.value)


def test_cold_cache_then_warm_cache_without_the_server(serve, repos, capsys):
    server = serve(repos)
    cold = hub.model_folder(GPT2)
    assert {path.name for path in cold.iterdir()} == set(model_files()) - {"pytorch_model.bin"}
    assert (cold / "model.safetensors").read_bytes() == model_files()["model.safetensors"]
    assert GPT2.model in capsys.readouterr().out
    server.close()
    asked = len(server.requests)
    assert hub.model_folder(GPT2) == cold
    assert len(server.requests) == asked and capsys.readouterr().out == ""


def test_reviews_are_the_training_parquet_only(serve, repos):
    server = serve(repos)
    files = hub.reviews_files(GPT2)
    assert [path.name for path in files] == ["train-00000-of-00001.parquet"]
    assert not any("test-" in line for line in server.requests)
    server.close()
    assert hub.reviews_files(GPT2) == files


def test_the_revision_is_pinned(serve, repos):
    server = serve(repos)
    first = hub.model_folder(GPT2)
    second = hub.model_folder(replace(GPT2, model_revision=OTHER))
    assert (first.name, second.name) == (GPT2.model_revision, OTHER)
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()
    assert all(GPT2.model_revision in line or OTHER in line or "/store/" in line for line in server.requests)


def test_another_commit_than_the_pinned_one_is_refused(serve, repos):
    serve(repos, "other_commit")
    failure(lambda: hub.model_folder(GPT2), "another revision")


def test_a_loaded_model_is_the_served_one(serve, repos, tiny_model, tokenizer, tmp_path):
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tiny_model.save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    repos[MODEL][GPT2.model_revision] = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    serve(repos)
    folder = hub.model_folder(GPT2)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the acting is superb")["input_ids"]])
    loaded = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(loaded(ids).logits, tiny_model(ids).logits)


def test_what_is_not_there(serve, repos):
    serve(repos)
    failure(lambda: hub.model_folder(replace(GPT2, model="nobody/gpt2")), "no such repository", "nobody/gpt2")
    failure(lambda: hub.model_folder(replace(GPT2, model_revision="1" * 40)), "no such revision")
    del repos[MODEL][GPT2.model_revision]["tokenizer.json"]
    failure(lambda: hub.model_folder(GPT2), "tokenizer.json is missing")
    repos[REVIEWS][GPT2.reviews_revision] = {"README.md": b""}
    failure(lambda: hub.reviews_files(GPT2), "train-*.parquet")


@pytest.mark.parametrize("mode", ["hang", "hang_head", "hang_body", "short", "lying"])
@pytest.mark.parametrize("wanted", [hub.model_folder, hub.reviews_files])
def test_silent_and_broken_servers_end_in_an_error_and_leave_no_half(serve, repos, monkeypatch, mode, wanted, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(hub, "ANSWER_SECONDS", 1.0)
        patch.setattr(hub, "SILENCE_SECONDS", 1.0)
        server = serve(repos, mode)
        failure(lambda: wanted(GPT2))
    whole = {data for revisions in repos.values() for files in revisions.values() for data in files.values()}
    assert all(path.read_bytes() in whole for path in (tmp_path / "cache").glob("*/snapshots/*/**/*") if path.is_file())
    assert not list((tmp_path / "cache").glob("*/snapshots/*/model.safetensors"))
    server.close()
    if mode in ("hang", "lying"):  # elsewhere the library's own retries hold the lock for some seconds more
        serve(repos)
        assert wanted(GPT2)


def test_a_refused_connection_is_an_error_at_once(serve, repos):
    serve(repos).close()
    failure(lambda: hub.model_folder(GPT2), "no connection")
    failure(lambda: hub.reviews_files(GPT2), "no connection")


def test_a_malformed_endpoint_is_the_same_kind_of_error(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "not-an-address")
    failure(lambda: hub.model_folder(GPT2))


def test_offline_asks_nobody_and_uses_the_cache(serve, repos, monkeypatch):
    server = serve(repos)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failure(lambda: hub.model_folder(GPT2), "HF_HUB_OFFLINE")
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = hub.model_folder(GPT2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.model_folder(GPT2) == folder


def test_a_damaged_cache_is_named_and_an_incomplete_one_completed(serve, repos):
    serve(repos)
    weights = hub.model_folder(GPT2) / "model.safetensors"
    weights.resolve().write_bytes(b"cut")
    failure(lambda: hub.model_folder(GPT2), "model.safetensors is damaged", str(weights.parent))
    weights.resolve().unlink()
    weights.unlink()
    assert (hub.model_folder(GPT2) / "model.safetensors").stat().st_size == len(model_files()["model.safetensors"])


def test_reviews_that_are_cut_off_or_fewer_than_promised(serve, repos):
    serve(repos)
    files = repos[REVIEWS][GPT2.reviews_revision]
    files["plain_text/train-00000-of-00001.parquet"] = b"PAR1 and no end"
    failure(lambda: hub.reviews_files(GPT2), "train-00000-of-00001.parquet is damaged")
    repos[REVIEWS] = {
        OTHER: {"plain_text/train-00000-of-00002.parquet": files["plain_text/test-00000-of-00001.parquet"]}
    }
    failure(lambda: hub.reviews_files(replace(GPT2, reviews_revision=OTHER)), "1 of 2 files")


def folder_profile(folder: Path):
    return replace(GPT2, model=str(folder), model_revision=None, reviews="package", reviews_revision=None)


def test_a_folder_is_taken_as_it_is_and_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "mine"
    folder.mkdir()
    failure(lambda: hub.model_folder(folder_profile(folder)), *hub.MODEL_FILES)
    for name in hub.MODEL_FILES:
        (folder / name).write_bytes(model_files()[name])
    assert hub.model_folder(folder_profile(folder)) == folder
    (folder / "tokenizer.json").unlink()
    assert "config.json is missing" not in failure(lambda: hub.model_folder(folder_profile(folder)), "tokenizer.json")


@pytest.mark.parametrize(
    "weights",
    [b"", b"version git-lfs/spec/v1\noid sha256:0\n", safetensors(100)[:-1], safetensors(100) + b"x",
     struct.pack("<Q", 4) + b"[[[[" + b"x" * 9, struct.pack("<Q", 2) + b"{}" + b"x" * 9],
)  # fmt: skip
def test_damaged_weights_are_refused(tmp_path, weights):
    for name in hub.MODEL_FILES:
        (tmp_path / name).write_bytes(model_files()[name])
    (tmp_path / "model.safetensors").write_bytes(weights)
    failure(lambda: hub.model_folder(folder_profile(tmp_path)), "damaged")


def test_mini_comes_with_the_course(monkeypatch, tmp_path):
    mini = replace(PROFILES["mini"], model=str(tmp_path))
    with pytest.raises(hub.HubError, match="(?s)config.json is missing.*git checkout"):
        hub.model_folder(mini)
    with pytest.raises(hub.HubError, match="package"):
        hub.reviews_files(PROFILES["mini"])


SCRIPT = """
import sys
from utils import hub
from utils.config import load_profile
try:
    print("GOT", hub.model_folder(load_profile("gpt2")).name, len(hub.reviews_files(load_profile("gpt2"))))
except hub.HubError as error:
    print("HubError", error)
assert not {"torch", "transformers"} & set(sys.modules)
"""


def in_a_fresh_process(tmp_path: Path, **environment: str) -> str:
    """Output of SCRIPT with these variables set before huggingface_hub is imported, and the real waits."""
    names = (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "LAB_GPT2_DIR",
        "LAB_OVERRIDE",
    )
    kept = {key: value for key, value in os.environ.items() if key not in names}
    variables = kept | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_variables_of_the_environment_in_a_fresh_process(tmp_path, repos):
    expected = f"GOT {GPT2.model_revision} 1"
    with HubServer(repos) as server:
        assert "HF_HUB_OFFLINE" in in_a_fresh_process(tmp_path, HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
        assert server.requests == []
        assert expected in in_a_fresh_process(tmp_path, HF_ENDPOINT=server.endpoint)
    gone = in_a_fresh_process(tmp_path, HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
    assert gone.strip() == expected


def test_a_download_killed_in_the_middle_is_finished_by_the_next_start(tmp_path, repos):
    variables = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    with HubServer(repos, "hang_body") as server:
        variables = os.environ | variables | {"HF_ENDPOINT": server.endpoint}
        child = subprocess.Popen([sys.executable, "-c", SCRIPT], env=variables, stdout=subprocess.DEVNULL)
        for _ in range(1200):
            half = [path for path in (tmp_path / "home").rglob("*.incomplete") if path.stat().st_size]
            if half or child.poll() is not None:
                break
            time.sleep(0.05)
        assert half and child.poll() is None
        child.kill()
        child.wait()
    snapshots = tmp_path / "home" / "hub"
    assert not list(snapshots.glob("*/snapshots/*/model.safetensors"))
    with HubServer(repos) as server:
        assert f"GOT {GPT2.model_revision} 1" in in_a_fresh_process(tmp_path, HF_ENDPOINT=server.endpoint)
    (weights,) = snapshots.glob("*/snapshots/*/model.safetensors")
    assert weights.read_bytes() == model_files()["model.safetensors"]


def test_the_waits_are_short():
    assert hub.ANSWER_SECONDS <= 5 and hub.SILENCE_SECONDS <= 10


def test_giving_up_does_not_wait_for_the_work():
    start = time.monotonic()
    with pytest.raises(hub.HubError, match="nothing new"):
        hub._watched(hub.Repo("model", "a/b", None), lambda: time.sleep(20), 0.1)
    assert time.monotonic() - start < 15
