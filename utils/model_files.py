"""Whether a folder holds a whole model or whole data: what is missing, cut off, or not what its weights say.

For: `hub.py`, which gets such folders from anywhere; a file is looked at in bounded memory before a library builds a
model from it. Not for: getting or loading one. Imports neither torch nor transformers.
"""

import json
import re
import struct
from pathlib import Path

MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
HEADER_LIMIT = 100_000_000  # bytes: the safetensors format's own
LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers")  # each layer has tensors
WIDTHS = (  # none is larger than the largest side of a tensor
    "n_embd", "n_inner", "n_positions", "vocab_size", "hidden_size", "intermediate_size", "d_model", "d_ff", "d_kv",
    "num_heads", "n_head", "num_attention_heads", "max_position_embeddings", "type_vocab_size",
)  # fmt: skip


def model_faults(folder: Path) -> list[str]:
    """Name what keeps `folder` from being a model: files missing, weights cut off, a configuration of other weights."""
    faults = [f"{name} is missing" for name in MODEL_FILES if not (folder / name).is_file()]
    if (folder / "model.safetensors").is_file():
        header = weights_header(folder / "model.safetensors")
        if header is None:
            return [*faults, "model.safetensors is damaged (cut off, or a Git LFS pointer): delete it and get it again"]
        if (folder / "config.json").is_file():
            faults += config_faults(folder / "config.json", header)
    return faults


def weights_header(path: Path) -> dict[str, dict] | None:
    """A safetensors file's header (dtype, shape and place of each tensor), or None where the file is not what it says.

    The file is 8 bytes with the header's length, the header in JSON, and the data, whose length the header says too.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length < min(size, HEADER_LIMIT):
            return None
        try:
            tensors = {name: t for name, t in json.loads(file.read(length)).items() if name != "__metadata__"}
            if 8 + length + max(t["data_offsets"][1] for t in tensors.values()) != size:
                return None
            if not all(type(n) is int for t in tensors.values() for n in t["shape"]):
                return None
            return tensors
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None


def config_faults(path: Path, header: dict[str, dict]) -> list[str]:
    """Name what in a config.json cannot be of these weights: a model is built before it is filled."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        return [f"config.json is damaged ({error}): get it again"]
    widest = max([n for tensor in header.values() for n in tensor["shape"]], default=0)
    limits = dict.fromkeys(LAYERS, len(header)) | dict.fromkeys(WIDTHS, widest)
    odd = [k for k in limits if not (config.get(k) is None or (type(config[k]) is int and 0 < config[k] <= limits[k]))]
    return [f"config.json does not fit the weights ({', '.join(odd)}): get both again"] if odd else []


def data_faults(patterns: tuple[str, ...], folder: Path) -> list[str]:
    """Name what keeps `folder` from holding the data: fewer files than their names promise, or cut-off ones."""
    faults = []
    for pattern in patterns:
        files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        promised = [re.search(r"-of-(\d+)", path.name) for path in files]
        expected = max((int(match[1]) for match in promised if match), default=1)
        if len(files) < expected:
            faults.append(f"{expected - len(files)} of {expected} files {pattern} missing")
        damaged = [path for path in files if path.suffix == ".parquet" and not _is_parquet(path)]
        faults += [f"{path.name} is damaged: delete it and get it again" for path in damaged]
    return faults


def _is_parquet(path: Path) -> bool:
    """Whether the file begins and ends with Parquet's mark."""
    data = path.read_bytes()
    return data[:4] == data[-4:] == b"PAR1" and len(data) > 8
