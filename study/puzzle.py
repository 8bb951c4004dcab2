"""The central puzzle in numbers: how little of the loss an adapter moves, beside how much of the tone.

`puzzle.json` keeps the test loss on positive and on negative reviews: of the base, of each adapter, of what the two
have in common (their mean), of what tells them apart (half their difference), and of one adapter around a = 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from datasets import Dataset
from torch import nn

from study.comparison import Bench
from study.dial import adapters_of, dial_header
from study.records import rows_of, runs_folder
from utils.adapters import scaling_vectors, set_scaling_vectors
from utils.config import ASSETS, Profile
from utils.data import LABELS
from utils.evaluation import Vectors, dial, held_out_loss
from utils.runs import read_json, write_json

BLOCKS = 192  # of each label
AROUND_ONE = tuple(0.5 + 0.125 * step for step in range(9))
NAMES = {
    "base": "base", "positive": "positive adapter", "negative": "negative adapter",
    "mean": "what they share (mean)", "half": "what tells them apart (half the difference)",
}  # fmt: skip


def combined(positive: Vectors, negative: Vectors, of_positive: float, of_negative: float) -> Vectors:
    """1 + p (l_pos - 1) + n (l_neg - 1): p = n = 1/2 is the mean, p = 1/2 and n = -1/2 the contrast at 1/2."""
    return {k: 1 + of_positive * (l - 1) + of_negative * (negative[k] - 1) for k, l in positive.items()}


def settings_of(positive: Vectors, negative: Vectors) -> dict[str, Vectors]:
    """The vectors behind each of `NAMES`, and `a = ...` for one adapter around a = 1."""
    weights = {"base": (0, 0), "positive": (1, 0), "negative": (0, 1), "mean": (0.5, 0.5), "half": (0.5, -0.5)}
    settings = {name: combined(positive, negative, *weight) for name, weight in weights.items()}
    return settings | {f"a = {strength:g}": dial(positive, strength) for strength in AROUND_ONE}


def losses(model: nn.Module, settings: Mapping[str, Vectors], blocks: Mapping[str, Dataset]) -> list[dict]:
    """One row a setting: `loss_positive` and `loss_negative`, nats per token; the vectors are put back at the end."""
    before, rows = scaling_vectors(model), []
    try:
        for name, vectors in settings.items():
            set_scaling_vectors(model, vectors)
            found = {f"loss_{label}": held_out_loss(model, part).value for label, part in blocks.items()}
            rows.append({"setting": name} | found)
    finally:
        set_scaling_vectors(model, before)
    return rows


def run_puzzle(bench: Bench, seeds: Sequence[int]) -> None:
    """`puzzle.json`, a row a setting and seed, from the reference adapters; a seed that is there is not made again."""
    path = runs_folder(bench) / "puzzle.json"
    header = dial_header(bench.profile, bench.fingerprint)
    rows = rows_of(path, header)
    blocks = {label: bench.blocks("test", label, limit=BLOCKS) for label in LABELS}
    for seed in seeds:
        if any(row["seed"] == seed for row in rows):
            print(f"{path.name}: seed {seed} there already")
            continue
        print(f"{path.name}: seed {seed}", flush=True)
        library, positive, negative = adapters_of(bench, seed)
        with library.use("positive") as model:
            found = losses(model, settings_of(positive, negative), blocks)
        rows += [{"seed": seed} | row for row in found]
        write_json(path, header | {"blocks": {label: len(part) for label, part in blocks.items()}, "rows": rows})


def load_puzzle(profile: Profile, fingerprint: str) -> tuple[list[dict], str | None]:
    """The settings as `changes` gives them, or none and the reason: no record, or one of another base."""
    record = read_json(ASSETS / "runs" / profile.name / "puzzle.json")
    if not record:
        return [], f"no record of the puzzle for profile {profile.name}: not measured"
    header = dial_header(profile, fingerprint)
    if {key: record.get(key) for key in header} != header:
        return [], "puzzle.json was made with another configuration or base model: not used"
    return changes(record["rows"]), None


def changes(rows: Sequence[Mapping[str, object]]) -> list[dict]:
    """Loss of each setting minus the base's, in % of the base's: mean over seeds, with the lowest and the highest."""
    base = {row["seed"]: row for row in rows if row["setting"] == "base"}
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        line: dict[str, object] = {"setting": NAMES.get(setting, setting)}
        for label in ("positive", "negative"):
            key = f"loss_{label}"
            found = [100 * (row[key] / base[row["seed"]][key] - 1) for row in rows if row["setting"] == setting]
            line[f"{label} reviews, %"] = (
                f"{statistics.fmean(found):+.2f} ({min(found):+.2f} to {max(found):+.2f})" if any(found) else "0"
            )
        lines.append(line)
    return lines
