"""The checks of notebook 04's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

`exercises.check` calls them.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable

from exercises import Answer, Wrong
from exercises.answers import Draw, expect, integer, kind, plain, untouched

MATRICES = {"c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}  # (in, out) in widths
SETTINGS = {"base": ["a1", "b2"], "blocks": [900, 3800], "steps": [200, 400], "bf16": [True, False], "seed": [0, 1]}
Z = 1.96  # as on the card: 97.5 % of a standard normal lie below


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


def wilson(hits: int, n: int, z: float = Z) -> list[float]:
    """Where the distance between share and p is z standard errors of p: the roots in p, by bisection."""
    share, bounds = hits / n, []
    for inside, outside in ((share, 0.0), (share, 1.0)):
        for _ in range(100):
            p = (inside + outside) / 2
            within = (share - p) ** 2 <= z * z * p * (1 - p) / n
            inside, outside = (p, outside) if within else (inside, p)
        bounds.append(inside)
    return bounds


def usual_intervals(hits: int, of: int) -> dict[str, list[float]]:
    """What the usual mistakes make of a share, by their causes."""
    share = hits / of
    error, (low, high), divisor = math.sqrt(share * (1 - share) / of), wilson(hits, of), 1 + Z * Z / of
    centre, half = divisor * (low + high) / 2, divisor * (high - low) / 2
    wald = "that is share +- 1.96 standard errors"
    return {
        f"{wald}: near 0 and 1 it leaves [0, 1] or has no width": [share - Z * error, share + Z * error],
        f"{wald}, cut off: at 0 and 1 it has no width": [max(0.0, share - Z * error), min(1.0, share + Z * error)],
        "the division by 1 + z^2 / n is missing": [centre - half, centre + half],
        "only the centre is divided by 1 + z^2 / n: the half width is, too": [
            centre / divisor - half, centre / divisor + half,
        ],
        "in per cent: a share lies between 0 and 1": [100 * low, 100 * high],
        "one standard error wide: 95 % needs z = 1.96": wilson(hits, of, 1.0),
        "z is 1.64: that leaves out 5 % on each side": wilson(hits, of, 1.6448536),
        "high comes before low": [high, low],
        "centre and half width are due as low and high": [(low + high) / 2, (high - low) / 2],
    }  # fmt: skip


def check_interval(answer: Answer, seed: int) -> None:
    """4.3: Wilson's 95 % interval of a share."""
    draw = Draw(seed)
    middle, n = draw.integer(20, 90), draw.integer(100, 300)
    cases = [(middle, n), (draw.integer(8, 9), 10), (0, 20), (20, 20)]
    found = [plain(answer(*case)) for case in cases]
    for pair in found:
        if type(pair) is not list or len(pair) != 2 or any(type(bound) not in (int, float) for bound in pair):
            raise Wrong("a pair of numbers is due: low and high")
        if not (math.isfinite(pair[0]) and math.isfinite(pair[1])):
            raise Wrong("a bound is NaN or infinite")
    wrong = [usual_intervals(*case) for case in cases]
    due = {"": [wilson(*case) for case in cases]} | {cause: [row[cause] for row in wrong] for cause in wrong[0]}
    cause = next(
        (cause for cause, bounds in due.items() if close(found, bounds)),
        "these are not the bounds of Wilson's interval",
    )
    if cause:
        raise Wrong(cause)


def close(found: list[list[float]], bounds: list[list[float]]) -> bool:
    """Whether two lists of intervals agree to three digits; bounds may be 0, so the distance is not relative."""
    return all(
        abs(a - b) < 5e-4 for pair, due in zip(found, bounds, strict=True) for a, b in zip(pair, due, strict=True)
    )


def undominated(points: list[tuple[float, float]]) -> list[int]:
    """Indices by rising cost of the points that no other one beats (costs no more, is worth no less)."""
    kept = [
        i
        for i, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
    ]
    return sorted(kept, key=lambda i: points[i][0])


def walk(points: list[tuple[float, float]], order: list[int], better: Callable = operator.gt) -> list[int]:
    """The points, taken in `order`, that are worth more than all before them."""
    kept = []
    for i in order:
        if not kept or better(points[i][1], points[kept[-1]][1]):
            kept.append(i)
    return kept


def hull(points: list[tuple[float, float]]) -> list[int]:
    """The part of the front that a straight mix of two others does not beat."""
    front = undominated(points)
    while True:
        below = [
            b
            for a, b, c in zip(front, front[1:], front[2:], strict=False)
            if (points[b][1] - points[a][1]) * (points[c][0] - points[a][0])
            < (points[c][1] - points[a][1]) * (points[b][0] - points[a][0])
        ]
        if not below:
            return front
        front.remove(below[0])


def check_front(answer: Answer, seed: int) -> None:
    """4.4: the Pareto front, cost low and value high."""
    draw = Draw(seed)
    shuffled = draw.order(12)
    for order in (shuffled, shuffled[::-1]):  # so that of two points either comes first once
        costs = [10 * i + draw.integer(1, 8) for i in range(9)]
        values = [0.40, 0.30, 0.45, 0.42, 0.44, 0.80, 0.65, 0.90, 0.70]
        values = [value + draw.integer(0, 9) / 1000 for value in values]
        points = [(costs[i], values[i]) for i in range(9)] + [(costs[5], values[5] - 0.1), (costs[7], values[5])]
        points.append((costs[6], values[5]))  # no two are the same in both
        points = [points[i] for i in order]
        right = undominated(points)
        best = max(range(len(points)), key=lambda i: points[i][1])
        cheap = min(range(len(points)), key=lambda i: points[i][0])
        ranked = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
        rising = [j for i, j in zip(ranked, ranked[1:], strict=False) if points[j][1] > points[i][1]]
        one_cost = "two points of one cost: only the worthier stays"
        traps = [
            ("by rising index: sort by cost", sorted(right)),
            ("by falling cost: the cheapest comes first", right[::-1]),
            ("that is the best value alone: cheaper points are on the front, too", [best]),
            ("that is the cheapest point alone", [cheap]),
            ("high cost counts as good", undominated([(-cost, value) for cost, value in points])[::-1]),
            ("low value counts as good", undominated([(cost, -value) for cost, value in points])),
            (one_cost, walk(points, sorted(ranked, key=lambda i: (points[i][0], i)))),
            (one_cost, walk(points, sorted(ranked, key=lambda i: points[i]))),
            ("two points of one value: only the cheaper stays", walk(points, ranked, operator.ge)),
            ("each point is compared with its neighbour only: all cheaper points count", [ranked[0], *rising]),
            ("the convex hull: a point below the straight line between two others is on the front as well",
             hull(points)),
            ("every point is there", ranked),
            ("points are returned: indices are due", [list(points[i]) for i in right]),
        ]  # fmt: skip
        found = plain(untouched(answer, points))
        if type(found) is not list:
            raise Wrong(f"a list of indices is due, not a {kind(found)}")
        expect(found, right, traps, "some point that is beaten is there, or one that is not is missing")


def word(holds: bool, fails: bool, n: int = 2) -> str:
    """The verdict on a claim from n runs."""
    return "cannot tell" if n < 2 else "holds" if holds else "does not hold" if fails else "cannot tell"


def judged(low: float, high: float, n: int, claimed: float) -> str:
    """The verdict on "at least `claimed`" from our interval over n runs."""
    return word(claimed <= low, high < claimed, n)


MIDDLE = "the middle of the interval decides: where the interval contains the claim, nobody can tell"
UNPROVEN = "what is not proven is taken to be wrong"
EQUAL = "the lower bound reaches the number where the two are equal: it holds"
CLAIM_MISTAKES = [
    (MIDDLE, lambda low, high, n, c: word(low + high >= 2 * c, True, n)),
    (MIDDLE, lambda low, high, n, c: word(low + high >= 2 * c, True)),
    ("one run has no interval: nobody can tell", lambda low, high, n, c: judged(low, high, 2, c)),
    ("two runs have an interval: only one has none", lambda low, high, n, c: judged(low, high, n - 1, c)),
    ("several runs that agree have an interval, of no width: count the runs",
     lambda low, high, n, c: "cannot tell" if low == high else judged(low, high, 2, c)),
    ("the verdicts are turned round: the claim is AT LEAST", lambda low, high, n, c: word(high < c, c <= low, n)),
    ("the upper end decides: chance may have helped", lambda low, high, n, c: judged(high, high, n, c)),
    (UNPROVEN, lambda low, high, n, c: word(c <= low, True, n)),
    (UNPROVEN, lambda low, high, n, c: word(c <= low, True)),
    (UNPROVEN, lambda low, high, n, c: word(n > 1 and c <= low, True)),
    (EQUAL, lambda low, high, n, c: word(c < low, high < c, n)),
    (EQUAL, lambda low, high, n, c: word(c < low, high <= c, n)),
    ("the upper bound still reaches the number where the two are equal: nobody can tell",
     lambda low, high, n, c: word(c <= low, high <= c, n)),
]  # fmt: skip


def claim_cases(middle: float) -> list[tuple[float, float, int, float]]:
    """(low, high, n, claimed) around a claim: on both sides of it, on it, and with few runs."""
    intervals = [(-0.3, 0.05, 5), (-0.05, 0.3, 5), (0.01, 0.2, 3), (-0.2, -0.01, 3)]
    intervals += [(0.0, 0.2, 4), (-0.2, 0.0, 4), (0.05, 0.2, 2), (-0.2, -0.05, 2)]  # on the claim; two runs
    intervals += [(0.1, 0.1, 1), (-0.1, -0.1, 1), (0.1, 0.1, 6), (-0.1, -0.1, 6)]  # one run; runs that agree
    return [(middle + low, middle + high, n, middle) for low, high, n in intervals]


def check_verdict(answer: Answer, seed: int) -> None:
    """4.5: the verdict on a claim "at least so much"."""
    cases = claim_cases(Draw(seed).integer(40, 60) / 100)
    found = [plain(answer(*case)) for case in cases]
    if any(said not in ("holds", "does not hold", "cannot tell") for said in found):
        raise Wrong('one of "holds", "does not hold", "cannot tell" is due')
    traps = [(cause, [rule(*case) for case in cases]) for cause, rule in CLAIM_MISTAKES]
    traps.append(("the same verdict for everything", [found[0]] * len(cases)))
    expect(found, [judged(*case) for case in cases], traps, "a verdict does not follow from the interval")


CHECKS = {
    "4.1": check_lora_count,
    "4.2": check_fair_pairs,
    "4.3": check_interval,
    "4.4": check_front,
    "4.5": check_verdict,
}
