"""One `train(...)` for every method, on the stock Hugging Face `Trainer`: same blocks, same order, one record a run.

It fixes what a fair comparison needs: linear warm-up and decay, weight decay 0 (decay would pull the vectors to 0, and
the base is at 1), evaluation on held-out blocks, the best step kept. Checkpoints are the Trainer's own, several
processes (`torchrun`, `accelerate launch`) are Accelerate's.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from utils.adapters import base_fingerprint, load_trainable_state, trainable_state
from utils.config import Settings
from utils.gpu import PeakMemory, fast_bf16
from utils.runs import RunRecord, WriteError, environment, locked, writing
from utils.sizes import count_parameters

RECORD, RUNNING = "run.json", "running.json"  # of a finished run; of one that is not, or was interrupted
LOCK = "train.lock"


class TrainingError(RuntimeError):
    """Training cannot start, ran out of memory or has diverged; the message names the remedy."""


class DivergedError(TrainingError):
    """The loss of a run is not finite: its learning rate is too high."""


class OneGpuArguments(TrainingArguments):
    """The Trainer's arguments, of which one process takes one GPU; else it takes all it sees, a batch for each."""

    @property
    def n_gpu(self) -> int:
        """At most 1."""
        return min(super().n_gpu, 1)


def training_arguments(
    profile: Settings,
    folder: Path,
    device: torch.device,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    interval: int | None = None,
    checkpointing: bool = False,
) -> TrainingArguments:
    """What a fair run fixes for every method. `data_seed` makes the order of blocks depend on the seed alone.

    `interval`: steps from one evaluation to the next; None: the profile's `eval_every`. `checkpointing` as in `train`.
    Raises `TrainingError` where the processes of a launch cannot share a batch evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher
    if profile.batch_size % processes:
        raise TrainingError(
            f"{processes} processes cannot share batches of {profile.batch_size} {profile.UNIT} evenly: start a number "
            "that divides them, or set LAB_OVERRIDE=batch_size=..."
        )
    interval = min(interval or profile.eval_every, steps)
    return OneGpuArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=profile.batch_size // processes,
        per_device_eval_batch_size=profile.batch_size // processes,
        gradient_accumulation_steps=profile.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=profile.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=0.0,
        optim="adamw_torch",
        bf16=fast_bf16(device),
        use_cpu=device.type == "cpu",
        logging_steps=max(n for n in range(1, 11) if interval % n == 0),  # no logged mean spans a checkpoint
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,  # one to fall back to
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        label_names=["labels"],
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )


def train(
    model: torch.nn.Module,
    blocks: Dataset,
    profile: Settings,
    *,
    method: str,
    eval_blocks: Dataset,
    folder: Path | str,
    task: str = "positive",
    seed: int = 0,
    learning_rate: float | None = None,
    steps: int | None = None,
    collator: Callable[[list[dict]], dict] | None = None,
    checkpointing: bool = False,
    trainer_class: type[Trainer] = Trainer,
) -> RunRecord:
    """Train what `attach(model, method)` made trainable on `blocks` (each `block_length` ids), keep the best step.

    Losses are mean nats per label; `profile.schedule` decides the steps, `collator` makes a batch of a list of rows.
    An interrupted run of the same configuration in `folder` goes on from its last checkpoint; any other one there is
    started over, from the numbers with which this function first saw the model: a notebook's cell can be run twice.
    The model ends in evaluation mode, at the step with the lowest held-out loss. `checkpointing` computes activations
    anew in the backward pass in the place of keeping them.

    Every process of a launch calls this, with the same arguments; process 0 decides about resuming and writes the
    records. All must see the same `folder`. Raises `TrainingError` where nothing is trainable, there are fewer blocks
    than one batch, or memory runs out; `DivergedError` when the loss is not finite (the record in `folder` then says
    "failed"), `BusyError` where another process trains in `folder`, `WriteError` where it cannot be written.
    """
    folder = Path(folder)
    planned, interval = profile.schedule(len(blocks))
    steps = planned if steps is None else steps
    learning_rate = profile.learning_rates.get(method) if learning_rate is None else learning_rate
    counts = count_parameters(model)
    if counts.trainable == 0:
        raise TrainingError("nothing to train: every parameter is frozen. Use attach(model, method) first")
    if learning_rate is None:
        raise TrainingError(f"no learning rate for {method!r} in the profile: pass learning_rate=...")
    if steps < 1 or not learning_rate > 0:
        raise TrainingError(f"{steps=} must be at least 1, and {learning_rate=} more than 0")
    if len(blocks) < profile.batch_size:
        raise TrainingError(
            f"{len(blocks)} {profile.UNIT} are less than one batch of {profile.batch_size}: use more training data"
        )
    if checkpointing and method == "prefix":
        raise TrainingError("prefix tuning hands its keys and values over in a cache, which checkpointing switches off")
    config = {
        "learning_rate": learning_rate, "steps": steps, **profile.run_settings(), f"train_{profile.UNIT}": len(blocks),
        f"eval_{profile.UNIT}": len(eval_blocks), "base": base_fingerprint(model),
    }  # fmt: skip
    versions, hardware = environment()
    record = RunRecord(
        status="running", method=method, task=task, profile=profile.name, config_id=profile.config_id(), config=config,
        seed=seed, counts={"trainable": counts.trainable, "total": counts.total}, versions=versions, hardware=hardware,
    )  # fmt: skip
    use_cache = model.config.use_cache  # the Trainer switches it off
    first = os.environ.get("RANK", "0") == "0"  # of the processes of a launch
    with locked(folder / LOCK, "training", wait=0) if first else nullcontext():
        arguments = training_arguments(
            profile, folder, model.device, learning_rate=learning_rate, steps=steps, seed=seed, interval=interval,
            checkpointing=checkpointing,
        )  # fmt: skip
        (checkpoint,) = broadcast_object_list([resume_point(folder, record) if first else None])
        start_over(model)
        set_seed(seed)
        arguments.eval_on_start = checkpoint is None  # the held-out loss before the first step
        progress = Progress()
        trainer = trainer_class(
            model=model, args=arguments, data_collator=collator, train_dataset=blocks, eval_dataset=eval_blocks,
            callbacks=[progress],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        try:
            with writing(folder), PeakMemory(model.device) as peak:
                if first:
                    record.save(folder / RUNNING)
                trainer.train(resume_from_checkpoint=checkpoint)
        except RuntimeError as error:
            explain(error, profile, folder)
            raise
        finally:  # a model is used further, as it was: no autocast over it, no mark, no checkpointing, its cache
            for left in ("forward", "_original_forward", "_is_accelerate_prepared"):  # by Accelerate
                vars(model).pop(left, None)
            if checkpointing:
                model.activation_checkpointing_disable()
            model.config.use_cache = use_cache
            model.eval()

        record.history = readable_history(trainer.state.log_history)
        for number, row in enumerate(record.history):
            if not all(math.isfinite(value) for value in row.values()):
                record.status, record.history = "failed", record.history[:number]
                if first:
                    record.save(folder / RUNNING)
                raise DivergedError(f"the loss is not finite at step {row['step']}: use a lower learning rate")
        record.metrics = summary(record.history)
        record.time = {"steps_timed": len(progress.seconds), "step_seconds_median": statistics.median(progress.seconds)}
        record.memory = {"peak_bytes": peak.bytes}
        if arguments.world_size > 1:
            record.hardware["processes"] = arguments.world_size
        record.bytes_on_disk = trainable_bytes(model)
        record.status = "finished"
        if first:
            record.save(folder / RECORD)
            (folder / RUNNING).unlink()
            for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
                if checkpoint.name != f"checkpoint-{record.metrics['best_step']}":
                    shutil.rmtree(checkpoint, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return record


def explain(error: RuntimeError, profile: Settings, folder: Path) -> None:
    """Raise what to do where memory ran out, or where torch could not write to the disk."""
    if any(word in str(error) for word in ("iostream", "inline_container", "PytorchStreamWriter")):
        raise WriteError(f"{folder}: cannot be written ({error}): free some space, or set LAB_ARTIFACTS") from error
    if not should_reduce_batch_size(error):
        return
    if profile.batch_size == 1:
        raise TrainingError("out of memory with one row: use checkpointing=True, or shorter rows") from error
    fits = [os.environ.get("LAB_OVERRIDE"), f"batch_size={profile.batch_size // 2}"]
    if "accumulation" in profile.run_settings():
        fits.append(f"accumulation={2 * profile.accumulation}")  # as many rows a step as before
    raise TrainingError(
        f"out of memory with batches of {profile.batch_size} {profile.UNIT}: set LAB_OVERRIDE="
        f"{','.join(filter(None, fits))} before you start Jupyter, or use checkpointing=True"
    ) from error


# --- going on, or starting over ---


def resume_point(folder: Path, record: RunRecord) -> str | None:
    """The checkpoint from which an interrupted run of the same configuration goes on; None: it starts over.

    The newest that is whole and has its best one beside it, before the last step: the Trainer would train beyond that.
    The others, and all of another run, are removed.
    """
    checkpoints, keys = folder / "checkpoints", ("method", "task", "config_id", "config", "seed", "versions")
    try:
        before = RunRecord.load(folder / RUNNING)
    except (RuntimeError, ValueError, OSError):
        before = None
    if not before or before.status != "running" or any(getattr(before, k) != getattr(record, k) for k in keys):
        shutil.rmtree(checkpoints, ignore_errors=True)
        return None
    usable: dict[int, str] = {}
    for checkpoint in sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        state = state_of(checkpoint)
        step, best = (state.global_step, state.best_global_step) if state else (math.inf, None)
        if step < record.config["steps"] and best in (*usable, step):
            usable[step] = str(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return usable[max(usable)] if usable else None


def state_of(checkpoint: Path) -> TrainerState | None:
    """The state in a checkpoint all of whose files can be read; None where a kill or a full disk has left it half."""
    files = [path for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    if not all(any(part in path.name for path in files) for part in ("model", "optimizer", "scheduler", "rng_state")):
        return None
    try:
        for path in files:
            if path.suffix == ".safetensors":
                safe_open(path, "pt").__exit__(None, None, None)  # compares its header with the file's length
            elif zipfile.ZipFile(path).testzip():  # what torch.save writes; here nothing is unpickled
                return None
        return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, SafetensorError):
        return None


def start_over(model: torch.nn.Module) -> None:
    """Give `model` the trainable numbers back that it had when it was first trained, or remember them now."""
    first = vars(model).get("first_state", {})
    if first.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}:
        load_trainable_state(model, first)
    else:
        model.first_state = trainable_state(model)


def trainable_bytes(model: torch.nn.Module) -> int:
    """Size in bytes of a safetensors file with the trainable parameters, in memory; nothing is written."""
    trained = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in model.named_parameters() if p.requires_grad}
    return len(to_safetensors(trained))


# --- what is seen of a run, and what it comes to ---


class Progress(TrainerCallback):
    """A bar with one line per evaluation on stdout, in process 0 alone, and the time of each step."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, *_: object, **_named: object) -> None:
        """Open the bar; after a resume it starts where the run was."""
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, file=sys.stdout, leave=False, unit="step",
            disable=not state.is_world_process_zero,
        )  # fmt: skip

    def on_step_begin(self, *_: object, **_named: object) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **_named: object) -> None:
        """Stop the clock, move the bar."""
        self.seconds.append(time.perf_counter() - self.started)
        self.bar.update()

    def on_evaluate(
        self, _args: TrainingArguments, state: TrainerState, *_: object, metrics: dict, **_named: object
    ) -> None:
        """Print the held-out loss, after the first step."""
        if state.global_step and not self.bar.disable:
            self.bar.write(f"step {state.global_step:>5}   held-out loss {metrics['eval_loss']:.4f}", file=sys.stdout)

    def on_train_end(self, *_: object, **_named: object) -> None:
        """Close the bar."""
        self.bar.close()


def readable_history(log: list[dict]) -> list[dict]:
    """The Trainer's log as one row a step: `{"step", "train_loss" and/or "eval_loss"}`."""
    rows: dict[int, dict] = {}
    for entry in log:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        if "loss" in entry:
            row["train_loss"] = float(entry["loss"])
        if "eval_loss" in entry:
            row["eval_loss"] = float(entry["eval_loss"])
    return [rows[step] for step in sorted(rows) if len(rows[step]) > 1]


def summary(history: list[dict]) -> dict[str, float]:
    """Held-out loss before training and at the best trained step (nats per token), and the steps that reached it.

    `steps_to_1_percent` is the first evaluated step whose loss is within 1 % of the best one: 0 where the whole gain
    is smaller than that. `steps_to_90_percent` is the first one with nine tenths of the gain.
    """
    start, *evaluated = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    best_step, best = min(evaluated, key=lambda pair: pair[1])
    near = next(step for step, loss in [start, *evaluated] if loss <= 1.01 * best)
    gain = 0.9 * (start[1] - best)
    most = next((step for step, loss in evaluated if start[1] - loss >= gain), best_step)
    return {
        "start_loss": start[1], "best_loss": best, "best_step": best_step, "steps_to_1_percent": near,
        "steps_to_90_percent": most,
    }  # fmt: skip
