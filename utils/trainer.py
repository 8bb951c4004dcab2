"""The course's additions to the Hugging Face `Trainer`: progress and times, shared steps, losses exact per label.

Not for: choosing settings, resuming, records (`training.py`, which uses all of them); which rows a process computes
(`shares.py`).
"""

from __future__ import annotations

import sys
import time

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from utils.checkpoints import SafeTrainer
from utils.shares import IGNORED, Plan, ShareSampler, WithFiller


class Progress(TrainerCallback):
    """A bar with one line per evaluation on stdout, in process 0 alone, and the time of each step."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Open the bar; after a resume it starts where the run was."""
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, file=sys.stdout, leave=False, unit="step",
            disable=not state.is_world_process_zero,
        )  # fmt: skip

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
        if self.bar is not None and not self.bar.disable:
            self.bar.write(f"step {state.global_step:>5}   held-out loss {metrics['eval_loss']:.4f}", file=sys.stdout)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Close the bar."""
        self.bar.close()


class BlockTrainer(SafeTrainer):
    """The Trainer for packed blocks; with a `plan`, its steps are shared out so that each row counts exactly once.

    Without a plan (one process, the batches that were asked for) everything is the Trainer's own.
    """

    def __init__(self, *arguments: object, plan: Plan | None = None, **options: object) -> None:
        self.plan = plan
        super().__init__(*arguments, **options)

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches of the epoch; Accelerate need not share them out again."""
        if self.plan is None:
            return super().get_train_dataloader()
        return self._shared(self.train_dataset, self.plan, self.args.data_seed)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """This process's batches of the held-out rows, as many as every other process has."""
        if self.plan is None:
            return super().get_eval_dataloader(eval_dataset)
        processes, batch = self.plan.processes, self.args.per_device_eval_batch_size
        return self._shared(eval_dataset or self.eval_dataset, Plan(processes * batch, processes, 1, batch))

    def _shared(self, rows: Dataset, plan: Plan, seed: int | None = None) -> DataLoader:
        sampler = ShareSampler(len(rows), plan, self.args.process_index, seed)
        rows = WithFiller(self._remove_unused_columns(rows))
        loader = DataLoader(rows, batch_sampler=sampler, collate_fn=self.data_collator)
        loader.set_epoch = sampler.set_epoch  # the Trainer calls it where it is there
        return loader

    def label_count(self, inputs: dict) -> torch.Tensor:
        """How many labels of a batch are predicted; a causal model predicts none at the first position."""
        labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        return (labels != IGNORED).sum()

    def prediction_step(self, model: torch.nn.Module, inputs: dict, *options: object, **named: object) -> tuple:
        """With a plan, a batch's loss summed over its labels: 0 for a batch without any, where the mean is NaN."""
        if self.plan is None:
            return super().prediction_step(model, inputs, *options, **named)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = Trainer.compute_loss(self, model, inputs)
        labels = self.label_count(inputs)
        return torch.where(labels > 0, loss * labels, 0.0), None, None

    def evaluation_loop(self, dataloader: DataLoader, *arguments: object, **options: object) -> EvalLoopOutput:
        """The Trainer's; with a plan its mean over the batches of all processes is made one over labels."""
        output = super().evaluation_loop(dataloader, *arguments, **options)
        if self.plan is not None:
            labels = count_labels(dataloader.dataset.rows, first=int(self._loss_shifts_labels))
            output.metrics["eval_loss"] *= len(dataloader) * self.plan.processes / labels
        return output


class PerLabelTrainer(BlockTrainer):
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
            labels = self.label_count(inputs)
            if self.plan is not None and labels == 0:  # the mean over no label is NaN, and so were its gradient
                loss = (outputs.logits * 0).sum()
            loss = loss * labels / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: torch.nn.Module, inputs: dict, *options: object, **named: object) -> tuple:
        """A batch's sum over labels, divided by its rows: the loop below averages it over rows."""
        if self.plan is not None:
            return super().prediction_step(model, inputs, *options, **named)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss * (inputs["labels"] != IGNORED).sum() / len(inputs["labels"]), None, None

    def evaluation_loop(self, dataloader: DataLoader, *arguments: object, **options: object) -> EvalLoopOutput:
        """The Trainer's, with its mean over rows made one over labels."""
        output = super().evaluation_loop(dataloader, *arguments, **options)
        if self.plan is None:
            output.metrics["eval_loss"] *= len(dataloader.dataset) / count_labels(dataloader.dataset)
        return output


def count_labels(examples: Dataset, first: int = 0) -> int:
    """How many labels are predicted: all but those of -100, of labels in a row those from position `first` on."""
    rows = (torch.as_tensor(label).reshape(-1) for label in examples["labels"])
    return sum(int((row[first:] != IGNORED).sum()) for row in rows)
