"""One `train(...)` for every method, on the Hugging Face `Trainer`: same blocks, same order, one record per run.

The Trainer brings gradient accumulation, resuming and data-parallel; this module fixes what a fair comparison
needs (linear warm-up and decay, weight decay 0 because it would pull the vectors to 0 and not to 1, evaluation on
held-out blocks, the best step kept) and writes a `RunRecord`. Not for: figures, or judging text.
"""

from __future__ import annotations

import functools
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from safetensors.torch import save as to_safetensors
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from extensions.recipes import Recipe
from utils.batches import SMALLER, batch_that_fitted, plan_of, smaller
from utils.checkpoints import drop_broken, one_at_a_time
from utils.config import Profile
from utils.counts import count_parameters
from utils.gpu import PeakMemory, fast_bf16
from utils.history import DivergedError, TrainingError, check_finite, readable_history, summary
from utils.processes import decided_by_first, join, process_count, process_index, wait_for_all
from utils.rivals import load_trainable_state, trainable_state
from utils.runs import RunRecord, environment
from utils.shares import Plan
from utils.step_times import idle_optimizer, step_ratios, step_seconds
from utils.storage import base_fingerprint
from utils.trainer import BlockTrainer, PerLabelTrainer, Progress

__all__ = [
    "RECORD", "RUNNING", "DivergedError", "TrainingError", "check_finite", "idle_optimizer", "readable_history",
    "resume_point", "start_over", "step_ratios", "step_seconds", "summary", "train", "trainable_bytes",
    "training_arguments",
]  # fmt: skip

RECORD, RUNNING = "run.json", "running.json"  # of a finished run; of one that is not, or was interrupted


def training_arguments(
    profile: Profile | Recipe,
    folder: Path,
    device: torch.device,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    interval: int | None = None,
    plan: Plan | None = None,
    checkpointing: bool = False,
) -> TrainingArguments:
    """What a fair run fixes for every method. `data_seed` makes the order of blocks depend on the seed alone.

    `interval`: steps from one evaluation to the next; None: the profile's `eval_every`. `plan`: how the optimiser's
    batch is shared out; None: one process, the profile's batches. `checkpointing` as in `train`.
    """
    interval = min(interval or profile.eval_every, steps)
    plan = plan or plan_of(profile, processes=1)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=plan.batch,
        per_device_eval_batch_size=plan.batch,
        gradient_accumulation_steps=plan.accumulation,
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
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs one process takes one, not a batch for each of them
    return arguments


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
    checkpointing: bool = False,
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

    Called by every process of a launch (`torchrun`, Accelerate; `scripts/train.py`) it trains as one process does, on
    the same rows in each step: process 0 decides about resuming and alone writes records, for which all must see the
    same `folder`. `checkpointing` computes activations anew in the backward pass in the place of keeping them. Where
    memory runs out, batches become half as large and twice as many a step, from the last checkpoint on.
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
    join(model.device)
    plan = plan_of(profile, process_count(), batch_that_fitted(folder, config))
    while True:
        arguments = training_arguments(
            profile, folder, model.device, learning_rate=learning_rate, steps=steps, seed=seed, interval=interval,
            plan=plan, checkpointing=checkpointing,
        )  # fmt: skip
        trainer_class = PerLabelTrainer if isinstance(profile, Recipe) else BlockTrainer
        make_trainer = functools.partial(
            trainer_class, model=model, args=arguments, data_collator=collator, train_dataset=blocks,
            eval_dataset=eval_blocks, plan=None if plan == plan_of(profile, processes=1) else plan,
        )  # fmt: skip
        try:
            return _run(make_trainer, record, folder)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            plan = smaller(plan, folder, config, error)
        clear_device_cache(garbage_collection=True)  # here, where the failed attempt's tensors are held no more


def _run(make_trainer: Callable[..., BlockTrainer], record: RunRecord, folder: Path) -> RunRecord:
    """One attempt at the run of `record`, with batches that may prove too large: trains, and finishes the record."""
    progress = Progress()
    checkpoint = agreed_resume_point(folder, record)
    model = make_trainer.keywords["model"]
    start_over(model)
    set_seed(record.seed)
    trainer = make_trainer(callbacks=[progress])
    trainer.remove_callback(PrinterCallback)
    try:
        with PeakMemory(model.device) as peak:
            if checkpoint is None:
                start = trainer.evaluate()["eval_loss"]  # the model before training
                record.history = check_finite([{"step": 0, "eval_loss": start}])
                release(model)
            save_as_first(record, folder / RUNNING)
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        release(model)
        if trainer.args.activation_checkpointing:
            model.gradient_checkpointing_disable()
    model.eval()

    history = record.history[:1] + readable_history(trainer.state.log_history)
    try:
        record.history = check_finite(history)
    except DivergedError:
        record.status = "failed"
        save_as_first(record, folder / RUNNING)
        raise
    record.metrics = summary(record.history)
    record.time = {"steps_timed": len(progress.seconds)}
    if progress.seconds:  # none where a kill came after the last checkpoint
        record.time["step_seconds_median"] = statistics.median(progress.seconds)
    record.memory = {"peak_bytes": peak.bytes}
    if trainer.plan is not None:  # how it was computed; what was computed is the same
        record.hardware |= {"processes": trainer.plan.processes, "batch": trainer.plan.batch}
    record.bytes_on_disk = trainable_bytes(model)
    record.status = "finished"
    save_as_first(record, folder / RECORD)
    if process_index() == 0:
        (folder / RUNNING).unlink()
        (folder / SMALLER).unlink(missing_ok=True)
    wait_for_all()
    return record


def release(model: torch.nn.Module) -> None:
    """Take off `model` what Accelerate leaves on it: its autocast over the class's forward, and its mark.

    With the first, what follows would be in bfloat16 too. With the second, left by an evaluation, Accelerate takes the
    model for prepared: several processes would then train each for itself, without a word.
    """
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)


def save_as_first(record: RunRecord, path: Path) -> None:
    """Write the record, in process 0 alone."""
    if process_index() == 0:
        record.save(path)


def agreed_resume_point(folder: Path, record: RunRecord) -> str | None:
    """As `resume_point`, decided by process 0 for all. `TrainingError` in a process with another configuration."""
    checkpoint = resume_point(folder, record) if process_index() == 0 else None
    settings = record.config | {"method": record.method, "task": record.task, "seed": record.seed}
    checkpoint, record.history, first = decided_by_first((checkpoint, record.history, settings))
    if first != settings:
        differing = sorted(key for key in first if first[key] != settings.get(key))
        raise TrainingError(
            f"process {process_index()} and process 0 differ in {', '.join(differing)}: give all the same arguments, "
            "data and model"
        )
    return checkpoint


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


def trainable_bytes(model: torch.nn.Module) -> int:
    """Size in bytes of a safetensors file with the trainable parameters, in memory; nothing is written."""
    return len(to_safetensors(trainable_state(model)))
