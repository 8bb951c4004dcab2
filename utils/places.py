"""Where (IA)³ sits in a recipe's model: its peft configuration, checked against the model, and attaching it.

peft takes a list that names too little, or a task type that is not the model's, without a word; here both are errors.
"""

from __future__ import annotations

import re

from peft import IA3Config, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from extensions.recipes import Recipe
from utils.adapters import AdapterError, carries_adapter, linear_modules
from utils.sizes import is_head


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


def check_places(places: Recipe, model: PreTrainedModel) -> None:
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


def attach_recipe(model: PreTrainedModel, recipe: Recipe, method: str = "ia3") -> PreTrainedModel | PeftModel:
    """As `attach`, on the model of a recipe: "ia3", "full", "base", or "head" (the classification head alone).

    Raises `AdapterError` for another method, a model that carries an adapter, and where `recipe_config` does.
    """
    if carries_adapter(model):
        raise AdapterError("this model already carries an adapter: load a fresh base with load_model(recipe)")
    if method == "ia3":
        return get_peft_model(model, recipe_config(recipe, model))
    if method not in ("full", "base", "head"):
        raise AdapterError(f"unknown method {method!r}: choose from ia3, head, full, base")
    if method == "head":
        check_task("SEQ_CLS", model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" or (method == "head" and is_head(name)))
    return model
