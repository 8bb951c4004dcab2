"""What a student's process sees of the disk: emptied folders, the rest read-only, one folder to write to (Linux).

The process is in a mount namespace of its own already: nothing here changes a file, all of it goes with the namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

BIND, READ_ONLY, NO_DEVICES, PRIVATE, RECURSIVE = 4096, 1, 4, 1 << 18, 16384
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
# Sockets of other programs lie in these, disks and consoles in /dev: with them a process would leave its namespaces.
EMPTIED = ("/dev", "/run", "/var/run", "/tmp", "/var/tmp")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
SHARED_MEMORY = 64 << 20  # bytes in /dev/shm
MOST_NODES = 20_000  # files and folders that an answer may make

libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def shut_in(scratch: Path, hide: Iterable[Path], disk: int) -> str:
    """Everything read-only but `scratch`, of `disk` bytes; `hide` emptied; the folder we are in with its own layer.

    Returns "namespace", or "hidden, not read-only" where the kernel is too old to make all mounts read-only.
    """
    here, hide = Path.cwd(), [*map(Path, EMPTIED), *hide]
    _mount("none", "/", None, RECURSIVE | PRIVATE)
    own = [path for path in hide if here in path.parents]
    _empty([path for path in hide if path not in own], [scratch, here, *map(Path, DEVICES), *_needed()])
    with contextlib.suppress(OSError):  # shared memory that no count would see; this namespace's own setting
        Path("/proc/sys/kernel/shmmni").write_text("0")
    for name in ("shm", "pts"):
        Path("/dev", name).mkdir()
    Path("/dev/fd").symlink_to("/proc/self/fd")
    Path("/dev/ptmx").symlink_to("pts/ptmx")
    answer = "namespace" if _make_read_only() else "hidden, not read-only"
    _mount("none", scratch, "tmpfs", NO_DEVICES, f"size={disk},nr_inodes={MOST_NODES},mode=700")
    _layer_over(here, scratch)
    _empty(own, [])
    # Root may write to /proc/sys without any capability, and through core_pattern run programs outside.
    _mount("proc", "/proc", "proc", READ_ONLY, needed=False)
    _mount("none", "/dev/shm", "tmpfs", NO_DEVICES, f"size={SHARED_MEMORY}")
    _mount("none", "/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666", needed=False)
    return answer


def _empty(paths: Iterable[Path], keep: Iterable[Path]) -> None:
    """Each folder is an empty one in which only `keep` is left, each file an empty one; what is not there is left out.

    The deepest come first, so that a kept folder comes back with what is hidden inside it.
    """
    found = {path.resolve() for path in paths if os.path.exists(path)} - {Path("/")}
    folders = {path for path in found if path.is_dir()}
    places = {place for path in keep for place in (path.absolute(), path.resolve()) if folders & set(place.parents)}
    kept = sorted(path for path in places if path.exists())
    handles = [(path, path.is_dir(), os.open(path, os.O_PATH)) for path in kept]
    for path in sorted(found, key=lambda path: len(path.parts), reverse=True):
        if path in folders:
            _mount("none", path, "tmpfs", 0, "size=256k,mode=755")
        else:
            _mount("/dev/null", path, None, BIND)
    for path, is_folder, handle in handles:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if is_folder else path.touch()
        _mount(f"/proc/self/fd/{handle}", path, None, BIND | RECURSIVE)
        os.close(handle)


def _needed() -> list[Path]:
    """The folders that this Python and the course's model are read from; they may lie in one that is emptied."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    model = [os.environ["LAB_GPT2_DIR"]] if os.environ.get("LAB_GPT2_DIR") else []
    return [Path(path) for path in dict.fromkeys((sys.base_prefix, sys.prefix, *packages, *model))]


def _layer_over(here: Path, scratch: Path) -> None:
    """What the answer writes into the course's folder goes into `scratch`; without such layers it is read-only."""
    (scratch / "upper").mkdir()
    (scratch / "work").mkdir()
    layers = f"lowerdir={here},upperdir={scratch}/upper,workdir={scratch}/work"
    if not _mount("overlay", here, "overlay", 0, layers, needed=False):
        _mount("overlay", here, "overlay", 0, f"{layers},userxattr", needed=False)
    os.chdir(here)


def _make_read_only() -> bool:
    """Whether every mount of this namespace is read-only now."""
    flags = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # MOUNT_ATTR_RDONLY is set, recursively
    arguments = (-100, b"/", 0x8000, ctypes.byref(flags), ctypes.sizeof(flags))
    return libc.syscall(SYS_MOUNT_SETATTR, *arguments) == 0


def _mount(
    source: str, target: str | Path, kind: str | None, flags: int, data: str | None = None, *, needed: bool = True
) -> bool:
    """Mount; whether it worked. OSError where it does not and is `needed`."""
    kind_, data_ = (None if text is None else text.encode() for text in (kind, data))
    if libc.mount(os.fsencode(source), os.fsencode(target), kind_, flags, data_) == 0:
        return True
    if needed:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {target}: {os.strerror(code)}")
    return False
