"""The puzzle's record: the settings are what their names say, and a change is a change from the base."""

from __future__ import annotations

import torch
from conftest import make_tiny_model, moved

from study.puzzle import NAMES, changes, load_puzzle, losses, settings_of
from utils.adapters import attach, scaling_vectors
from utils.config import PROFILES
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
