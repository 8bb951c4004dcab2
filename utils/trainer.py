"""Losses exact per label, on the stock `Trainer`: for the optional labs, where one row has more labels than another."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from extensions.encoding import IGNORED


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
        output.metrics["eval_loss"] *= len(dataloader.dataset) / count_labels(dataloader.dataset)
        return output


def count_labels(examples: Dataset) -> int:
    """How many labels are predicted: all but those of -100."""
    return sum(int((torch.as_tensor(labels) != IGNORED).sum()) for labels in examples["labels"])
