"""The dial on a modern language model: (IA)³ vectors for negative and for positive reviews, on SmolLM2-135M-Instruct.

    python -m extensions --lab modern-llm --seeds 0 1                # the sweep, then a vector for each label and seed
    python -m extensions --lab modern-llm --seeds 0 --only runs

A run's record goes to `assets/runs/modern-llm-mini/`, its adapter to `assets/adapters/modern-llm-mini/`. The learning
rate is chosen on validation reviews, by short runs on positive reviews. The text is a plain continuation: packed
reviews with the end token between them, no chat template. What is there is not made again, what was interrupted goes
on.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets import Dataset

from extensions.models import load_model
from extensions.recipes import Recipe
from extensions.training import attach_recipe
from study.comparison import stranger
from study.records import SWEEP_SEED, expected, make_one, sweep_method, swept_rates
from utils.adapters import base_fingerprint
from utils.config import ASSETS, PROFILES
from utils.data import LABELS, load_reviews, review_blocks
from utils.evaluation import held_out_loss
from utils.runs import RunRecord
from utils.saving import save_adapter
from utils.training import train

SWEEP_BLOCKS = 120  # of `max_length` tokens


class DialBench:
    """What all runs share, loaded once: the reviews of the course, the base, its tokenizer and its fingerprint."""

    def __init__(self, recipe: Recipe) -> None:
        self.profile = recipe
        self.reviews = load_reviews(PROFILES["mini"])
        self.base, self.tokenizer, self.description = load_model(recipe)
        # an adapter records where its base comes from: the model's name, and no folder of this computer
        self.base.config._name_or_path = self.base.name_or_path = recipe.model_name
        self.fingerprint = base_fingerprint(self.base)

    def blocks(self, part: str, label: str) -> Dataset:
        """Packed blocks (rows, `max_length`) of one label: `train_examples` of "adapter", else `eval_examples`."""
        recipe = self.profile
        limit = recipe.train_examples if part == "adapter" else recipe.eval_examples
        # more than enough reviews: one fills a block and more, nearly always
        reviews = min(list(self.reviews[part]["label"]).count(LABELS.index(label)), 2 * limit)
        return review_blocks(self.reviews[part], label, self.tokenizer, recipe.max_length, reviews=reviews, limit=limit)


def sweep_recipe(recipe: Recipe) -> Recipe:
    """The recipe with no more training blocks than a sweep has."""
    return replace(recipe, train_examples=min(recipe.train_examples, SWEEP_BLOCKS))


def train_dial(bench: DialBench, label: str, seed: int, folder: Path | str, *, rate: float) -> tuple:
    """The model with the (IA)³ vectors of one label, and the record; validation chose its step, no test row is read."""
    model = attach_recipe(copy.deepcopy(bench.base), bench.profile)
    record = train(
        model, bench.blocks("adapter", label), bench.profile, method="ia3", task=label, folder=folder, seed=seed,
        eval_blocks=bench.blocks("validation", label), learning_rate=rate,
    )  # fmt: skip
    return model, record


def measure_dial(
    bench: DialBench, label: str, seed: int, folder: Path | str, *, rate: float, assets: Path
) -> RunRecord:
    """Train, keep the adapter under `assets`, and measure the loss on test reviews of both labels, the base's too."""
    model, record = train_dial(bench, label, seed, folder, rate=rate)
    name = f"{label}-seed{seed}"
    to = assets / "adapters" / bench.profile.name / name
    save_adapter(model, bench.tokenizer, to, config_id=bench.profile.config_id())
    for tested in LABELS:
        test = bench.blocks("test", tested)
        record.metrics[f"test_loss_{tested}"] = held_out_loss(model, test).to_dict()
        record.metrics[f"base_test_loss_{tested}"] = held_out_loss(bench.base, test).to_dict()
    record.config |= {"data": bench.profile.data_name, "model": bench.description}
    return record


def run_sweep(bench: DialBench, assets: Path = ASSETS) -> float:
    """The rate with the lowest validation loss, between two worse ones; its records go to `sweep/`."""
    short = copy.copy(bench)
    short.profile = sweep_recipe(bench.profile)

    def run(rate: float, folder: Path) -> RunRecord:
        return train_dial(short, "positive", SWEEP_SEED, folder, rate=rate)[1]

    guess = bench.profile.learning_rates["ia3"]
    return sweep_method(short, "ia3", guess, assets / "runs" / bench.profile.name, run)


def run_dials(recipe: Recipe, seeds: list[int], only: str | None = None, assets: Path = ASSETS) -> None:
    """Every record and adapter that is missing; `only` "sweep" or "runs" leaves the other out."""
    bench = DialBench(recipe)
    print(bench.description, flush=True)
    if only != "runs":
        print(f"rate {run_sweep(bench, assets):g}", flush=True)
    if only == "sweep":
        return
    folder = assets / "runs" / recipe.name
    rate = swept_rates(folder, sweep_recipe(recipe), bench.fingerprint).get("ia3", recipe.learning_rates["ia3"])
    jobs = {folder / f"{label}-seed{seed}.json": (label, seed) for seed in seeds for label in LABELS}
    missing = [path for path in jobs if not path.exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} records there already{expected(missing)}", flush=True)
    for path, (label, seed) in jobs.items():
        record = make_one(bench, path, partial(measure_dial, bench, label, seed, rate=rate, assets=assets), stranger)
        losses = {name: record.value(f"{name}_{label}") for name in ("base_test_loss", "test_loss")}
        print(f"{path.stem:20}", *(f"{name} {value}" for name, value in losses.items()), flush=True)
