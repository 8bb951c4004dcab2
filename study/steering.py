"""The rival of the dial: activation steering, which needs no gradient, beside the contrast of two adapters.

A steering vector is the mean hidden state behind one layer over positive reviews minus that over negative ones; it is
added to the layer's output at every token (contrastive activation addition, Rimsky et al. 2024, arXiv:2312.06681; Zou
et al. 2023, arXiv:2310.01405). It is computed from the reviews that the two adapters are trained on.

Layer and scale are chosen on validation, as an adapter's rate and step are. At each layer the scale is sought at which
real validation reviews cost `PRICE` times the base's perplexity. The layer is taken that there moves the share of
positive texts most, with prompts and a seed that the test does not have. This scale is called strength 2, where the
contrast costs about as much. `steering.json` holds what the dial's record holds of the contrast: for the steering
vector, and for a control, the contrast with its factors shuffled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from study.comparison import Bench
from study.dial import STRENGTHS, adapters_of, dial_header, load_reference_dial, point_of
from study.records import rows_of, runs_folder
from utils.adapters import set_scaling_vectors
from utils.config import Profile
from utils.data import LABELS, PROMPTS, balanced_blocks
from utils.evaluation import contrast, dial, held_out_loss, point_scores, positivity
from utils.generation import evaluation_mode, generate
from utils.runs import read_json, write_json

PRICE = 1.10  # perplexity of real validation reviews at strength 2, times the base's
SCALES = (1.0, 64.0)  # of strength 2, in mean differences: where it is sought
HALVINGS = 6
VALIDATION_SEED = 100
VALIDATION_PROMPTS = (
    "This is", "We watched", "The cast", "A friend of mine", "The ending", "In this film", "The first half", "Before I",
    "The dialogue", "There is", "The scene in which", "The camera", "At the cinema", "My wife", "The book", "It was",
)  # fmt: skip
CONTROL = (-2, 2)  # strengths of the shuffled contrast


def mean_differences(model: GPT2LMHeadModel, blocks: Mapping[str, Dataset], batch_size: int = 32) -> Tensor:
    """Mean hidden state over all tokens of the "positive" blocks minus that of the "negative": (layers - 1, width).

    Row i is of the output of layer i. The last layer is left out: only the head would read what is added there.
    """
    means = {}
    with evaluation_mode(model):
        for label, part in blocks.items():
            sums = 0
            for start in range(0, len(part), batch_size):
                ids = torch.as_tensor(part[start : start + batch_size]["input_ids"]).to(model.device)
                states = model.transformer(ids, use_cache=False, output_hidden_states=True).hidden_states[1:-1]
                sums = sums + torch.stack([state.double().mean(1).sum(0) for state in states])
            means[label] = sums / len(part)  # blocks are of one length
    return (means["positive"] - means["negative"]).float()


@contextmanager
def steered(model: GPT2LMHeadModel, layer: int, move: Tensor) -> Iterator[GPT2LMHeadModel]:
    """Inside, `move` (width,) is added to the output of `layer` at every token."""
    move = move.to(model.device)
    hook = model.transformer.h[layer].register_forward_hook(lambda _module, _inputs, output: output + move)
    try:
        yield model
    finally:
        hook.remove()


def choose(bench: Bench, differences: Tensor) -> list[dict[str, float]]:
    """Every layer's `layer`, `scale` (of strength 2) and `reach` on validation, the best first.

    `reach`: the share of positive texts at strength 2 minus that at -2, by the judge of words.
    """
    model, profile = bench.base, bench.profile
    part = bench.reviews["validation"]
    blocks = balanced_blocks(part, bench.tokenizer, profile.block_length, profile.eval_blocks)
    bound = held_out_loss(model, blocks).value + math.log(PRICE)
    found = []
    for layer, difference in enumerate(differences):
        low, high = SCALES
        for _ in range(HALVINGS):
            losses = []
            for scale in (math.sqrt(low * high), -math.sqrt(low * high)):
                with steered(model, layer, scale * difference):
                    losses.append(held_out_loss(model, blocks).value)
            low, high = (abs(scale), high) if fmean(losses) <= bound else (low, abs(scale))
        shares = []
        for scale in (low, -low):
            with steered(model, layer, scale * difference):
                texts = generate(model, bench.tokenizer, VALIDATION_PROMPTS, seed=VALIDATION_SEED, **profile.sampling)
            shares.append(positivity(texts, bench.judges["words"]).value)
        found.append({"layer": layer, "scale": low, "reach": shares[0] - shares[1]})
        print(f"layer {layer}: strength 2 is {low:.2f} mean differences, reach {found[-1]['reach']:.2f}", flush=True)
    return sorted(found, key=lambda row: -row["reach"])


def points(bench: Bench, seed: int, choice: Mapping[str, list]) -> Iterator[tuple[str, float, nn.Module]]:
    """Every (curve, strength) of a seed, with a model that is turned so until the next one is asked for.

    `choice` as `chosen` gives it. Strength 0 is the base, which the dial's record has.
    """
    model, layer, unit = copy.deepcopy(bench.base), choice["layers"][0]["layer"], torch.tensor(choice["unit"])
    for strength in filter(None, STRENGTHS["contrast"]):
        with steered(model, layer, strength * unit):
            yield "steering", strength, model
    library, positive, negative = adapters_of(bench, seed)
    stream = torch.Generator().manual_seed(seed)
    shuffled = {key: l[torch.randperm(len(l), generator=stream)] for key, l in contrast(positive, negative, 1).items()}
    with library.use("positive") as model:
        for strength in CONTROL:
            set_scaling_vectors(model, dial(shuffled, strength))
            yield "shuffled", strength, model


def run_steering(bench: Bench, seeds: Sequence[int]) -> None:
    """`steering.json`: `layers` as `choose` gives them, `unit`, and a row a seed and point; what is there is kept."""
    path = runs_folder(bench) / "steering.json"
    profile, tokenizer = bench.profile, bench.tokenizer
    header = dial_header(profile, bench.fingerprint)
    rows, choice = rows_of(path, header), chosen(path)
    if not choice:
        parts = {label: bench.blocks("adapter", label, reviews=profile.train_reviews) for label in LABELS}
        differences = mean_differences(bench.base, parts)
        layers = choose(bench, differences)
        unit = layers[0]["scale"] / 2 * differences[layers[0]["layer"]]
        choice = {"layers": layers, "unit": [round(number, 5) for number in unit.tolist()]}
        write_json(path, header | choice | {"rows": rows})
    done = {point_of(row) for row in rows}
    blocks = balanced_blocks(bench.reviews["test"], tokenizer, profile.block_length, profile.eval_blocks)
    for seed in seeds:
        for curve, strength, model in points(bench, seed, choice):
            if (seed, curve, strength) in done:
                continue
            print(f"{path.name}: seed {seed} {curve} {strength:+g}", flush=True)
            texts = generate(model, tokenizer, PROMPTS, seed=seed, **profile.sampling)
            scores = point_scores(texts, bench.judges, model, tokenizer, blocks, base=bench.base)
            rows.append({"seed": seed, "curve": curve, "strength": strength} | scores)
            write_json(path, header | choice | {"rows": rows})


def chosen(path: Path) -> dict[str, list]:
    """`layers` and `unit` of the record at `path`: what its points are made with; empty where there is no file."""
    record = read_json(path)
    return {key: record[key] for key in ("layers", "unit") if record}


def load_rivals(profile: Profile, fingerprint: str) -> tuple[list[dict], str | None]:
    """Rows of the contrast, the steering vector and the control, or none and the reason: a record that is not there."""
    found = []
    for name in ("dial", "steering"):
        rows, why_not = load_reference_dial(profile, fingerprint, name)
        if why_not:
            return [], why_not
        found += [row for row in rows if row["curve"] != "dial"]
    return found, None
