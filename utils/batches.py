"""How the optimiser's batch is cut where one process or its memory does not hold it, with the same result.

The Trainer's own `auto_find_batch_size` makes the optimiser's batch smaller with the batch in memory, which is another
run; here twice as many batches come to one step. Not for: which rows are in a batch (`shares.py`).
"""

from __future__ import annotations

from pathlib import Path

from extensions.recipes import Recipe
from utils.config import Profile
from utils.history import TrainingError
from utils.processes import decided_by_first, process_index
from utils.runs import read_json, write_json
from utils.shares import Plan

SMALLER = "batch.json"  # the rows of a batch to go on with, after memory ran out


def plan_of(profile: Profile | Recipe, processes: int, largest: int | None = None) -> Plan:
    """How the profile's optimiser batch is shared out among `processes`, in batches of at most `largest` rows."""
    rows = profile.batch_size * profile.accumulation
    try:
        return Plan.make(rows, processes, min(largest or profile.batch_size, profile.batch_size))
    except ValueError as error:
        raise TrainingError(str(error)) from None


def smaller(plan: Plan, folder: Path, config: dict, error: RuntimeError) -> Plan:
    """The plan with batches of half the size, after memory ran out, and a note of it for the next start.

    The other processes of a launch wait for this one and cannot follow: there the run ends with a `TrainingError`, as
    it does where a batch is one row already; a new start takes the note into account and goes on.
    """
    halved = plan.halved()
    if halved is None:
        raise TrainingError("out of memory with one row at a time: use checkpointing, or shorter rows") from error
    write_json(folder / SMALLER, {"config": config, "batch": halved.batch})
    print(f"out of memory with batches of {plan.batch} rows: going on with {halved.batch}", flush=True)
    if plan.processes > 1:
        raise TrainingError(
            f"process {process_index()} ran out of memory with batches of {plan.batch} rows: start the same command "
            f"again, it goes on with {halved.batch}"
        ) from error
    return halved


def batch_that_fitted(folder: Path, config: dict) -> int | None:
    """The rows of a batch that an earlier start of this run noted after memory ran out; None without such a note."""
    note = decided_by_first(read_json(folder / SMALLER) if process_index() == 0 else {})
    return note["batch"] if note.get("config") == config else None
