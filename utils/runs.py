"""One run is one JSON file, and a file is whole or not there, whatever stops the process or fills the disk.

Every table and figure of the course reads run records only. The second half writes files and folders in one move, on
Windows, macOS, Linux and network shares alike: to a temporary name first, then renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from utils.metrics import Estimate

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "scikit-learn")
UNITS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve_bf16")  # of x86, then of ARM
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)  # what a network share without locks answers


class RunError(RuntimeError):
    """A run record that cannot be read; the message names the file and what to do."""


class WriteError(OSError):
    """Something could not be written; what was there before is as it was. The message names cause and remedy."""


class BusyError(RuntimeError):
    """Another process works on the same files; the message says what to do."""


# --- records ---


@dataclass
class RunRecord:
    """Everything about one run. Losses in nats per token, times in seconds, memory and sizes in bytes.

    `status` is "finished", "running" or "failed". `history` has one row a logged step: `step` with `train_loss` and/or
    `eval_loss`. A metric is a number or an `Estimate` as a dict.
    """

    status: str
    method: str
    profile: str
    config_id: str
    config: dict
    seed: int
    task: str = "positive"
    counts: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    time: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    bytes_on_disk: int | None = None
    versions: dict = field(default_factory=dict)
    hardware: dict = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def save(self, path: Path | str) -> Path:
        """Write the record as JSON, in one move. Raises as `write_json` does."""
        write_json(path, asdict(self))
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> RunRecord:
        """Read what `save` wrote. Raises RunError: no file, no JSON, or the JSON of something else."""
        path = Path(path)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}): train this run first") from error
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: not a run record ({error}): delete it and repeat the run") from error

    def value(self, name: str) -> float | Estimate | None:
        """The metric `name`, looked up in metrics, counts, time and memory; None where the run has not measured it."""
        if name == "bytes_on_disk":
            return self.bytes_on_disk
        for part in (self.metrics, self.counts, self.time, self.memory):
            if name in part:
                return Estimate.from_dict(part[name]) if isinstance(part[name], dict) else part[name]
        return None


def load_runs(folder: Path | str, config_id: str | None = None) -> tuple[list[RunRecord], list[str]]:
    """The comparable records in `folder` (*.json, sorted by name), and why each other record was left out.

    Left out, and named: unreadable files, unfinished runs, runs of another configuration than `config_id` or, without
    it, than the first finished run's. Other JSON files (an adapter's, the dial's) are passed over. Raises RunError for
    a folder that is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder: run the notebook that trains first")
    records, excluded = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            values = read_json(path)
            if not {"status", "history"} & values.keys():
                continue
            record = RunRecord(**values)
        except (OSError, ValueError, TypeError) as error:
            excluded.append(f"{path.name}: not a run record ({error}): delete it and repeat the run")
            continue
        config_id = config_id or (record.config_id if record.status == "finished" else None)
        if record.status != "finished":
            excluded.append(f"{path.name}: {record.status}, not finished")
        elif record.config_id != config_id:
            excluded.append(f"{path.name}: another configuration ({record.config_id}, not {config_id})")
        else:
            records.append(record)
    return records, excluded


def environment() -> tuple[dict[str, str], dict[str, str | int]]:
    """Versions of the packages, and the hardware: what decides a result, no host names, no paths.

    `units`: the processor's units for vectors and matrices, which decide how fast it multiplies.
    """
    import torch

    from utils.gpu import pick_device

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cuda, has = pick_device().type == "cuda", torch.cpu.get_capabilities()
    name = torch.cuda.get_device_name() if cuda else has.get("cpu_name") or platform.machine()
    units = ", ".join(unit for unit in UNITS if has.get(unit)) or "none that PyTorch names"
    hardware = {"device": "cuda" if cuda else "cpu", "name": name, "cores": os.cpu_count() or 1, "units": units}
    return versions, hardware | {"threads": torch.get_num_threads(), "system": platform.system()}


# --- files and folders in one move ---


def read_json(path: Path) -> dict:
    """The JSON object at `path`, empty where there is no such file. Raises ValueError where it is damaged."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path | str, values: object) -> None:
    """Write `values` as JSON, in one move. Raises ValueError for NaN, TypeError for what JSON has not, `WriteError`."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    write_atomic(Path(path), text.encode("utf-8"))


def _plain(value: object) -> object:
    """A NumPy or torch scalar as a Python number, an Estimate as a dict (for `json.dumps`)."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a run record holds numbers, texts, lists and dicts, not {type(value).__name__}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full, read-only or broken disk raises inside into a `WriteError` about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}). What was there before is as it "
            "was: free some space, or set LAB_ARTIFACTS to a folder that can be written, and run this again"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is at any moment either the old one or the new one, whole. Raises `WriteError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; the old one is removed only once the new one stands. Raises `WriteError`.

    No system has one move for that, so for a moment only `<folder>.old` is there: `standing` finds it.
    """
    old = folder.with_name(folder.name + ".old")
    with writing(folder):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def standing(folder: Path) -> Path:
    """`folder`, or the one before it where a kill came between the two moves of `replace_folder`."""
    old = folder.with_name(folder.name + ".old")
    return old if old.is_dir() and not folder.exists() else folder


@contextmanager
def locked(path: Path, doing: str, *, wait: float = -1) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it when the process ends, killed or not.

    `wait`: seconds for another holder to end, -1 for ever. Then `BusyError`, which says what is being done (`doing`).
    On a share without locks nothing is held. Raises `WriteError` in a folder that cannot be written.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=wait)
        except Timeout as error:
            raise BusyError(
                f"another notebook or program is {doing} in {path.parent}: wait until it has ended, or shut its kernel "
                "down, and run this again (or set LAB_ARTIFACTS to another folder)"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    try:
        yield
    finally:
        lock.release()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
