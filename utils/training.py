"""One `train(...)` for every method, on the Hugging Face `Trainer`: same blocks, same order, one record per run.

The Trainer brings gradient accumulation, resuming and data-parallel; this module fixes what a fair comparison
needs (linear warm-up and decay, weight decay 0 because it would pull the vectors to 0 and not to 1, evaluation on
held-out blocks, the best step kept) and writes a `RunRecord`. Not for: figures, or judging text.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save as to_safetensors
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from utils.adapters import base_fingerprint, count_parameters
from utils.checkpoints import SafeTrainer, drop_broken, one_at_a_time
from utils.config import Profile
from utils.gpu import PeakMemory, autocast, fast_bf16
from utils.recipe import Recipe
from utils.rivals import load_trainable_state, trainable_state
from utils.runs import RunRecord, environment
from utils.trainer import PerLabelTrainer, Progress

RECORD, RUNNING = "run.json", "running.json"  # of a finished run; of one that is not, or was interrupted


class TrainingError(RuntimeError):
    """Training cannot start or has diverged; the message names the remedy."""


class DivergedError(TrainingError):
    """The loss of a run is not finite: its learning rate is too high."""


def training_arguments(
    profile: Profile | Recipe,
    folder: Path,
    device: torch.device,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    interval: int | None = None,
) -> TrainingArguments:
    """What a fair run fixes for every method. `data_seed` makes the order of blocks depend on the seed alone.

    `interval`: steps from one evaluation to the next; None: the profile's `eval_every`.
    """
    interval = min(interval or profile.eval_every, steps)
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=profile.batch_size,
        per_device_eval_batch_size=profile.batch_size,
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
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        label_names=["labels"],
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


@one_at_a_time
def train(
    model: torch.nn.Module,
    blocks: Dataset,
    profile: Profile | Recipe,
    *,
    method: str,
    eval_blocks: Dataset,
    folder: Path | str,
    task: str = "positive",
    seed: int = 0,
    learning_rate: float | None = None,
    steps: int | None = None,
    collator: Callable[[list[dict]], dict] | None = None,
) -> RunRecord:
    """Train what `attach(model, method)` made trainable on `blocks` (each `block_length` ids), keep the best step.

    With a recipe in the profile's place, `blocks` are encoded examples, `collator` pads a list of them to a batch
    (`encoding.make_collator`), and epochs decide the steps. Losses are mean nats per label: per token, or per
    example where a class is predicted. An interrupted run of the same configuration in `folder` is continued from its
    last checkpoint; any other one there is started over, from the state in which this function first saw the model, so
    that a notebook's cell can be run twice. The model ends in evaluation mode, at the step with the
    lowest held-out loss. Raises `TrainingError` when nothing is trainable or there are fewer blocks than one batch,
    `DivergedError` when the loss is not finite (the record in `folder` then says "failed"), `BusyError` where another
    process trains in `folder`, `WriteError` where the disk is full or read-only, `CheckpointError` for a damaged one.
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
    config = {
        "learning_rate": learning_rate, "steps": steps, **profile.run_settings(), f"train_{profile.UNIT}": len(blocks),
        f"eval_{profile.UNIT}": len(eval_blocks), "base": base_fingerprint(model),
    }  # fmt: skip
    versions, hardware = environment()
    record = RunRecord(
        status="running", method=method, task=task, profile=profile.name, config_id=profile.config_id(), config=config,
        seed=seed, counts={"trainable": counts.trainable, "total": counts.total}, versions=versions, hardware=hardware,
    )  # fmt: skip
    checkpoint = resume_point(folder, record)
    start_over(model)
    set_seed(seed)
    progress = Progress()
    trainer = (PerLabelTrainer if isinstance(profile, Recipe) else SafeTrainer)(
        model=model,
        args=training_arguments(
            profile, folder, model.device, learning_rate=learning_rate, steps=steps, seed=seed, interval=interval
        ),
        data_collator=collator,
        train_dataset=blocks,
        eval_dataset=eval_blocks,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with PeakMemory(model.device) as peak:
            if checkpoint is None:
                start = trainer.evaluate()["eval_loss"]  # the model before training
                record.history = check_finite([{"step": 0, "eval_loss": start}])
            record.save(folder / RUNNING)
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        # Accelerate leaves its autocast on the model, over the class's forward: what follows would be bfloat16 too.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
    model.eval()

    history = record.history[:1] + readable_history(trainer.state.log_history)
    try:
        record.history = check_finite(history)
    except DivergedError:
        record.status = "failed"
        record.save(folder / RUNNING)
        raise
    record.metrics = summary(record.history)
    record.time = {"steps_timed": len(progress.seconds)}
    if progress.seconds:  # none where a kill came after the last checkpoint
        record.time["step_seconds_median"] = statistics.median(progress.seconds)
    record.memory = {"peak_bytes": peak.bytes}
    record.bytes_on_disk = trainable_bytes(model)
    record.status = "finished"
    record.save(folder / RECORD)
    (folder / RUNNING).unlink()
    return record


def start_over(model: torch.nn.Module) -> None:
    """Give `model` the trainable numbers back that it had when it was first trained, or remember them now."""
    first = vars(model).get("first_state", {})
    if first.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}:
        load_trainable_state(model, first)
    else:
        model.first_state = trainable_state(model)


def resume_point(folder: Path, record: RunRecord) -> str | None:
    """The last checkpoint of an interrupted run of the same configuration, whose history `record` then takes over.

    Checkpoints of any other run are removed, and so is one that is not whole (`checkpoints.py`).
    """
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        return None
    try:
        before = RunRecord.load(folder / RUNNING)
    except (RuntimeError, OSError):
        before = None
    keys = ("method", "task", "config_id", "config", "seed", "versions")
    if before and before.status == "running" and all(getattr(before, k) == getattr(record, k) for k in keys):
        drop_broken(checkpoints)
        record.history = before.history
        return get_last_checkpoint(str(checkpoints)) if before.history else None
    shutil.rmtree(checkpoints)
    return None


def step_ratios(
    models: Mapping[str, torch.nn.Module], blocks: Dataset, batch_size: int, rounds: int = 7
) -> dict[str, float]:
    """Time of one optimiser step of each model as a ratio to the last one's, from one interleaved run.

    The models take turns on the same batch (the first of `blocks`) with AdamW at rate 0, so nothing is learned; the
    first round warms up, and the ratio is the median of those within the rounds. Above 1 is slower.
    """
    inputs = {name: blocks[:batch_size][name] for name in ("input_ids", "labels")}
    optimizers = {name: idle_optimizer(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            seconds[name].append(step_seconds(model, optimizers[name], inputs))
    *_, yardstick = seconds.values()
    return {
        name: statistics.median(a / b for a, b in zip(values[1:], yardstick[1:], strict=True))
        for name, values in seconds.items()
    }


def idle_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over what `model` trains, at rate 0: it does its work and changes nothing."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)


def step_seconds(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict) -> float:
    """Wall-clock seconds of a forward pass, a backward pass and an update; `inputs`: the model's, (batch, length)."""
    batch = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    started = time.perf_counter()
    with autocast(model.device):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


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


def check_finite(history: list[dict]) -> list[dict]:
    """The history itself; `DivergedError` names the first step whose loss is NaN or infinite."""
    for row in history:
        if not all(math.isfinite(value) for value in row.values()):
            raise DivergedError(f"the loss is not finite at step {row['step']}: use a lower learning rate")
    return history


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


def trainable_bytes(model: torch.nn.Module) -> int:
    """Size in bytes of a safetensors file with the trainable parameters, in memory; nothing is written."""
    return len(to_safetensors(trainable_state(model)))
