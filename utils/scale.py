"""What grows with the model and with the tasks: memory and communication of training, by closed forms.

In the formulas: P parameters of the base, T numbers that are trained, W processes, b bytes of a frozen weight. What
trains is float32: its gradient 4 bytes a number, AdamW's two moments 8. Activations of a whole pass are in
`memory.py`. docs/scale.md shows the numbers, tests/test_scale.py counts the same bytes on two sizes. Not for: choosing
a batch (`gpu.py`, `batches.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GPT2Config, T5Config

from utils.config import ASSETS
from utils.lab_counts import predict_t5_count
from utils.sizes import FLOAT32, inner_size, predict_gpt2_groups, predict_ia3_count

BFLOAT16 = 2  # bytes
ADAMW = 2 * FLOAT32  # bytes a number: both moments (Kingma and Ba 2015)

# T0 (Sanh et al. 2021) is T5 1.1 after language-model adaptation: gated feed-forward, a head of its own.
T0 = {"vocab_size": 32_128, "d_kv": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}


@dataclass(frozen=True)
class Size:
    """A model by name: its parameters P, the numbers T that (IA)³ trains for a task, and P outside its blocks."""

    name: str
    parameters: int
    trained: int
    outside: int


def t5_parameters(config: T5Config) -> int:
    """P of a gated T5 with a head of its own (as its checkpoints have it; built from a configuration, it is tied).

    With a = heads x d_kv, the width inside attention: a block of the encoder 4da (attention) + 3dm (feed-forward) + 2d
    (norms), of the decoder 8da + 3dm + 3d; the first of each has a table of positions, `t5_outside` is the rest.
    """
    d, m, a = config.d_model, config.d_ff, config.num_heads * config.d_kv
    encoder = config.num_layers * (4 * d * a + 3 * d * m + 2 * d)
    decoder = config.num_decoder_layers * (8 * d * a + 3 * d * m + 3 * d)
    tables = 2 * config.relative_attention_num_buckets * config.num_heads
    return t5_outside(config) + encoder + decoder + tables


def t5_outside(config: T5Config) -> int:
    """Parameters outside a T5's blocks, 2d (vocabulary + 1): `shared`, `lm_head` and a last norm for each stack."""
    return 2 * config.d_model * (config.vocab_size + 1)


def gpt2_size(name: str, config: GPT2Config) -> Size:
    """A GPT-2, whose head is the embedding."""
    groups = predict_gpt2_groups(config)
    outside = groups["token embedding"] + groups["position embedding"] + 2 * config.n_embd
    return Size(name, sum(groups.values()), predict_ia3_count(config), outside)


def t5_size(name: str, config: T5Config) -> Size:
    """A gated T5 with a head of its own."""
    return Size(name, t5_parameters(config), predict_t5_count(config), t5_outside(config))


def sizes() -> list[Size]:
    """The course's two models, GPT-2's largest, and the two of the paper (Liu et al. 2022), T0-3B and T0-11B."""
    return [
        gpt2_size("embedded model", GPT2Config.from_pretrained(ASSETS / "mini-gpt2")),
        gpt2_size("GPT-2", GPT2Config()),
        gpt2_size("GPT-2 XL", GPT2Config(n_embd=1600, n_layer=48, n_head=25)),
        t5_size("T0-3B", T5Config(d_model=2048, d_ff=5120, num_heads=32, **T0)),
        t5_size("T0-11B", T5Config(d_model=4096, d_ff=10_240, num_heads=64, **T0)),
    ]


def task_bytes(size: Size) -> int:
    """4T: one task's vectors in float32, on disk or beside the base in memory."""
    return FLOAT32 * size.trained


def state_bytes(trained: int) -> int:
    """(4 + 8) T: gradients and AdamW's moments of T trained numbers."""
    return (FLOAT32 + ADAMW) * trained


def held_bytes(size: Size, processes: int = 1, *, weight: int = BFLOAT16, sharded: bool = False) -> int:
    """What a process holds through training with (IA)³, activations excepted: bP + 4T + 12T; sharded, a W-th of it.

    Data-parallel processes each hold all of it.
    """
    whole = weight * size.parameters + task_bytes(size) + state_bytes(size.trained)
    return -(-whole // processes) if sharded else whole


def full_bytes(size: Size) -> int:
    """(4 + 12) P: what full fine-tuning in float32 holds in the place of that."""
    return FLOAT32 * size.parameters + state_bytes(size.parameters)


def all_reduced_bytes(trained: int) -> int:
    """4T a step, whatever the batch: the gradients. In a ring a process sends 2 (W - 1) / W of it (Patarasu 2009)."""
    return FLOAT32 * trained


def gathered_bytes(size: Size, *, weight: int = BFLOAT16) -> int:
    """b (2P - P outside the blocks) a step and micro-batch: FSDP gathers a block forward and backward, the rest once.

    (W - 1) / W of it comes from other processes.
    """
    return weight * (2 * size.parameters - size.outside)


def checkpointed_bytes(config: GPT2Config, batch: int, length: int) -> int:
    """Float32 activations of GPT-2 that checkpointing keeps: every block's input, the last one's output, the loss's.

    4 (d (L + 1) + vocabulary) a token; while a block is computed anew, its own come on top.
    """
    return FLOAT32 * batch * length * (config.n_embd * (config.n_layer + 1) + config.vocab_size)


def sharding_padding(config: GPT2Config, processes: int) -> int:
    """Numbers that FSDP adds to each (IA)³ block: the feed-forward's vector is (1, m) and is split by rows.

    One process holds it, the others an empty row of it: m (W - 1).
    """
    return inner_size(config) * (processes - 1)
