"""Answers to 04's exercises, for test_exercises.py: a right one in another way, wrong ones with what is said."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from operator import ge, gt

import numpy as np

SETTINGS = ("base", "blocks", "steps", "bf16", "seed")
SIZES = {"c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
Z = 1.96


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


def wald(hits, n, z=Z):
    share = hits / n
    half = z * math.sqrt(share * (1 - share) / n)
    return share - half, share + half


def wilson(hits, n, z=Z, divide=True, divide_half=True):
    share = hits / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n if divide else 1
    centre, half = centre / scale, half / (scale if divide_half else 1)
    return centre - half, centre + half


def wilson_by_roots(hits, n):
    a, b, c = 1 + Z * Z / n, -(2 * hits / n + Z * Z / n), (hits / n) ** 2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)]


def front(points):
    found, best = [], -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            found.append(index)
            best = points[index][1]
    return found


def by_cost(points):
    return sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))


def neighbours(points):
    order = by_cost(points)
    return order[:1] + [j for i, j in zip(order, order[1:], strict=False) if points[j][1] > points[i][1]]


def walk(points, key, better=gt):
    found, best = [], -math.inf
    for index in sorted(range(len(points)), key=lambda i: key(points[i])):
        if better(points[index][1], best):
            found.append(index)
            best = points[index][1]
    return found


def hull(points):
    kept = []
    for index in front(points):
        while len(kept) > 1 and slope(points, kept[-2], kept[-1]) <= slope(points, kept[-1], index):
            kept.pop()
        kept.append(index)
    return kept


def slope(points, i, j):
    return (points[j][1] - points[i][1]) / (points[j][0] - points[i][0])


def best_alone(points):
    return [max(range(len(points)), key=lambda i: (points[i][1], -points[i][0]))]


def verdict(low, high, n, claimed):
    if n < 2 or low < claimed <= high:
        return "cannot tell"
    return "holds" if low >= claimed else "does not hold"


def by_middle(low, high, n, claimed):
    return "cannot tell" if n < 2 else "holds" if (low + high) / 2 >= claimed else "does not hold"


TURNED = {"holds": "does not hold", "does not hold": "holds", "cannot tell": "cannot tell"}

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
    "4.3": (
        wilson_by_roots,
        [
            (wald, "1.96 standard errors: near 0"),
            (lambda hits, n: (max(0, wald(hits, n)[0]), min(1, wald(hits, n)[1])), "cut off"),
            (lambda hits, n: wilson(hits, n, divide=False), "division by 1 + z^2 / n"),
            (lambda hits, n: wilson(hits, n, divide_half=False), "only the centre is divided"),
            (lambda hits, n: [100 * bound for bound in wilson(hits, n)], "per cent"),
            (lambda hits, n: wilson(hits, n, 1.0), "one standard error"),
            (lambda hits, n: wilson(hits, n, 1.645), "z is 1.64"),
            (lambda hits, n: wilson(hits, n, 2.0), "not the bounds"),
            (lambda hits, n: wilson(hits, n)[::-1], "high comes before low"),
            (
                lambda hits, n: (sum(wilson(hits, n)) / 2, (wilson(hits, n)[1] - wilson(hits, n)[0]) / 2),
                "centre and half",
            ),
            (lambda hits, n: (0.0, 1.0), "not the bounds"),
            (lambda hits, n: (float("nan"), 1.0), "NaN"),
            (lambda hits, n: hits / n, "a pair of numbers"),
        ],
    ),
    "4.4": (
        front,
        [
            (lambda points: sorted(front(points)), "by rising index"),
            (lambda points: front(points)[::-1], "by falling cost"),
            (hull, "the convex hull"),
            (best_alone, "the best value alone"),
            (lambda points: by_cost(points)[:1], "the cheapest point alone"),
            (lambda points: front([(-c, v) for c, v in points])[::-1], "high cost counts as good"),
            (lambda points: front([(c, -v) for c, v in points]), "low value counts as good"),
            (neighbours, "neighbour only"),
            (lambda points: walk(points, lambda point: point[0]), "two points of one cost"),
            (lambda points: walk(points, lambda point: point), "two points of one cost"),
            (lambda points: walk(points, lambda p: (p[0], -p[1]), ge), "two points of one value"),
            (by_cost, "every point is there"),
            (lambda points: [points[i] for i in front(points)], "indices are due"),
            (lambda points: front(points)[:-1], "some point that is beaten"),
        ],
    ),
    "4.5": (
        verdict,
        [
            (lambda low, high, n, c: "holds" if low + high >= 2 * c else "does not hold", "middle of the interval"),
            (lambda low, high, n, c: verdict(low, high, 2, c), "one run has no interval"),
            (lambda low, high, n, c: TURNED[verdict(low, high, n, c)], "turned round"),
            (lambda low, high, n, c: verdict(high, high, n, c), "the upper end"),
            (lambda low, high, n, c: "holds" if n > 1 and high >= c else verdict(low, high, n, c), "the upper end"),
            (lambda low, high, n, c: "holds" if n > 1 and low >= c else "does not hold", "not proven"),
            (lambda low, high, n, c: "cannot tell", "the same verdict"),
            (by_middle, "middle of the interval"),
            (
                lambda low, high, n, c: verdict(low, min(low, c - 1), n, c) if low < c else verdict(low, high, n, c),
                "not proven",
            ),
            (
                lambda low, high, n, c: "cannot tell" if low == c else verdict(low, high, n, c),
                "the lower bound reaches",
            ),
            (lambda low, high, n, c: verdict(low - 1e-9, high - 1e-9, n, c), "the lower bound reaches"),
            (lambda low, high, n, c: verdict(low, high - 1e-9, n, c), "the upper bound still reaches"),
            (lambda low, high, n, c: verdict(low, high, n - 1, c), "two runs"),
            (lambda low, high, n, c: "cannot tell" if low == high else verdict(low, high, 2, c), "no width"),
            (lambda low, high, n, c: low >= c, "one of"),
        ],
    ),
}


ALSO_RIGHT = {
    "4.1": [lambda *given: np.int64(lora(*given))],
    "4.4": [front, lambda points: by_pairs(points)],  # the one drops doubles, the other keeps them: none is drawn
}


def by_pairs(points):
    kept = [p for p in points if not any(c <= p[0] and v >= p[1] and (c, v) != p for c, v in points)]
    return [points.index(point) for point in sorted(kept)]
