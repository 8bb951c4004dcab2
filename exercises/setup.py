"""The checks of notebook 01's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

Each draws inputs, computes the answer in a slow and obvious way, and knows the usual mistakes by their results.
`exercises.check` calls them.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from peft import IA3Config, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from exercises import Answer
from exercises.answers import Draw, expect, integer, number, tensors, untouched


def scaled_thirds(x: Tensor, weight: Tensor, bias: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
    """Query, key and value (batch, tokens, d), column by column, third k of `c_attn`'s output times `factors[k]`."""
    d = len(factors[0])
    columns = [(x * weight[:, j]).sum(-1) + bias[j] for j in range(3 * d)]
    return tuple(torch.stack(columns[k * d : (k + 1) * d], dim=-1) * factors[k] for k in range(3))


def check_scaled_qkv(answer: Answer, seed: int) -> None:
    """1.1: (IA)³ on one fused `c_attn`, as in the paper: query left alone."""
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
    """1.2: (IA)³ on a feed-forward layer with any activation."""
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


@cache
def built_count(**config: object) -> int:
    """The numbers that peft trains where it chooses the places itself, on a model without weights."""
    settings = AutoConfig.for_model(**config)
    encoder = settings.is_encoder_decoder
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM).from_config(settings)
    task = "SEQ_2_SEQ_LM" if encoder else "CAUSAL_LM"
    stored_as_in_out = settings.model_type == "gpt2"  # said, so that peft does not warn
    adapted = get_peft_model(model, IA3Config(task_type=task, fan_in_fan_out=stored_as_in_out))
    return adapted.get_nb_trainable_parameters()[0]


def random_configs(draw: Draw) -> list[dict]:
    """Configurations of tiny models, as `config.json` holds them: GPT-2, Llama with shared keys and values, T5."""
    heads, size = 2 * draw.integer(3, 4), 2 * draw.integer(2, 5)
    width, layers, inner = heads * size, draw.integer(2, 4), 8 * draw.integer(5, 9) + 4
    gpt2 = {"model_type": "gpt2", "n_embd": width, "n_head": heads, "n_layer": layers}
    llama = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": size,
    }  # fmt: skip
    t5 = {
        "model_type": "t5", "d_model": width, "d_kv": size + 1, "d_ff": inner, "num_layers": layers,
        "num_decoder_layers": layers + 2, "num_heads": heads,
    }  # fmt: skip
    return [gpt2 | {"n_inner": inner}, gpt2 | {"n_inner": None}, llama, t5]


def count_mistakes(config: dict) -> list[tuple[str, int]]:
    """The usual wrong counts for a configuration, by their causes."""
    shorter = "the feed-forward vector is as long as the inner activation, not as the model is wide"
    if config["model_type"] == "gpt2":
        d, n = config["n_embd"], config["n_layer"]
        inner = config["n_inner"] or 4 * d
        return [
            ("GPT-2: c_attn puts out the queries as well: 3d", n * (2 * d + inner)),
            ("GPT-2: the inner width is n_inner where that is given, and 4d where it is null", n * 7 * d),
            ("that is one block: multiply by the layers", 3 * d + inner),
            (shorter, n * 4 * d),
        ]
    if config["model_type"] == "llama":
        d, n, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
        shared = config["num_key_value_heads"] * config["head_dim"]
        return [
            ("Llama: keys and values have num_key_value_heads heads, fewer than the queries", n * (2 * d + inner)),
            ("Llama: queries have a matrix of their own, which is left alone", n * (d + 2 * shared + inner)),
            ("that is one block: multiply by the layers", 2 * shared + inner),
            (shorter, n * (2 * shared + d)),
            ("a gated layer has one inner activation: down_proj's input is scaled", n * (2 * shared + 2 * inner)),
        ]
    attention, inner, d = 2 * config["num_heads"] * config["d_kv"], config["d_ff"], config["d_model"]
    n, m = config["num_layers"], config["num_decoder_layers"]
    wide = n * (2 * d + inner) + m * (4 * d + inner)
    return [
        ("T5: a decoder's block attends twice, to itself and to the encoder", (n + m) * (attention + inner)),
        ("T5: the decoder has num_decoder_layers blocks", n * (3 * attention + 2 * inner)),
        ("T5: attention is num_heads * d_kv wide, not d_model", wide),
        ("T5: the decoder is missing", n * (attention + inner)),
        ("T5: the encoder is missing", m * (2 * attention + inner)),
        ("T5: queries are left alone", n * (attention * 3 // 2 + inner) + m * (attention * 3 + inner)),
        (shorter, n * (attention + d) + m * (2 * attention + d)),
    ]


def check_unseen_count(answer: Answer, seed: int) -> None:
    """1.3: the (IA)³ vectors of a model never seen, from its configuration alone; peft has the last word."""
    for config in random_configs(Draw(seed)):
        hint = f"{config['model_type']}: peft trains another number"
        expect(integer(untouched(answer, config)), built_count(**config), count_mistakes(config), hint)


def check_perplexity(answer: Answer, seed: int) -> None:
    """1.4: one perplexity of many texts."""
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
    "1.1": check_scaled_qkv,
    "1.2": check_feedforward,
    "1.3": check_unseen_count,
    "1.4": check_perplexity,
}
