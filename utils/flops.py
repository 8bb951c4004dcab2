"""How much arithmetic a training step needs, by formula, and how much of it this machine does at best, measured.

For: the share of the machine's own matrix-multiply rate that training reaches. Not for: memory (`memory.py`), or the
times of methods (`cost.py`).
"""

from __future__ import annotations

import torch
from transformers import GPT2Config

from utils.sizes import inner_size
from utils.timing import seconds

FROZEN, TRAINED = 4, 6  # FLOPs a weight and token: forward 2, gradient of the activations 2, of the weights 2


def weights_in_products(config: GPT2Config) -> int:
    """Entries of the matrices that a token is multiplied by: L (4 d² + 2 d m) in the blocks, V d in the tied head.

    Embeddings, norms and biases are looked up or added: they are not counted.
    """
    width, inner = config.n_embd, inner_size(config)
    return config.n_layer * (4 * width**2 + 2 * width * inner) + config.vocab_size * width


def training_flops(config: GPT2Config, length: int, per_weight: int = FROZEN) -> int:
    """FLOPs a token of a forward and backward pass on rows of `length` tokens.

    `per_weight` x weights + 12 L d `length`: PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) has
    6 a weight, of which 2 are the gradient of the weights themselves. Frozen weights need none, so 4 are left; the
    gradient of the activations must still pass through them. Attention's two products have no weights: 4 L d `length`
    forward, twice that backward; the causal half is not taken off, as in PaLM. The first layer's query, key and value
    projection needs no gradient of its input either, which is left in (under 1 % on GPT-2).
    """
    return per_weight * weights_in_products(config) + 12 * config.n_layer * config.n_embd * length


def product_flops(size: int) -> int:
    """FLOPs of one product of two square matrices."""
    return 2 * size**3


def product_seconds(size: int, dtype: torch.dtype, device: torch.device | str, repeats: int = 3) -> float:
    """Seconds of one product of two (size, size) matrices: the mean of `repeats` after one that warms up."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    return seconds(lambda: [torch.mm(left, right, out=out) for _ in range(repeats)]) / repeats


def best_size(dtype: torch.dtype, device: torch.device | str, sizes: tuple[int, ...]) -> int:
    """Which of `sizes` gives the highest rate of square products: the yardstick is the machine's best."""
    return max(sizes, key=lambda size: product_flops(size) / product_seconds(size, dtype, device))
