"""scripts/compare.py and what only it uses: a learning-rate sweep, costs; resumed, never mixed, never invented."""

from __future__ import annotations

import json
from dataclasses import replace

import compare
import pytest
from conftest import make_tiny_model

from utils.adapters import METHODS
from utils.comparison import chosen_rates, measure_run, sweep_row
from utils.cost import cost_rows, latency_cost, training_cost
from utils.steering import dial_header


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """An empty assets folder for the script."""
    monkeypatch.setattr(compare, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


def test_plan_has_every_method_and_seed_and_the_opponents():
    runs = compare.plan(["base", "ia3"], [0, 1])
    assert len(runs) == 6 and ("negative", "ia3", 1) in runs and ("negative", "base", 0) not in runs


def test_runs_that_are_there_are_skipped_and_those_that_do_not_fit_stop_it(bench, assets, monkeypatch, capsys):
    runs = [("positive", "base", 0), ("positive", "ia3", 0)]
    compare.run_all(bench, runs)
    assert sorted(path.name for path in assets.rglob("*seed0.json")) == [
        "positive-base-seed0.json", "positive-ia3-seed0.json",
    ]  # fmt: skip
    assert (assets / "adapters" / "mini" / "positive-seed0" / "probe.json").is_file()
    monkeypatch.setattr(compare, "measure_run", None)  # nothing is made again
    compare.run_all(bench, runs)
    assert capsys.readouterr().out.count("there already") == 2
    bench.profile = replace(bench.profile, top_p=0.5)
    with pytest.raises(SystemExit, match="sampled in another way.*delete it"):
        compare.run_all(bench, runs)


def test_the_sweep_resumes_and_refuses_another_base(bench, assets, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RATES", (1e-3, 1e-1))
    compare.run_sweep(bench, ["base", "ia3"])
    path = assets / "runs" / "mini" / "sweep.json"
    rows = json.loads(path.read_text())["rows"]
    assert [(row["method"], row["learning_rate"]) for row in rows] == [("ia3", 1e-3), ("ia3", 1e-1)]
    monkeypatch.setattr(compare, "sweep_row", None)
    compare.run_sweep(bench, ["base", "ia3"])
    assert "ia3" in capsys.readouterr().out
    bench.fingerprint = "another"
    with pytest.raises(SystemExit, match="another base model"):
        compare.run_sweep(bench, ["ia3"])


def test_a_rate_that_diverges_is_a_row_and_is_not_chosen(bench, tmp_path):
    good, bad = (sweep_row(bench, "full", rate, 0, tmp_path / str(rate)) for rate in (1e-3, 1e30))
    assert bad["best_loss"] is None and good["best_loss"] < good["start_loss"]
    assert chosen_rates([bad, good]) == {"full": 1e-3}


def test_the_rate_with_the_lowest_mean_loss_is_chosen():
    losses = {(1e-3, 0): 4.0, (1e-3, 1): 4.4, (1e-2, 0): 4.1, (1e-2, 1): 4.1}
    rows = [{"method": "ia3", "learning_rate": r, "seed": s, "best_loss": v} for (r, s), v in losses.items()]
    assert chosen_rates(rows) == {"ia3": 1e-2}


def test_the_dial_goes_on_where_it_stopped(bench, assets):
    for task in ("positive", "negative"):
        record = measure_run(bench, task, "ia3", 0, assets / "run", assets / "adapters" / "mini" / f"{task}-seed0")
        assert record.status == "finished"
    compare.write_json(assets / "runs" / "mini" / "dial.json", dial_header(bench.profile, "other") | {"rows": []})
    with pytest.raises(SystemExit, match="Delete it"):
        compare.run_dial(bench, [0])


def test_costs_of_every_method(bench):
    rows = {row["method"]: row for row in cost_rows(bench, list(METHODS), rounds=1)}
    assert list(rows) == list(METHODS)
    assert rows["full"]["step_ratio"] == 1 and rows["base"]["step_ratio"] is None
    assert {m for m, row in rows.items() if row["merged_latency_ratio"]} == {"ia3", "ia3_kv", "lora"}
    assert all(row["latency_ratio"] > 0 for row in rows.values())
    assert rows["base"]["saved_bytes"] == 0 < rows["lora"]["saved_bytes"] < rows["ia3"]["saved_bytes"]
    assert rows["ia3"]["bytes_on_disk"] < rows["full"]["bytes_on_disk"]
    json.dumps(list(rows.values()), allow_nan=False)


def test_training_cost_has_a_row_a_method():
    rows = training_cost(make_tiny_model, ["ia3", "full"], batch=2, length=16, rounds=1)
    assert [row["method"] for row in rows] == ["ia3", "full"]
    assert all(row["tokens_per_second"] == pytest.approx(32 / row["step_seconds"]) for row in rows)


def test_latency_is_measured_eager_and_compiled(tokenizer, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.compile", lambda forward: compiled.append(forward) or forward)
    rows = latency_cost(make_tiny_model, tokenizer, repeats=1)
    names = ["base", "attached", "merged"]
    assert [row["name"] for row in rows] == names + [f"{name}, compiled" for name in names] and len(compiled) == 3


def test_without_a_gpu_its_rows_are_not_invented(monkeypatch, assets):
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    with pytest.raises(SystemExit, match="not measured"):
        compare.run_gpu_cost()
    assert not assets.exists()
