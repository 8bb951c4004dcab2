"""Run records: written whole or not at all, refused when broken, never mixed; files on other systems' disks."""

from __future__ import annotations

import errno
import json
import os
import platform

import numpy as np
import pytest
import torch

from utils import runs
from utils.metrics import Estimate
from utils.runs import RunError, RunRecord, load_runs


def record(**changes) -> RunRecord:
    values = {
        "status": "finished", "method": "ia3", "profile": "mini", "config_id": "0123456789ab", "config": {"steps": 4},
        "seed": 0, "counts": {"trainable": 10, "total": 100}, "history": [{"step": 0, "eval_loss": 5.0}],
        "metrics": {"best_loss": 4.5, "positivity": Estimate(0.7, 0.6, 0.8, 100)}, "bytes_on_disk": 1234,
        "memory": {"peak_bytes": 99},
    }  # fmt: skip
    return RunRecord(**(values | changes))


def test_saved_and_loaded_are_equal(tmp_path):
    path = record().save(tmp_path / "deep" / "run.json")
    loaded = RunRecord.load(path)
    assert loaded == record(created=loaded.created, metrics=loaded.metrics)
    assert loaded.value("positivity") == Estimate(0.7, 0.6, 0.8, 100)
    assert (loaded.value("trainable"), loaded.value("bytes_on_disk"), loaded.value("peak_bytes")) == (10, 1234, 99)
    assert loaded.value("relevance") is None
    assert os.listdir(path.parent) == ["run.json"]  # no temporary file is left


def test_numbers_of_every_kind_become_json_but_nan_and_sets_do_not(tmp_path):
    runs.write_json(tmp_path / "dial.json", {"rows": [Estimate(1, 0, 2, 3)]})
    assert json.loads((tmp_path / "dial.json").read_text()) == {"rows": [{"value": 1, "low": 0, "high": 2, "n": 3}]}
    path = record(metrics={"a": np.float32(0.5), "b": torch.tensor(2)}).save(tmp_path / "run.json")
    assert RunRecord.load(path).metrics == {"a": 0.5, "b": 2}
    with pytest.raises(TypeError, match="not set"):
        record(metrics={"a": {1, 2}}).save(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(metrics={"best_loss": float("nan")}).save(path)
    assert RunRecord.load(path).metrics == {"a": 0.5, "b": 2}


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = record(seed=1).save(tmp_path / "run.json")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(runs.os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        record(seed=2).save(path)
    assert RunRecord.load(path).seed == 1
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"status": "finished", "typo": 1}', "\0"])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json: not a run record .*: delete it and repeat the run"):
        RunRecord.load(tmp_path / "run.json")


def test_only_comparable_runs_are_loaded_and_the_others_named(tmp_path):
    record(seed=0).save(tmp_path / "a.json")
    record(seed=1).save(tmp_path / "a2.json")
    record(seed=2).save(tmp_path / "sweep" / "run.json")  # of another study: each folder is one
    record(status="running").save(tmp_path / "b.json")
    record(config_id="another").save(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("{")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    found, excluded = load_runs(tmp_path, "0123456789ab")
    assert [r.seed for r in found] == [0, 1]
    assert [line.split(":")[0] for line in excluded] == ["b.json", "c.json", "d.json"]
    assert "running, not finished" in excluded[0]
    assert "another configuration" in excluded[1]
    assert load_runs(tmp_path)[0] == found  # without an id: that of the first finished run
    assert load_runs(tmp_path, "nobody")[0] == []
    assert not any(str(tmp_path) in line for line in excluded)


def test_a_missing_record_or_folder_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match="train this run first"):
        RunRecord.load(tmp_path / "run.json")
    with pytest.raises(RunError, match="run the notebook that trains first"):
        load_runs(tmp_path / "nowhere")


def test_environment_names_no_host_and_no_path():
    versions, hardware = runs.environment()
    assert versions["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "datasets"} <= versions.keys()
    text = json.dumps([versions, hardware])
    assert platform.node() not in text
    assert os.getcwd() not in text


def test_an_unknown_package_is_reported_not_invented(monkeypatch):
    monkeypatch.setattr(runs, "PACKAGES", ("no-such-package",))
    assert runs.environment()[0]["no-such-package"] == "not installed"


# --- other systems' rules, imitated ---


def test_a_file_and_a_folder_replace_the_ones_before_and_leave_nothing_beside_them(tmp_path):
    for text in ("old", "new"):
        runs.write_atomic(tmp_path / "made" / "file", text.encode())
        runs.replace_folder(tmp_path / "made", tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_share_without_locks_is_written_without_one(tmp_path, monkeypatch, answer):
    def refused(*_, **__):
        raise OSError(answer, "no locks here")

    monkeypatch.setattr(runs.FileLock, "acquire", refused)
    with runs.locked(tmp_path / "lock", "saving"):
        record().save(tmp_path / "run.json")
    monkeypatch.setattr(runs.FileLock, "acquire", lambda *_, **__: os.stat(tmp_path / "none"))
    with pytest.raises(runs.WriteError, match="cannot be written"), runs.locked(tmp_path / "lock", "saving"):
        pass
