"""Measured runs: made the same way for each method, refused when they do not belong, averaged over seeds."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from study import comparison
from study.comparison import comparison_runs, measure_run, paired_difference, study_runs, summarise, usable_runs
from utils.adapters import METHODS
from utils.config import PROFILES
from utils.gpu import GpuError
from utils.metrics import Estimate
from utils.runs import RunRecord
from utils.saving import load_adapter


def test_every_method_is_measured_alike(bench, tmp_path):
    records = {m: measure_run(bench, "positive", m, 0, tmp_path / m, tmp_path / "adapter" / m) for m in METHODS}
    keys = [set(record.metrics) for record in records.values()]
    assert set.intersection(*keys) >= {"positivity", "perplexity", "test_loss_positive", "test_loss_negative", "empty"}
    assert {record.config["base"] for record in records.values()} == {bench.fingerprint}
    assert len({record.metrics["base_test_loss_positive"]["value"] for record in records.values()}) == 1
    base = records["base"].metrics
    assert base["test_loss_positive"] == base["base_test_loss_positive"]
    assert records["full"].metrics["test_loss_positive"]["value"] < base["test_loss_positive"]["value"]
    assert records["base"].counts["trainable"] == 0 < records["ia3"].counts["trainable"]
    assert [path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()] == ["ia3"]  # beside its lock
    load_adapter(copy.deepcopy(bench.base), tmp_path / "adapter" / "ia3")
    for record in records.values():
        assert RunRecord.load(record.save(tmp_path / "records" / f"{record.method}.json")) == record


def test_too_little_memory_stops_before_training(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.sizes.free_memory", lambda device: 1000)
    with pytest.raises(GpuError, match="are free"):
        measure_run(bench, "positive", "full", 0, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_without_reference_runs_one_seed_is_made_here_and_kept(bench, tmp_path, monkeypatch):
    records, source, excluded = comparison_runs(bench.profile, bench.fingerprint, ("base", "ia3"), assets=tmp_path)
    assert [record.method for record in records] == ["base", "ia3"] and source.startswith("trained on this computer")
    assert excluded == ["no run records for profile mini", "no reference run that fits for: base, ia3"]
    monkeypatch.setattr(comparison, "measure_run", None)  # a second call trains nothing
    again, _, _ = comparison_runs(bench.profile, bench.fingerprint, ("base", "ia3"), assets=tmp_path)
    assert again == records


def record(method: str, seed: int = 0, base: str = "b", **fields: object) -> RunRecord:
    profile = PROFILES["mini"]
    config = {"base": base, "learning_rate": profile.learning_rates.get(method), **profile.sampling}
    return RunRecord("finished", method, "mini", profile.config_id(), config, seed, **fields)


def test_reference_runs_of_all_methods_are_taken(tmp_path):
    for seed in (1, 0):
        for method in ("full", "ia3"):
            record(method, seed).save(tmp_path / f"runs/mini/positive-{method}-seed{seed}.json")
    record("ia3", task="negative").save(tmp_path / "runs/mini/negative-ia3-seed0.json")
    record("ia3", 7, base="other").save(tmp_path / "runs/mini/positive-ia3-seed7.json")
    found, source, excluded = comparison_runs(PROFILES["mini"], "b", ("ia3", "full"), assets=tmp_path)
    assert [(r.method, r.seed, r.task) for r in found] == [(m, s, "positive") for m in ("ia3", "full") for s in (0, 1)]
    assert source == "reference run" and excluded == ["positive-ia3-seed7: made with another base model"]


def test_runs_of_another_configuration_are_named_and_another_methods_rate_spoils_none(tmp_path):
    record("ia3").save(tmp_path / "positive-ia3-seed0.json")
    found, excluded = usable_runs(tmp_path, replace(PROFILES["mini"], steps=3), "b")
    assert found == [] and "another configuration" in excluded[0]
    rates = dict(PROFILES["mini"].learning_rates) | {"full": 1.0}
    found, excluded = usable_runs(tmp_path, replace(PROFILES["mini"], learning_rates=rates), "b")
    assert [run.method for run in found] == ["ia3"] and excluded == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": "other"}, "another base model"),
        ({"learning_rate": 1.0}, "trained at a rate of 1.0, not 0.01"),
        ({"temperature": 0.1}, "its text was sampled in another way"),
        ({"samples": 2}, "its text was sampled in another way"),
    ],
)
def test_a_run_made_with_other_settings_is_left_out_and_says_why(tmp_path, change, reason):
    run = record("ia3")
    run.config |= change
    run.save(tmp_path / "run.json")
    found, excluded = usable_runs(tmp_path, PROFILES["mini"], "b")
    assert found == [] and len(excluded) == 1 and reason in excluded[0]


def test_summary_is_a_mean_over_seeds_or_over_what_was_varied():
    def measured(method: str, seed: int, share: float) -> RunRecord:
        share = Estimate(share, share - 0.1, share + 0.1, 16).to_dict()
        return record(method, seed, metrics={"positivity": share}, counts={"trainable": 10})

    runs = [measured("ia3", 0, 0.6), measured("ia3", 1, 0.8), measured("lora", 0, 0.7)]
    ia3, lora = summarise(runs, ["trainable", "positivity", "perplexity"])
    assert (ia3["method"], ia3["trainable"], ia3["perplexity"]) == ("ia3", 10, None)
    assert ia3["positivity"].value == pytest.approx(0.7) and ia3["positivity"].n == 2
    assert lora["positivity"] == Estimate(0.7, 0.7 - 0.1, 0.7 + 0.1, 16)
    runs = [record("ia3", seed, counts={"trainable": n}) for seed, n in ((0, 5), (0, 7))]
    for run, variant in zip(runs, ("keys", "values"), strict=True):
        run.config["variant"] = variant
    rows = summarise(runs, ["trainable"], by="variant")
    assert rows == [{"variant": "keys", "trainable": 5}, {"variant": "values", "trainable": 7}]


def test_a_study_is_read_with_its_own_rule_and_falls_back_to_the_embedded_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "load_base", lambda profile: (None, None))
    monkeypatch.setattr(comparison, "base_fingerprint", lambda model: "b")
    run = record("ia3")
    run.config["learning_rate"] = 0.5  # not the profile's: a sweep is made of such runs
    for study in ("sweep", "ablations"):
        run.save(tmp_path / "runs" / "mini" / study / "run.json")
    (tmp_path / "runs" / "gpt2" / "sweep").mkdir(parents=True)
    found, name, excluded = study_runs(PROFILES["gpt2"], "sweep", tmp_path)
    assert ([r.method for r in found], name, excluded) == (["ia3"], "mini", [])
    found, name, excluded = study_runs(PROFILES["mini"], "ablations", tmp_path)
    assert found == [] and "at a rate of 0.5" in excluded[0]
    assert len(excluded) == 1  # read once, named once
    assert study_runs(PROFILES["mini"], "nothing", tmp_path)[0] == []


def test_paired_difference_uses_common_seeds_only():
    values = {("ia3", 0): 1.0, ("ia3", 1): 2.0, ("ia3", 2): 9.0, ("full", 0): 0.5, ("full", 1): 1.5}
    runs = [record(m, s, metrics={"best_loss": value}) for (m, s), value in values.items()]
    assert paired_difference(runs, "ia3", "full", "best_loss") == Estimate(0.5, 0.5, 0.5, 2)
    with pytest.raises(ValueError, match="no values"):
        paired_difference(runs, "ia3", "lora", "best_loss")
