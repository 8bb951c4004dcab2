"""Answers to 01's exercises, for test_exercises.py: a right one in another way, wrong ones with what is said."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import gelu


def count_by_shapes(vocabulary, context, width, layers):
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    block = sum(a * b + b for a, b in shapes) + 4 * width
    return sum([vocabulary * width, context * width, *(block for _ in range(layers)), 2 * width])


def gpt2(v, c, d, n):
    return (v + c) * d + n * (12 * d * d + 13 * d) + 2 * d


def qkv_by_slices(x, weight, bias, l_k, l_v):
    d = l_k.shape[0]
    factors = torch.cat([torch.ones(d), l_k, l_v])
    out = torch.nn.functional.linear(x, weight.T, bias) * factors
    return [out[..., :d], out[..., d : 2 * d], out[..., 2 * d :]]


def qkv(x, weight, bias):
    return (x @ weight + bias).chunk(3, dim=-1)


def late_bias(x, weight, bias, k, v):
    one = torch.ones_like(k)
    return ((x @ weight) * torch.cat([one, k, v]) + bias).chunk(3, dim=-1)


def in_place(x, weight, bias, k, v):
    k *= 1.5
    return qkv(x, weight, bias)[0], qkv(x, weight, bias)[1] * k / 1.5, qkv(x, weight, bias)[2] * v


def ff(x, w1, b1, w2, b2, l, f):
    return f(x @ w1 + b1), w2, b2, l


def ff_by_rows(x, w1, b1, w2, b2, l, activation):
    inner = torch.einsum("btd,di->bti", x, w1).add(b1)
    return torch.einsum("bti,id->btd", activation(inner), l[:, None] * w2) + b2


ANSWERS = {
    "1.1": (
        count_by_shapes,
        [
            (lambda v, c, d, n: gpt2(v, c, d, n) + v * d, "output head is counted again"),
            (lambda v, c, d, n: gpt2(v, c, d, n) - 2 * d, "last layer norm"),
            (lambda v, c, d, n: gpt2(v, c, d, n) - (4 * n + 2) * d, "layer norms are missing"),
            (lambda v, c, d, n: gpt2(v, c, d, n) - 9 * n * d, "biases of attention"),
            (lambda v, c, d, n: gpt2(v, c, d, n) - c * d, "position embedding"),
            (lambda v, c, d, n: 124_439_808, "that is GPT-2 whatever"),
            (lambda v, c, d, n: float(gpt2(v, c, d, n)), "a count is an integer"),
            (lambda v, c, d, n: gpt2(v, c, d, 1), "only one block"),
            (lambda v, c, d: 0, "your code raises TypeError"),
            (lambda v, c, d, n: gpt2(v, c, d, n) - 2 * n * d, "two layer norms stand in each block"),
            (lambda v, c, d, n: gpt2(v, c, d, n) - (2 * n + 1) * d, "norms have biases"),
            (lambda v, c, d, n: gpt2(v, c, d, n) / missing, "NameError in line"),  # noqa: F821
        ],
    ),
    "1.2": (
        qkv_by_slices,
        [
            (late_bias, "the bias is not scaled"),
            (lambda x, w, b, k, v: (qkv(x, w, b)[0], qkv(x, w, b)[1] * v, qkv(x, w, b)[2] * k), "swapped"),
            (lambda x, w, b, k, v: (qkv(x, w, b)[0] * k, qkv(x, w, b)[1] * k, qkv(x, w, b)[2] * v), "the query is"),
            (lambda x, w, b, k, v: (qkv(x, w, b)[0] * k, qkv(x, w, b)[1] * v, qkv(x, w, b)[2]), "another order"),
            (lambda x, w, b, k, v: (qkv(x, w, b)[0], qkv(x, w, b)[1] + k, qkv(x, w, b)[2] + v), "are added"),
            (lambda x, w, b, k, v: (qkv(x, w, 0)[0], qkv(x, w, 0)[1] * k, qkv(x, w, 0)[2] * v), "bias is missing"),
            (lambda x, w, b, k, v: qkv(x, w, b), "nothing is scaled"),
            (lambda x, w, b, k, v: qkv(x, w, b)[1] * k, "3 tensors are due"),
            (lambda x, w, b, k, v: tuple(part[0] for part in qkv(x, w, b)), "a shape is"),
            (lambda x, w, b, k, v: tuple(part / 0 * 0 for part in qkv(x, w, b)), "NaN"),
            (lambda x, w, b, k, v: qkv(x, w.T, b), "mat1 and mat2 shapes cannot be multiplied"),
            (in_place, "changed in place"),
        ],
    ),
    "1.3": (
        ff_by_rows,
        [
            (lambda x, w1, b1, w2, b2, l, f: f(l * (x @ w1 + b1)) @ w2 + b2, "before the activation"),
            (lambda x, w1, b1, w2, b2, l, f: (l * (x @ w1 + b1)) @ w2 + b2, "activation is missing"),
            (lambda x, w1, b1, w2, b2, l, f: (l * f(x @ w1 + b1)) @ w2, "second bias"),
            (lambda x, w1, b1, w2, b2, l, f: (l * f(x @ w1)) @ w2 + b2, "first bias"),
            (lambda x, w1, b1, w2, b2, l, f: (l + f(x @ w1 + b1)) @ w2 + b2, "is added"),
            (lambda x, w1, b1, w2, b2, l, f: f(x @ w1 + b1) @ w2 + b2, "nothing is scaled"),
            (lambda x, w1, b1, w2, b2, l, f: l * f(x @ w1 + b1), "second matrix is missing"),
            (lambda x, w1, b1, w2, b2, l, f: (f(x @ w1 + b1) @ w2 + b2) * l, "The size of tensor a"),
            (lambda x, w1, b1, w2, b2, l, f: (l * gelu(x @ w1 + b1)) @ w2 + b2, "you call gelu"),
            (lambda x, w1, b1, w2, b2, l, f: (l * gelu(x @ w1 + b1, approximate="tanh")) @ w2 + b2, "you call gelu"),
        ],
    ),
    "1.4": (
        lambda n, d, m, q: sum(d + d + m + d * bool(q) for _ in range(n)),
        [
            (lambda n, d, m, q: n * (3 * d + m), "ignores `queries`"),
            (lambda n, d, m, q: n * ((2 + q) * d + 4 * d), "ignores `inner`"),
            (lambda n, d, m, q: (2 + q) * d + m, "that is one block"),
            (lambda n, d, m, q: n * ((2 + q) * d + d), "feed-forward layer takes"),
            (lambda n, d, m, q: n * ((3 + q) * d + m), "a vector too many"),
            (lambda n, d, m, q: n * ((3 - q) * d + m), "turned round"),
            (lambda n, d, m, q: 64_512, "that is GPT-2 whatever"),
            (lambda n, d, m, q: n * ((2 + q) * d + m) + 1, "not that of the vectors"),
            (lambda n, d, m, q: n * ((2 + q) * d + m) / 1, "a count is an integer"),
        ],
    ),
    "1.5": (
        lambda nats, tokens: torch.tensor(nats).sum().div(torch.tensor(tokens).sum()).exp(),
        [
            (lambda nats, tokens: sum(nats) / sum(tokens), "that is the loss"),
            (lambda a, n: sum(math.exp(x / y) for x, y in zip(a, n, strict=True)) / len(a), "mean of perplexities"),
            (lambda a, n: math.exp(sum(x / y for x, y in zip(a, n, strict=True)) / len(a)), "each text counts"),
            (lambda nats, tokens: 2 ** (sum(nats) / sum(tokens)), "the base is 2"),
            (lambda nats, tokens: math.exp(-sum(nats) / sum(tokens)), "the sign"),
            (lambda nats, tokens: math.exp(min(700, sum(nats) / len(nats))), "the nats a text"),
            (lambda nats, tokens: [math.exp(x / y) for x, y in zip(nats, tokens, strict=True)], "one number is due"),
            (lambda nats, tokens: math.exp(nats / tokens), "your code raises TypeError"),
        ],
    ),
}


ALSO_RIGHT = {
    "1.1": [lambda v, c, d, n: np.int64(gpt2(v, c, d, n)), lambda v, c, d, n: torch.tensor(gpt2(v, c, d, n))],
    "1.4": [lambda n, d, m, q: np.int64(n * ((2 + q) * d + m))],
}
