"""The course's additions to the Hugging Face `Trainer`: a progress bar with times, and losses exact per label.

Not for: choosing settings, resuming, records (`training.py`, which uses both).
"""

from __future__ import annotations

import sys
import time

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from utils.checkpoints import SafeTrainer


class Progress(TrainerCallback):
    """A bar with one line per evaluation on stdout, and the time of each step."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Open the bar; after a resume it starts where the run was."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, file=sys.stdout, leave=False, unit="step")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop the clock, move the bar."""
        self.seconds.append(time.perf_counter() - self.started)
        self.bar.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **_: object
    ) -> None:
        """Print the held-out loss; the evaluation before the first step has no bar yet."""
        if self.bar is not None:
            self.bar.write(f"step {state.global_step:>5}   held-out loss {metrics['eval_loss']:.4f}", file=sys.stdout)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Close the bar."""
        self.bar.close()


class PerLabelTrainer(SafeTrainer):
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
            loss = loss * (inputs["labels"] != -100).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: torch.nn.Module, inputs: dict, *_: object, **__: object) -> tuple:
        """A batch's sum over labels, divided by its rows: the loop below averages it over rows."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss * (inputs["labels"] != -100).sum() / len(inputs["labels"]), None, None

    def evaluation_loop(self, dataloader: DataLoader, *arguments: object, **options: object) -> EvalLoopOutput:
        """The Trainer's, with its mean over rows made one over labels."""
        output = super().evaluation_loop(dataloader, *arguments, **options)
        output.metrics["eval_loss"] *= len(dataloader.dataset) / count_labels(dataloader.dataset)
        return output


def count_labels(examples: Dataset) -> int:
    """How many labels are predicted: all but those of -100; one for an example that has a single one."""
    return sum(sum(i != -100 for i in label) if hasattr(label, "__len__") else 1 for label in examples["labels"])
