"""The checks of notebook 01's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

Each draws inputs, computes the answer in a slow and obvious way, and knows the usual mistakes by their results.
`exercises.check` calls them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exercises import Answer
from exercises.answers import Draw, expect, integer, number, tensors, untouched


def gpt2_size(vocabulary: int, context: int, width: int, layers: int) -> int:
    """GPT-2's parameters, tensor by tensor, inner width 4d; the tied head is the token embedding."""
    d = width
    block = [2 * d, d * 3 * d, 3 * d, d * d, d, 2 * d, d * 4 * d, 4 * d, 4 * d * d, d]  # in the order of the model
    return vocabulary * d + context * d + layers * sum(block) + 2 * d


def check_gpt2_count(answer: Answer, seed: int) -> None:
    """1.1: all parameters of any GPT-2 whose inner width is 4d."""
    draw = Draw(seed)
    sizes = [(50_257, 1024, 768, 12), (draw.integer(90, 900), draw.integer(20, 60), 8 * draw.integer(2, 9), 3)]
    for vocabulary, context, d, layers in sizes:
        right = gpt2_size(vocabulary, context, d, layers)
        traps = [
            ("the output head is counted again: it is the token embedding", right + vocabulary * d),
            ("the position embedding is missing", right - context * d),
            ("the last layer norm, after all blocks, is missing: 2d", right - 2 * d),
            (
                "the layer norms are missing: two in each block and one at the end, 2d each",
                right - (4 * layers + 2) * d,
            ),
            ("two layer norms stand in each block, and only one of them is counted", right - 2 * layers * d),
            ("layer norms have biases as well: 2d each", right - (2 * layers + 1) * d),
            ("the biases of attention and feed-forward are missing: 4d and 5d in a block", right - 9 * layers * d),
            ("only one block is counted", gpt2_size(vocabulary, context, d, 1)),
            ("that is GPT-2 whatever is asked for: compute it from the arguments", 124_439_808),
        ]
        expect(integer(answer(vocabulary, context, d, layers)), right, traps, "some group is missing or counted twice")


def scaled_thirds(x: Tensor, weight: Tensor, bias: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
    """Query, key and value (batch, tokens, d), column by column, third k of `c_attn`'s output times `factors[k]`."""
    d = len(factors[0])
    columns = [(x * weight[:, j]).sum(-1) + bias[j] for j in range(3 * d)]
    return tuple(torch.stack(columns[k * d : (k + 1) * d], dim=-1) * factors[k] for k in range(3))


def check_scaled_qkv(answer: Answer, seed: int) -> None:
    """1.2: (IA)³ on one fused `c_attn`, as in the paper: query left alone."""
    draw = Draw(seed)
    for _ in range(2):
        d = 2 * draw.integer(2, 4)
        x, weight, bias = draw.normal(2, draw.integer(3, 5), d), draw.normal(d, 3 * d), draw.normal(3 * d)
        k, v, one, none = draw.factors(d), draw.factors(d), torch.ones(d), torch.zeros(3 * d)
        query, key, value = right = scaled_thirds(x, weight, bias, [one, k, v])
        plain = scaled_thirds(x, weight, bias, [one, one, one])
        late = [a + b for a, b in zip(scaled_thirds(x, weight, none, [one, k, v]), bias.chunk(3), strict=True)]
        traps = [
            ("the bias is not scaled: the vector multiplies all that c_attn puts out, (xW + b) * l", tuple(late)),
            ("the bias is missing", scaled_thirds(x, weight, none, [one, k, v])),
            ("the two vectors are swapped: l_k scales the keys", scaled_thirds(x, weight, bias, [one, v, k])),
            (
                "the thirds are in another order: c_attn puts out query, key, value",
                (plain[0] * k, plain[1] * v, plain[2]),
            ),
            ("the query is scaled too: the paper leaves it alone", (query * k, key, value)),
            ("nothing is scaled", plain),
            ("the vectors are added: they multiply", (plain[0], plain[1] + k, plain[2] + v)),
            ("the input is scaled instead of the output", _scaled_input(x, weight, bias, k, v)),
        ]
        found = tensors(untouched(answer, x, weight, bias, k, v), 3)
        expect(found, right, traps, "query, key and value are not the thirds of xW + b, the last two scaled")


def _scaled_input(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    one = torch.ones_like(k)
    return tuple(scaled_thirds(x * l, weight, bias, [one, one, one])[i] for i, l in enumerate((one, k, v)))


def gelu(before: Tensor, l: Tensor, w2: Tensor, b2: Tensor, approximate: str = "none") -> Tensor:
    """What comes out where GELU takes the place of any other activation."""
    return (torch.nn.functional.gelu(before, approximate=approximate) * l) @ w2 + b2


def check_feedforward(answer: Answer, seed: int) -> None:
    """1.3: (IA)³ on a feed-forward layer with any activation."""
    draw = Draw(seed)
    for activation in (torch.tanh, torch.sin):
        d, inner = draw.integer(3, 5), draw.integer(7, 9)
        x, w1, b1 = draw.normal(2, 3, d), draw.normal(d, inner), draw.normal(inner)
        w2, b2, l = draw.normal(inner, d), draw.normal(d), draw.factors(inner)
        before = x @ w1 + b1
        hidden = activation(before)
        right = torch.stack([b2 + sum(l[u] * hidden[..., u, None] * w2[u] for u in range(inner))]).squeeze(0)
        traps = [
            ("the vector is applied before the activation: it belongs after it", activation(before * l) @ w2 + b2),
            ("the activation is missing", (before * l) @ w2 + b2),
            ("you call gelu, not `activation`", gelu(before, l, w2, b2)),
            ("you call gelu, not `activation`", gelu(before, l, w2, b2, approximate="tanh")),
            ("the second bias is missing", (hidden * l) @ w2),
            ("the first bias is missing", (activation(x @ w1) * l) @ w2 + b2),
            ("the vector is added: it multiplies", (hidden + l) @ w2 + b2),
            ("nothing is scaled", hidden @ w2 + b2),
            ("that is the scaled inner activation: the second matrix is missing", hidden * l),
        ]
        traps = [(cause, (wrong,)) for cause, wrong in traps]
        found = tensors(untouched(answer, x, w1, b1, w2, b2, l, activation))
        expect(found, (right,), traps, "the result is not (l * activation(x W1 + b1)) W2 + b2")


def check_ia3_count(answer: Answer, seed: int) -> None:
    """1.4: the (IA)³ vectors of any configuration."""
    draw = Draw(seed)
    for layers, d in ((draw.integer(2, 30), 8 * draw.integer(2, 90)), (12, 768)):
        for inner in (4 * d, 3 * d + 8):
            for queries in (True, False):
                right = sum((3 if queries else 2) * d + inner for _ in range(layers))
                traps = [
                    ("that is GPT-2 whatever is asked for: compute it from the arguments", 64_512),
                    ("the count ignores `queries`: without them c_attn takes 2d numbers", layers * (3 * d + inner)),
                    ("the count ignores `inner`: it need not be 4d", layers * ((2 + queries) * d + 4 * d)),
                    ("that is one block: multiply by the layers", (2 + queries) * d + inner),
                    ("the feed-forward layer takes `inner` numbers, not d: its input is scaled",
                     layers * ((2 + queries) * d + d)),
                    ("a vector too many: attention's output projection gets none",
                     layers * ((2 + queries) * d + d + inner)),
                    ("`queries` is turned round: True means they are scaled", layers * ((3 - queries) * d + inner)),
                ]  # fmt: skip
                expect(integer(answer(layers, d, inner, queries)), right, traps, "the count is not that of the vectors")


def check_perplexity(answer: Answer, seed: int) -> None:
    """1.5: one perplexity of many texts."""
    draw = Draw(seed)
    tokens = draw.integers(5, 60, 6).tolist()
    nats = [n * (1 + 3 * draw.integer(0, 100) / 100) for n in tokens]
    mean = sum(nats) / sum(tokens)
    each = [a / n for a, n in zip(nats, tokens, strict=True)]
    traps = [
        ("that is the loss, in nats per token: take exp of it", mean),
        ("a mean of perplexities: take exp once, at the end", sum(math.exp(a) for a in each) / len(each)),
        ("each text counts the same: divide all nats by all tokens, so that each token does",
         math.exp(sum(each) / len(each))),
        ("the base is 2: the nats need e", 2**mean),
        ("that is exp of the nats a text: divide by the tokens", lambda: math.exp(min(700, sum(nats) / len(nats)))),
        ("the sign is turned round: the nats are -log p already", math.exp(-mean)),
    ]  # fmt: skip
    expect(number(untouched(answer, nats, tokens)), math.exp(mean), traps, "it is not exp(all nats / all tokens)")


CHECKS = {
    "1.1": check_gpt2_count,
    "1.2": check_scaled_qkv,
    "1.3": check_feedforward,
    "1.4": check_ia3_count,
    "1.5": check_perplexity,
}
