"""The checks of notebook 03's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

`exercises.check` calls them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import torch
from peft import get_peft_model_state_dict
from peft.tuners.ia3 import IA3Layer
from safetensors.torch import load, save
from torch import Tensor
from transformers import GPT2LMHeadModel

from exercises import Answer, Wrong
from exercises.answers import Draw, expect, kind, plain, tensors, untouched
from exercises.train import trained_vectors
from exercises.train_models import adapted, tiny_gpt2
from utils.adapters import scaling_vectors

LAYERS = 11  # "10" comes before "2" where places are sorted as text


def logits_by_hooks(
    base: GPT2LMHeadModel, vectors: dict[str, Tensor], ids: Tensor, change: Callable = lambda place, l: l
) -> Tensor:
    """Logits (rows, tokens, vocabulary) of `base` with each vector changed by `change(place, vector)`."""
    hooks = []
    for place, l in vectors.items():
        layer, role = place.split(".")
        block, factors = base.transformer.h[int(layer)], change(place, l)
        if role == "attention":
            hook = block.attn.c_attn.register_forward_hook(lambda _, __, output, l=factors: output * l)
        else:
            hook = block.mlp.c_proj.register_forward_pre_hook(lambda _, inputs, l=factors: (inputs[0] * l,))
        hooks.append(hook)
    with torch.no_grad():
        logits = base(ids).logits
    for hook in hooks:
        hook.remove()
    return logits


def check_file_loaded(answer: Answer, seed: int) -> None:
    """3.1: an adapter's file in a module of the student's own computes what peft computes.

    A row has as many tokens as `c_attn` has outputs, so that a vector of shape (3d, 1) fits, and scales tokens.
    """
    draw, width = Draw(seed), 8
    model, base = adapted(draw, seed, layers=LAYERS), tiny_gpt2(seed, layers=LAYERS)
    file, ids = save(get_peft_model_state_dict(model)), draw.integers(0, 39, 2, 3 * width)
    with torch.no_grad():
        right = model(ids).logits
    vectors = scaling_vectors(model)
    text = [str(layer) for layer in range(LAYERS)]
    taken = dict(zip(text, sorted(text), strict=True))  # block -> whose vector it gets where names are sorted

    def only(role: str) -> Callable:
        return lambda place, l: l if place.endswith(role) else torch.ones_like(l)

    def attention(change: Callable) -> Callable:
        return lambda place, l: change(l) if place.endswith("attention") else l

    changes = {
        "nothing is loaded: that is the base": lambda place, l: torch.ones_like(l),
        "the feed-forward's vectors are missing": only("attention"),
        "the attention's vectors are missing": only("feedforward"),
        "blocks in the order of their names as text: 10 comes before 2":
            lambda place, _: vectors[f"{taken[place.split('.')[0]]}.{place.split('.')[1]}"],
        "the vector (3d, 1) scales tokens: flatten it, and it scales units": attention(lambda l: l[:, None]),
        "the queries are left alone: peft scales them, too":
            attention(lambda l: torch.cat([torch.ones(width), l[width:]])),
        "keys and values are exchanged: the vector holds query, key, value":
            attention(lambda l: torch.cat([l[:width], l[2 * width :], l[width : 2 * width]])),
    }  # fmt: skip
    traps = [(cause, lambda change=change: (logits_by_hooks(base, vectors, ids, change),))
             for cause, change in changes.items()]  # fmt: skip
    given = copy.deepcopy(base)
    with mock.patch.object(IA3Layer, "__init__", side_effect=RuntimeError("this is peft: write the module yourself")):
        found = tensors(answer(given, file, ids))
    before, after = base.state_dict(), given.state_dict()
    if before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in before):
        raise Wrong("the base is another one afterwards: work on a copy, copy.deepcopy(base)")
    expect(found, (right,), traps, "the logits are not those of peft with this adapter", 1e-5)


def check_merge(answer: Answer, seed: int) -> None:
    """3.2: one layer with its vector multiplied in, both roles; square weights first, where a wrong side still fits."""
    draw, exchanged = Draw(seed), "the two roles are exchanged: feedforward=False scales the output, True the input"
    for inner, out in ((4, 4), (draw.integer(3, 5), draw.integer(6, 8))):
        weight, bias, square = draw.normal(inner, out), draw.normal(out), inner == out
        l, blank = draw.factors(out), ("nothing is merged", (weight, bias))
        right = (torch.stack([weight[:, j] * l[j] for j in range(out)], dim=1), bias * l)
        traps = [
            ("attention: the bias is not scaled: the vector multiplies all that c_attn puts out", (right[0], bias)),
            (
                "attention: scale the weight's columns, its outputs",
                (weight * l[:, None] if square else weight, bias * l),
            ),
            ("attention: the vector is added: it multiplies", (weight + l, bias + l)),
        ]
        turned = ("the weight is transposed: Conv1D keeps it as (in, out)", (right[0].T, right[1]))
        other = (exchanged, (weight * l[:, None], bias) if square else right)
        _expect_layer(answer, (weight, bias, l, False), right, [other, *traps, blank, turned])
        l = draw.factors(inner)
        right = (torch.stack([weight[i] * l[i] for i in range(inner)]), bias)
        beside = weight * l if square else weight
        traps = [
            (
                "feed-forward: the bias is scaled: it is added after the product",
                (right[0], bias * l if square else bias),
            ),
            ("feed-forward: scale the weight's rows, its inputs", (beside, bias)),
            ("feed-forward: scale the rows, and leave the bias", (beside, bias * l if square else bias)),
            ("feed-forward: the vector is added: it multiplies", (weight + l[:, None], bias)),
        ]
        turned = ("the weight is transposed: Conv1D keeps it as (in, out)", (right[0].T, right[1]))
        _expect_layer(answer, (weight, bias, l, True), right, [*traps, blank, turned])


def _expect_layer(answer: Answer, given: tuple, right: tuple[Tensor, Tensor], traps: list) -> None:
    found = tensors(untouched(answer, *given), 2)
    expect(found, right, traps, "the merged layer does not give what the adapted one gives")


def check_rows(answer: Answer, seed: int) -> None:
    """3.3: a vector of its own for each row of a batch, none for some."""
    draw = Draw(seed)
    for rows, length in ((4, 4), (5, 3)):
        width = 4 if rows == length else 6
        output = draw.normal(rows, length, width)
        vectors = {name: draw.factors(width) for name in ("positive", "negative", "short")}
        names = ["negative", None, "positive", "short", "negative"][:rows]
        one = torch.ones(width)
        stack = torch.stack([one if name is None else vectors[name] for name in names])
        right = torch.stack([output[row] * stack[row] for row in range(rows)])
        traps = [
            ("every row gets the first row's vector, as with peft's adapter_names", output * stack[0]),
            ("every row gets the last row's vector", output * stack[-1]),
            ("rows and tokens are mixed up: row r, for all its tokens, takes vector r",
             output * stack if rows == length else output),
            ("the vectors are mixed: each row has its own", output * stack.mean(0)),
            ("None means the base: all factors 1, not 0",
             right * torch.tensor([float(name is not None) for name in names])[:, None, None]),
            ("nothing is scaled", output),
            ("the vectors are added: they multiply", output + stack[:, None]),
        ]  # fmt: skip
        traps = [(cause, (wrong,)) for cause, wrong in traps]
        found = tensors(untouched(answer, output, vectors, names))
        expect(found, (right,), traps, "a row is not its output times its own vector")


def blended(
    adapters: list[dict[str, Tensor]], weights: list[float], missing: float = 1.0, start: float = 1.0, away: float = 1.0
) -> dict[str, Tensor]:
    """`start` + the sum of weight * (l - `away`), place by place; a place that an adapter lacks counts as `missing`."""
    sizes = {key: len(l) for adapter in adapters for key, l in adapter.items()}
    result = {key: torch.full((size,), start) for key, size in sizes.items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        for key, size in sizes.items():
            result[key] = result[key] + weight * (adapter.get(key, torch.full((size,), missing)) - away)
    return result


def one_by_one(adapters: list[dict[str, Tensor]], weights: list[float], step: Callable) -> dict[str, Tensor]:
    """What `step(before, l, weight)` makes of ones at each place, adapter by adapter."""
    result = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for key, l in adapter.items():
            result[key] = step(result.get(key, torch.ones_like(l)), l, weight)
    return result


def check_blend(answer: Answer, seed: int) -> None:
    """3.4: several adapters, each turned by its own strength."""
    draw = Draw(seed)
    sizes = {"0.attention": 6, "0.feedforward": 8, "1.attention": 6}
    for weights in ([1.0, -0.5], [0.5, 2.0, -1.5], [0.3]):
        adapters = [{key: draw.factors(size) for key, size in sizes.items()} for _ in weights]
        adapters[0].pop("1.attention")
        if len(adapters) > 1:
            adapters[1].pop("0.feedforward")
        right = blended(adapters, weights)
        common = {key for key in right if all(key in adapter for adapter in adapters)}
        product = "the adapters are multiplied: add their moves, strength * (l - 1)"
        bare = "a sum of the vectors themselves: blend the moves away from 1, l - 1"
        traps = [
            (bare, blended(adapters, weights, 0, 0, 0)),
            (bare, blended(adapters, weights, 1, 0, 0)),
            (bare, blended(adapters, weights, 0, 1, 0)),
            (bare, blended(adapters, weights, 1, 1, 0)),
            ("the 1 is missing: 1 plus the moves", blended(adapters, weights, start=0.0)),
            ("a missing place is taken for 0: untouched is 1, so its move is 0",
             blended(adapters, weights, missing=0.0)),
            ("each adapter overwrites the one before it: add its move",
             one_by_one(adapters, weights, lambda before, l, weight: 1 + weight * (l - 1))),
            (product, one_by_one(adapters, weights, lambda before, l, weight: before * (1 + weight * (l - 1)))),
            (product, one_by_one(adapters, weights, lambda before, l, weight: before * l**weight)),
            ("the strengths are divided by their sum: leave them as they are",
             blended(adapters, [weight / sum(weights) for weight in weights])),
            ("the strengths are ignored", blended(adapters, [1.0] * len(weights))),
            ("places that the first adapter lacks are lost", {key: right[key] for key in right if key in adapters[0]}),
            ("places that some adapter lacks are lost", {key: right[key] for key in right if key in common}),
        ]  # fmt: skip
        found = untouched(answer, adapters, weights)
        if type(found) is not dict:
            raise Wrong(f"a dictionary is due, as each adapter is one, not a {kind(found)}")
        places = plain(list(found))
        values = [tensors(value)[0] for value in found.values()]
        _expect_vectors(dict(zip(places, values, strict=True)), right, traps)


def _expect_vectors(found: dict[str, Tensor], right: dict[str, Tensor], traps: list) -> None:
    """`expect` for dictionaries of vectors: the places first, then the numbers."""
    for cause, wrong in traps:
        if found.keys() == wrong.keys() != right.keys():
            raise Wrong(cause)
    if found.keys() != right.keys():
        raise Wrong("the places are not those of the adapters")
    order = sorted(right)
    in_order = [(cause, tuple(wrong[key] for key in order)) for cause, wrong in traps if wrong.keys() == right.keys()]
    hint = "it is not 1 + the sum of strength * (l - 1)"
    expect(tuple(found[key] for key in order), tuple(right[key] for key in order), in_order, hint)


def check_style(answer: Answer, seed: int) -> None:
    """3.6: an adapter for a style of the student's own was trained, and it is not 02's. A person judges the style."""
    vectors = trained_vectors(answer.function, "style")
    earlier = answer.function / "adapters" / "positive" / "adapter_model.safetensors"
    known = load(earlier.read_bytes()) if earlier.is_file() else {}
    if known.keys() == vectors.keys() and all(torch.equal(known[name], vectors[name]) for name in known):
        raise Wrong("that is the adapter of 02 again: train on texts of your style")


CHECKS = {
    "3.1": check_file_loaded,
    "3.2": check_merge,
    "3.3": check_rows,
    "3.4": check_blend,
    "3.6": check_style,
}
