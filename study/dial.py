"""The recorded dial: how positive the texts are, and at what price, for every strength of one adapter and of two.

And the ladder: what one prompt becomes at each strength, as README shows it.
"""

from __future__ import annotations

import json
import re
from functools import partial

from study.comparison import Bench
from study.records import rows_of
from utils.adapters import load_base, scaling_vectors, set_scaling_vectors
from utils.config import ASSETS, Profile
from utils.data import PROMPTS, balanced_blocks
from utils.evaluation import contrast, dial, strength_sweep
from utils.generation import generate
from utils.metrics import Estimate
from utils.runs import write_json
from utils.saving import AdapterLibrary


def dial_header(profile: Profile, fingerprint: str) -> dict[str, object]:
    """What a recorded dial was made with; one with another header is not used, and never continued."""
    return {
        "config_id": profile.config_id(), "base": fingerprint, "learning_rate": profile.learning_rates["ia3"],
        "sampling": profile.sampling,
    }  # fmt: skip


def load_reference_dial(profile: Profile, fingerprint: str) -> tuple[list[dict], str | None]:
    """Rows of this profile's committed dial, or none and the reason: no record, another configuration or base."""
    path = ASSETS / "runs" / profile.name / "dial.json"
    if not path.exists():
        return [], f"no reference run of the dial for profile {profile.name}: not measured"
    record = json.loads(path.read_text(encoding="utf-8"))
    header = dial_header(profile, fingerprint)
    if {key: record.get(key) for key in header} != header:
        return [], f"{path.name} was made with another configuration, base model or sampling: not used"
    return record["rows"], None


STRENGTHS = {"dial": (-2, -1, 0, 1, 2, 3), "contrast": (-3, -2.5, -2, -1, 0, 1, 2, 2.5, 3)}


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


LADDER = (-3, -2, -1, 0, 1, 2, 3)


def run_ladder(bench: Bench) -> None:
    """`ladder.json`: the first prompt with the profile's seed at each strength of the positive adapter.

    `text` ends at its last full sentence; `probability`: the words judge's, that prompt and text are positive.
    """
    path = ASSETS / "runs" / bench.profile.name / "ladder.json"
    profile, prompt = bench.profile, PROMPTS[0]
    header = dial_header(profile, bench.fingerprint) | {"prompt": prompt, "seed": profile.seed, "judge": "words"}
    if rows_of(path, header):
        return print(f"{path.name}: there already")
    library = AdapterLibrary(load_base(profile)[0], bench.tokenizer)
    library.load("positive", ASSETS / "adapters" / profile.name / f"positive-seed{profile.seed}")
    vectors, rows = scaling_vectors(library.model, "positive"), []
    options = profile.sampling | {"samples": 1, "seed": profile.seed}
    with library.use("positive") as model:
        for strength in LADDER:
            set_scaling_vectors(model, dial(vectors, strength))
            (sample,) = generate(model, bench.tokenizer, [prompt], **options)
            text = re.sub(r"(?<=[.!?])[^.!?]*$", "", sample.text)
            probability = bench.judges["words"].probability([prompt + text])[0]
            rows.append({"strength": strength, "text": text, "probability": probability})
    return write_json(path, header | {"rows": rows})


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
