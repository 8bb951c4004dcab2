"""Methods that (IA)³ is compared with and that peft does not have: BitFit, a bottleneck adapter, (IA)³ without queries.

For: changing a GPT-2 so that only the method's numbers train, and keeping those numbers.
Not for: choosing a method (`adapters.attach`), counting (`counts.py`), training (`training.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.counts import bottleneck_size


def train_biases(model: nn.Module) -> None:
    """BitFit (Ben Zaken et al. 2022): freeze everything but the bias vectors, those of the norms included."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))


class Bottleneck(nn.Module):
    """The adapter of Houlsby et al. (2019): d -> r -> d with GELU between; it starts at 0, so the model is unchanged.

    Input and output (..., d); the caller adds the output to what it read.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """up(GELU(down(hidden)))."""
        return self.up(nn.functional.gelu(self.down(hidden), approximate="tanh"))


def add_bottleneck(module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
    """Forward hook of a feed-forward module: its output, plus what its `adapter` makes of it."""
    return output + module.adapter(output)


def insert_bottlenecks(model: nn.Module) -> None:
    """Pfeiffer et al. (2021): freeze the model; one `Bottleneck` behind the feed-forward module of each block."""
    model.requires_grad_(False)
    for block in model.transformer.h:
        adapter = Bottleneck(model.config.n_embd, bottleneck_size(model.config))
        block.mlp.adapter = adapter.to(model.device, model.dtype)
        block.mlp.register_forward_hook(add_bottleneck)


def hold_queries(model: nn.Module) -> None:
    """Keep the query third of every `c_attn` vector at 1: keys, values and feed-forward are left, as in the paper.

    Call it when the model is on its device.
    """
    for name, parameter in model.named_parameters():
        if ".c_attn.ia3_l." in name:  # (3d, 1): queries, keys, values
            free = torch.ones(parameter.shape, device="cpu")
            free[: len(free) // 3] = 0
            hold(parameter, free)


def hold(parameter: nn.Parameter, free: Tensor) -> None:
    """Let training change only the entries where `free` (0 or 1, of the same shape, on the CPU) is 1.

    A hook zeroes the gradient of the others, and Adam without weight decay leaves alone what has no gradient.
    `held` tells `count_parameters` how many entries of the tensor cannot move.
    """
    parameter.held = int((free == 0).sum())
    parameter.register_hook(lambda gradient: gradient * free.to(gradient))


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run of any method has to keep: copies of the parameters that want a gradient, by name, on the CPU."""
    return {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put `trainable_state` of one model into another with the same method attached. KeyError where names differ."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if differing := sorted(wanted.keys() ^ state.keys()):
        raise KeyError(f"this state does not fit the model: {differing[0]} is on one side only")
    for name, parameter in wanted.items():
        parameter.copy_(state[name])
