"""The tables of docs/scale.md, from the formulas of `utils/scale.py`; `readme_numbers.py` puts them in their places.

Not for: anything measured.
"""

from __future__ import annotations

from pathlib import Path

from tables import table

from utils.gpu import format_bytes
from utils.scale import (
    BFLOAT16,
    all_reduced_bytes,
    full_bytes,
    gathered_bytes,
    held_bytes,
    sizes,
    state_bytes,
    task_bytes,
)

TASKS = 1000  # that share one base
GPUS = 8


def sizes_part(_assets: Path) -> str:
    """From the embedded model to 11B: what (IA)³ trains, keeps and all-reduces, beside full fine-tuning."""
    titles = ["model", "parameters", "trained for a task", "%", "the task's file", "weights, bfloat16",
              "held, (IA)³", "held, full", "all-reduced a step, (IA)³", "all-reduced, full"]  # fmt: skip
    rows = []
    for size in sizes():
        counts = (size.name, f"{size.parameters:,}", f"{size.trained:,}", f"{100 * size.trained / size.parameters:.4f}")
        held = (task_bytes(size), BFLOAT16 * size.parameters, held_bytes(size), full_bytes(size))
        moved = (all_reduced_bytes(size.trained), all_reduced_bytes(size.parameters))
        rows.append([*counts, *map(format_bytes, (*held, *moved))])
    return table(titles, rows)


def sharding_part(_assets: Path) -> str:
    """The same models on eight GPUs: what each holds, and what a step moves, data-parallel and sharded."""
    titles = ["model", "each holds, data-parallel", "each holds, sharded", "all-reduced a step",
              "gathered a step, sharded", "gathered over all-reduced"]  # fmt: skip
    rows = []
    for size in sizes():
        reduced, gathered = all_reduced_bytes(size.trained), gathered_bytes(size)
        held = (held_bytes(size), held_bytes(size, GPUS, sharded=True))
        rows.append([size.name, *map(format_bytes, (*held, reduced, gathered)), f"{gathered / reduced:,.0f} x"])
    return table(titles, rows)


def tasks_part(_assets: Path) -> str:
    """A thousand tasks on one base: their vectors, beside as many merged or fully fine-tuned models."""
    titles = ["model", "the base, bfloat16", f"vectors of {TASKS:,} tasks", f"{TASKS:,} merged models, bfloat16",
              "training state of one task"]  # fmt: skip
    rows = []
    for size in sizes():
        base = BFLOAT16 * size.parameters
        many = (base, TASKS * task_bytes(size), TASKS * base, state_bytes(size.trained))
        rows.append([size.name, *map(format_bytes, many)])
    return table(titles, rows)
