"""The puzzle's record: the settings are what their names say, and a change is a change from the base."""

from __future__ import annotations

import json

import torch
from conftest import make_tiny_model, moved

from study.puzzle import AROUND_ONE, NAMES, changes, load_puzzle, losses, settings_of
from utils.adapters import attach, scaling_vectors
from utils.config import ASSETS, PROFILES
from utils.evaluation import held_out_loss


def test_settings_and_losses(blocks):
    model = moved(attach(make_tiny_model(), "ia3"))
    positive = scaling_vectors(model)
    negative = {key: 2 - l for key, l in positive.items()}  # the opposite: nothing is shared
    settings = settings_of(positive, negative)
    assert list(settings)[:5] == list(NAMES) and "a = 1" in settings
    for key, l in positive.items():
        assert torch.allclose(settings["positive"][key], l) and torch.allclose(settings["half"][key], l)
        assert torch.allclose(settings["mean"][key], torch.ones_like(l))
    part = blocks.select(range(3))
    rows = {row["setting"]: row for row in losses(model, settings, {"positive": part, "negative": part})}
    assert abs(rows["base"]["loss_positive"] - held_out_loss(make_tiny_model(), part).value) < 1e-6
    assert abs(rows["a = 1"]["loss_negative"] - held_out_loss(model, part).value) < 1e-6
    assert all(torch.equal(scaling_vectors(model)[key], l) for key, l in positive.items())


def test_changes_are_in_per_cent_of_the_same_seeds_base():
    rows = [
        {"seed": seed, "setting": name, "loss_positive": loss, "loss_negative": 4.0}
        for seed, moves in enumerate(((4.0, 3.96), (5.0, 4.9)))
        for name, loss in zip(("base", "positive"), moves, strict=True)
    ]
    base, positive = changes(rows)
    assert base["positive reviews, %"] == "0" and positive["setting"] == "positive adapter"
    assert positive["positive reviews, %"] == "-1.50 (-2.00 to -1.00)"


def test_a_record_of_another_base_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr("study.puzzle.ASSETS", tmp_path)
    assert load_puzzle(PROFILES["mini"], "f")[1].endswith("not measured")


def test_the_shipped_record_tells_the_story_that_section_7_of_03_reads():
    rows = json.loads((ASSETS / "runs" / "mini" / "puzzle.json").read_text(encoding="utf-8"))["rows"]
    seeds = {row["seed"] for row in rows}
    assert len(seeds) == 3
    change = {(row["setting"], row["seed"]): row for row in rows}

    def gain(setting: str, label: str) -> float:
        key = f"loss_{label}"
        return sum(1 - change[setting, s][key] / change["base", s][key] for s in seeds) / len(seeds)

    assert gain("mean", "positive") > 0.6 * gain("positive", "positive") > 0 and gain("mean", "negative") > 0
    assert all(gain("half", label) < 0.3 * gain("mean", label) for label in ("positive", "negative"))
    around = {a: gain(f"a = {a:g}", "positive") for a in AROUND_ONE}
    assert AROUND_ONE[0] < max(around, key=around.get) < AROUND_ONE[-1] and max(map(abs, around.values())) < 0.01
