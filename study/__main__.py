"""Make the reference runs that 03 and 04 read: one run, one JSON under `assets/runs/<profile>/`.

    python -m study                      # all that is missing, one after another
    python -m study --only dial          # sweep | runs | ablations | dial | ladder | puzzle | steering | cost | bands
    python -m study --only runs --share 1/2    # every second run: the other half in a second process
    python -m study --gpu-cost           # time and memory of GPT-2's shape, on a GPU
    LAB_PROFILE=gpt2 python -m study     # for another profile

`sweep` says which learning rate validation chooses for each method; `utils/config.py` holds the rates that the other
runs are made with. What is there already and fits today's configuration and base model is skipped; what does not fit is
refused by name, never mixed in (delete it to make it anew). An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from transformers import GPT2Config, GPT2LMHeadModel

from study.ablations import ABLATIONS, measure_ablation
from study.comparison import Bench, measure_run, sweep_run
from study.cost import cost_rows, latency_cost, training_cost
from study.dial import run_dial, run_ladder
from study.puzzle import run_puzzle
from study.records import SEEDS, SWEEP_SEED, Jobs, make_all, rows_of, runs_folder, sweep_method
from study.steering import run_steering
from utils.adapters import METHODS, load_base
from utils.config import ASSETS, PROFILES, describe, load_profile
from utils.gpu import pick_device
from utils.judges import judge_names
from utils.runs import environment, write_json
from utils.session import quiet

BAND_SEEDS = (3, 4, 5, 6, 7)  # more runs of (IA)³, from which `grading_bands.py` learns how far seeds lie apart
GPU_BATCH = (8, 512)  # rows, tokens
STAGES = ("sweep", "runs", "ablations", "dial", "ladder", "puzzle", "steering", "cost", "bands")


def comparison_jobs(bench: Bench, methods: list[str], seeds: list[int]) -> Jobs:
    """The base and all methods on positive reviews, (IA)³ on negative ones too; its adapters are kept in `assets`."""
    runs = [("positive", method, seed) for seed in seeds for method in methods]
    runs += [("negative", "ia3", seed) for seed in seeds if "ia3" in methods]
    adapters = ASSETS / "adapters" / bench.profile.name
    return {
        runs_folder(bench) / f"{task}-{method}-seed{seed}.json": partial(
            measure_run, bench, task, method, seed, adapter_folder=adapters / f"{task}-seed{seed}"
        )
        for task, method, seed in runs
    }


def band_jobs(bench: Bench) -> Jobs:
    """The base and (IA)³ on positive reviews with more seeds; no adapter is kept."""
    return {
        runs_folder(bench) / "bands" / f"positive-{method}-seed{seed}.json": partial(
            measure_run, bench, "positive", method, seed
        )
        for seed in BAND_SEEDS
        for method in ("base", "ia3")
    }


def ablation_jobs(bench: Bench, seeds: list[int]) -> Jobs:
    """Every ablation with every seed, all of one seed first."""
    return {
        runs_folder(bench) / "ablations" / f"{ablation.name}-seed{seed}.json": partial(
            measure_ablation, bench, ablation, seed
        )
        for seed in seeds
        for ablation in ABLATIONS
    }


def ship_judges(bench: Bench) -> None:
    """Keep the judges under `assets/judges`, so that nobody need fit them again."""
    pretrain = bench.reviews["pretrain"]
    for kind, name in judge_names(pretrain["text"], pretrain["label"]).items():
        folder = ASSETS / "judges" / name
        if not folder.exists():
            bench.judges[kind].save(folder)


def run_sweep(bench: Bench, methods: list[str]) -> None:
    """`sweep/`: each method at rates around the profile's, until the best one lies between two worse ones."""
    for method in methods:
        if method == "base":
            continue
        guess = bench.profile.learning_rates[method]
        run = partial(sweep_run, bench, method, seed=SWEEP_SEED)
        best = sweep_method(bench, method, guess, runs_folder(bench), run)
        print(f"{method:10} {best:g} (the profile has {guess:g})", flush=True)


def run_cost(bench: Bench, methods: list[str]) -> None:
    """`cost.json`: bytes, stored activations, time of a step and latency of every method, from one interleaved run."""
    path = runs_folder(bench) / "cost.json"
    if rows_of(path, {"config_id": bench.profile.config_id(), "base": bench.fingerprint}):
        return print(f"{path.name}: there already")
    versions, hardware = environment()
    record = {
        "config_id": bench.profile.config_id(), "base": bench.fingerprint, "versions": versions, "hardware": hardware,
        "rows": cost_rows(bench, methods),
    }  # fmt: skip
    return write_json(path, record)


def run_gpu_cost() -> None:
    """`assets/runs/gpu-cost.json`: training and generation with GPT-2's shape, random weights. Stops without a GPU."""
    if pick_device().type != "cuda":
        sys.exit('--gpu-cost measures on a GPU, and there is none here: its rows stay "not measured"')
    tokenizer = load_base(PROFILES["mini"])[1]  # any will do: what is timed is the number of tokens

    def random_gpt2() -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config()).to(pick_device())

    versions, hardware = environment()
    batch, length = GPU_BATCH
    record = {
        "versions": versions, "hardware": hardware, "batch": batch, "length": length, "weights": "random",
        "training": training_cost(random_gpt2, [m for m in METHODS if m != "base"], batch, length),
        "latency": latency_cost(random_gpt2, tokenizer),
    }  # fmt: skip
    write_json(ASSETS / "runs" / "gpu-cost.json", record)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", choices=STAGES)
    parser.add_argument("--share", default="1/1", help="2/3: the second of three processes that share the runs")
    parser.add_argument("--gpu-cost", action="store_true", help="measure time and memory on a GPU, and stop")
    options = parser.parse_args()
    quiet()
    if options.gpu_cost:
        return run_gpu_cost()
    profile = load_profile()
    print(describe(profile), flush=True)
    bench = Bench(profile)
    ship_judges(bench)
    part, parts = (int(number) for number in options.share.split("/"))

    def share(jobs: Jobs) -> Jobs:
        return dict(list(jobs.items())[part - 1 :: parts])

    stages = {
        "sweep": partial(run_sweep, bench, options.methods),
        "runs": lambda: make_all(bench, share(comparison_jobs(bench, options.methods, options.seeds))),
        "ablations": lambda: make_all(bench, share(ablation_jobs(bench, options.seeds))),
        "dial": partial(run_dial, bench, options.seeds),
        "ladder": partial(run_ladder, bench),
        "puzzle": partial(run_puzzle, bench, options.seeds),
        "steering": partial(run_steering, bench, options.seeds),
        "cost": partial(run_cost, bench, options.methods),
        "bands": lambda: make_all(bench, share(band_jobs(bench))),
    }
    for name in [options.only] if options.only else list(stages):
        stages[name]()


if __name__ == "__main__":
    main()
