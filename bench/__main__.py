"""Measure the course's speed and memory side by side with what it is compared with; write `build/bench/`.

    python -m bench                        # what is missing: JSON, one table, figures
    python -m bench --only opening mixed   # parts whose name begins so, again
    python -m bench --one-thread           # processor time on one thread: for a machine that others use too
    python -m bench --keep                 # also assets/runs/bench.json, which README quotes
    python -m bench --quick --folder DIR   # a trial of every part in tiny sizes

Every line is the median of interleaved rounds, a ratio with its lowest and highest round. Each part is kept as soon as
it is measured: an interrupted run goes on where it was, on the same machine and versions. Takes about 40 minutes on two
cores. What needs CUDA reads "not measured" without it. Not for: students, or what grading costs (`bench_grading.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import torch

from bench import cuda as bench_cuda
from bench.growth import growth_points, memory_rows, places, resident_points
from bench.report import not_measured, write_report
from bench.rows import PROCESSOR_TIME, Row, Sizes, own_process, sizes, unmeasured
from bench.training import training_rows
from bench.use import generating_rows, latency_rows, mixed_rows, opening_rows, switching_rows
from utils.gpu import pick_device
from utils.runs import environment, read_json, write_json
from utils.settings import ROOT

KEPT = ROOT / "assets" / "runs" / "bench.json"
CUDA = {  # part: function, what, against what
    "formats": (bench_cuda.format_rows, "training in bfloat16, with SDPA", "float32, eager attention"),
    "compile": (bench_cuda.compile_rows, "training with torch.compile, warm-up counted", "without"),
    "flattened": (bench_cuda.flattened_rows, "training on whole reviews without padding", "the same padded"),
    "static-cache": (bench_cuda.static_rows, "writing with a static cache", "dynamic cache"),
    "profile": (bench_cuda.profile_rows, "training of the gpt2 profile", "60 s; the card's matrix products"),
}
Part = Callable[[], list[Row]]


def parts(scale: Sizes) -> dict[str, Part]:
    """What the table is made of, by name: functions that return its lines."""
    here: dict[str, Part] = {"opening": partial(opening_rows, scale)}
    for model in scale.models:
        for name, rows in (
            ("generating", generating_rows), ("latency", latency_rows), ("switching", switching_rows),
            ("mixed", mixed_rows),
        ):  # fmt: skip
            here[f"{name}-{model}"] = partial(alone, scale, rows, scale, model)
        if model == "124M" and pick_device().type == "cpu":  # minutes a round
            del here[f"generating-{model}"]
        here[f"training-{model}"] = partial(training_rows, scale, model)
        here[f"memory-{model}"] = partial(memory_rows, scale, model)
    large = scale.models[-1]
    for name, (rows, what, against) in CUDA.items():
        if pick_device().type == "cuda":
            here[f"cuda-{name}"] = partial(alone, scale, rows, scale, large)
        else:
            here[f"cuda-{name}"] = lambda n=name, w=what, a=against: [unmeasured(f"cuda-{n}", w, a, "no CUDA here")]
    return here


def alone(scale: Sizes, function: Callable, *arguments: object) -> list[Row]:
    """`function` in a process of its own."""
    with own_process(scale.isolated) as call:
        return call(function, *arguments)


def growth(scale: Sizes) -> dict[tuple[str, float], Part]:
    """The points of the growth figures by series and place."""
    here: dict[tuple[str, float], Part] = {
        (series, x): partial(growth_points, scale, series, x)
        for series in ("size", "length", "batch") for x in places(scale, series)
    }  # fmt: skip
    return here | {("residents", count): partial(resident_points, scale, count) for count in scale.residents}


def opened(path: Path, header: dict) -> dict:
    """The record begun at `path` where it has this header, else a new one."""
    record = read_json(path)
    if record and {key: record.get(key) for key in header} == header:
        return record
    if record:
        print(f"{path.name} is of another machine, other versions or sizes: it is begun anew")
    return header | {"rows": {}, "growth": {}, "load": {}}


def measure(record: dict, path: Path, scale: Sizes, only: Sequence[str]) -> None:
    """Every part that `record` has not, or those that `only` names, again; kept at `path` one by one."""
    todo = [(record["rows"], name, name, part) for name, part in parts(scale).items()]
    for (series, x), part in growth(scale).items():
        todo.append((record["growth"].setdefault(series, {}), f"{x:g}", f"growth-{series}-{x:g}", part))
    for shelf, key, name, part in todo:
        if (only and not name.startswith(tuple(only))) or (not only and done(shelf.get(key))):
            continue
        started = time.monotonic()
        record["load"][name] = psutil.getloadavg()[0]
        shelf[key] = attempt(name, part)
        write_json(path, record)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def done(lines: list[Row] | None) -> bool:
    """Whether a part is there and did not fail: what failed is tried again."""
    return bool(lines) and not any(str(line.get("reason", "")).startswith("failed") for line in lines)


def attempt(name: str, part: Part) -> list[Row]:
    """The lines of a part; where it fails, one line that says why, so that the other parts are measured."""
    try:
        return part()
    except Exception as error:  # whatever a device or library throws at one part concerns that part only
        reason = str(error).strip().splitlines() or ["no details"]
        print(f"{name}: failed: {type(error).__name__}: {reason[0]}", file=sys.stderr)
        line = unmeasured(name, name, "", "")
        return [line | {"reason": f"failed: {type(error).__name__}: {reason[0][:200]}", "x": None}]


def keep(record: dict, scale: Sizes) -> None:
    """Put the record into `assets` beside the other kind of device's; a part that was never run says so there.

    Stops at a trial in tiny sizes, or where a part failed.
    """
    lines = [
        line for shelf in (record["rows"], *record["growth"].values()) for found in shelf.values() for line in found
    ]
    failed = [str(line.get("name", "growth")) for line in lines if str(line.get("reason", "")).startswith("failed")]
    if record["quick"] or failed:
        sys.exit(f"not kept: {'a trial in tiny sizes' if record['quick'] else 'failed: ' + ', '.join(failed)}")
    missing = {name: [unmeasured(name, name, "", "not run yet")] for name in parts(scale) if name not in record["rows"]}
    whole = record | {"rows": record["rows"] | missing}
    write_json(KEPT, read_json(KEPT) | {record["hardware"]["device"]: whole})


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="measure these again, nothing else")
    parser.add_argument("--keep", action="store_true", help="write the record that README quotes")
    parser.add_argument("--one-thread", action="store_true", help="processor time on one thread, for a busy machine")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args(arguments)
    if options.one_thread:
        torch.set_num_threads(1)
        os.environ |= {"OMP_NUM_THREADS": "1", PROCESSOR_TIME: "1"}
    scale = sizes(options.quick)
    versions, hardware = environment()
    clock = "processor time on one thread" if options.one_thread else "the clock"
    header = {
        "quick": options.quick,
        "clock": clock,
        "versions": versions,
        "hardware": hardware,
        "sizes": plain(asdict(scale)),
    }
    path = options.folder / "bench.json"
    record = opened(path, header)
    measure(record, path, scale, options.only)
    print((write_report(record, options.folder)[0]).read_text(encoding="utf-8"))
    print(f"not measured: {', '.join(not_measured(record)) or 'nothing'}")
    if options.keep:
        keep(record, scale)
    return 0


def plain(values: dict) -> dict:
    """As JSON gives it back: lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


if __name__ == "__main__":
    raise SystemExit(main())
