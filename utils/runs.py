"""One training or evaluation run is one JSON file; every table and figure of the course reads these files only.

For: `RunRecord` and its file, the folder of records, the environment they were made in. What is in `metrics.py`
(`Estimate`, `METRICS`, tables) can be had from here too.
Not for: computing metrics (`evaluation.py`), drawing (`plots.py`), or numbers typed by hand.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from utils.files import read_json_file, write_atomic
from utils.metrics import METRICS, Estimate, Metric, MetricError, compare_table, mean_interval, pareto_front, table

__all__ = [
    "METRICS",
    "Estimate",
    "Metric",
    "MetricError",
    "RunError",
    "RunRecord",
    "compare_table",
    "environment",
    "load_runs",
    "mean_interval",
    "pareto_front",
    "read_json",
    "table",
    "write_json",
]

STATUSES = ("finished", "running", "failed")
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "scikit-learn")


class RunError(RuntimeError):
    """A run record that cannot be read or trusted; the message names the file and what is wrong."""


@dataclass
class RunRecord:
    """Everything about one run. Losses in nats per token, times in seconds, memory and sizes in bytes.

    `history` has one row a logged step: `step` with `train_loss` and/or `eval_loss`. A metric is a number or an
    `Estimate` as a dict.
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
        """Write the record as JSON, all or nothing: a crash leaves the old file. Raises RunError for a bad value."""
        path = Path(path)
        values = json.loads(json.dumps(asdict(self), default=_plain))  # tuples become lists, so that load equals save
        _validate(values, path)
        write_json(path, values)
        return path

    @classmethod
    def load(cls, path: Path | str) -> RunRecord:
        """Read and validate. Raises RunError: no file, broken JSON, missing or unknown key, wrong type, NaN."""
        path = Path(path)
        try:
            values = read_json_file(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}): train this run first") from error
        except ValueError as error:
            raise RunError(f"{path}: not valid JSON ({error}): delete it and repeat the run") from error
        try:
            _validate(values, path)
        except RecursionError as error:
            raise RunError(f"{path}: nested too deeply for a run record") from error
        return cls(**values)

    def value(self, name: str) -> float | Estimate | None:
        """The metric `name`, looked up in metrics, counts, time and memory; None where the run has not measured it."""
        if name == "bytes_on_disk":
            return self.bytes_on_disk
        for part in (self.metrics, self.counts, self.time, self.memory):
            if name in part:
                return Estimate.from_dict(part[name]) if isinstance(part[name], dict) else part[name]
        return None


def read_json(path: Path) -> dict:
    """The JSON object at `path`, empty where there is no such file. Raises ValueError where it is damaged."""
    return read_json_file(path) if path.is_file() else {}


def write_json(path: Path | str, values: object) -> None:
    """Write `values` as JSON, all or nothing (`write_atomic`). Raises ValueError for NaN, `WriteError`."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    write_atomic(Path(path), text.encode("utf-8"))


SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 cannot
TYPES = {"str": str, "int": int, "dict": dict, "list": list, "int | None": (int, type(None))}


def _plain(value: object) -> object:
    """A NumPy or torch scalar as a Python number, an Estimate as a dict (for `json.dumps`)."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if hasattr(value, "item"):
        return value.item()
    raise RunError(f"a run record holds numbers, texts, lists and dicts, not {type(value).__name__}")


def _validate(values: object, path: Path) -> None:
    """Raise RunError where the JSON of a record is not one."""
    if not isinstance(values, dict):
        raise RunError(f"{path}: a run record is a JSON object, this is a {type(values).__name__}")
    known = {f.name: TYPES[f.type] for f in fields(RunRecord)}
    required = {f.name for f in fields(RunRecord) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - values.keys()):
        raise RunError(f"{path}: missing {', '.join(missing)}")
    if unknown := sorted(values.keys() - known.keys()):
        raise RunError(f"{path}: unknown {', '.join(unknown)}")
    for name, value in values.items():
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise RunError(f"{path}: {name} is a {type(value).__name__}, not {_type_name(known[name])}")
    if values["status"] not in STATUSES:
        raise RunError(f"{path}: status is {values['status']!r}, not one of {', '.join(STATUSES)}")
    _sound(values, path, "")
    for row in values.get("history", []):
        if not (isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_number, row.values()))):
            raise RunError(f"{path}: a row of history is {str(row)[:60]}, not a step with its losses")
    for part in ("metrics", "counts", "time", "memory"):
        for name, value in values.get(part, {}).items():
            if not (value is None or _is_number(value) or _is_estimate(value)):
                raise RunError(f"{path}: {part}.{name} is {str(value)[:60]}, not a number or an estimate")


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_estimate(value: object) -> bool:
    """Whether `value` is an `Estimate` as a dict."""
    try:
        return isinstance(value, dict) and all(map(_is_number, vars(Estimate.from_dict(value)).values()))
    except MetricError:
        return False


def _type_name(kind: type | tuple) -> str:
    return " or ".join(
        "null" if k is type(None) else k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))
    )


def _sound(value: object, path: Path, where: str) -> None:
    """Raise RunError at the first NaN, infinity or broken text, naming its place ("metrics.test_loss")."""
    if isinstance(value, str) and SURROGATE.search(value):
        raise RunError(f"{path}: {where} is half of a character, which no file can hold")
    if isinstance(value, float) and not math.isfinite(value):
        raise RunError(f"{path}: {where} is {value}: the run diverged or was recorded wrongly")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str):
            _sound(key, path, "a name")
        _sound(item, path, f"{where}.{key}" if where else str(key))


def environment() -> tuple[dict[str, str], dict[str, str | int]]:
    """Versions of the packages, and the hardware: what decides a result, no host names, no paths."""
    import torch

    from utils.gpu import pick_device

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cuda = pick_device().type == "cuda"
    name = torch.cuda.get_device_name() if cuda else torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    hardware = {"device": "cuda" if cuda else "cpu", "name": name, "cores": os.cpu_count() or 1}
    return versions, hardware | {"threads": torch.get_num_threads(), "system": platform.system()}


def load_runs(folder: Path | str, config_id: str | None = None) -> tuple[list[RunRecord], list[str]]:
    """The comparable records in `folder` (*.json, sorted by name), and why each other record was left out.

    Left out, and named: unreadable or invalid files, unfinished runs, runs of another configuration than `config_id`
    or, without it, than the first finished run's. Other JSON files (an adapter's, the dial's) are no
    records and passed over. Raises RunError where the folder is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder: run the notebook that trains first")
    records, excluded = [], []
    for path in sorted(folder.glob("*.json")):
        name = path.name
        if _is_other_json(path):
            continue
        try:
            record = RunRecord.load(path)
        except RunError as error:
            excluded.append(str(error).replace(str(path), name))
            continue
        config_id = config_id or (record.config_id if record.status == "finished" else None)
        if record.status != "finished":
            excluded.append(f"{name}: {record.status}, not finished")
        elif record.config_id != config_id:
            excluded.append(f"{name}: another configuration ({record.config_id}, not {config_id})")
        else:
            records.append(record)
    return records, excluded


def _is_other_json(path: Path) -> bool:
    """Whether this is a readable JSON file of another kind, as `adapter_config.json`; a broken file is not."""
    try:
        values = read_json_file(path)
    except (OSError, ValueError):
        return False
    return not (isinstance(values, dict) and {"status", "history"} & values.keys())
