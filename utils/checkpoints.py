"""Checkpoints of a training run without pickle, which count only once they are whole.

The Hugging Face Trainer keeps optimiser, scheduler and random states with `torch.save`, and where a `.bin` lies beside
the weights it may read that. `SafeTrainer` writes and reads safetensors only, and writes a `seal.json` (the SHA-256 of
every such file) when all the rest is on the disk. Not for: deciding whether a run is continued (`training.py`), or FSDP
and DeepSpeed, whose checkpoints are those engines' own.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from utils.runs import digest, locked, write_atomic, writing

SEAL, OURS = "seal.json", (".json", ".safetensors")
OPTIMIZER, RNG, LOCK = "optimizer.safetensors", "rng_state.safetensors", "train.lock"
ADAPTER_WEIGHTS, MODEL_WEIGHTS = "adapter_model.safetensors", "model.safetensors"
DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError, RuntimeError, SafetensorError)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be continued from; the message names the folder to delete."""


def one_at_a_time(train: Callable) -> Callable:
    """Make `train(..., folder=...)` refuse a folder in which another process trains, with `BusyError`.

    Of the processes of one distributed run (`RANK`), only the first takes the lock.
    """

    @functools.wraps(train)
    def guarded(*arguments: object, folder: Path | str, **options: object) -> object:
        first = os.environ.get("RANK", "0") == "0"
        with locked(Path(folder) / LOCK, "training", wait=0) if first else nullcontext():
            return train(*arguments, folder=folder, **options)

    return guarded


class SafeTrainer(Trainer):
    """The Trainer, with checkpoints of safetensors and JSON that are sealed when they are whole, and rotated after."""

    def train(self, resume_from_checkpoint: str | None = None, **options: object) -> TrainOutput:
        """As the Trainer's; from a checkpoint of the last step, beyond which it would train, the best one is taken."""
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            if state.global_step >= self.args.max_steps:
                self.state = state
                self._find_best()
                self._load_best_model()
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    @property
    def _engine_saves(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle that nothing reads
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """As the Trainer's; the checkpoints before go only when the new one is sealed, by step and not by the clock."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint, limit = folder / f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        self.args.save_total_limit = None  # the Trainer would remove the old ones before the seal
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    seal(checkpoint)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._engine_saves:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_optimizer(Path(output_dir, OPTIMIZER), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._engine_saves:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            self._find_best()
            load_optimizer(Path(checkpoint, OPTIMIZER), self.optimizer, self.lr_scheduler)

    def _find_best(self) -> None:
        """The best checkpoint by its step: its path is another one where the run's folder was moved."""
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: float16, which needs a scaler, is not used."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing, whatever file of that name lies there."""

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_rng(self._rng_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (path := self._rng_file(checkpoint)).is_file():  # none: of fewer processes
            load_rng(path)

    def _rng_file(self, checkpoint: str) -> Path:
        alone = self.args.world_size <= 1
        return Path(checkpoint, RNG if alone else f"rng_state_{self.args.process_index}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self._engine_saves:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._engine_saves:
            super()._load_best_model()
        else:
            load_weights(self.model, Path(self.state.best_model_checkpoint))


# --- one checkpoint ---


def seal(checkpoint: Path) -> None:
    """Write `seal.json`, the last file of a checkpoint, once the others are on the disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.suffix in OURS and path.name != SEAL)
    sums = {path.relative_to(checkpoint).as_posix(): digest(path) for path in files}
    write_atomic(checkpoint / SEAL, json.dumps(sums, indent=1).encode())


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint is sealed, and every sealed file is there with its SHA-256."""
    try:
        sums = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        return TRAINER_STATE_NAME in sums and all(digest(checkpoint / name) == sums[name] for name in sums)
    except (*DAMAGED, RecursionError):
        return False


def drop_broken(checkpoints: Path) -> None:
    """Remove the checkpoints that a kill, a full disk or damage has left half: nothing is ever loaded from them."""
    for checkpoint in checkpoints.glob("checkpoint-*"):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """The trained numbers of a checkpoint, from its safetensors file and no other, into `model`.

    Raises CheckpointError where there is none, or it does not fit.
    """
    try:
        if isinstance(model, PeftModel):
            name = model.active_adapter
            folder = checkpoint if name == "default" else checkpoint / name  # where peft puts it
            set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS), adapter_name=name)
            return
        found = model.load_state_dict(load_file(checkpoint / MODEL_WEIGHTS), strict=False)
        absent = set(found.missing_keys) - set(model.all_tied_weights_keys)
        if absent or found.unexpected_keys:
            raise ValueError(f"it does not fit the model at {sorted([*absent, *found.unexpected_keys])[0]}")
    except DAMAGED as error:
        raise damaged(checkpoint, error) from error


def damaged(checkpoint: Path, error: object) -> CheckpointError:
    """The error that names the folder to delete."""
    return CheckpointError(f"{checkpoint} cannot be continued from ({error}): delete this folder and train again")


# --- the states beside the weights ---


def write_state(path: Path, tensors: dict[str, Tensor], values: dict) -> None:
    """A safetensors file of `tensors`, with `values` as JSON in its header."""
    save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path, {"values": json.dumps(values)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `write_state` wrote: tensors on the CPU, values. Raises CheckpointError."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["values"])  # noqa: SIM118
    except DAMAGED as error:
        raise damaged(path.parent, error) from error


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: object) -> None:
    """Both states in one file: the optimiser's tensors as "<parameter>.<name>", the rest as JSON."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{name}": value for i, values in state["state"].items() for name, value in values.items()}
    write_state(path, tensors, {"groups": state["param_groups"], "scheduler": scheduler.state_dict()})


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: object) -> None:
    """Put back what `save_optimizer` wrote. Raises CheckpointError where it does not fit."""
    tensors, values = read_state(path)
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in values["groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        scheduler.load_state_dict(values["scheduler"])
    except DAMAGED as error:
        raise damaged(path.parent, error) from error


def save_rng(path: Path) -> None:
    """The states of Python's, NumPy's and torch's random numbers (and the current GPU's)."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    tensors = {"python": torch.tensor(words), "numpy": torch.from_numpy(keys.astype(np.int64)),
               "cpu": torch.random.get_rng_state()}  # fmt: skip
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    write_state(path, tensors, {"python": [version, gauss], "numpy": [name, *rest]})


def load_rng(path: Path) -> None:
    """Put back what `save_rng` wrote; the GPU's where there is one on both sides. Raises CheckpointError."""
    tensors, values = read_state(path)
    try:
        version, gauss = values["python"]
        name, *rest = values["numpy"]
        random.setstate((version, tuple(tensors["python"].tolist()), gauss))
        np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.random.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
    except DAMAGED as error:
        raise damaged(path.parent, error) from error
