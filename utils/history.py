"""The losses of a run: the Trainer's log as rows, the check that they are finite, and what they come to.

Reached through `training.py`, where the two errors of a run can be had from too. Not for: drawing them (`plots.py`).
"""

from __future__ import annotations

import math


class TrainingError(RuntimeError):
    """Training cannot start or has diverged; the message names the remedy."""


class DivergedError(TrainingError):
    """The loss of a run is not finite: its learning rate is too high."""


def readable_history(log: list[dict]) -> list[dict]:
    """The Trainer's log as one row a step: `{"step", "train_loss" and/or "eval_loss"}`."""
    rows: dict[int, dict] = {}
    for entry in log:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        if "loss" in entry:
            row["train_loss"] = float(entry["loss"])
        if "eval_loss" in entry:
            row["eval_loss"] = float(entry["eval_loss"])
    return [rows[step] for step in sorted(rows) if len(rows[step]) > 1]


def check_finite(history: list[dict]) -> list[dict]:
    """The history itself; `DivergedError` names the first step whose loss is NaN or infinite."""
    for row in history:
        if not all(math.isfinite(value) for value in row.values()):
            raise DivergedError(f"the loss is not finite at step {row['step']}: use a lower learning rate")
    return history


def summary(history: list[dict]) -> dict[str, float]:
    """Held-out loss before training and at the best trained step (nats per token), and the steps that reached it.

    `steps_to_1_percent` is the first evaluated step whose loss is within 1 % of the best one: 0 where the whole gain
    is smaller than that. `steps_to_90_percent` is the first one with nine tenths of the gain.
    """
    start, *evaluated = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    best_step, best = min(evaluated, key=lambda pair: pair[1])
    near = next(step for step, loss in [start, *evaluated] if loss <= 1.01 * best)
    gain = 0.9 * (start[1] - best)
    most = next((step for step, loss in evaluated if start[1] - loss >= gain), best_step)
    return {
        "start_loss": start[1], "best_loss": best, "best_step": best_step, "steps_to_1_percent": near,
        "steps_to_90_percent": most,
    }  # fmt: skip
