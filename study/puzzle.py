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
from study.dial import adapters_of, dial_header, load_reference_dial
from study.records import rows_of, runs_folder
from utils.adapters import set_scaling_vectors, vectors_restored
from utils.config import ASSETS, Profile
from utils.data import LABELS
from utils.evaluation import Vectors, contrast, dial, held_out_loss
from utils.runs import write_json

BLOCKS = 192  # of each label
AROUND_ONE = tuple(0.5 + 0.125 * step for step in range(9))
NAMES = {
    "base": "base", "positive": "positive adapter", "negative": "negative adapter",
    "mean": "what they share (mean)", "half": "what tells them apart (half the difference)",
}  # fmt: skip


def settings_of(positive: Vectors, negative: Vectors) -> dict[str, Vectors]:
    """The vectors behind each of `NAMES`, and `a = ...` for one adapter around a = 1."""
    mean = {key: (l + negative[key]) / 2 for key, l in positive.items()}
    settings = {"base": dial(positive, 0), "positive": positive, "negative": negative, "mean": mean}
    settings["half"] = contrast(positive, negative, 0.5)
    return settings | {f"a = {strength:g}": dial(positive, strength) for strength in AROUND_ONE}


def losses(model: nn.Module, settings: Mapping[str, Vectors], blocks: Mapping[str, Dataset]) -> list[dict]:
    """One row a setting: `loss_positive` and `loss_negative`, nats per token; the vectors are put back at the end."""
    rows = []
    with vectors_restored(model):
        for name, vectors in settings.items():
            set_scaling_vectors(model, vectors)
            found = {f"loss_{label}": held_out_loss(model, part).value for label, part in blocks.items()}
            rows.append({"setting": name} | found)
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
    rows, why_not = load_reference_dial(profile, fingerprint, "puzzle", ASSETS)
    return changes(rows), why_not


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
