"""Make the reference runs that 03 and 04 read: one run, one JSON under `assets/runs/<profile>/`.

    python scripts/compare.py                      # all that is missing, one after another
    python scripts/compare.py --only dial          # sweep | runs | dial | cost
    python scripts/compare.py --gpu-cost           # time and memory of GPT-2's shape, on a GPU
    LAB_PROFILE=gpt2 python scripts/compare.py     # for another profile

What is there already and fits today's configuration and base model is skipped; what does not fit is refused by
name, never mixed in (delete it to make it anew). An interrupted run resumes. Not for: students.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.adapters import METHODS, AdapterLibrary, load_base, scaling_vectors  # noqa: E402
from utils.comparison import COMPARED, Bench, chosen_rates, measure_run, misfit, sweep_row  # noqa: E402
from utils.config import ASSETS, PROFILES, artifacts_dir, describe, load_profile, quiet  # noqa: E402
from utils.cost import cost_rows, latency_cost, training_cost  # noqa: E402
from utils.data import PROMPTS, balanced_blocks  # noqa: E402
from utils.gpu import pick_device  # noqa: E402
from utils.judges import judge_names  # noqa: E402
from utils.runs import Estimate, RunError, RunRecord, environment, write_json  # noqa: E402
from utils.steering import contrast, dial, dial_header, strength_sweep  # noqa: E402

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the sweep, half a decade apart
STRENGTHS = {"dial": (-2, -1, 0, 1, 2, 3), "contrast": (-3, -2.5, -2, -1, 0, 1, 2, 2.5, 3)}
SEEDS = (0, 1, 2)
GPU_BATCH = (8, 512)  # rows, tokens


def plan(methods: list[str], seeds: list[int]) -> list[tuple[str, str, int]]:
    """(task, method, seed) of every run: the base and all methods on positive reviews, (IA)³ on negative ones too."""
    runs = [("positive", method, seed) for seed in seeds for method in methods]
    return runs + [("negative", "ia3", seed) for seed in seeds if "ia3" in methods]


def run_one(bench: Bench, task: str, method: str, seed: int) -> RunRecord:
    """One measured run; an (IA)³ adapter goes to `assets/adapters`."""
    folder = artifacts_dir(bench.profile) / "compare" / f"{task}-{method}-seed{seed}"
    adapter = ASSETS / "adapters" / bench.profile.name / f"{task}-seed{seed}"
    return measure_run(bench, task, method, seed, folder, adapter_folder=adapter)


def ship_judges(bench: Bench) -> None:
    """Keep the judges under `assets/judges`, so that nobody need fit them again."""
    pretrain = bench.reviews["pretrain"]
    for kind, name in judge_names(pretrain["text"], pretrain["label"]).items():
        folder = ASSETS / "judges" / name
        if not folder.exists():
            bench.judges[kind].save(folder)


def run_all(bench: Bench, runs: list[tuple[str, str, int]]) -> None:
    """Every run that has no record yet, with the expected time left from those made so far."""
    folder = ASSETS / "runs" / bench.profile.name
    took: list[float] = []
    for done, (task, method, seed) in enumerate(runs):
        path = folder / f"{task}-{method}-seed{seed}.json"
        if path.exists():
            check_fits(path, bench)
            print(f"{path.name}: there already")
            continue
        left = f", about {statistics.median(took) * (len(runs) - done) / 60:.0f} min left" if took else ""
        print(f"{path.name}: run {done + 1} of {len(runs)}{left}", flush=True)
        started = time.monotonic()
        run_one(bench, task, method, seed).save(path)
        took.append(time.monotonic() - started)


def check_fits(path: Path, bench: Bench) -> None:
    """Stop when a record was made with other settings or another base model."""
    try:
        record = RunRecord.load(path)
    except RunError as error:
        sys.exit(f"{error}\nDelete the file to make the run anew.")
    if reason := misfit(record, bench.profile, bench.fingerprint):
        sys.exit(f"{path.name}: {reason}. It is not mixed in: delete it to make it anew.")


def run_sweep(bench: Bench, methods: list[str]) -> None:
    """`sweep.json`: every method at every rate, seed 0; prints the rate that validation chooses for each."""
    path = ASSETS / "runs" / bench.profile.name / "sweep.json"
    header = {"config_id": bench.profile.config_id(), "base": bench.fingerprint}
    rows = rows_of(path, header)
    for method in methods:
        for rate in RATES:
            if method == "base" or any((row["method"], row["learning_rate"]) == (method, rate) for row in rows):
                continue
            print(f"{path.name}: {method} at {rate}", flush=True)
            folder = artifacts_dir(bench.profile) / "compare" / f"sweep-{method}-{rate}"
            rows.append(sweep_row(bench, method, rate, 0, folder))
            write_json(path, header | {"rows": rows})
    for method, rate in chosen_rates(rows).items():
        print(f"{method:10} {rate:g} (the profile has {bench.profile.learning_rates.get(method)})")


def rows_of(path: Path, header: dict) -> list[dict]:
    """The rows of the record at `path`, none where there is no file; stops where it has another header."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found and {key: found.get(key) for key in header} != header:
        sys.exit(f"{path.name} was made with other settings or another base model. Delete it to make it anew.")
    return found.get("rows", [])


def run_cost(bench: Bench, methods: list[str]) -> None:
    """`cost.json`: bytes, stored activations, time of a step and latency of every method, from one interleaved run."""
    versions, hardware = environment()
    record = {
        "config_id": bench.profile.config_id(), "base": bench.fingerprint, "versions": versions, "hardware": hardware,
        "rows": cost_rows(bench, methods),
    }  # fmt: skip
    write_json(ASSETS / "runs" / bench.profile.name / "cost.json", record)


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
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", choices=("sweep", "runs", "dial", "cost"))
    parser.add_argument("--gpu-cost", action="store_true", help="measure time and memory on a GPU, and stop")
    options = parser.parse_args()
    quiet()
    if options.gpu_cost:
        return run_gpu_cost()
    profile = load_profile()
    print(describe(profile), flush=True)
    bench = Bench(profile)
    ship_judges(bench)
    stages = {
        "sweep": partial(run_sweep, bench, options.methods),
        "runs": partial(run_all, bench, plan(options.methods, options.seeds)),
        "dial": partial(run_dial, bench, options.seeds),
        "cost": partial(run_cost, bench, options.methods),
    }
    for name in [options.only] if options.only else ["runs", "dial"]:
        stages[name]()


if __name__ == "__main__":
    main()
