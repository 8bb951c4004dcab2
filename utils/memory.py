"""Closed forms for the memory of GPT-2 training, and the measurement that checks them.

For: how many bytes of activations a forward pass stores, from the configuration alone; `saved_for_backward`, which
counts the stored bytes of a real pass.
Not for: devices and what is free on them (`gpu.py` puts the two together in `estimate_memory`).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from utils.counts import LORA_RANK, PREFIX_TOKENS, bottleneck_size, inner_size

if TYPE_CHECKING:  # a notebook's first cell needs this module, and no model's code
    from transformers import GPT2Config

FLOAT32 = 4  # bytes


def format_bytes(count: int) -> str:
    """A number of bytes with a binary unit: `format_bytes(1536)` is "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def reuse_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors; False where the C library is not glibc.

    glibc's `malloc` hands every block above 32 MiB back to the kernel, which must fill the next one with zeros, page
    by page: for a batch's logits and their gradients a fifth of a training step on a CPU. See mallopt(3).
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


@dataclass
class SavedBytes:
    """Bytes that autograd keeps for the backward pass; final once the `with saved_for_backward(model)` block ends."""

    bytes: int = 0


@contextlib.contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[SavedBytes]:
    """Measure what a forward pass of `model` stores for its backward pass: activations, not parameters.

    Each storage is counted once, however many operations keep it. Run the forward pass inside the block.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    saved.bytes = sum(storage.nbytes() for storage in storages.values())
    storages.clear()


@dataclass(frozen=True)
class Footprint:
    """What a method keeps beside the frozen base's activations, on GPT-2 of width d.

    `a_block` counts per token and layer in units of d, `outside` the same once per token; both are functions of the
    configuration and the length of a block. `untouched`: blocks before the first trainable number, of which nothing is
    kept.
    """

    a_block: Callable[[GPT2Config, int], float]
    outside: Callable[[GPT2Config, int], float] = lambda _config, _length: 0
    untouched: int = 0


FOOTPRINTS: dict[str, Footprint] = {
    # l needs the input of its product: the output of c_attn (3 d), the inside of the feed-forward (4 d)
    "ia3": Footprint(lambda c, _: 3 + inner_size(c) / c.n_embd),
    "ia3_kv": Footprint(lambda c, _: 3 + inner_size(c) / c.n_embd),
    # A needs the normalised input of c_attn (d), B needs the product with A (r)
    "lora": Footprint(lambda c, _: 1 + LORA_RANK / c.n_embd),
    # a bias needs nothing
    "bitfit": Footprint(lambda c, _: 0),
    # keys and values are copied behind the virtual tokens' (2 d for more tokens), which are kept too; one mask for all
    "prefix": Footprint(
        lambda c, length: 2 * (length + 2 * PREFIX_TOKENS) / length,
        outside=lambda c, length: (length + PREFIX_TOKENS) / c.n_embd,
    ),
    # the way down needs its input (d), GELU and the way up need theirs (r each)
    "bottleneck": Footprint(lambda c, _: 1 + 2 * bottleneck_size(c) / c.n_embd, untouched=1),
    # every weight needs its layer's input: two norms' outputs (2 d), the inside of the feed-forward (4 d); the head d
    "full": Footprint(lambda c, _: 2 + inner_size(c) / c.n_embd, outside=lambda *_: 1),
}


def activation_bytes(
    config: GPT2Config, method: str, batch: int, length: int, device: torch.device | str = "cpu"
) -> int:
    """Bytes of float32 activations that `GPT2LMHeadModel` in training mode stores for its backward pass.

    Per token and layer, in units of the width d (from transformers' GPT-2; a test holds it within 5 % of a real pass):
    two layer norms' inputs 2; query, key, value and the attention's output 4; the tanh form of GELU four tensors of
    the inner size 4 x 4 = 16, or one of them (4) where it is fused (`gelu_pytorch_tanh`); what `FOOTPRINTS` adds. Per
    token: the last norm's input (d) and the log-probabilities (vocabulary). Dropout adds its masks, and on a CPU three
    tensors of `length` a head, because the fused attention there knows no dropout. Attention itself stores no matrix
    of `length` x `length`.
    """
    footprint, width = FOOTPRINTS[method], config.n_embd
    gelu = 1 if config.activation_function == "gelu_pytorch_tanh" else 4
    block = 2 + 4 + gelu * inner_size(config) / width
    block += 2 if config.resid_pdrop else 0
    if config.attn_pdrop and torch.device(device).type == "cpu":
        block += 3 * config.n_head * length / width
    blocks = (config.n_layer - footprint.untouched) * block + config.n_layer * footprint.a_block(config, length)
    per_token = width * (blocks + 1 + footprint.outside(config, length)) + config.vocab_size
    return round(FLOAT32 * batch * length * per_token)
