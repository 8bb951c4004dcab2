"""What a `Profile` (`config.py`) and a `Recipe` (`recipes.py`) share: frozen, checked, overridable, identified.

For: `Settings`, their base class, and `override`, which puts the numbers of `LAB_OVERRIDE` in. Not for: any one profile
or recipe, or choosing among them. Importing this module imports neither torch nor transformers.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar, TypeVar

ROOT = Path(__file__).resolve().parent.parent


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


def short(revision: str) -> str:
    """A commit hash by its first 8 digits, any other revision (a branch, a pull request) by its whole name."""
    return revision[:8] if len(revision) == 40 else revision


class Settings:
    """Base of a frozen dataclass with the field `model` among others: mappings frozen, numbers checked."""

    NOT_TRAINING: ClassVar[frozenset[str]]  # fields that `config_id` leaves out
    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"seed", "warmup_ratio"})

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(getattr(self, field.name), Mapping):
                object.__setattr__(self, field.name, FrozenDict(getattr(self, field.name)))
            _check_number(field.name, field.type, getattr(self, field.name), self.MAY_BE_ZERO)

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


_UPPER = {"warmup_ratio": 1.0, "top_p": 1.0}


def _check_number(name: str, kind: type, value: object, may_be_zero: frozenset[str]) -> None:
    """Raise ConfigError where a numeric field is not a number of its kind or out of its range."""
    if kind not in (int, float):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise ConfigError(f"{name}={value!r}: {kind.__name__} expected")
    too_small = value < 0 or (value == 0 and name not in may_be_zero)
    if not math.isfinite(value) or too_small or value > _UPPER.get(name, math.inf):
        least = "0 or more" if name in may_be_zero else "more than 0"
        raise ConfigError(f"{name}={value}: must be {least}{', at most 1' if name in _UPPER else ''}")


SettingsT = TypeVar("SettingsT", bound=Settings)


def override(profile: SettingsT, text: str) -> SettingsT:
    """`profile` with the numbers of "steps=4,train_reviews=60" put in; an empty text changes nothing.

    Raises ConfigError for an unknown field or a value that is no number of its kind.
    """
    kinds = {field.name: field.type for field in fields(profile) if field.type in (int, float)}
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
