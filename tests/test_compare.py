"""`python -m study` and what only it uses: a learning-rate sweep, costs; resumed, never mixed, never invented."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_tiny_model

from study import __main__ as compare
from study import dial as dial_module
from study import records as study_records
from study.ablations import ABLATIONS
from study.comparison import chosen_rates, measure_run, stranger, sweep_losses, sweep_run, usable_runs
from study.cost import cost_rows, latency_cost, step_ratios, training_cost
from study.dial import dial_header
from utils.adapters import METHODS, attach
from utils.runs import RunRecord


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """An empty assets folder for the script."""
    for module in (compare, study_records, dial_module):
        monkeypatch.setattr(module, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


def test_every_method_and_seed_has_a_job_and_the_opponents_too(bench):
    names = [path.stem for path in compare.comparison_jobs(bench, ["base", "ia3"], [0, 1])]
    assert len(names) == 6 and "negative-ia3-seed1" in names and "negative-base-seed0" not in names
    jobs = list(compare.ablation_jobs(bench, [0, 1]))
    assert len(set(jobs)) == 2 * len(ABLATIONS) and {path.parent.name for path in jobs} == {"ablations"}
    assert all(path.stem.endswith("seed0") for path in jobs[: len(ABLATIONS)])  # a whole seed first


def test_records_that_are_there_are_kept_and_those_that_do_not_fit_stop_it(bench, assets, monkeypatch, capsys):
    jobs = compare.comparison_jobs(bench, ["base", "ia3"], [0])
    study_records.make_all(bench, jobs)
    assert sorted(path.stem for path in jobs if path.is_file()) == sorted(path.stem for path in jobs)
    assert (assets / "adapters" / "mini" / "positive-seed0" / "probe.json").is_file()
    assert "0 of 3 records" in capsys.readouterr().out
    monkeypatch.setattr(compare, "measure_run", None)  # nothing is made again
    study_records.make_all(bench, jobs)
    assert "3 of 3 records there already\n" in capsys.readouterr().out
    bench.profile = replace(bench.profile, top_p=0.5)
    with pytest.raises(SystemExit, match="sampled in another way.*delete it"):
        study_records.make_all(bench, jobs)


def test_the_time_left_is_told_from_past_records(bench, assets, capsys):
    jobs = compare.comparison_jobs(bench, ["base"], [0, 1, 2])
    paths = list(jobs)
    study_records.make_one(bench, paths[0], jobs[paths[0]], study_records.misfit)
    record = RunRecord.load(paths[0])
    assert record.time["run_seconds"] > 0
    record.time["run_seconds"] = 600.0
    record.save(paths[0])
    study_records.make_all(bench, jobs)
    assert "1 of 3 records there already, about 20 min for the others" in capsys.readouterr().out


def test_a_failed_run_is_kept_as_failed_and_left_out_by_name(bench, assets):
    bench.profile = replace(bench.profile, learning_rates={"full": 1e30})
    study_records.make_all(bench, compare.comparison_jobs(bench, ["full"], [0]))
    folder = assets / "runs" / "mini"
    assert RunRecord.load(folder / "positive-full-seed0.json").status == "failed"
    found, excluded = usable_runs(folder, bench.profile, bench.fingerprint)
    assert found == [] and excluded == ["positive-full-seed0.json: failed, not finished"]


def test_the_sweep_tries_until_the_best_rate_has_worse_neighbours(bench, assets, monkeypatch, capsys):
    compare.run_sweep(bench, ["base", "full"])
    folder = assets / "runs" / "mini" / "sweep"
    losses = sweep_losses(RunRecord.load(path) for path in folder.iterdir())["full"]
    rates = list(losses)
    best = min(losses, key=losses.get)
    at = study_records.RATES.index(best)
    assert set(study_records.RATES[max(at - 1, 0) : at + 2]) <= set(rates)
    has = bench.profile.learning_rates["full"]
    assert f"full       {best:g} (the profile has {has:g})" in capsys.readouterr().out
    monkeypatch.setattr(compare, "sweep_run", lambda *_: pytest.fail("made again"))
    compare.run_sweep(bench, ["full"])
    bench.fingerprint = "another"
    with pytest.raises(SystemExit, match="another base model"):
        compare.run_sweep(bench, ["full"])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, 1e-3),
        ({1e-3: 2.0}, 3e-4),
        ({1e-3: 2.0, 3e-4: 2.1}, 3e-3),
        ({1e-3: 2.0, 3e-4: 2.1, 3e-3: 2.2}, None),
        ({1e-3: 2.0, 3e-4: 2.1, 3e-3: 1.9}, 1e-2),
        ({1e-5: 1.0, 3e-5: 2.0}, None),  # the end of the list
    ],
)
def test_the_next_rate(losses, expected):
    assert study_records.next_rate(9e-4, losses) == expected


def test_the_rate_with_the_lowest_mean_loss_is_chosen_and_never_one_that_diverges(bench, assets):
    records = [
        study_records.make_one(bench, assets / f"{rate}.json", partial(sweep_run, bench, "full", rate, 0), stranger)
        for rate in (1e30, 1e-3)
    ]
    assert [record.status for record in records] == ["failed", "finished"]
    assert records[1].metrics["best_loss"] < records[1].metrics["start_loss"]
    assert chosen_rates(records) == {"full": 1e-3}
    losses = {(1e-3, 0): 4.0, (1e-3, 1): 4.4, (1e-2, 0): 4.1, (1e-2, 1): 4.1}
    records = [
        RunRecord("finished", "ia3", "mini", "id", {"learning_rate": r}, s, metrics={"best_loss": v})
        for (r, s), v in losses.items()
    ]
    assert chosen_rates(records) == {"ia3": 1e-2}


def test_the_dial_goes_on_where_it_stopped(bench, assets):
    for task in ("positive", "negative"):
        record = measure_run(bench, task, "ia3", 0, assets / "run", assets / "adapters" / "mini" / f"{task}-seed0")
        assert record.status == "finished"
    dial_module.write_json(assets / "runs" / "mini" / "dial.json", dial_header(bench.profile, "other") | {"rows": []})
    with pytest.raises(SystemExit, match="Delete it"):
        dial_module.run_dial(bench, [0])


def test_costs_of_every_method(bench):
    rows = {row["method"]: row for row in cost_rows(bench, list(METHODS), rounds=1)}
    assert list(rows) == list(METHODS)
    assert rows["full"]["step_ratio"] == 1 and rows["base"]["step_ratio"] is None
    assert {m for m, row in rows.items() if row["merged_latency_ratio"]} == {"ia3", "ia3_kv", "lora"}
    assert all(row["latency_ratio"] > 0 for row in rows.values())
    assert rows["base"]["saved_bytes"] == 0 < rows["lora"]["saved_bytes"] < rows["ia3"]["saved_bytes"]
    assert rows["ia3"]["bytes_on_disk"] < rows["full"]["bytes_on_disk"]
    json.dumps(list(rows.values()), allow_nan=False)


def test_step_ratios_leave_the_models_as_they_were(bench):
    models = {method: attach(make_tiny_model(), method) for method in ("ia3", "full")}
    before = {name: [p.detach().clone() for p in model.parameters()] for name, model in models.items()}
    ratios = step_ratios(models, bench.blocks("adapter", "positive"), batch_size=4, rounds=3)
    assert list(ratios) == ["ia3", "full"] and ratios["full"] == 1.0 and ratios["ia3"] > 0
    for name, model in models.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], model.parameters(), strict=True))


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
