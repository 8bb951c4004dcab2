"""One batch, an adapter of its own for each row: for a server that answers several tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from peft.tuners.ia3.layer import IA3Layer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from utils.adapters import AdapterError
from utils.generation import adapters_off


@contextmanager
def mixed_adapters(model: PeftModel, names: Sequence[str | None]) -> Iterator[PeftModel]:
    """Inside, row r of a batch of `len(names)` rows runs under the adapter `names[r]`, or on the bare base for None.

    peft's `adapter_names` does that for LoRA; for (IA)³ it is ignored without a word. (IA)³ multiplies activations, so
    a row can have factors of its own: the adapters are switched off, and hooks on the layers beneath them multiply by
    a stack of vectors, one for each row. Works for any architecture whose layers see (rows, length, width).

    `generate(...)`, `model(...)` and `model.generate(...)` all work; where rows are repeated (samples, beams) their
    adapters are repeated with them. A row is what it is in the same batch under its adapter alone, to the bit. A
    classification head that was trained with an adapter goes with it. For inference: nothing here is trained. Raises
    AdapterError for a model without (IA)³, an unknown adapter, or, at the call, a batch with another number of rows.
    """
    layers = [module for module in model.modules() if isinstance(module, IA3Layer)]
    if not isinstance(model, PeftModel) or not layers:
        raise AdapterError("mixed_adapters() needs a PeftModel with (IA)³ adapters: load one first")
    if unknown := sorted({name for name in names if name is not None} - set(model.peft_config)):
        raise AdapterError(f"no adapter named {', '.join(unknown)}: loaded are {', '.join(model.peft_config)}")
    if not names:
        raise AdapterError("no row: give one adapter name, or None, for each row of the batch")
    with ExitStack() as stack:
        stack.enter_context(adapters_off(model))
        for layer in layers:
            stack.callback(_scale_rows(layer, names).remove)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                stack.callback(module.register_forward_hook(_heads_by_row(names)).remove)
        model.row_adapters = names  # `generate` reads a prompt once for each row then
        stack.callback(delattr, model, "row_adapters")
        yield model


def _scale_rows(layer: IA3Layer, names: Sequence[str | None]) -> torch.utils.hooks.RemovableHandle:
    """Hook on the layer beneath: its input (feed-forward) or its output times the rows' factors, (rows, 1, width)."""
    vectors = [layer.ia3_l[name].detach().flatten() if name in layer.ia3_l else None for name in names]
    known = next((vector for vector in vectors if vector is not None), torch.ones(1))
    factors = torch.stack([torch.ones_like(known) if vector is None else vector for vector in vectors])

    def scaled(tensor: Tensor) -> Tensor:
        rows = repeated(factors, len(tensor))
        rows = rows.view(len(rows), *[1] * (tensor.dim() - 2), -1)
        return (tensor * rows).to(tensor.dtype)

    base = layer.get_base_layer()
    if layer.is_feedforward:
        return base.register_forward_pre_hook(lambda _module, args: (scaled(args[0]), *args[1:]))
    return base.register_forward_hook(lambda _module, _args, output: scaled(output))


def repeated(factors: Tensor, rows: int) -> Tensor:
    """`factors` (names, width) for a batch of `rows`: each row's as often as the row is repeated."""
    times, rest = divmod(rows, len(factors))
    if rest or not times:
        raise AdapterError(f"{len(factors)} adapter names for a batch of {rows} rows: give one for each row")
    return factors if times == 1 else factors.repeat_interleave(times, 0)


def _heads_by_row(names: Sequence[str | None]) -> Callable[[ModulesToSaveWrapper, tuple, Tensor], Tensor]:
    """Hook of a module that is saved with each adapter, as a classification head is: each row through its own."""

    def hook(module: ModulesToSaveWrapper, args: tuple, output: Tensor) -> Tensor:
        heads = dict(module.modules_to_save.items())
        rows = repeated(torch.arange(len(names))[:, None], len(output))[:, 0]
        output = output.clone()
        for number, name in enumerate(names):
            mine = rows == number
            output[mine] = heads.get(name, module.original_module)(args[0])[mine]
        return output

    return hook
