"""Reading a student's answer, and naming what is wrong with it: for the checks in this package.

An answer can be any object, one that equals everything included. So `plain` and `tensors` first turn it into plain
Python values or bare tensors, by exact type; only those are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from exercises import Wrong

NUMBERS = {bool, int, float, np.bool_, np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64}
Traps = Sequence[tuple[str, object]]  # (cause in words, what that mistake gives, or a function that computes it)


class Draw:
    """Random inputs from one seed; equal seeds draw equal inputs on every machine."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(1000 + seed)

    def integer(self, low: int, high: int) -> int:
        """One of low, ..., high."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """A tensor of integers in low, ..., high."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def order(self, count: int) -> list[int]:
        """0, ..., count - 1 in random order."""
        return torch.randperm(count, generator=self.generator).tolist()

    def normal(self, *shape: int) -> Tensor:
        """A float32 tensor of standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def factors(self, *shape: int) -> Tensor:
        """Scaling factors around 1, between 0.5 and 1.5, none of them near 1."""
        sign = 2 * self.integers(0, 1, *shape) - 1
        return 1 + sign * (0.1 + 0.4 * torch.rand(shape, generator=self.generator))


def kind(value: object) -> str:
    """The type's name, for a message."""
    return type(value).__name__


def plain(value: object) -> object:
    """`value` as plain Python: numbers, text, booleans, None, and lists and dictionaries of them (tuples become lists).

    Tensors and arrays are unpacked. Raises `Wrong` for every other type.
    """
    if type(value) in (str, type(None)):
        return value
    if type(value) in NUMBERS:
        return value.item() if isinstance(value, np.generic) else value
    if type(value) in (list, tuple):
        return [plain(item) for item in value]
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if type(value) in (Tensor, torch.nn.Parameter, np.ndarray):
        return value.tolist()
    raise Wrong(f"the answer holds a {kind(value)}: return plain numbers, lists, dictionaries or tensors")


def number(value: object) -> float:
    """`value` as one float; a tensor or array without axes counts. Raises `Wrong` for anything else."""
    found = plain(value)
    if type(found) not in (int, float):
        raise Wrong(f"one number is due, not a {kind(value)}")
    return float(found)


def integer(value: object) -> int:
    """`value` as one integer. Raises `Wrong` for a float, even a round one, and for anything else."""
    found = plain(value)
    if type(found) is float:
        raise Wrong("a count is an integer: divide with //, or not at all")
    if type(found) is not int:
        raise Wrong(f"one integer is due, not a {kind(value)}")
    return found


def tensors(value: object, count: int = 1) -> tuple[Tensor, ...]:
    """`value` as `count` bare tensors on the CPU (one alone: the tensor itself). Raises `Wrong` for anything else."""
    items = (value,) if count == 1 else value
    if type(items) not in (list, tuple) or len(items) != count:
        raise Wrong(f"{'one tensor is' if count == 1 else f'{count} tensors are'} due, not a {kind(value)}")
    for item in items:
        if type(item) not in (Tensor, torch.nn.Parameter):
            raise Wrong(f"a tensor is due, not a {kind(item)}")
    return tuple(item.detach().cpu().clone() for item in items)


def expect(found: object, right: object, traps: Traps = (), hint: str = "the numbers are not the right ones",
           tolerance: float = 1e-4) -> None:  # fmt: skip
    """Raise `Wrong` unless `found` is `right`: with the cause whose result it is, else with what is off.

    Both are plain values, or equally long tuples of tensors. Floats are equal within `tolerance`, relative to the
    largest number of `right`.
    """
    if same(found, right, tolerance):
        return
    for cause, wrong in traps:
        if same(found, wrong() if callable(wrong) else wrong, tolerance):
            raise Wrong(cause)
    if type(found) is tuple:
        for ours, theirs in zip(right, found, strict=True):
            if theirs.shape != ours.shape:
                raise Wrong(f"a shape is {tuple(theirs.shape)} where {tuple(ours.shape)} is due")
    if not all(np.isfinite(value) for value in leaves(found) if type(value) is float):
        raise Wrong("the answer holds NaN or infinity")
    raise Wrong(hint)


def same(found: object, right: object, tolerance: float) -> bool:
    """Whether two plain values, or two tuples of tensors, are equal; types and shapes must agree."""
    if type(right) is tuple:
        return len(found) == len(right) and all(map(lambda a, b: _same_tensor(a, b, tolerance), found, right))
    if type(right) in (list, dict):
        if type(found) is not type(right) or len(found) != len(right):
            return False
        if type(right) is dict:
            return found.keys() == right.keys() and all(same(found[k], right[k], tolerance) for k in right)
        return all(same(a, b, tolerance) for a, b in zip(found, right, strict=True))
    if type(right) is float:
        return type(found) in (int, float) and abs(found - right) <= tolerance * max(1e-9, abs(right))
    return type(found) is type(right) and found == right


def _same_tensor(found: Tensor, right: Tensor, tolerance: float) -> bool:
    if found.shape != right.shape or found.is_complex():
        return False
    if not right.is_floating_point():
        return not found.is_floating_point() and torch.equal(found.long(), right.long())
    scale = float(right.double().abs().max()) if right.numel() else 1.0
    return torch.allclose(found.double(), right.double(), rtol=0, atol=tolerance * max(scale, 1e-9))


def leaves(found: object) -> list[object]:
    """Every single value inside plain lists, dictionaries and tuples of tensors."""
    if type(found) is Tensor:
        return found.flatten().tolist()
    if type(found) in (list, tuple):
        return [leaf for item in found for leaf in leaves(item)]
    if type(found) is dict:
        return [leaf for item in found.values() for leaf in leaves(item)]
    return [found]


def untouched(call: Callable[..., object], *arguments: object) -> object:
    """What `call` gives for copies of `arguments`; raises `Wrong` where it changes one of these in place."""
    given = copy.deepcopy(arguments)
    result = call(*given)
    for before, after in zip(arguments, given, strict=True):
        if not _unchanged(before, after):
            raise Wrong("an argument is changed in place: make a new object instead")
    return result


def _unchanged(before: object, after: object) -> bool:
    """Whether two structures of one making are still equal, bit by bit."""
    if type(before) is Tensor:
        return torch.equal(before, after)
    if type(before) is dict:
        return before.keys() == after.keys() and all(_unchanged(before[key], after[key]) for key in before)
    if type(before) is list:
        return len(before) == len(after) and all(map(_unchanged, before, after))
    return before == after
