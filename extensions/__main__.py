"""Make the reference runs of the optional labs: one run, one JSON under `assets/runs/<lab>-<size>[-<data>]/`.

    python -m extensions --lab bert-paraphrase                  # the sweep, then every method with seeds 0, 1, 2
    python -m extensions --lab mt0-sentiment --methods ia3 full --seeds 0 --only runs
    python -m extensions --lab modern-llm --seeds 0 1      # vectors for both labels (modern.py)
    LAB_DATA_DIR=folder python -m extensions --lab bert-paraphrase    # on the real data in folder/mrpc

`sweep/` says which learning rate validation chooses for each method (on at most 800 training examples); the runs are
made at that rate, or at the recipe's where nothing was swept. What is there and fits today's recipe and base model is
skipped, what does not fit is refused by name, and an interrupted run goes on. Says at the start how long the missing
runs take, from the records of past ones. LAB_PROFILE, LAB_OVERRIDE and LAB_DEVICE act as in the notebooks.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

from extensions.modern import run_dials
from extensions.recipes import DIALS, RECIPES, Recipe, describe_recipe, setup_lab
from extensions.runs import METHOD_NAMES, LabBench, lab_folder, learning_rate, measure_lab, methods_of, train_lab
from study.comparison import stranger
from study.records import SEEDS, SWEEP_SEED, expected, make_one, sweep_method, swept_rates
from utils.config import ASSETS
from utils.runs import RunRecord

METHODS = ("ia3", "head", "full", "base")  # compared unless others are asked for
SWEEP_EXAMPLES = 800


def sweep_recipe(recipe: Recipe) -> Recipe:
    """The recipe with no more training examples than a sweep has."""
    return replace(recipe, train_examples=min(recipe.train_examples or SWEEP_EXAMPLES, SWEEP_EXAMPLES))


def sweep_run(bench: LabBench, method: str, rate: float, folder: Path) -> RunRecord:
    """One method at one rate; validation only, no test row is read."""
    recipe, examples = sweep_recipe(bench.profile), bench.examples["train"]
    examples = examples.select(range(min(len(examples), recipe.train_examples)))
    return train_lab(bench, method, SWEEP_SEED, folder, rate=rate, recipe=recipe, examples=examples)[1]


def run_sweep(bench: LabBench, methods: list[str]) -> None:
    """`sweep/`: each method at rates around the recipe's, until the best one lies between two worse ones."""
    short = copy.copy(bench)
    short.profile = sweep_recipe(bench.profile)
    for method in (m for m in methods if m != "base"):
        run = partial(sweep_run, bench, method)
        best = sweep_method(short, method, learning_rate(bench.profile, method), lab_folder(bench.profile, ASSETS), run)
        print(f"{method:10} {best:g}", flush=True)


def run_all(bench: LabBench, methods: list[str], seeds: list[int]) -> None:
    """Every record that is missing, all methods of one seed first; first says how long that takes."""
    folder = lab_folder(bench.profile, ASSETS)
    rates = swept_rates(folder, sweep_recipe(bench.profile), bench.fingerprint)
    jobs = {folder / f"{method}-seed{seed}.json": (method, seed) for seed in seeds for method in methods}
    missing = [path for path in jobs if not path.exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} records there already{expected(missing)}", flush=True)
    for path, (method, seed) in jobs.items():
        rate = rates.get(method, learning_rate(bench.profile, method))

        def refuse(record: RunRecord, recipe: Recipe, fingerprint: str, rate: float = rate) -> str | None:
            used = record.config.get("learning_rate", rate)
            return stranger(record, recipe, fingerprint) or (
                f"trained at a rate of {used:g}, and the sweep chose {rate:g}" if used != rate else None
            )

        record = make_one(bench, path, partial(measure_lab, bench, method, seed, rate=rate), refuse)
        shown = {name: record.value(name) for name in ("accuracy", "f1", "exact_match", "label_loss")}
        print(f"{path.stem:20}", *(f"{k} {v}" for k, v in shown.items() if v is not None), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, choices=[*RECIPES, *DIALS])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHOD_NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", choices=("sweep", "runs"))
    options = parser.parse_args(arguments)
    recipe = setup_lab(options.lab)
    print(describe_recipe(recipe), flush=True)
    if options.lab in DIALS:
        return run_dials(recipe, options.seeds, options.only)
    bench = LabBench(recipe)
    print(bench.description, "|", ", ".join(f"{part} {len(rows):,}" for part, rows in bench.rows.items()), flush=True)
    methods = methods_of(recipe, options.methods)
    if options.only != "runs":
        run_sweep(bench, methods)
    if options.only != "sweep":
        run_all(bench, methods, options.seeds)
    return None


if __name__ == "__main__":
    main()
