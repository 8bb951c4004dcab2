"""How many numbers (IA)³ trains in the optional labs' models, by closed form: BERT, T5 and BLOOM.

In the formulas: L layers of width d, inner width m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BertConfig, BloomConfig, T5Config


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
