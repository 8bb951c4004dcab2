"""Answers to 01's exercises, for test_exercises.py: a right one in another way, wrong ones with what is said."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import gelu


def parts(config):
    """Blocks, width of keys and values together, inner width of each stack of a model, with attentions a block."""
    if config["model_type"] == "gpt2":
        return [(config["n_layer"], 3 * config["n_embd"], config["n_inner"] or 4 * config["n_embd"], 1)]
    if config["model_type"] == "llama":
        shared = 2 * config["num_key_value_heads"] * config["head_dim"]
        return [(config["num_hidden_layers"], shared, config["intermediate_size"], 1)]
    attention = 2 * config["num_heads"] * config["d_kv"]
    return [(config["num_layers"], attention, config["d_ff"], 1),
            (config["num_decoder_layers"], attention, config["d_ff"], 2)]  # fmt: skip


def counted(config, **changed):
    """The count, with some entries of the configuration replaced: by a number, or by what another entry holds."""
    config = config | {name: config.get(value, value) for name, value in changed.items()}
    return sum(n * (times * attention + inner) for n, attention, inner, times in parts(config))


def only(kind, wrong):
    """The right count, but for one kind of model."""
    return lambda config: wrong(config) if config["model_type"] == kind else counted(config)


def summed(term):
    return lambda config: sum(term(*part) for part in parts(config))


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
    "1.2": (
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
    "1.3": (
        lambda config: int(torch.tensor([n * (k * a + m) for n, a, m, k in parts(config)]).sum()),
        [
            (
                only("llama", lambda c: counted(c, num_key_value_heads="num_attention_heads")),
                "have num_key_value_heads",
            ),
            (only("llama", lambda c: counted(c) + c["num_hidden_layers"] * c["hidden_size"]), "a matrix of their own"),
            (only("llama", summed(lambda n, a, m, k: n * (a + 2 * m))), "a gated layer has one inner activation"),
            (only("llama", summed(lambda n, a, m, k: a + m)), "that is one block"),
            (only("llama", lambda c: counted(c, intermediate_size="hidden_size")), "as long as the inner"),
            (only("gpt2", lambda c: counted(c) - c["n_layer"] * c["n_embd"]), "c_attn puts out the queries"),
            (only("gpt2", lambda c: counted(c, n_inner=0)), "the inner width is n_inner"),
            (only("gpt2", summed(lambda n, a, m, k: a + m)), "that is one block"),
            (only("gpt2", lambda c: counted(c, n_inner="n_embd")), "as long as the inner activation"),
            (only("t5", summed(lambda n, a, m, k: n * (a + m))), "a decoder's block attends twice"),
            (only("t5", lambda c: counted(c, num_decoder_layers="num_layers")), "num_decoder_layers"),
            (only("t5", lambda c: counted(c, num_heads="d_model", d_kv=1)), "attention is num_heads * d_kv wide"),
            (only("t5", lambda c: counted(c, num_decoder_layers=0)), "the decoder is missing"),
            (only("t5", lambda c: counted(c, num_layers=0)), "the encoder is missing"),
            (only("t5", summed(lambda n, a, m, k: n * (a * k * 3 // 2 + m))), "T5: queries are left alone"),
            (only("t5", lambda c: counted(c, d_ff="d_model")), "as long as the inner activation"),
            (lambda config: counted(config) + 1, "peft trains another number"),
            (lambda config: counted(config) / 1, "a count is an integer"),
            (lambda config: counted(config | {"x": config.pop("model_type")}), "your code raises KeyError"),
            (lambda config: [config.pop("n_embd", 0), counted(config | {"n_embd": 9})][1], "changed in place"),
        ],
    ),
    "1.4": (
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


ALSO_RIGHT = {"1.3": [lambda config: np.int64(counted(config)), lambda config: torch.tensor(counted(config))]}
