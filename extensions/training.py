"""How the labs' models are trained: where (IA)³ sits in BERT, T5 and BLOOM, what it counts, losses exact per label."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from peft import IA3Config, PeftModel, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from extensions.encoding import IGNORED
from extensions.recipes import Recipe
from utils.adapters import AdapterError, carries_adapter, linear_modules
from utils.runs import RunRecord
from utils.sizes import is_head
from utils.training import train

if TYPE_CHECKING:
    from transformers import BertConfig, BloomConfig, LlamaConfig, T5Config


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


def predict_llama_count(config: LlamaConfig) -> int:
    """L (2k + m), where k = key-value heads x head width: keys and values may be narrower than the model."""
    k = config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * (2 * k + config.intermediate_size)


PREDICTED_BY_TYPE: dict[str, Callable[..., int]] = {
    "bert": predict_bert_count, "bloom": predict_bloom_count, "llama": predict_llama_count,
    "mt5": predict_t5_count, "t5": predict_t5_count,
}  # fmt: skip


class PerLabelTrainer(Trainer):
    """Losses are means per label (a token, or an example's class), whatever batches and accumulation the labels are in.

    The Trainer averages means of batches, and takes BERT and T5 for models that divide by the labels of the whole step
    (they accept the argument and ignore it), so that with accumulation their loss and gradients come out a multiple.
    Every row of packed blocks has as many labels as any other: there the plain Trainer is exact.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple:
        """The batch's share in the mean over the `num_items_in_batch` labels of the step; None: the batch's mean."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            # a causal model predicts no label at the first position; the Trainer counts the step's labels so too
            labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
            loss = loss * (labels != IGNORED).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: torch.nn.Module, inputs: dict, *options: object, **named: object) -> tuple:
        """A batch's sum over labels, divided by its rows: the loop below averages it over rows."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss * (inputs["labels"] != IGNORED).sum() / len(inputs["labels"]), None, None

    def evaluation_loop(self, dataloader: DataLoader, *arguments: object, **options: object) -> EvalLoopOutput:
        """The Trainer's, with its mean over rows made one over labels."""
        output = super().evaluation_loop(dataloader, *arguments, **options)
        labels = dataloader.dataset["labels"]
        predicted = sum(int((torch.as_tensor(label) != IGNORED).sum()) for label in labels)
        output.metrics["eval_loss"] *= len(labels) / predicted
        return output


def train_recipe(model: torch.nn.Module, examples: Dataset, recipe: Recipe, **options: object) -> RunRecord:
    """`utils.training.train` with losses that are exact per label (`PerLabelTrainer`); the same options."""
    return train(model, examples, recipe, trainer_class=PerLabelTrainer, **options)
