"""Where (IA)³ sits: its peft configuration for GPT-2 and for a recipe, checked against the model it is meant for.

peft takes a list that names too little, or a task type that is not the model's, without a word; here both are errors.
Reached through `adapters.py`. Not for: attaching (`adapters.py`), or which places a recipe chose (`recipes.py`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from peft import IA3Config, TaskType
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from extensions.recipes import Recipe
from utils.adapter_files import AdapterError
from utils.counts import is_head


class Places(NamedTuple):
    """Ends of module names that (IA)³ is put on, and those of them that are scaled on their input."""

    target_modules: tuple[str, ...] | str
    feedforward_modules: tuple[str, ...]


GPT2_PLACES = Places(("c_attn", "mlp.c_proj"), ("mlp.c_proj",))


def ia3_config(model: PreTrainedModel | None = None) -> IA3Config:
    """The course's (IA)³ configuration for GPT-2; given a model, checks that it has both targets.

    Raises `AdapterError` naming the missing module and what the model has instead.
    """
    if model is not None:
        check_places(GPT2_PLACES, model)
    return IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(GPT2_PLACES.target_modules),
        feedforward_modules=list(GPT2_PLACES.feedforward_modules),
        fan_in_fan_out=True,  # GPT-2's Conv1D stores its weight as (in, out)
    )


def recipe_config(recipe: Recipe, model: PreTrainedModel | None = None) -> IA3Config:
    """The (IA)³ configuration of a recipe; given a model, checks that it has every target and does the task.

    Raises `AdapterError` for a target that the model lacks (the message lists its linear layers) and for a task type
    that is not the model's: peft itself accepts it, and freezes a classification head without a word.
    """
    if model is not None:
        check_task(recipe.task_type, model)
        check_places(recipe, model)
    targets = recipe.target_modules
    return IA3Config(
        task_type=TaskType(recipe.task_type),
        revision=recipe.model_revision,  # so that AutoPeftModel loads the base at the commit the adapter was trained on
        target_modules=targets if isinstance(targets, str) else list(targets),
        feedforward_modules=list(recipe.feedforward_modules),
    )


def check_places(places: Recipe | Places, model: PreTrainedModel) -> None:
    """`AdapterError` where a target, or a feed-forward module among the targets, is not in the model."""
    names, targets = [name for name, _ in model.named_modules()], places.target_modules
    if isinstance(targets, str):
        chosen = [name for name in names if re.fullmatch(targets, name)]
        missing = [] if chosen else [targets]
    else:
        chosen = [name for name in names if name.endswith(tuple("." + target for target in targets))]
        missing = [target for target in targets if not any(name.endswith("." + target) for name in chosen)]
    missing += [inner for inner in places.feedforward_modules if not any(name.endswith(inner) for name in chosen)]
    if missing:
        raise AdapterError(
            f"{type(model).__name__} has no {' and no '.join(dict.fromkeys(missing))}: choose target modules, and "
            f"feed-forward modules among them, from what it has: {', '.join(linear_modules(model))}"
        )


def linear_modules(model: nn.Module) -> list[str]:
    """The last two parts of the names of all linear layers, each once: what (IA)³ can be put on."""
    found = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return sorted({".".join([part for part in name.split(".") if not part.isdigit()][-2:]) for name in found})


def check_task(task_type: str, model: PreTrainedModel) -> None:
    """`AdapterError` where the model does not do what peft's `task_type` says."""
    if any(is_head(name) for name, _ in model.named_modules()):
        does = "SEQ_CLS"
    elif model.config.is_encoder_decoder:
        does = "SEQ_2_SEQ_LM"
    else:
        does = "CAUSAL_LM" if model.get_output_embeddings() is not None else "FEATURE_EXTRACTION"
    if does != task_type:
        raise AdapterError(f"the task type {task_type} does not fit {type(model).__name__}, which is for {does}")
