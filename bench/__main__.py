"""Measure the course's speed and memory side by side with what it is compared with; write `build/bench/`.

    python -m bench                        # a table, a figure and a record: about half an hour on two cores
    python -m bench --keep                 # also assets/runs/bench.json, which the pages quote: on a quiet machine
    python -m bench --quick                # a trial of every part in tiny sizes, into build/bench-quick
    python -m bench --only opening mixed   # parts whose name begins so, again
    python -m bench --one-thread           # processor time on one thread: for a machine that others use too

Every line is the median of interleaved rounds, a ratio with its lowest and highest round. Each part is kept as soon as
it is measured: an interrupted run goes on where it was, on the same machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import psutil
import torch

from bench.report import write_report
from bench.rows import PROCESSOR_TIME, Row, Sizes, own_process, sizes
from bench.training import profile_rows, training_rows
from bench.use import generating_rows, memory_rows, mixed_rows, opening_rows, switching_rows
from utils.config import ROOT
from utils.gpu import pick_device
from utils.runs import environment, read_json, write_json
from utils.session import quiet

KEPT = ROOT / "assets" / "runs" / "bench.json"
BUILD = ROOT / "build"


def parts(by_model: dict[str, Sizes]) -> dict[str, Callable[[], list[Row]]]:
    """What the table is made of, by name: functions that return its lines."""

    def alone(rows: Callable, scale: Sizes, model: str) -> list[Row]:
        with own_process(scale.isolated) as call:
            return call(rows, scale, model)

    here: dict[str, Callable[[], list[Row]]] = {"opening": partial(opening_rows, next(iter(by_model.values())))}
    for model, scale in by_model.items():
        for name, rows in (("generating", generating_rows), ("switching", switching_rows), ("mixed", mixed_rows)):
            here[f"{name}-{model}"] = partial(alone, rows, scale, model)
        here[f"training-{model}"] = partial(training_rows, scale, model)
        here[f"memory-{model}"] = partial(memory_rows, scale, model)
        if model == "124M" and pick_device().type == "cuda":
            here[f"profile-{model}"] = partial(profile_rows, scale, model)
    return here


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write the record that the pages quote")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="measure these again, nothing else")
    parser.add_argument("--one-thread", action="store_true", help="processor time on one thread, for a busy machine")
    options = parser.parse_args(arguments)
    if options.keep and options.quick:
        sys.exit("a trial in tiny sizes is not kept")
    if options.one_thread:
        torch.set_num_threads(1)
        os.environ |= {"OMP_NUM_THREADS": "1", PROCESSOR_TIME: "1"}
    quiet()
    by_model = sizes(options.quick)
    versions, hardware = environment()
    header = {
        "clock": "processor time on one thread" if options.one_thread else "the clock", "versions": versions,
        "hardware": hardware,
        "sizes": {model: asdict(scale) for model, scale in by_model.items()},
    }  # fmt: skip
    header = json.loads(json.dumps(header))  # lists for tuples, as it is read again
    folder = BUILD / ("bench-quick" if options.quick else "bench")
    path = folder / "bench.json"
    record = read_json(path)
    if {key: record.get(key) for key in header} != header:
        record = header | {"rows": {}, "load": {}}
    for name, part in parts(by_model).items():
        if name.startswith(tuple(options.only)) if options.only else name not in record["rows"]:
            print(name, flush=True)
            record["load"][name] = psutil.getloadavg()[0]
            record["rows"][name] = part()
            write_json(path, record)
    print(write_report(record, folder))
    if options.keep:
        if missing := [name for name in parts(by_model) if name not in record["rows"]]:
            sys.exit(f"not kept: {', '.join(missing)} not measured yet")
        write_json(KEPT, read_json(KEPT) | {hardware["device"]: record})


if __name__ == "__main__":
    main()
