"""What the course ships: a base model of the promised size, and adapters and records that belong to it."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open

from study.ablations import ABLATIONS
from study.comparison import chosen_rates, study_runs, sweep_losses, usable_runs
from study.dial import load_reference_dial
from utils.adapters import METHODS, base_fingerprint, scaling_vectors, set_scaling_vectors
from utils.config import ASSETS, PROFILES
from utils.data import review_blocks
from utils.evaluation import dial, held_out_loss
from utils.runs import load_runs
from utils.saving import load_adapter, read_probe
from utils.sizes import count_parameters

PROFILE = PROFILES["mini"]
ADAPTERS = sorted((ASSETS / "adapters" / "mini").iterdir())


@pytest.fixture(scope="module")
def fingerprint(embedded):
    return base_fingerprint(embedded()[0])


def test_the_embedded_model_is_what_the_course_promises_and_its_card_says(embedded):
    model, tokenizer = embedded()
    assert 5e6 <= count_parameters(model).total <= 12e6
    assert model.config.n_positions >= 256 and 8000 <= len(tokenizer) == model.config.vocab_size <= 8400
    weights = ASSETS / "mini-gpt2" / "model.safetensors"
    assert weights.stat().st_size <= 25e6
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id
    record = json.loads((ASSETS / "mini-gpt2" / "pretraining.json").read_text(encoding="utf-8"))
    card = (ASSETS / "mini-gpt2" / "README.md").read_text(encoding="utf-8")
    assert record["parameters"] == count_parameters(model).total
    for value in (f"{record['steps']:,}", f"{record['tokens']:,}", *map(str, record["bits_per_byte"].values())):
        assert value in card


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_every_shipped_adapter_loads_on_the_shipped_base(embedded, folder):
    model = load_adapter(embedded()[0], folder)
    assert read_probe(folder)["config_id"] == PROFILE.config_id()
    assert model.active_adapter == "default"


def test_there_is_a_pair_of_adapters_for_every_seed():
    names = {folder.name for folder in ADAPTERS}
    seeds = {name.split("seed")[1] for name in names}
    assert names == {f"{task}-seed{seed}" for task in ("positive", "negative") for seed in seeds} and "0" in seeds


def test_records_are_of_the_shipped_base_three_seeds_a_method_its_sweeps_rate_and_every_ablation(fingerprint):
    records, excluded = load_runs(ASSETS / "runs" / "mini", config_id=PROFILE.config_id())
    assert excluded == [] and {record.config["base"] for record in records} == {fingerprint}
    assert load_reference_dial(PROFILE, fingerprint)[1] is None
    records, excluded = usable_runs(ASSETS / "runs" / "mini", PROFILE, fingerprint)
    runs = {(record.task, record.method, record.seed) for record in records}
    wanted = {("positive", method, seed) for method in METHODS for seed in range(3)}
    assert excluded == [] and wanted | {("negative", "ia3", seed) for seed in range(3)} <= runs
    sweep, name, excluded = study_runs(PROFILE, "sweep")
    assert (name, excluded) == ("mini", []) and chosen_rates(sweep) == PROFILE.learning_rates
    for losses in sweep_losses(sweep).values():
        assert min(losses, key=losses.get) not in (min(losses), max(losses))  # a worse rate on either side
    start = next(record.metrics["start_loss"] for record in sweep if record.method == "full")
    gained = {method for method, losses in sweep_losses(sweep).items() if min(losses.values()) < start}
    assert gained == {*METHODS} - {"base", "prefix"}  # 04: these steps are too few for the prefix
    records, name, excluded = study_runs(PROFILE, "ablations")
    found = {(r.config["study"], r.method, r.config["variant"], r.task) for r in records if r.seed == 0}
    assert (name, excluded) == ("mini", [])
    assert found == {(a.study, a.method, a.variant, a.task) for a in ABLATIONS}


@pytest.mark.slow
def test_the_same_factors_on_other_units_are_worse_than_no_adapter_as_02_says(embedded, real_reviews):
    base, tokenizer = embedded()
    model = load_adapter(base, ASSETS / "adapters" / "mini" / "positive-seed0")
    reviews = Dataset.from_list(real_reviews["validation"])
    blocks = review_blocks(reviews, "positive", tokenizer, PROFILE.block_length, limit=PROFILE.eval_blocks)
    trained, generator = scaling_vectors(model), torch.Generator().manual_seed(PROFILE.seed)
    shuffled = {place: l[torch.randperm(len(l), generator=generator)] for place, l in trained.items()}
    losses = []
    for vectors in (trained, dial(trained, 0), shuffled):
        set_scaling_vectors(model, vectors)
        losses.append(held_out_loss(model, blocks).value)
    assert losses == sorted(losses)
