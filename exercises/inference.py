"""The checks of notebook 03's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

`exercises.check` calls them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from exercises import Answer, Wrong
from exercises.answers import Draw, expect, kind, number, plain, tensors, untouched

WORDS = ("a", "good", "film", "Good", "and", "bad", "The", "the", "story", "film,", "good!")


def grams(texts: list[str], n: int) -> list[tuple[str, ...]]:
    """Every n-gram of lower-case words inside each text."""
    found = []
    for text in texts:
        words = text.lower().split()
        for start in range(len(words)):
            if start + n <= len(words):
                found.append(tuple(words[start : start + n]))
    return found


def share(found: list) -> float:
    """Different ones among all; 1 where there is none."""
    return len(set(found)) / len(found) if found else 1.0


def check_distinct(answer: Answer, seed: int) -> None:
    """3.1: distinct-n of some texts."""
    draw = Draw(seed)
    for n in (2, 1, 3):
        texts = [" ".join(WORDS[i] for i in draw.integers(0, 10, draw.integer(4, 9)).tolist()) for _ in range(4)]
        texts = [
            "good film and bad film",
            "good film, bad film!",
            "The story the story",
            texts[0],
            *texts,
            "the film Good",
        ]
        lowered = [text.lower().split() for text in texts]
        right = share(grams(texts, n))
        kept = [tuple(words[i : i + n]) for words in (t.split() for t in texts) for i in range(len(words) - n + 1)]
        letters = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
        each = [share(grams([text], n)) for text in texts]
        traps = [
            ("n-grams cross from one text into the next", share(grams([" ".join(texts)], n))),
            ("large and small letters are different words: use lower()", share(kept)),
            (
                "punctuation is stripped: a word is what stands between spaces, with all its signs",
                share(grams([re.sub(r"[^\w\s]", "", text) for text in texts], n)),
            ),
            ("letters are counted: split the text into words", share(letters)),
            ("a mean over texts: repetition between texts is lost", sum(each) / len(each)),
            ("that is the share of repeated n-grams: take 1 minus it", 1 - right),
            ("that is a number of n-grams: divide by all", float(len(set(grams(texts, n))))),
            ("divided by words: divide by the number of n-grams", len(set(grams(texts, n))) / sum(map(len, lowered))),
            ("n is ignored", share(grams(texts, 1))),
        ]
        expect(number(untouched(answer, texts, n)), right, traps, "it is not different n-grams / all n-grams", 1e-6)
    if number(answer(["one word", ""], 3)) != 1:
        raise Wrong("where no text has n words nothing is repeated: return 1")


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


def both_orders(x: Tensor, weight: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """(xW) * l and x (W * l), computed in the precision of the arguments, as float32."""
    return ((x @ weight) * l).float(), (x @ (weight * l)).float()


def rounding_gaps(x: Tensor, weight: Tensor, l: Tensor) -> dict[str, Tensor]:
    """All distances of the two orders in bfloat16 (at ""), and those that the usual mistakes give, by cause."""
    low_x, low_weight, low_l = low = [tensor.to(torch.bfloat16) for tensor in (x, weight, l)]
    attached, merged = both_orders(*low)
    exact, exact_merged = both_orders(x, weight, l)
    rounded, rounded_merged = both_orders(*(tensor.float() for tensor in low))
    late, late_merged = (low_x @ low_weight) * l, low_x @ (low_weight * l).to(torch.bfloat16)
    return {
        "": attached - merged,
        "that is float32: convert all three to bfloat16 before the products": exact - exact_merged,
        "there is no distance: the products themselves must be in bfloat16": rounded - rounded_merged,
        "only the results are rounded: convert before the products":
            exact.to(torch.bfloat16).float() - exact_merged.to(torch.bfloat16).float(),
        "l is not converted: convert all three to bfloat16": late - late_merged.float(),
        "that is the distance from float32, not between the two orders": attached - exact,
    }  # fmt: skip


def check_rounding(answer: Answer, seed: int) -> None:
    """3.3: the largest distance of two orders of multiplication in bfloat16."""
    draw, found, gaps = Draw(seed), [], []
    for _ in range(3):
        x, weight = draw.integers(-4, 4, 6, 8).float(), draw.integers(-4, 4, 8, 10).float()
        l = draw.factors(10)
        found.append(number(untouched(answer, x, weight, l)))
        gaps.append(rounding_gaps(x, weight, l))
    right = [gap[""].abs().max().item() for gap in gaps]
    traps = [
        ("that is the mean distance: the largest is due", [gap[""].abs().mean().item() for gap in gaps]),
        ("distances up and down: take the absolute value first", [gap[""].max().item() for gap in gaps]),
        *((cause, [gap[cause].abs().max().item() for gap in gaps]) for cause in gaps[0] if cause),
    ]
    expect(found, right, traps, "it is not the largest distance of (xW) * l and x (W * l), all in bfloat16", 1e-3)


def check_rows(answer: Answer, seed: int) -> None:
    """3.4: a vector of its own for each row of a batch, none for some."""
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
    """3.5: several adapters, each turned by its own strength."""
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


CHECKS = {
    "3.1": check_distinct,
    "3.2": check_merge,
    "3.3": check_rounding,
    "3.4": check_rows,
    "3.5": check_blend,
}
