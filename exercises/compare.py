"""The checks of notebook 04's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

`exercises.check` calls them.
"""

from __future__ import annotations

import itertools

from exercises import Answer, Wrong
from exercises.answers import Draw, expect, integer, kind, plain, untouched

MATRICES = {"c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}  # (in, out) in widths
SETTINGS = {"base": ["a1", "b2"], "blocks": [900, 3800], "steps": [200, 400], "bf16": [True, False], "seed": [0, 1]}


def check_lora_count(answer: Answer, seed: int) -> None:
    """4.1: LoRA of any rank on any of GPT-2's matrices."""
    draw = Draw(seed)
    names = list(MATRICES)
    for targets in (["mlp.c_fc", "c_attn", "attn.c_proj"], [names[draw.integer(0, 3)]], names):
        layers, d, rank = draw.integer(2, 9), 8 * draw.integer(3, 9), draw.integer(2, 7)
        sizes = [(d * MATRICES[name][0], d * MATRICES[name][1]) for name in targets]
        right = sum(rank * a + b * rank for _ in range(layers) for a, b in sizes)
        traps = [
            ("that is one block: multiply by the layers", right // layers),
            ("the rank is missing: A has `rank` rows, B `rank` columns", right // rank),
            ("that is the frozen matrix: count A and B only", layers * sum(a * b for a, b in sizes)),
            ("that is rank * in * out: add rank * in and rank * out", rank * layers * sum(a * b for a, b in sizes)),
            ("only A is counted, which has `rank` rows of in numbers", layers * rank * sum(a for a, _ in sizes)),
            ("only B is counted, which has out rows of `rank` numbers", layers * rank * sum(b for _, b in sizes)),
            ("every matrix is taken to be (d, d)", layers * rank * 2 * d * len(sizes)),
            ("the targets are ignored: that is c_attn", layers * rank * 4 * d),
            ("LoRA adds no bias", right + layers * sum(b for _, b in sizes)),
        ]
        expect(integer(untouched(answer, layers, d, rank, targets)), right, traps, "it is not the sum of A and B")


def fair_pairs(runs: list[dict], same: tuple[str, ...] = tuple(SETTINGS), other: tuple[str, ...] = ("method",)) -> list:
    """[i, j], i < j, of runs that agree in all of `same` and differ in all of `other`."""
    return [
        [i, j]
        for i, j in itertools.combinations(range(len(runs)), 2)
        if all(runs[i][key] == runs[j][key] for key in same) and all(runs[i][key] != runs[j][key] for key in other)
    ]


def random_runs(draw: Draw) -> list[dict]:
    """A dozen runs; for each setting a pair that differs in nothing else, and pairs that are fair."""
    rates = {"ia3": 0.01, "lora": 0.003, "full": 0.0005}
    first = {key: values[draw.integer(0, 1)] for key, values in SETTINGS.items()}
    runs = [{"method": method, "learning_rate": rates[method]} | first for method in rates]
    runs.append(runs[0] | {"learning_rate": 0.02})  # one method twice
    runs.append(runs[1] | {"learning_rate": 0.01})  # at the rate of the first
    for key, values in SETTINGS.items():
        runs.append(runs[draw.integer(0, 2)] | {key: next(value for value in values if value != first[key])})
    return [runs[i] for i in draw.order(len(runs))]


def check_fair_pairs(answer: Answer, seed: int) -> None:
    """4.2: the pairs of runs that may be compared."""
    draw = Draw(seed)
    for _ in range(2):
        runs = random_runs(draw)
        settings = tuple(SETTINGS)
        without = {key: tuple(name for name in settings if name != key) for key in settings}
        traps = [
            ("a shared learning rate is asked for: the rate is the one setting that must not be shared",
             fair_pairs(runs, (*settings, "learning_rate"))),
            ("two runs of one method are no comparison of methods", fair_pairs(runs, other=())),
            ("two runs of one method are no comparison of methods", fair_pairs(runs, other=("learning_rate",))),
            ("pairs with one and the same rate are left out: it may be the same by chance",
             fair_pairs(runs, other=("method", "learning_rate"))),
            *((f"`{key}` is not looked at: it must be the same", fair_pairs(runs, kept))
              for key, kept in without.items()),
            ("nothing is looked at but the method", fair_pairs(runs, ())),
            ("each pair is there twice: smaller index first, and once",
             [list(p) for i, j in fair_pairs(runs) for p in ((i, j), (j, i))]),
            ("the larger index comes first", [[j, i] for i, j in fair_pairs(runs)]),
        ]  # fmt: skip
        found = plain(untouched(answer, runs))
        if type(found) is not list or any(type(pair) is not list or len(pair) != 2 for pair in found):
            raise Wrong(f"a list of pairs (i, j) is due, not a {kind(found)}")
        right = sorted(fair_pairs(runs))
        traps = [(cause, sorted(wrong)) for cause, wrong in traps]
        expect(_in_order(found), right, traps, "the pairs are not those of two methods under the same settings")


def _in_order(pairs: list) -> list:
    """Pairs sorted; as they came where they cannot be sorted."""
    try:
        return sorted(pairs)
    except TypeError:
        return pairs


CHECKS = {"4.1": check_lora_count, "4.2": check_fair_pairs}
