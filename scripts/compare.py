"""Make the reference runs that 03 and 04 read: one run, one JSON under `assets/runs/<profile>/`.

    python scripts/compare.py                      # all that is missing, one after another
    python scripts/compare.py --only dial          # sweep | runs | ablations | dial | cost | bands
    python scripts/compare.py --only runs --share 1/2    # every second run: the other half in a second process
    python scripts/compare.py --gpu-cost           # time and memory of GPT-2's shape, on a GPU
    LAB_PROFILE=gpt2 python scripts/compare.py     # for another profile

`sweep` says which learning rate validation chooses for each method; it is `utils/config.py` that holds the rates the
other runs are made with. What is there already and fits today's configuration and base model is skipped; what does
not fit is refused by name, never mixed in (delete it to make it anew). Says at the start how long the missing runs
take, from the records of past ones. An interrupted run resumes. Not for: students.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.ablations import ABLATIONS, measure_ablation  # noqa: E402
from utils.adapters import METHODS, AdapterLibrary, load_base, scaling_vectors  # noqa: E402
from utils.comparison import (  # noqa: E402
    Bench,
    chosen_rates,
    measure_run,
    misfit,
    stranger,
    sweep_losses,
    sweep_run,
)  # fmt: skip
from utils.config import ASSETS, PROFILES, artifacts_dir, describe, load_profile  # noqa: E402
from utils.cost import cost_rows, latency_cost, training_cost  # noqa: E402
from utils.data import PROMPTS, balanced_blocks  # noqa: E402
from utils.gpu import pick_device  # noqa: E402
from utils.judges import judge_names  # noqa: E402
from utils.runs import Estimate, RunError, RunRecord, environment, read_json, write_json  # noqa: E402
from utils.session import quiet  # noqa: E402
from utils.steering import contrast, dial, dial_header, strength_sweep  # noqa: E402
from utils.training import RUNNING, DivergedError  # noqa: E402

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of the sweep, half a decade apart
SWEEP_SEED = 0
STRENGTHS = {"dial": (-2, -1, 0, 1, 2, 3), "contrast": (-3, -2.5, -2, -1, 0, 1, 2, 2.5, 3)}
SEEDS = (0, 1, 2)
BAND_SEEDS = (3, 4, 5, 6, 7)  # more runs of (IA)³, from which `grading_bands.py` learns how far seeds lie apart
GPU_BATCH = (8, 512)  # rows, tokens


Jobs = dict[Path, Callable[[Path], RunRecord]]  # by the record's path: what makes it, given a folder to work in


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


def runs_folder(bench: Bench) -> Path:
    """Where the records of the bench's profile are."""
    return ASSETS / "runs" / bench.profile.name


def ship_judges(bench: Bench) -> None:
    """Keep the judges under `assets/judges`, so that nobody need fit them again."""
    pretrain = bench.reviews["pretrain"]
    for kind, name in judge_names(pretrain["text"], pretrain["label"]).items():
        folder = ASSETS / "judges" / name
        if not folder.exists():
            bench.judges[kind].save(folder)


def make_all(bench: Bench, jobs: Jobs) -> None:
    """Every record that is missing, one after another; first says how long that takes, going by the records there."""
    missing = [path for path in jobs if not path.exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} records there already{expected(missing, bench)}", flush=True)
    for path, make in jobs.items():
        make_one(bench, path, make, misfit)


def expected(missing: list[Path], bench: Bench) -> str:
    """ ", about 30 min for the others", from the median time of such records; empty where there is none yet."""
    seconds = [json.loads(path.read_text(encoding="utf-8"))["time"].get("run_seconds")
               for folder in {path.parent for path in missing} for path in folder.glob("*-seed*.json")]  # fmt: skip
    seconds = [value for value in seconds if value]
    return f", about {statistics.median(seconds) * len(missing) / 60:.0f} min for the others" if seconds else ""


def make_one(
    bench: Bench, path: Path, make: Callable[[Path], RunRecord], refuse: Callable[..., str | None]
) -> RunRecord:
    """The record at `path`, made now unless it is there. Stops where it was made with other settings or another base.

    A run whose loss is not finite has a record too, whose status is "failed": tables name it and leave it out.
    """
    if not path.exists():
        print(f"{path.stem}: making it", flush=True)
        folder = artifacts_dir(bench.profile) / "compare" / path.parent.parent.name / path.parent.name / path.stem
        started = time.monotonic()
        try:
            record = make(folder)
        except DivergedError as error:
            print(f"{path.stem}: {error}")
            record = RunRecord.load(folder / RUNNING)
        record.time["run_seconds"] = time.monotonic() - started
        record.save(path)
    try:
        record = RunRecord.load(path)
    except RunError as error:
        sys.exit(f"{error}\nDelete the file to make the run anew.")
    if reason := refuse(record, bench.profile, bench.fingerprint):
        sys.exit(f"{path.name}: {reason}. It is not mixed in: delete it to make it anew.")
    return record


def run_sweep(bench: Bench, methods: list[str]) -> None:
    """`sweep/`: each method at rates around the profile's, until the best one lies between two worse ones."""
    for method in methods:
        if method == "base":
            continue
        guess = bench.profile.learning_rates[method]
        run = partial(sweep_run, bench, method, seed=SWEEP_SEED)
        best = sweep_method(bench, method, guess, runs_folder(bench), run)
        print(f"{method:10} {best:g} (the profile has {guess:g})", flush=True)


def sweep_method(bench: Bench, method: str, guess: float, folder: Path, run: Callable[..., RunRecord]) -> float:
    """The best rate of `method`: those around `guess` are tried until it lies between two worse ones.

    `run(rate, folder=...)` trains at a rate; its record goes to `sweep/` in `folder`.
    """
    tried: list[RunRecord] = []
    while rate := next_rate(guess, sweep_losses(tried).get(method, {})):
        path = folder / "sweep" / f"{method}-{rate:g}-seed{SWEEP_SEED}.json"
        tried.append(make_one(bench, path, lambda to, rate=rate: run(rate, folder=to), stranger))
    return chosen_rates(tried)[method]


def next_rate(guess: float, losses: Mapping[float, float]) -> float | None:
    """The next rate to try: the one nearest to `guess`, then the missing neighbour of the best; None at the end."""
    if not losses:
        return min(RATES, key=lambda rate: abs(math.log(rate / guess)))
    at = RATES.index(min(losses, key=losses.get))
    return next((rate for rate in RATES[max(at - 1, 0) : at + 2] if rate not in losses), None)


def rows_of(path: Path, header: dict) -> list[dict]:
    """The rows of the record at `path`, none where there is no file; stops where it has another header."""
    found = read_json(path)
    if found and {key: found.get(key) for key in header} != header:
        sys.exit(f"{path.name} was made with other settings or another base model. Delete it to make it anew.")
    return found.get("rows", [])


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


def run_dial(bench: Bench, seeds: list[int]) -> None:
    """`dial.json`: what `strength_sweep` measures, of one adapter and of the contrast of two, for every seed."""
    path = ASSETS / "runs" / bench.profile.name / "dial.json"
    header = dial_header(bench.profile, bench.fingerprint)
    rows = rows_of(path, header)
    for seed in seeds:
        if any(row["seed"] == seed for row in rows):
            print(f"{path.name}: seed {seed} there already")
            continue
        print(f"{path.name}: seed {seed}", flush=True)
        rows += sweep_seed(bench, seed)
        write_json(path, header | {"rows": rows})


def sweep_seed(bench: Bench, seed: int) -> list[dict]:
    """Both curves of one seed's pair of adapters, as JSON rows."""
    folder = ASSETS / "adapters" / bench.profile.name
    library = AdapterLibrary(load_base(bench.profile)[0], bench.tokenizer)
    for task in ("positive", "negative"):
        library.load(task, folder / f"{task}-seed{seed}")
    positive, negative = (scaling_vectors(library.model, task) for task in ("positive", "negative"))
    curves = {"dial": partial(dial, positive), "contrast": partial(contrast, positive, negative)}
    profile = bench.profile
    blocks = balanced_blocks(bench.reviews["test"], bench.tokenizer, profile.block_length, profile.eval_blocks)
    options = {
        "prompts": PROMPTS, "sampling": profile.sampling,
        "judges": bench.judges, "blocks": blocks, "tokenizer": bench.tokenizer, "seed": seed,
    }  # fmt: skip
    rows = []
    with library.use("positive") as model:
        for curve, vectors_at in curves.items():
            for row in strength_sweep(model, vectors_at, STRENGTHS[curve], **options):
                values = {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in row.items()}
                rows.append({"seed": seed, "curve": curve} | values)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", choices=("sweep", "runs", "ablations", "dial", "cost", "bands"))
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
        "cost": partial(run_cost, bench, options.methods),
        "bands": lambda: make_all(bench, share(band_jobs(bench))),
    }
    for name in [options.only] if options.only else list(stages):
        stages[name]()


if __name__ == "__main__":
    main()
