"""Files and folders that are whole or not there, whatever stops the process, fills the disk or runs beside it.

For: writing a file or a folder in one move (`write_atomic`, `replace_folder`), the lock that keeps two notebooks apart
(`locked`), JSON of unknown origin in bounded memory (`read_json_file`). Not for: what the files mean (`runs.py`,
`storage.py`, `checkpoints.py`). Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

JSON_LIMIT = 2**26  # bytes; the largest record of the course has a hundredth of it


class WriteError(OSError):
    """Something could not be written; what was there before is as it was. The message names cause and remedy."""


class BusyError(RuntimeError):
    """Another process works on the same files; the message says what to do."""


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
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk; Windows has no such thing for folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` every file and folder below `folder`, and `folder` itself."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; the old one is removed only once the new one stands. Raises `WriteError`.

    No system has one move for that, so for a moment only `<folder>.old` is there: `standing` finds it.
    """
    old = folder.with_name(folder.name + ".old")
    with writing(folder):
        sync_tree(new)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def standing(folder: Path) -> Path:
    """`folder`, or the one before it where a kill came between the two moves of `replace_folder`."""
    old = folder.with_name(folder.name + ".old")
    return old if old.is_dir() and not folder.exists() else folder


@contextmanager
def locked(path: Path, doing: str, *, wait: float = -1) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it when the process ends, killed or not.

    `wait`: seconds for another holder to end, -1 for ever. Then `BusyError`, which says what is being done (`doing`).
    Raises `WriteError` in a folder that cannot be written.
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
    try:
        yield
    finally:
        lock.release()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> object:
    """The value of a JSON text. Raises ValueError for all that is wrong with it, too deep nesting included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_file(path: Path, limit: int = JSON_LIMIT) -> object:
    """The value of a JSON file in UTF-8. Raises OSError (no such file), ValueError (damaged, above `limit` bytes)."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if path.stat().st_size > limit:
        raise ValueError(f"{path.stat().st_size:,} bytes are more than the {limit:,} that such a file can have")
    return parse_json(path.read_text(encoding="utf-8"))
