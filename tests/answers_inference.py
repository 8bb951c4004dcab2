"""Answers to 03's exercises, for test_exercises.py: a right one in another way, wrong ones with what is said."""

from __future__ import annotations

import re
from collections import Counter

import torch


def ngrams(texts, n, split=str.split, lower=True):
    found = []
    for text in texts:
        words = split(text.lower() if lower else text)
        found += list(zip(*(words[i:] for i in range(n)), strict=False))
    return found


def distinct(grams):
    return len(set(grams)) / len(grams) if grams else 1.0


def by_counter(texts, n):
    counts = Counter(gram for text in texts for gram in ngrams([text], n))
    return len(counts) / counts.total() if counts else 1


def merged(weight, bias, l, feedforward):
    matrix = torch.diag(l)
    return [matrix @ weight, bias] if feedforward else [weight @ matrix, matrix @ bias]


def other_side(weight, bias, l, feedforward):
    return (weight * l, bias) if feedforward else (weight * l[:, None], bias * l)


def bias_of(attention, feedforward):
    """The right weight, and a bias scaled in these roles."""
    return lambda w, b, l, f: (merged(w, b, l, f)[0], b * l if (feedforward if f else attention) else b)


def merge_in_place(weight, bias, l, feedforward):
    weight *= l[:, None] if feedforward else l
    return weight, bias if feedforward else bias * l


def low(*tensors):
    return [tensor.bfloat16() for tensor in tensors]


def orders(x, weight, l):
    return ((x @ weight) * l).float() - (x @ (weight * l)).float()


def rounded_only(x, weight, l):
    return orders(*(tensor.float() for tensor in low(x, weight, l))).abs().max().item()


def from_float32(x, weight, l):
    a, b, c = low(x, weight, l)
    return (((a @ b) * c).float() - (x @ weight) * l).abs().max().item()


def factors_in_float32(x, weight, l):
    x, weight = low(x, weight)
    return ((x @ weight) * l - (x @ (weight * l).bfloat16()).float()).abs().max().item()


def results_only(x, weight, l):
    return (((x @ weight) * l).bfloat16().float() - (x @ (weight * l)).bfloat16().float()).abs().max().item()


def stack(output, vectors, names, missing=1.0):
    base = torch.full_like(output[0, 0], missing)
    return torch.stack([vectors.get(name, base) for name in names])


def rows_by_loop(output, vectors, names):
    result = output.clone()
    for row, name in enumerate(names):
        if name is not None:
            result[row] = result[row] * vectors[name]
    return result


def rows_in_place(output, vectors, names):
    for row, name in enumerate(names):
        output[row] *= vectors.get(name, 1.0)
    return output


def blend(adapters, strengths, places=None, missing=1.0, start=1.0, away=1.0):
    places = {place for adapter in adapters for place in adapter} if places is None else places
    result = {}
    for place in places:
        ones = next(torch.ones_like(adapter[place]) for adapter in adapters if place in adapter)
        moves = [a * (d.get(place, missing * ones) - away) for d, a in zip(adapters, strengths, strict=True)]
        result[place] = start * ones + sum(moves)
    return result


def one_by_one(adapters, strengths, step):
    result = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for place, l in adapter.items():
            result[place] = step(result.get(place, torch.ones_like(l)), strength * (l - 1))
    return result


def blend_by_powers(adapters, strengths):
    result = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for place, l in adapter.items():
            result[place] = result.get(place, 1) * l**strength
    return result


def blend_in_place(adapters, strengths):
    result = adapters[0]
    for place, l in blend(adapters, strengths).items():
        result[place] = l
    return result


def in_all(adapters):
    return set.intersection(*(set(adapter) for adapter in adapters))


ANSWERS = {
    "3.1": (
        by_counter,
        [
            (lambda texts, n: distinct(ngrams([" ".join(texts)], n)), "cross from one text"),
            (lambda texts, n: distinct(ngrams(texts, n, lower=False)), "use lower()"),
            (lambda texts, n: distinct(ngrams(texts, n, split=list, lower=False)), "letters are counted"),
            (lambda texts, n: sum(distinct(ngrams([t], n)) for t in texts) / max(1, len(texts)), "mean over texts"),
            (lambda texts, n: 1 - distinct(ngrams(texts, n)), "repeated n-grams"),
            (lambda texts, n: len(set(ngrams(texts, n))), "divide by all"),
            (lambda texts, n: distinct(ngrams(texts, 1)), "n is ignored"),
            (lambda t, n: len(set(ngrams(t, n))) / max(1, len(ngrams(t, 1))), "divided by words"),
            (lambda texts, n: len(set(ngrams(texts, n))) / len(ngrams(texts, n)), "raises ZeroDivisionError"),
            (lambda t, n: distinct(ngrams([re.sub(r"[^\w\s]", "", s) for s in t], n)), "punctuation"),
            (lambda t, n: distinct(ngrams(t, n, split=lambda s: re.findall("[a-z]+", s))), "punctuation"),
            (lambda t, n: distinct(ngrams(t, n)) if ngrams(t, n) else 0.0, "nothing is repeated: return 1"),
        ],
    ),
    "3.2": (
        merged,
        [
            (bias_of(attention=False, feedforward=False), "attention: the bias is not scaled"),
            (other_side, "attention: scale the weight's columns"),
            (lambda w, b, l, f: (w * l, b * l) if not f else other_side(w, b, l, f), "scale the weight's rows"),
            (lambda w, b, l, f: (w * (l[:, None] if f else l), b * l), "feed-forward: the bias is scaled"),
            (lambda w, b, l, f: (w.clone(), b.clone()), "nothing is merged"),
            (lambda w, b, l, f: (merged(w, b, l, f)[0].T, merged(w, b, l, f)[1]), "transposed"),
            (lambda w, b, l, f: (w + l[:, None], b) if f else (w + l, b + l), "is added: it multiplies"),
            (lambda w, b, l, f: merged(w, b, l, not f), "the two roles are exchanged"),
            (merge_in_place, "changed in place"),
            (lambda w, b, l, f: merged(w, b, l, f)[0], "2 tensors are due"),
        ],
    ),
    "3.3": (
        lambda x, w, l: (torch.sub(*(t.float() for t in both(*low(x, w, l))))).abs().amax().item(),
        [
            (lambda x, w, l: orders(*low(x, w, l)).abs().mean().item(), "mean distance"),
            (lambda x, w, l: orders(x, w, l).abs().max().item(), "that is float32"),
            (rounded_only, "products themselves"),
            (from_float32, "distance from float32"),
            (results_only, "only the results are rounded"),
            (lambda x, w, l: 0.0, "there is no distance"),
            (factors_in_float32, "l is not converted"),
            (lambda x, w, l: orders(*low(x, w, l)), "one number is due"),
            (lambda x, w, l: orders(*low(x, w, l)).abs().max().item() * 1.1, "it is not the largest distance"),
        ],
    ),
    "3.4": (
        rows_by_loop,
        [
            (lambda output, vectors, names: output * stack(output, vectors, names)[0], "first row's vector"),
            (lambda output, vectors, names: output * stack(output, vectors, names)[-1], "last row's vector"),
            (lambda output, vectors, names: output * stack(output, vectors, names), "mixed up"),
            (lambda output, vectors, names: output * stack(output, vectors, names).mean(0), "vectors are mixed"),
            (lambda output, vectors, names: output * stack(output, vectors, names, 0.0)[:, None], "not 0"),
            (lambda output, vectors, names: output.clone(), "nothing is scaled"),
            (lambda output, vectors, names: output + stack(output, vectors, names)[:, None], "are added"),
            (lambda output, vectors, names: output * torch.stack([vectors[n] for n in names])[:, None], "KeyError"),
            (rows_in_place, "changed in place"),
        ],
    ),
    "3.5": (
        blend,
        [
            (lambda ds, a: blend(ds, a, missing=0, start=0, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, start=0, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, missing=0, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, start=0), "the 1 is missing"),
            (lambda ds, a: blend(ds, a, missing=0), "a missing place is taken for 0"),
            (lambda ds, a: one_by_one(ds, a, lambda before, move: 1 + move), "overwrites"),
            (lambda ds, a: one_by_one(ds, a, lambda before, move: before * (1 + move)), "multiplied"),
            (blend_by_powers, "multiplied"),
            (lambda ds, a: blend(ds, [x / (sum(a) or 1) for x in a]), "divided by their sum"),
            (lambda ds, a: blend(ds, [1.0] * len(a)), "strengths are ignored"),
            (lambda ds, a: blend(ds, a, places=list(ds[0])), "first adapter lacks"),
            (lambda ds, a: blend(ds, a, places=in_all(ds)), "some adapter lacks"),
            (lambda ds, a: list(blend(ds, a).values()), "a dictionary is due"),
            (blend_in_place, "changed in place"),
        ],
    ),
}


def both(x, weight, l):
    return (x @ weight) * l, x @ (weight * l)


ALSO_RIGHT = {
    "3.3": [lambda x, w, l: orders_in_bfloat16(*low(x, w, l)).abs().max()],  # so close, subtraction is exact
}


def orders_in_bfloat16(x, weight, l):
    return (x @ weight) * l - x @ (weight * l)
