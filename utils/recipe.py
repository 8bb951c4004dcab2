"""What an optional lab needs to know of its run, in one frozen `Recipe`; `train` takes it where it takes a `Profile`.

Not for: which recipes there are and choosing one (`recipes.py`). Importing this module imports neither torch nor
transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from utils.config import ConfigError, Settings

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM")


@dataclass(frozen=True)
class Recipe(Settings):
    """Everything that decides a lab's run; lengths in tokens, `batch_size` and `*_examples` in examples."""

    NOT_TRAINING = frozenset({"seed", "learning_rates", "expected"})
    MAY_BE_ZERO = Settings.MAY_BE_ZERO | {"label_length", "train_examples", "eval_examples"}
    UNIT: ClassVar[str] = "examples"

    lab: str
    size: str  # "mini" or "full"
    task_type: str  # as peft spells it, one of TASK_TYPES
    model: str  # a Hub id, the name of a stand-in, or an absolute folder
    model_revision: str | None
    model_type: str  # as transformers spells it
    shape: Mapping[str, int | str | bool]  # the sizes in its configuration that differ from the class's own
    data: str  # a Hub dataset id, the name of a package, or an absolute folder
    data_revision: str | None
    labels: tuple[str, ...]  # label texts, in the order of their numbers; none where answers are free text
    prompt: str  # what is put around "{text}"
    target_modules: tuple[str, ...] | str  # ends of module names, or one regular expression for whole names
    feedforward_modules: tuple[str, ...]  # those of them that are scaled on their input
    max_length: int  # of the input; of prompt and answer together for CAUSAL_LM
    label_length: int  # of a label text with its end token
    batch_size: int
    accumulation: int  # batches to one optimiser step
    epochs: int
    learning_rates: Mapping[str, float]  # by method
    expected: Mapping[str, int]  # numbers that (IA)³ trains and all, as peft counts them
    evals_per_epoch: int = 1
    train_examples: int = 0  # 0: all there are
    eval_examples: int = 0
    warmup_ratio: float = 0.06
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type not in TASK_TYPES:
            raise ConfigError(f"unknown task type {self.task_type!r}: peft spells them {', '.join(TASK_TYPES)}")

    @property
    def name(self) -> str:
        """Lab and size, "bert-paraphrase-mini": the folder its artefacts go to, the `profile` of its run records."""
        return f"{self.lab}-{self.size}"

    @property
    def data_name(self) -> str:
        """The data without the path of a machine."""
        return Path(self.data).name if Path(self.data).is_absolute() else self.data

    @property
    def local_data(self) -> Path | None:
        """The folder that holds the data, or None where they come from the Hub or a package."""
        return Path(self.data) if Path(self.data).is_absolute() else None

    def settings(self) -> dict:
        """All fields as JSON values, model and data by their names."""
        return super().settings() | {"data": self.data_name}

    def schedule(self, examples: int) -> tuple[int, int]:
        """(optimiser steps, steps from one evaluation to the next) for this many training examples.

        Evaluations are evenly spaced and the last is at the end: an epoch is cut by less than `evals_per_epoch` steps.
        """
        epoch = math.ceil(math.ceil(examples / self.batch_size) / self.accumulation)
        interval = max(1, epoch // self.evals_per_epoch)
        return interval * min(self.evals_per_epoch, epoch) * self.epochs, interval

    def run_settings(self) -> dict:
        """The sizes that a run record repeats beside `config_id`."""
        names = ("batch_size", "accumulation", "epochs", "max_length", "label_length", "warmup_ratio")
        return {name: getattr(self, name) for name in names}
