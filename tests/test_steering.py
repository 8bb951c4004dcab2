"""The dial: it moves the vectors as said, measures what it says, and puts everything back."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_tiny_model, moved

from study.dial import dial_header, load_reference_dial
from utils.adapters import attach, scaling_vectors
from utils.config import PROFILES
from utils.evaluation import dial, held_out_loss, strength_sweep


@pytest.fixture
def model():
    return moved(attach(make_tiny_model(), "ia3"))


def sweep(model, tokenizer, blocks, judge, strengths):
    blocks = blocks.select(range(4))
    rows = strength_sweep(
        model, partial(dial, scaling_vectors(model)), strengths, prompts=["I saw", "the acting"],
        sampling={"samples": 3, "new_tokens": 12}, judges={"words": judge}, blocks=blocks,
        tokenizer=tokenizer, progress=False,
    )  # fmt: skip
    return rows, blocks


def test_sweep_measures_each_strength_and_puts_the_vectors_back(model, tokenizer, blocks, judge):
    before = scaling_vectors(model)
    rows, held_out = sweep(model, tokenizer, blocks, judge, (0, 1, -2))
    assert [row["strength"] for row in rows] == [0.0, 1.0, -2.0]
    assert set(rows[0]) == {"strength", "positivity", "perplexity", "held_out_loss"}
    assert rows[0]["held_out_loss"].value == pytest.approx(held_out_loss(make_tiny_model(), held_out).value, abs=1e-6)
    assert rows[1]["held_out_loss"].value == pytest.approx(held_out_loss(model, held_out).value, abs=1e-6)
    assert len({row["held_out_loss"].value for row in rows}) == 3
    assert all(torch.equal(scaling_vectors(model)[key], before[key]) for key in before)


def test_sweep_puts_the_vectors_back_after_an_error(model, tokenizer, blocks, judge):
    before = scaling_vectors(model)
    with pytest.raises(TypeError):
        sweep(model, tokenizer, blocks, judge, (2, None))
    assert all(torch.equal(scaling_vectors(model)[key], before[key]) for key in before)


def test_reference_dial_says_why_it_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr("study.dial.ASSETS", tmp_path)
    profile = PROFILES["mini"]
    assert load_reference_dial(profile, "f")[1].endswith("not measured")
    path = tmp_path / "runs" / "mini" / "dial.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dial_header(profile, "f") | {"rows": [{"strength": 0}]}))
    assert load_reference_dial(profile, "f") == ([{"strength": 0}], None)
    others = [(profile, "g"), (replace(profile, top_p=0.5), "f"), (replace(profile, steps=7), "f")]
    for other, base in others:
        assert "another configuration, base model or sampling" in load_reference_dial(other, base)[1]
