"""The recorded dial: how positive the texts are, and at what price, for every strength of one adapter and of two.

And the ladder: what one prompt becomes at each strength, as README shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from study.comparison import Bench
from study.records import rows_of, runs_folder
from utils.adapters import load_base, scaling_vectors, set_scaling_vectors, vectors_restored
from utils.config import ASSETS, Profile
from utils.data import PROMPTS, balanced_blocks
from utils.evaluation import Vectors, contrast, dial, strength_sweep
from utils.generation import generate
from utils.judges import Judge
from utils.metrics import Estimate
from utils.pages import whole_sentences
from utils.runs import read_json, write_json
from utils.saving import AdapterLibrary


def dial_header(profile: Profile, fingerprint: str) -> dict[str, object]:
    """What a recorded dial was made with; one with another header is not used, and never continued."""
    return {
        "config_id": profile.config_id(), "base": fingerprint, "learning_rate": profile.learning_rates["ia3"],
        "sampling": profile.sampling,
    }  # fmt: skip


def load_reference_dial(
    profile: Profile, fingerprint: str, name: str = "dial", assets: Path | None = None
) -> tuple[list[dict], str | None]:
    """Rows of the committed `name`.json, or none and the reason: no record, another configuration or base.

    Where `name`-embeddings.json fits too, a row has `positivity_embeddings` of `extensions/embedding_judge.py` as well.
    """
    path = (assets or ASSETS) / "runs" / profile.name / f"{name}.json"
    record, third = read_json(path), read_json(path.with_stem(f"{name}-embeddings"))
    if not record:
        return [], f"no reference run of the {name} for profile {profile.name}: not measured"
    header = dial_header(profile, fingerprint)
    if {key: record.get(key) for key in header} != header:
        return [], f"{path.name} was made with another configuration, base model or sampling: not used"
    if {key: third.get(key) for key in header} == header:
        shares = {point_of(row): row["positivity_embeddings"] for row in third["rows"]}
        for row in record["rows"]:
            if point_of(row) in shares:
                row["positivity_embeddings"] = shares[point_of(row)]
    return record["rows"], None


def point_of(row: Mapping[str, object]) -> tuple[object, ...]:
    """What tells a row of a record from the others: seed, curve, strength."""
    return tuple(row.get(key) for key in ("seed", "curve", "strength"))


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


LADDER = {"prompt": "The acting was", "seed": 1}


def run_ladder(bench: Bench) -> None:
    """`ladder.json`: one prompt with one seed at each strength of the contrast of the two adapters of seed 0.

    `text` ends at its last full sentence, if it has one; `probability`: the words judge's, that prompt and text are
    positive.
    """
    path = runs_folder(bench) / "ladder.json"
    profile = bench.profile
    header = dial_header(profile, bench.fingerprint) | LADDER | {"curve": "contrast", "judge": "words"}
    if rows_of(path, header):
        return print(f"{path.name}: there already")
    library, positive, negative = adapters_of(bench, 0)
    with library.use("positive") as model:
        at = partial(contrast, positive, negative)
        rows = ladder_rows(model, bench.tokenizer, bench.judges["words"], at, profile.sampling)
    return write_json(path, header | {"rows": rows})


def ladder_rows(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    vectors_at: Callable[[float], Vectors],
    sampling: Mapping[str, float],
) -> list[dict]:
    """`strength`, `text`, `probability` for one prompt and one seed at a = -3 to +3; the vectors are put back."""
    options = dict(sampling) | {"samples": 1, "seed": LADDER["seed"]}
    rows = []
    with vectors_restored(model):
        for strength in range(-3, 4):
            set_scaling_vectors(model, vectors_at(strength))
            (sample,) = generate(model, tokenizer, [LADDER["prompt"]], **options)
            text = " " + whole_sentences(sample.text)
            probability = float(judge.probability([LADDER["prompt"] + text])[0])
            rows.append({"strength": strength, "text": text, "probability": probability})
    return rows


def adapters_of(bench: Bench, seed: int) -> tuple[AdapterLibrary, Vectors, Vectors]:
    """The two reference adapters of a seed on a base of their own, and their vectors: positive, negative."""
    library = AdapterLibrary(load_base(bench.profile)[0], bench.tokenizer)
    for task in ("positive", "negative"):
        library.load(task, ASSETS / "adapters" / bench.profile.name / f"{task}-seed{seed}")
    return library, *(scaling_vectors(library.model, task) for task in ("positive", "negative"))


def curves_of(positive: Vectors, negative: Vectors) -> dict[str, Callable[[float], Vectors]]:
    """Both curves of a pair of adapters: what gives the vectors at a strength."""
    return {"dial": partial(dial, positive), "contrast": partial(contrast, positive, negative)}


def sweep_seed(bench: Bench, seed: int) -> list[dict]:
    """Both curves of one seed's pair of adapters, as JSON rows."""
    library, positive, negative = adapters_of(bench, seed)
    curves = curves_of(positive, negative)
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
