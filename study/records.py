"""One record after another, each made once: what is there and fits is kept, what does not fit is refused by name."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from study.comparison import Bench, chosen_rates, misfit, stranger, sweep_losses
from utils.config import ASSETS, Settings, artifacts_dir
from utils.runs import RunRecord, read_json
from utils.training import RUNNING, DivergedError

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of the sweep, half a decade apart
SWEEP_SEED = 0
SEEDS = (0, 1, 2)
Jobs = dict[Path, Callable[[Path], RunRecord]]  # by the record's path: what makes it, given a folder to work in


def runs_folder(bench: Bench) -> Path:
    """Where the records of the bench's profile are."""
    return ASSETS / "runs" / bench.profile.name


def make_all(bench: Bench, jobs: Jobs) -> None:
    """Every record that is missing, one after another; first says how long that takes, going by the records there."""
    missing = [path for path in jobs if not path.exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} records there already{expected(missing)}", flush=True)
    for path, make in jobs.items():
        make_one(bench, path, make, misfit)


def expected(missing: list[Path]) -> str:
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
    record = RunRecord.load(path)
    if reason := refuse(record, bench.profile, bench.fingerprint):
        sys.exit(f"{path.name}: {reason}. It is not mixed in: delete it to make it anew.")
    return record


def sweep_method(bench: Bench, method: str, guess: float, folder: Path, run: Callable[..., RunRecord]) -> float:
    """The best rate of `method`: those around `guess` are tried until it lies between two worse ones.

    `run(rate, folder=...)` trains at a rate; its record goes to `sweep/` in `folder`.
    """
    tried: list[RunRecord] = []
    while rate := next_rate(guess, sweep_losses(tried).get(method, {})):
        path = folder / "sweep" / f"{method}-{rate:g}-seed{SWEEP_SEED}.json"
        tried.append(make_one(bench, path, lambda to, rate=rate: run(rate, folder=to), stranger))
    return chosen_rates(tried)[method]


def swept_rates(folder: Path, settings: Settings, fingerprint: str) -> dict[str, float]:
    """By method, the rate that `folder/sweep` chose; nothing for a method that was not swept with these settings."""
    records = [RunRecord.load(path) for path in sorted((folder / "sweep").glob("*.json"))]
    return chosen_rates(record for record in records if stranger(record, settings, fingerprint) is None)


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
