"""How many numbers a model has and how many each method trains: closed forms, and the count that checks them.

In the formulas: L layers of width d, inner width m (4d in GPT-2), LoRA's rank or the bottleneck's width r, t virtual
tokens. Reached through `adapters.py`. Not for: bytes and memory (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:  # a notebook's first cell needs this module, and no model's code
    from transformers import BertConfig, BloomConfig, GPT2Config, T5Config

LORA_RANK = 8
PREFIX_TOKENS = 20
BOTTLENECK_SHARE = 12  # the bottleneck is a twelfth of the width: 64 on GPT-2


# Parts of parameter names, the first that fits decides: GPT-2's, then those of BERT, T5 and BLOOM.
GROUPS = (
    ("wte", "token embedding"), ("wpe", "position embedding"), (".attn.", "attention"), (".mlp.", "feed-forward"),
    ("LayerNorm", "layer norms"), ("layernorm", "layer norms"), ("layer_norm", "layer norms"),
    ("position_embeddings", "position embedding"), ("relative_attention_bias", "position embedding"),
    ("token_type_embeddings", "token embedding"), ("word_embeddings", "token embedding"),
    ("shared", "token embedding"), ("embed_tokens", "token embedding"), ("lm_head", "head"), ("pooler", "pooler"),
    ("attention", "attention"), ("Attention", "attention"), ("DenseReluDense", "feed-forward"),
    ("intermediate.", "feed-forward"), ("output.dense", "feed-forward"),
)  # fmt: skip


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: `total` counts a tied matrix once; `groups` names where they sit."""

    trainable: int
    total: int
    groups: dict[str, int]

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100 * self.trainable / self.total


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name was added by a method, and is none of the model's own."""
    return any(mark in name for mark in ("ia3_", "lora_", "prompt_encoder.", ".mlp.adapter.", ".mixing."))


def is_head(name: str) -> bool:
    """Whether the parameter of this name belongs to a classification head, which starts at random and is trained."""
    return bool({"classifier", "score"} & set(name.split(".")))


def group_of(name: str) -> str:
    """The group of a parameter, from its name."""
    if is_adapter(name):
        return "adapter"
    if is_head(name):
        return "head"
    return next((group for part, group in GROUPS if part in name), "layer norms")


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count by walking the model (works on the meta device, nothing need be downloaded).

    Trainable is what training can change: an entry that is held (`rivals.hold_queries`) does not count.
    """
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        groups[group_of(name)] = groups.get(group_of(name), 0) + parameter.numel()
    trainable = sum(p.numel() - getattr(p, "held", 0) for p in model.parameters() if p.requires_grad)
    return ParameterCount(trainable, sum(groups.values()), groups)


def inner_size(config: GPT2Config) -> int:
    """Width inside the feed-forward layers, m: four times the model's unless the configuration says otherwise."""
    return config.n_inner or 4 * config.n_embd


def bottleneck_size(config: GPT2Config) -> int:
    """Width of the bottleneck adapter, r."""
    return max(1, config.n_embd // BOTTLENECK_SHARE)


def predict_gpt2_groups(config: GPT2Config) -> dict[str, int]:
    """Attention L (4d² + 4d), feed-forward L (2dm + d + m), layer norms (4L + 2) d."""
    d, m, layers = config.n_embd, inner_size(config), config.n_layer
    return {
        "token embedding": config.vocab_size * d,  # the output head is the same matrix
        "position embedding": config.n_positions * d,
        "attention": layers * (4 * d * d + 4 * d),
        "feed-forward": layers * (2 * d * m + d + m),
        "layer norms": (4 * layers + 2) * d,
    }


def predict_ia3_count(
    config: GPT2Config, attention: bool = True, feedforward: bool = True, *, queries: bool = True
) -> int:
    """L (3d + m): a number for each output of `c_attn` (2d without the queries), and one for each inner unit."""
    return config.n_layer * (attention * (2 + queries) * config.n_embd + feedforward * inner_size(config))


def predict_lora_count(config: GPT2Config, rank: int = LORA_RANK) -> int:
    """L r (d + 3d): A is (r, d) and B is (3d, r) on each `c_attn`."""
    return config.n_layer * rank * 4 * config.n_embd


def predict_bitfit_count(config: GPT2Config) -> int:
    """L (7d + m) + d: biases of `c_attn` 3d, of both `c_proj` 2d, of two norms 2d, of `c_fc` m; the last norm's d."""
    return config.n_layer * (7 * config.n_embd + inner_size(config)) + config.n_embd


def predict_prefix_count(config: GPT2Config, tokens: int = PREFIX_TOKENS) -> int:
    """2 L t d: a key and a value for each virtual token in each layer."""
    return 2 * config.n_layer * tokens * config.n_embd


def predict_bottleneck_count(config: GPT2Config) -> int:
    """L (2dr + r + d): a projection down and one up, with their biases."""
    r, d = bottleneck_size(config), config.n_embd
    return config.n_layer * (2 * d * r + r + d)


PREDICTED: dict[str, Callable[[GPT2Config], int]] = {
    "base": lambda _: 0,
    "ia3": predict_ia3_count,
    "ia3_kv": lambda config: predict_ia3_count(config, queries=False),
    "lora": predict_lora_count,
    "bitfit": predict_bitfit_count,
    "prefix": predict_prefix_count,
    "bottleneck": predict_bottleneck_count,
    "full": lambda config: sum(predict_gpt2_groups(config).values()),
}


def predict_trainable(config: GPT2Config, method: str) -> int:
    """Numbers that `method` trains, from the configuration alone. Raises KeyError for a method without a form."""
    return PREDICTED[method](config)


def predict_bert_count(config: BertConfig, labels: int = 2, *, inside: bool = True) -> int:
    """L (2d + m) + labels (d + 1): keys, values, the feed-forward's inside, and the classifier, which trains too.

    With `inside=False` m becomes d: the feed-forward's input is scaled, as document 001 has it.
    """
    d = config.hidden_size
    feedforward = config.intermediate_size if inside else d
    return config.num_hidden_layers * (2 * d + feedforward) + labels * (d + 1)


def predict_t5_count(config: T5Config) -> int:
    """L (2a + m) in the encoder, L (4a + m) in the decoder, where a = heads x d_kv is the width of keys and values.

    The decoder has a second pair of them, for its attention to the encoder.
    """
    a, m = config.num_heads * config.d_kv, config.d_ff
    return config.num_layers * (2 * a + m) + config.num_decoder_layers * (4 * a + m)


def predict_bloom_count(config: BloomConfig) -> int:
    """L (3d + 4d): a number for each output of `query_key_value`, one for each inner unit; there are always 4d."""
    return config.n_layer * 7 * config.hidden_size


PREDICTED_BY_TYPE: dict[str, Callable[..., int]] = {
    "bert": predict_bert_count, "bloom": predict_bloom_count, "mt5": predict_t5_count, "t5": predict_t5_count,
}  # fmt: skip
