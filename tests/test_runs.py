"""Run records: written whole or not at all, refused when broken, never mixed; tables and fronts."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from utils import runs
from utils.metrics import METRICS, Estimate, compare_table, mean_interval, pareto_front, table
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


def test_numpy_and_torch_numbers_become_json(tmp_path):
    path = record(metrics={"a": np.float32(0.5), "b": torch.tensor(2)}).save(tmp_path / "run.json")
    assert RunRecord.load(path).metrics == {"a": 0.5, "b": 2}
    with pytest.raises(RunError, match="not set"):
        record(metrics={"a": {1, 2}}).save(path)


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = record(seed=1).save(tmp_path / "run.json")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(runs.os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        record(seed=2).save(path)
    assert RunRecord.load(path).seed == 1
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_diverged_run_is_not_saved(tmp_path):
    with pytest.raises(RunError, match=r"metrics.best_loss is nan"):
        record(metrics={"best_loss": float("nan")}).save(tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


def rewrite(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("method"), "missing method"),
        (lambda v: v.update(typo=1), "unknown typo"),
        (lambda v: v.update(seed="0"), "seed is a str, not int"),
        (lambda v: v.update(seed=True), "seed is a bool, not int"),
        (lambda v: v.update(bytes_on_disk=1.5), "bytes_on_disk is a float, not int or null"),
        (lambda v: v.update(status="done"), "status is 'done', not one of finished, running, failed"),
        (lambda v: v["history"].append({"eval_loss": float("inf")}), "history.1.eval_loss is inf"),
    ],
)
def test_a_wrong_record_is_refused_by_name(tmp_path, change, message):
    path = record().save(tmp_path / "run.json")
    rewrite(path, change)
    with pytest.raises(RunError, match=message) as error:
        RunRecord.load(path)
    assert "run.json" in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "this is a list")])
def test_a_file_that_is_no_record(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=message):
        RunRecord.load(tmp_path / "run.json")


def test_a_missing_record_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match="train this run first"):
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


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match="run the notebook that trains first"):
        load_runs(tmp_path / "nowhere")


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    runs.write_json(tmp_path / "dial.json", {"rows": [Estimate(1, 0, 2, 3)]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(tmp_path / "dial.json", {"rows": [float("nan")]})
    assert json.loads((tmp_path / "dial.json").read_text()) == {"rows": [{"value": 1, "low": 0, "high": 2, "n": 3}]}


def test_environment_names_no_host_and_no_path():
    versions, hardware = runs.environment()
    assert versions["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "datasets"} <= versions.keys()
    text = json.dumps([versions, hardware])
    assert os.uname().nodename not in text
    assert os.getcwd() not in text


def test_an_unknown_package_is_reported_not_invented(monkeypatch):
    monkeypatch.setattr(runs, "PACKAGES", ("no-such-package",))
    assert runs.environment()[0]["no-such-package"] == "not installed"


def test_estimate_as_text_and_dict():
    estimate = Estimate(0.674, 0.612, 0.731, 256)
    assert str(estimate) == "0.67 [0.61, 0.73]"
    assert Estimate.from_dict(estimate.to_dict()) == estimate
    with pytest.raises(ValueError, match="not an estimate"):
        Estimate.from_dict({"value": 1})


def test_mean_interval_is_students():
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert estimate.value == 2
    assert estimate.high - 2 == pytest.approx(4.302653 / 3**0.5)  # t(0.975, 2) from a table
    assert mean_interval([5.0]) == Estimate(5.0, 5.0, 5.0, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_pareto_front_is_what_nothing_beats():
    points = [(10, 0.5), (1, 0.3), (5, 0.6), (7, 0.55), (1, 0.2), (20, 0.6)]
    assert pareto_front(points) == [1, 2]
    assert pareto_front([]) == []


def test_pareto_front_against_its_definition():
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 8, (30, 2)).tolist()]

    def beaten(a):
        return any(b != a and b[0] <= a[0] and b[1] >= a[1] for b in points)

    assert {points[i] for i in pareto_front(points)} == {p for p in points if not beaten(p)}


def test_table_marks_the_best_in_the_good_direction():
    rows = [
        {"method": "ia3", "trainable": 64512, "positivity": Estimate(0.7, 0.6, 0.8, 9), "test_loss": 4.5},
        {"method": "full", "trainable": 124439808, "positivity": Estimate(0.6, 0.5, 0.7, 9), "test_loss": None},
    ]
    text = table(rows, ["method", "trainable", "positivity", "test_loss"])
    heading, _, ia3, full, note = text.splitlines()
    assert "trainable (parameters) ↓" in heading
    assert "positive, words (share) ↑" in heading
    assert "64,512*" in ia3
    assert "0.70 [0.60, 0.80]*" in ia3
    assert "4.500" in ia3
    assert "4.500*" not in ia3  # nothing to compare it with
    assert "*" not in full
    assert full.rstrip().endswith("-")
    assert "intervals" in note


def test_table_without_a_direction_has_no_marks():
    assert "*" not in table([{"name": "a", "best_step": 1}, {"name": "b", "best_step": 2}], ["name", "best_step"])
    assert table([], ["name"]).splitlines() == ["name", "----"]


def test_compare_table_says_match_only_for_equal():
    lines = compare_table([("(IA)³", 64512, 64512), ("LoRA", 294912, 294913)]).splitlines()
    assert lines[2].split() == ["(IA)³", "64,512", "64,512", "yes"]
    assert lines[3].endswith("NO")


def test_every_metric_is_declared_completely():
    for name, metric in METRICS.items():
        assert metric.better in ("higher", "lower", None), name
        assert metric.label and metric.digits >= 0
        assert metric.title.endswith({"higher": "↑", "lower": "↓", None: metric.title[-1]}[metric.better])


def test_text_in_a_column_of_numbers_is_no_best_value():
    assert "*" not in table(
        [{"m": "a", "best_loss": "not measured"}, {"m": "b", "best_loss": "not measured"}], ["m", "best_loss"]
    )
    lines = table(
        [{"m": "a", "best_loss": "not measured"}, {"m": "b", "best_loss": 4.0}, {"m": "c", "best_loss": 5.0}],
        ["m", "best_loss"],
    )
    assert [line.rstrip().endswith("*") for line in lines.splitlines()[2:5]] == [False, True, False]
