"""Answers to 04's exercises, for test_exercises.py: a right one in another way, wrong ones with what is said."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np

SETTINGS = ("base", "blocks", "steps", "bf16", "seed")
SIZES = {"c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}


def lora(layers, width, rank, targets, number=lambda a, b, r: r * (a + b)):
    return layers * sum(number(width * SIZES[name][0], width * SIZES[name][1], rank) for name in targets)


def lora_other(number):
    return lambda layers, width, rank, targets: lora(layers, width, rank, targets, number)


def lora_by_tables(layers, width, rank, targets):
    total = 0
    for _ in range(layers):
        for name in targets:
            inside, outside = SIZES[name]
            total += rank * width * inside + outside * width * rank
    return total


def pairs(runs, settings=SETTINGS, differ=("method",), way=combinations):
    return [
        (i, j)
        for i, j in way(range(len(runs)), 2)
        if all(runs[i][name] == runs[j][name] for name in settings)
        and all(runs[i][name] != runs[j][name] for name in differ)
    ]


def pairs_by_group(runs):
    groups = {}
    for index, run in enumerate(runs):
        groups.setdefault(tuple(run[name] for name in SETTINGS), []).append(index)
    found = [pair for members in groups.values() for pair in combinations(members, 2)]
    return [[i, j] for i, j in found if runs[i]["method"] != runs[j]["method"]]


ANSWERS = {
    "4.1": (
        lora_by_tables,
        [
            (lambda n, d, r, names: lora(1, d, r, names), "that is one block"),
            (lambda n, d, r, names: lora(n, d, 1, names), "the rank is missing"),
            (lora_other(lambda a, b, r: a * b), "that is the frozen matrix"),
            (lora_other(lambda a, b, r: r * a * b), "add rank * in and rank * out"),
            (lora_other(lambda a, b, r: r * a), "only A is counted"),
            (lora_other(lambda a, b, r: r * b), "only B is counted"),
            (lambda n, d, r, names: n * r * 2 * d * len(names), "taken to be (d, d)"),
            (lambda n, d, r, names: n * r * 4 * d, "targets are ignored"),
            (lora_other(lambda a, b, r: r * (a + b) + b), "no bias"),
            (lora_other(lambda a, b, r: r * (a + b) / 1), "a count is an integer"),
            (
                lambda n, d, r, names: sum({"c_attn": 4 * n * d * r}[name] for name in names),
                "your code raises KeyError",
            ),
        ],
    ),
    "4.2": (
        pairs_by_group,
        [
            (lambda runs: pairs(runs, (*SETTINGS, "learning_rate")), "a shared learning rate"),
            (lambda runs: pairs(runs, differ=()), "two runs of one method"),
            (lambda runs: pairs(runs, ("base", "blocks", "steps", "bf16")), "`seed` is not looked at"),
            (lambda runs: pairs(runs, ("blocks", "steps", "bf16", "seed")), "`base` is not looked at"),
            (lambda runs: pairs(runs, ("base", "steps", "bf16", "seed")), "`blocks` is not looked at"),
            (lambda runs: pairs(runs, ("base", "blocks", "bf16", "seed")), "`steps` is not looked at"),
            (lambda runs: pairs(runs, ("base", "blocks", "steps", "seed")), "`bf16` is not looked at"),
            (lambda runs: pairs(runs, ()), "nothing is looked at"),
            (lambda runs: pairs(runs, way=permutations), "there twice"),
            (lambda runs: [(j, i) for i, j in pairs(runs)], "larger index comes first"),
            (lambda runs: pairs(runs, differ=("method", "learning_rate")), "same by chance"),
            (lambda runs: pairs(runs)[1:], "not those of two methods"),
            (lambda runs: len(pairs(runs)), "a list of pairs"),
        ],
    ),
}


ALSO_RIGHT = {"4.1": [lambda *given: np.int64(lora(*given))]}
