"""The checks of notebook 02's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

Those about models are made in `train_models.py`; nothing but the files of 2.9 is loaded. `exercises.check`
calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from exercises import Answer, NotYet, Wrong
from exercises.answers import Draw, expect, number, plain, tensors, untouched
from exercises.train_models import check_config, check_identity, check_overfit, check_tone_unit
from utils.adapters import AdapterError
from utils.runs import RunError, RunRecord
from utils.saving import check_tensors, read_probe

LEAST_MOVED = 1e-3  # a factor that training has moved is farther from 1 than this
MOST_SAID = 110  # characters of another module's message
GROUPS = ("query", "key", "value", "feedforward")


def check_labels(answer: Answer, seed: int) -> None:
    """2.3: -100 on padding only, although padding and end of text are one token."""
    draw, end = Draw(seed), 0
    for left in (False, True):
        lengths = [7, *(draw.integer(2, 5) for _ in range(3))]
        ids, mask = torch.full((4, 7), end), torch.zeros(4, 7, dtype=torch.long)
        for row, length in enumerate(lengths):
            place = slice(7 - length, 7) if left else slice(0, length)
            ids[row, place] = torch.cat([draw.integers(1, 9, length - 1), torch.tensor([end])])
            mask[row, place] = 1
        right = torch.tensor([[t if m else -100 for t, m in zip(*row, strict=True)] for row in
                              zip(ids.tolist(), mask.tolist(), strict=True)])  # fmt: skip
        traps = [
            ("every end-of-text token is masked, the true one too: go by the mask", ids.masked_fill(ids == end, -100)),
            ("the padding is not masked", ids.clone()),
            ("the mask is turned round: it is 1 where there is text", ids.masked_fill(mask == 1, -100)),
            ("the labels are shifted: GPT-2 shifts them itself", torch.roll(right, -1, 1)),
        ]
        found = tensors(untouched(answer, ids, mask))
        traps = [(cause, (wrong,)) for cause, wrong in traps]
        expect(found, (right,), traps, "a label is neither its own token nor -100 on padding")


def decayed(start: float, rate: float, decay: float, steps: int) -> float:
    """What AdamW makes of one number in `steps` steps without a gradient."""
    parameter = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay)
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return parameter.item()


def check_decay(answer: Answer, seed: int) -> None:
    """2.4: one factor under weight decay alone."""
    draw = Draw(seed)
    for start in (draw.integer(120, 180) / 100, draw.integer(30, 80) / 100, 1.0):
        rate, decay, steps = draw.integer(1, 5) / 100, draw.integer(1, 5) / 10, draw.integer(20, 60)
        right = decayed(start, rate, decay, steps)
        traps = [
            ("that goes to 1: weight decay pulls to 0", 1 + (start - 1) * (1 - rate * decay) ** steps),
            ("that is one step: the pull is repeated", start * (1 - rate * decay)),
            ("that is a straight line: each step takes a share of what is left", start * (1 - rate * decay * steps)),
            ("the learning rate is missing: AdamW multiplies by 1 - rate * decay", start * (1 - decay) ** steps),
            ("the decay is missing: AdamW multiplies by 1 - rate * decay", start * (1 - rate) ** steps),
            ("nothing decays", start),
            ("it grows: the sign is turned round", start * (1 + rate * decay) ** steps),
        ]
        expect(number(answer(start, rate, decay, steps)), right, traps, "a step multiplies by 1 - rate * decay", 1e-6)


def mean_moves(vectors: dict[str, Tensor], move: Callable = lambda part: (part - 1).abs().mean()) -> dict:
    """`move` of each part of the vectors: {[layer, group]: number}."""
    moves = {}
    for key, vector in vectors.items():
        layer, role = key.split(".")
        parts = {role: vector}
        if role == "attention":
            parts = dict(zip(("query", "key", "value"), vector.chunk(3), strict=True))
        moves |= {(int(layer), group): float(move(part)) for group, part in parts.items()}
    return moves


def check_heatmap(answer: Answer, seed: int) -> None:
    """2.6: the cell of the heat map that is farthest from 1."""
    draw, d = Draw(seed), 6
    for group in ("query", "value", "feedforward"):
        vectors = {}
        for layer in range(11):
            vectors[f"{layer}.attention"] = 1 + 0.02 * draw.normal(3 * d)
            vectors[f"{layer}.feedforward"] = 1 + 0.02 * draw.normal(4 * d)
        to_and_fro = 0.3 * (-1.0) ** torch.arange(4 * d)  # far from 1, and 0 on average
        layers = draw.order(11)[:5]
        if group == "feedforward":
            vectors[f"{layers[0]}.feedforward"] = 1 + to_and_fro
        else:
            third = ("query", "key", "value").index(group)
            vectors[f"{layers[0]}.attention"][third * d : (third + 1) * d] = 1 + to_and_fro[:d]
            vectors[f"{layers[3]}.feedforward"] += 0.13 * (-1.0) ** torch.arange(4 * d)  # the largest sum
            vectors[f"{layers[1]}.attention"] += 0.15 * (-1.0) ** torch.arange(3 * d)  # the largest whole vector
        vectors[f"{layers[1]}.attention"][d : 2 * d] = 1.15  # the largest signed mean
        some = torch.tensor([0.55, 0, -0.55, 0, 0.55, 0])  # fewer units, farther away: the largest mean square
        vectors[f"{layers[4]}.attention"][2 * d :] = 1 + some
        vectors[f"{layers[2]}.attention"][0] = 0.3  # the largest single factor
        right = farthest(vectors)
        traps = [
            ("moves up and down cancel: take the distance from 1 of each factor, then the mean",
             farthest(vectors, lambda part: (part - 1).mean())),
            ("moves up and down cancel: take the distance from 1 of each factor, then the mean",
             farthest(vectors, lambda part: abs((part - 1).mean()))),
            ("squares or a standard deviation make few large moves count more: take the absolute value",
             farthest(vectors, lambda part: (part - 1).square().mean())),
            ("one unit decides: take the mean over the group", farthest(vectors, lambda part: (part - 1).abs().max())),
            ("a sum favours the longest group: take the mean", farthest(vectors, lambda part: (part - 1).abs().sum())),
            ("that is the cell that moved the least", farthest(vectors, lambda part: -(part - 1).abs().mean())),
            *(("the layer is right, the group is not: the vector holds query, key, value, in this order",
               [right[0], name]) for name in GROUPS if name != right[1]),
            ("the layer is the text of the key: make it an integer", [str(right[0]), right[1]]),
        ]  # fmt: skip
        found = plain(untouched(answer, vectors))
        if type(found) is list and len(found) == 2 and found[1] == "attention":
            raise Wrong("attention is three groups: cut its vector into query, key and value")
        if type(found) is not list or len(found) != 2:
            raise Wrong("a pair is due: the layer, an integer, and the group's name")
        if found[1] not in GROUPS:
            raise Wrong(f"a pair (layer, group) is due, and the groups are {', '.join(GROUPS)}")
        expect(found, right, traps, "another cell is farther from 1")


def farthest(vectors: dict[str, Tensor], move: Callable = lambda part: (part - 1).abs().mean()) -> list:
    """[layer, group] with the largest `move`."""
    moves = mean_moves(vectors, move)
    return list(max(moves, key=moves.get))


def check_files(answer: Answer, seed: int) -> None:
    """2.9: the adapter that 02 has saved and the record of its run. The grader also measures both on other reviews."""
    trained_vectors(answer.function, "positive")


def trained_vectors(folder: object, task: str) -> dict[str, Tensor]:
    """The vectors of the adapter for `task` in a profile's folder; raises where no whole training made them."""
    if not isinstance(folder, Path):
        raise NotYet if folder is None or folder is ... else Wrong("a folder is due: artifacts_dir(profile)")
    adapter, record = folder / "adapters" / task, folder / "train" / task / "run.json"
    if not adapter.exists() or not record.exists():
        raise NotYet("no trained adapter, or no curve, in artifacts/: run the cells above")
    try:
        probe, run = read_probe(adapter), RunRecord.load(record)
        check_tensors(adapter)
    except AdapterError as error:
        raise Wrong(f"the adapter is damaged: {str(error).partition(': ')[2] or 'save it again'}"[:MOST_SAID]) from None
    except RunError:
        raise Wrong(f"train/{task}/run.json is damaged: delete it and run the training again") from None
    vectors = load_file(adapter / "adapter_model.safetensors")
    if any(not name.endswith("ia3_l") for name in vectors):
        raise Wrong("the adapter holds other tensors than the vectors of (IA)³")
    if max(float((vector - 1).abs().max()) for vector in vectors.values()) < LEAST_MOVED:
        raise Wrong("every factor is 1: save the adapter after its training")
    if run.status != "finished" or not run.history or run.history[-1]["step"] != run.config["steps"]:
        raise Wrong("the curve is cut off: let the training run to its end")
    if (probe["base_fingerprint"], probe.get("config_id")) != (run.config["base"], run.config_id):
        raise Wrong("adapter and curve come from different runs: run the notebook from top to bottom")
    if not run.metrics.get("best_loss", math.inf) < run.metrics.get("start_loss", -math.inf):
        raise Wrong("the held-out loss has not fallen: nothing was learned")
    best = best_vectors(record.parent, run.metrics.get("best_step"))
    if best and (best.keys() != vectors.keys() or any(not torch.equal(best[name], vectors[name]) for name in best)):
        raise Wrong("other vectors than those of the curve's best step: run again from the training cell on")
    return vectors


def best_vectors(folder: Path, step: object) -> dict[str, Tensor]:
    """What the run in `folder` ended with, from the checkpoint of its best step; empty where that is gone."""
    try:
        return load_file(folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")
    except (SafetensorError, OSError):
        return {}


CHECKS = {
    "2.1": check_config,
    "2.2": check_identity,
    "2.3": check_labels,
    "2.4": check_decay,
    "2.5": check_overfit,
    "2.6": check_heatmap,
    "2.7": check_tone_unit,
    "2.9": check_files,
}
