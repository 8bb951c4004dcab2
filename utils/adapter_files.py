"""What lies in an adapter folder, read and checked before peft sees it: the files may come from anybody.

`adapter_config.json` decides what peft builds (and how much memory, or how long a pattern's search, that costs), so
only the options that the course's own adapters use may differ from peft's defaults. Tensors come from
`adapter_model.safetensors` alone: an `adapter_model.bin` is a pickle, which runs code when it is read.
Not for: attaching, or the proof by logits (`storage.py`).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.files import read_json_file

FILES = ("adapter_config.json", "adapter_model.safetensors", "probe.json")
SMALL = 2**20  # bytes of JSON: ours have some thousands
KINDS = {"IA3": IA3Config, "LORA": LoraConfig, "PREFIX_TUNING": PrefixTuningConfig}
FREE = {  # the options that the course sets, or that peft fills in from the model
    "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "fan_in_fan_out", "feedforward_modules",
    "inference_mode", "lora_alpha", "modules_to_save", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "num_virtual_tokens", "peft_type", "peft_version", "r", "revision", "target_modules",
    "task_type", "token_dim",
}  # fmt: skip
PATTERN_LENGTH, REPEATS = 256, 3  # of target_modules as a pattern: more repeats could search for years


class AdapterError(RuntimeError):
    """An adapter cannot be made, saved or loaded as asked; the message names cause and remedy."""


def read_probe(folder: Path) -> dict:
    """The probe of an adapter folder; `AdapterError` when the folder is incomplete or the probe unreadable."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"no adapter in {folder.name}/ ({', '.join(missing)} missing): run 02-Train.ipynb first")
    try:
        probe = read_json_file(folder / "probe.json", SMALL)
        _check_probe(probe)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder.name}/probe.json is damaged ({error}): save the adapter again") from error
    return probe


def _check_probe(probe: dict) -> None:
    """KeyError, TypeError or ValueError where the probe lacks something or has it in another type."""
    ids, logits = probe["ids"], probe["logits"]
    if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
        raise ValueError("ids must be token ids")
    if not (isinstance(logits, list) and logits and all(type(x) in (int, float) and math.isfinite(x) for x in logits)):
        raise ValueError("logits must be finite numbers")
    for name in ("base_fingerprint", "merged_fingerprint"):
        if not isinstance(probe[name], str):
            raise TypeError(f"{name} must be a text")


def check_tensors(folder: Path, limit: float = math.inf) -> dict[str, Tensor]:
    """The folder's tensors; `AdapterError` when a file is not what its name says, or a tensor holds NaN or infinity.

    `limit`: bytes that the file may have.
    """
    path = folder / "adapter_model.safetensors"
    try:
        config = read_json_file(folder / "adapter_config.json", SMALL)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder.name}/adapter_config.json is damaged ({error}): save the adapter again") from error
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than its base model")
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError, TypeError) as error:
        raise AdapterError(
            f"{folder.name}/adapter_model.safetensors is truncated or corrupt ({error}): copy or save it again"
        ) from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(
            f"{folder.name} holds NaN or infinity in {broken[0]} and {len(broken) - 1} more: "
            "its training diverged, train it again with a lower learning rate"
        )
    try:
        check_config(config, tensors)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise AdapterError(
            f"{folder.name}/adapter_config.json is not one of the course's ({error}): save the adapter again"
        ) from error
    return tensors


def check_config(config: dict, tensors: dict[str, Tensor]) -> None:
    """ValueError, TypeError or KeyError where peft would build something else than what the tensors fill."""
    if not isinstance(config, dict) or config.get("peft_type") not in KINDS:
        raise ValueError(f"peft_type must be one of {', '.join(KINDS)}")
    usual = KINDS[config["peft_type"]]().to_dict()
    if other := sorted(k for k, v in config.items() if k not in FREE and v != plain(usual.get(k))):
        raise ValueError(f"it sets {', '.join(other)[:200]}")
    for name in ("target_modules", "feedforward_modules", "modules_to_save"):
        check_names(name, config.get(name))
    if config["peft_type"] == "LORA":
        ranks = {t.shape[0] for name, t in tensors.items() if "lora_A" in name}
        if ranks != {config["r"]}:
            raise ValueError(f"r is {config['r']!r}, the tensors have {sorted(ranks)}")
    if config["peft_type"] == "PREFIX_TUNING":
        size = (config["num_virtual_tokens"], 2 * config["num_layers"] * config["token_dim"])
        if tuple(tensors["prompt_embeddings"].shape) != size:
            raise ValueError(f"a prefix of {size} is named, the tensor is another one")


def plain(value: object) -> object:
    """A default of peft's as JSON has it: an enumeration by its value, a set or a tuple as a list."""
    if isinstance(value, (set, tuple)):
        return sorted(value)
    return getattr(value, "value", value)


def check_names(option: str, value: object) -> None:
    """ValueError where a list of modules is none, or a pattern in its place could take long to search with."""
    if isinstance(value, str):
        repeats = sum(value.count(sign) for sign in "*+{")
        if len(value) > PATTERN_LENGTH or repeats > REPEATS:
            raise ValueError(f"{option} is a pattern with more than {REPEATS} repeats or {PATTERN_LENGTH} characters")
    elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"{option} must be a list of names")
