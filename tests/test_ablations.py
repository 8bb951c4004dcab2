"""The small experiments around (IA)³: each starts as the base, trains what its name says, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model

from study.ablations import (
    ABLATIONS,
    Ablation,
    build,
    choose_modules,
    enough_blocks,
    few_shot_rows,
    measure_ablation,
    scores_by_gradient,
    share_factors,
    study_rows,
)
from utils.adapters import scaling_vectors
from utils.runs import RunRecord
from utils.sizes import count_parameters, predict_ia3_count, predict_lora_count

STUDIES = [a for a in ABLATIONS if a.study != "few-shot"]
IDS = torch.tensor([[5, 9, 40, 77, 3, 120, 8, 11]])
BATCH = {"input_ids": IDS.tolist(), "labels": IDS.tolist()}


def trained(ablation: Ablation, steps: int = 3) -> torch.nn.Module:
    """A three-layer model after a few steps of Adam."""
    model = build(make_tiny_model(layers=3), ablation, BATCH).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_names_of_records_are_unique_and_fit_in_a_file_name():
    names = [ablation.name for ablation in ABLATIONS]
    assert len(set(names)) == len(names) and all(set("/\\: ").isdisjoint(name) for name in names)


@pytest.mark.parametrize("ablation", STUDIES, ids=lambda a: a.name)
def test_starts_as_the_base_and_trains_only_what_was_added(ablation):
    base = make_tiny_model(layers=3)
    before = {name: p.clone() for name, p in base.named_parameters()}
    fresh = build(copy.deepcopy(base), ablation, BATCH)
    with torch.inference_mode():
        expected, fresh = base(IDS).logits, fresh(IDS).logits
    torch.testing.assert_close(fresh, expected)
    after = trained(ablation)
    weights = {name.replace(".base_layer", ""): p for name, p in after.named_parameters()}
    assert all(torch.equal(weights[name], p) for name, p in before.items())
    with torch.inference_mode():
        assert not torch.allclose(after(IDS).logits, expected)


@pytest.mark.parametrize("ablation", [a for a in STUDIES if a.study in ("vectors", "layers")], ids=lambda a: a.name)
def test_what_is_held_stays_at_one_and_what_is_counted_moves(ablation):
    model = trained(ablation)
    wanted = ablation.variant.split(" + ")
    layers = {"first": [0], "middle": [1], "last": [2]}.get(wanted[0].split()[0], range(3))
    free = 0
    for key, vector in scaling_vectors(model).items():
        layer, role = key.split(".")
        sections = ["queries", "keys", "values"] if role == "attention" else ["feedforward"]
        for section, factors in zip(sections, vector.chunk(len(sections)), strict=True):
            moves = int(layer) in layers and (ablation.study == "layers" or section in wanted)
            assert bool((factors != 1).any()) == moves, (key, section)
            free += moves * factors.numel()
    assert count_parameters(model).trainable == free


@pytest.mark.parametrize(("grain", "per_layer"), [("one per head", 3 * 4 + 16), ("one per vector", 4)])
def test_shared_factors_stay_equal_and_count_once(grain, per_layer):
    model = trained(Ablation("granularity", grain))
    assert count_parameters(model).trainable == 3 * per_layer
    for key, vector in scaling_vectors(model).items():
        size = 8 if grain == "one per head" else 32 if key.endswith("attention") else 128
        groups = vector.view(-1, size)
        assert torch.equal(groups, groups[:, :1].expand_as(groups)) and (groups != 1).all()


def test_a_shared_factor_learns_as_one_number_would():
    torch.manual_seed(0)
    inputs, goal = torch.randn(5, 4), torch.randn(5, 4)
    many, one = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(()))
    share_factors(many, 4)
    for factor in (many, one):
        optimizer = torch.optim.Adam([factor], lr=0.1)
        for _ in range(5):
            ((factor * inputs - goal) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(many, one.expand(4))


def test_a_factor_is_chosen_by_the_size_of_its_gradient():
    model = make_tiny_model()
    scores = scores_by_gradient(copy.deepcopy(model), BATCH)
    assert len(scores) == 4 * model.config.n_layer
    name = "transformer.h.1.attn.c_proj"
    gradients = []
    for unit in range(model.config.n_embd):  # central differences: one output of one matrix times 1 + e, and 1 - e
        losses = []
        for step in (1e-2, -1e-2):
            varied = copy.deepcopy(model).double()
            matrix = varied.get_submodule(name)
            with torch.no_grad():
                matrix.weight[:, unit] *= 1 + step
                matrix.bias[unit] *= 1 + step
                losses.append(varied(input_ids=IDS, labels=IDS).loss.item())
        gradients.append(abs(losses[0] - losses[1]) / 2e-2)
    assert scores[name] == (pytest.approx(sum(gradients) / len(gradients), rel=1e-2), model.config.n_embd)
    assert not any("ia3" in name for name, _ in model.named_parameters())


def test_the_choice_keeps_to_the_budget_and_combinations_are_counted():
    assert choose_modules({"a": (1.0, 5), "b": (3.0, 8), "c": (2.0, 4)}, 12) == ["b", "c"]
    assert choose_modules({"a": (1.0, 5), "b": (3.0, 8), "c": (2.0, 6)}, 13) == ["b", "a"]
    config = make_tiny_model(layers=3).config
    chosen = build(make_tiny_model(layers=3), Ablation("gradient", "chosen by gradient"), BATCH)
    assert 0 < count_parameters(chosen).trainable <= predict_ia3_count(config)
    config = make_tiny_model(layers=3).config
    together = build(make_tiny_model(layers=3), Ablation("together", "with LoRA"), BATCH)
    assert count_parameters(together).trainable == predict_ia3_count(config) + predict_lora_count(config)
    mixed = build(make_tiny_model(layers=3), Ablation("low-rank", "low-rank mixing"), BATCH)
    width = 7 * config.n_embd
    assert count_parameters(mixed).trainable == config.n_layer * (width + 2 * 4 * width)


def test_a_record_says_what_was_varied_and_keeps_the_best_step(bench, tmp_path):
    for ablation in (Ablation("together", "with LoRA"), Ablation("few-shot", "2 reviews", "lora", reviews=2)):
        record = measure_ablation(bench, ablation, 1, tmp_path / ablation.name)
        record = RunRecord.load(record.save(tmp_path / f"{ablation.name}.json"))
        assert (record.config["study"], record.config["variant"]) == (ablation.study, ablation.variant)
        assert record.config["learning_rate"] == bench.profile.learning_rates[ablation.method]
        assert record.config["train_reviews"] == ablation.reviews or bench.profile.train_reviews
        assert {"best_loss", "positivity", "test_loss_negative"} <= record.metrics.keys()
    assert record.config["modules"] == []


def test_too_few_reviews_for_a_batch_are_repeated(bench):
    one = enough_blocks(bench, Ablation("few-shot", "1 review", reviews=1))
    bench.profile = replace(bench.profile, batch_size=7)
    many = enough_blocks(bench, Ablation("few-shot", "1 review", reviews=1))
    assert len(many) == 7 > len(one)
    assert all(torch.equal(many[i]["input_ids"], one[i % len(one)]["input_ids"]) for i in range(7))


def fake(study: str, variant: str, method: str = "ia3", task: str = "positive", seed: int = 0, **config) -> RunRecord:
    """A record with a share of 0.6 and a loss 0.1 below the base's."""
    share = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 9}
    losses = {f"{base}test_loss_{task}": share | {"value": v} for base, v in (("", 3.9), ("base_", 4.0))}
    return RunRecord(
        "finished", method, "mini", "id", {"study": study, "variant": variant} | config, seed, task,
        counts={"trainable": 1500}, metrics={"positivity": share, "best_loss": 4.1, "start_loss": 4.3} | losses,
    )  # fmt: skip


def test_rows_of_a_study_hold_its_own_variants_and_tasks_only():
    records = [
        fake("vectors", "keys"), fake("vectors", "values"), fake("layers", "first third"),
        fake("granularity", "one per head", task="negative"), fake("granularity", "one per vector"),
    ]  # fmt: skip
    rows = study_rows(records, "vectors")
    assert [row["label"] for row in rows] == ["keys (1,500)", "values (1,500)"]
    assert rows[0]["loss_change"] == pytest.approx(-0.1) and rows[0]["positivity"].value == 0.6
    assert rows[0]["validation_change"] == pytest.approx(-0.2)
    assert [row["variant"] for row in study_rows(records, "granularity", "negative")] == ["one per head"]


def test_few_reviews_are_joined_by_the_whole_run_of_the_same_seed():
    few = [fake("few-shot", f"{n} reviews", m, train_reviews=n) for m in ("ia3", "full") for n in (8, 32)]
    whole = [fake("-", "-", m, seed=s) for m in ("ia3", "full", "lora") for s in (0, 1)]
    rows = few_shot_rows(few, whole, 1500)
    points = [(row["method"], row["train_reviews"]) for row in rows]
    assert points == [(m, n) for m in ("ia3", "full") for n in (8, 32, 1500)]
    assert all(row["positivity"].n == 9 for row in rows)  # one seed: the run's own interval
    assert all(row["loss_change"] == pytest.approx(-0.1) for row in rows)
