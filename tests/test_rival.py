"""The rival of the dial: the vector is what its name says, the choice reads validation alone, the record resumes."""

from __future__ import annotations

import copy
import json
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import logits, make_tiny_model, moved

from extensions import embedding_judge
from study import dial, records, steering
from study.dial import dial_header
from study.records import SEEDS
from study.steering import (
    CONTROL,
    PRICE,
    VALIDATION_PROMPTS,
    VALIDATION_SEED,
    choose,
    load_rivals,
    mean_differences,
    points,
    run_steering,
    steered,
)
from study.tables import at_price, rival_rows
from utils.adapters import attach, scaling_vectors
from utils.data import PROMPTS
from utils.metrics import Estimate

STEERED = [a for a in dial.STRENGTHS["contrast"] if a]


def test_the_vector_is_the_difference_of_the_mean_hidden_states(blocks):
    model, parts = make_tiny_model(layers=3), {"positive": blocks.select(range(5)), "negative": blocks.select((6, 7))}
    found = mean_differences(model, parts, batch_size=2)
    assert found.shape == (2, 32)
    for layer, row in enumerate(found):
        means = []
        for part in parts.values():
            states = []
            hook = model.transformer.h[layer].register_forward_hook(lambda _m, _i, out, to=states: to.append(out))
            model(torch.as_tensor(part[:]["input_ids"]))
            hook.remove()
            means.append(states[0].flatten(0, 1).mean(0))
        assert torch.allclose(row, means[0] - means[1], atol=1e-5)


def test_steering_moves_one_layers_output_and_leaves_nothing_behind(tiny_model):
    before, move = logits(tiny_model), torch.randn(32)
    with steered(tiny_model, 0, 0.0 * move):
        assert torch.equal(logits(tiny_model), before)
    read = []  # by the next layer
    tiny_model.transformer.h[1].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    logits(tiny_model)
    with pytest.raises(RuntimeError, match="stop"), steered(tiny_model, 0, move):
        assert not torch.equal(logits(tiny_model), before)
        raise RuntimeError("stop")
    assert torch.allclose(read[1], read[0] + move, atol=1e-6)
    assert torch.equal(logits(tiny_model), before)


def test_the_choice_reads_validation_alone(bench, monkeypatch):
    assert not set(VALIDATION_PROMPTS) & set(PROMPTS) and VALIDATION_SEED not in SEEDS
    bench.reviews = {"validation": bench.reviews["validation"]}  # any other part is a KeyError
    layer, move, read = 0, torch.zeros(32), []

    @contextmanager
    def turned(_model, at, by):
        nonlocal layer, move
        layer, move = at, by
        yield

    def loss(*_args):  # a known price: quadratic in the length of the move
        return Estimate(4 + 0.01 * float(move @ move), 0, 0, 1)

    def share(*_args):  # the second layer reaches further
        return Estimate(0.5 + 0.1 * (layer + 1) * (1 if move[0] > 0 else -1), 0, 1, 1)

    def written(_model, _tokenizer, prompts, *, seed, **_options):
        read.append((prompts, seed))

    for name, fake in {"steered": turned, "held_out_loss": loss, "positivity": share, "generate": written}.items():
        monkeypatch.setattr(steering, name, fake)
    differences = torch.zeros(2, 32)
    differences[0, 0], differences[1, 0] = 1.0, 0.1
    best, other = choose(bench, differences)
    assert (best["layer"], other["layer"]) == (1, 0)
    assert (best["reach"], other["reach"]) == pytest.approx((0.4, 0.2))
    longest = math.sqrt(math.log(PRICE) / 0.01)  # whose price is `PRICE`
    assert 0.93 * longest < other["scale"] <= longest and 0.93 * longest < 0.1 * best["scale"] <= longest
    assert read == [(VALIDATION_PROMPTS, VALIDATION_SEED)] * 4


@pytest.fixture
def rivals(bench, tmp_path, monkeypatch):
    """A bench whose records go to `tmp_path`, with two adapters on its tiny model."""
    model = moved(attach(copy.deepcopy(bench.base), "ia3"))
    positive = scaling_vectors(model)
    library = SimpleNamespace(use=lambda task: nullcontext(model))
    negative = {key: 2 - l for key, l in positive.items()}
    monkeypatch.setattr(steering, "adapters_of", lambda bench, seed: (library, positive, negative))
    for module in (dial, records):
        monkeypatch.setattr(module, "ASSETS", tmp_path)
    return bench, model, positive


def test_the_control_is_the_contrast_with_its_factors_shuffled(rivals):
    bench, model, positive = rivals
    choice = {"layers": [{"layer": 0}], "unit": [0.1 * n for n in range(32)]}
    seen = []
    for curve, strength, turned in points(bench, 0, choice):
        seen.append((curve, strength))
        assert not torch.equal(logits(turned), logits(bench.base))
        if (curve, strength) == ("shuffled", 2):
            found = scaling_vectors(model)
    assert seen == [*(("steering", a) for a in STEERED), *(("shuffled", a) for a in CONTROL)]
    for key, l in positive.items():
        wanted = 1 + 2 * (2 * l - 2)
        assert not torch.allclose(found[key], wanted)
        assert torch.allclose(found[key].sort().values, wanted.sort().values, atol=1e-5)


def test_an_interrupted_record_goes_on_and_is_as_if_nothing_had_happened(rivals, tmp_path, monkeypatch):
    bench = rivals[0]
    before = logits(bench.base)
    run_steering(bench, [0])
    path = tmp_path / "runs" / "mini" / "steering.json"
    whole = json.loads(path.read_text())
    assert len(whole["rows"]) == len(STEERED) + len(CONTROL) and torch.equal(logits(bench.base), before)
    assert set(whole["rows"][0]) == {"seed", "curve", "strength", "positivity", "perplexity", "held_out_loss"}
    path.write_text(json.dumps(whole | {"rows": whole["rows"][:3]}))
    monkeypatch.setattr(steering, "choose", None)  # it is not chosen again
    run_steering(bench, [0])
    assert json.loads(path.read_text()) == whole
    monkeypatch.setattr(steering, "generate", None)  # a second call writes no text
    run_steering(bench, [0])
    bench.fingerprint = "another"
    with pytest.raises(SystemExit, match="another base model"):
        run_steering(bench, [0])


def test_the_third_judge_reads_the_same_points_and_stands_beside_the_others(rivals, bench, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "mini"
    assert load_rivals(bench.profile, bench.fingerprint)[1].endswith("not measured")
    run_steering(bench, [0])
    header = dial_header(bench.profile, bench.fingerprint)
    base = json.loads((folder / "steering.json").read_text())["rows"][0] | {"curve": "contrast", "strength": 0}
    (folder / "dial.json").write_text(json.dumps(header | {"rows": [base, base | {"curve": "dial"}]}))
    rows, why_not = load_rivals(bench.profile, bench.fingerprint)
    assert why_not is None and [row["curve"] for row in rows].count("dial") == 0
    assert not any("positivity_embeddings" in row for row in rows)

    share = Estimate(0.5, 0.4, 0.6, 9)
    judge = SimpleNamespace(accuracy=lambda *_args, **_options: share)
    monkeypatch.setattr(embedding_judge, "EmbeddingJudge", lambda reviews: judge)
    monkeypatch.setattr(embedding_judge, "positivity", lambda texts, by: share)
    monkeypatch.setattr(embedding_judge, "SEEDS", (0,))
    choice = steering.chosen(folder / "steering.json")
    embedding_judge.judge_record(bench, "steering", lambda seed: points(bench, seed, choice))
    rows, _ = load_rivals(bench.profile, bench.fingerprint)
    assert [row["curve"] for row in rows if "positivity_embeddings" not in row] == ["contrast"]
    assert {row["positivity_embeddings"]["value"] for row in rows[1:]} == {0.5}


def row(curve: str, seed: int, strength: float, price: float, share: float) -> dict:
    scores = {"held_out_loss": 4 + math.log(price), "positivity": share, "perplexity": 10 * price}
    return {"curve": curve, "seed": seed, "strength": strength} | {key: {"value": v} for key, v in scores.items()}


def test_rivals_are_compared_at_one_price():
    rows = []
    for seed in range(3):
        rows += [row("contrast", seed, 0, 1.0, 0.5), row("contrast", seed, 2, 1.2, 0.9 + 0.02 * seed)]
        rows += [row("steering", seed, 1, 1.1, 0.6), row("steering", seed, 2, 1.3, 0.8)]
    assert at_price(rows, "contrast", "positivity", 1.1, 1) == pytest.approx({0: 0.7, 1: 0.71, 2: 0.72})
    assert at_price(rows, "steering", "positivity", 1.2, 1) == pytest.approx(dict.fromkeys(range(3), 0.7))
    assert at_price(rows, "contrast", "positivity", 1.3, 1) == {} == at_price(rows, "contrast", "positivity", 1.1, -1)
    assert at_price(rows, "contrast", "perplexity", 1.1, 1) == pytest.approx(dict.fromkeys(range(3), 1.1))
    words, own = rival_rows(rows, [1.1])
    assert (words["towards"], words["price"], words["score"]) == ("praise", "x 1.10", "positive: words")
    assert words["contrast"].startswith("0.71 [") and words["steering"] == "0.60 [0.60, 0.60]"
    assert words["contrast - steering"].startswith("0.11 [") and words["contrast - steering"].endswith("(above 0)")
    assert own["contrast - steering"].startswith("0.00 [") or own["contrast - steering"].startswith("-0.00 [")
