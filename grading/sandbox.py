"""The process in which a student's code runs: no network, no way to our files, limits on everything.

For: `spawn`, and `TreeWatch`, which stops what runs too long or takes too much. On Linux, where the system allows
namespaces, the code sees no other process, no network, nothing of the course's solutions, and writes to its own
folder only. Elsewhere proxies are off and limits hold; `spawn` says which of the two it was.
Not for: judging (`worker.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, IPC, processes, network
NEW_USER = 0x10000000
BIND, READ_ONLY, REMOUNT, PRIVATE, RECURSIVE = 4096, 1, 32, 1 << 18, 16384
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
NO_NETWORK = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "no_proxy": "",
    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one answer may use: `seconds` of processor time (the same on a busy machine), `clock` seconds in all."""

    seconds: float = 60.0
    clock: float = 300.0
    memory: int = 2 << 30  # bytes beyond what the course itself needs
    processes: int = 32
    file: int = 32 << 20  # bytes a file, what is printed included

    def to_dict(self) -> dict:
        """The limits as JSON values."""
        return asdict(self)


class StoppedError(RuntimeError):
    """A limit was passed; the message says which."""


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library; OSError where it fails."""
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def spawn(work: Callable[[dict], None], scratch: Path, hide: Iterable[Path], limits: Limits, keep_fd: int) -> int:
    """Fork, shut the child in, and call `work(facts)` there; returns the process to watch and to kill.

    `scratch`: the child's home, the one folder it may write to. `hide`: files and folders it must not read. `keep_fd`:
    the one descriptor it keeps. `facts` says what holds: `network`, `files`, `processes`, each "namespace" or "limits".
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        _close_all_but(keep_fd, scratch / "output.txt")
        facts = {"network": "limits", "files": "limits", "processes": "limits"}
        if _enter_namespaces():
            inner = os.fork()  # a new process namespace begins with the next child
            if inner:
                die_with_parent()
                _, code = os.waitpid(inner, 0)
                os._exit(os.waitstatus_to_exitcode(code) & 0xFF)
            facts |= {"network": "namespace", "processes": "namespace"}
            facts["files"] = _shut_in(scratch, hide)
        _limit(limits)
        _clean_environment(scratch)
        if _libc is not None:
            _drop_privileges()
            die_with_parent()
        work(facts)
        status = 0
    except BaseException:  # nothing of a student's may run on in a copy of the grader
        status = 71
    finally:
        os._exit(status)


def _close_all_but(keep_fd: int, output: Path) -> None:
    """Standard input empty, standard output and errors into a file, everything else closed."""
    empty = os.open(os.devnull, os.O_RDONLY)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(empty, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) != keep_fd:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _enter_namespaces() -> bool:
    """Whether this process is now in namespaces of its own (its children, for processes)."""
    if _libc is None or os.environ.get("GRADING_NO_NAMESPACES"):
        return False
    user, group = os.geteuid(), os.getegid()
    if user == 0 and _libc.unshare(NEW_NAMESPACES) == 0:
        return True
    if _libc.unshare(NEW_NAMESPACES | NEW_USER) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    return True


def _shut_in(scratch: Path, hide: Iterable[Path]) -> str:
    """Everything read-only but `scratch`, `hide` emptied, the course's folder with a layer of its own."""
    _call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
    for path in hide:
        if path.is_dir():
            _call("mount", b"none", os.fsencode(path), b"tmpfs", READ_ONLY, b"size=4k")
        elif path.exists():
            _call("mount", b"/dev/null", os.fsencode(path), None, BIND, None)
    own = os.fsencode(scratch)
    _call("mount", own, own, None, BIND, None)
    answer = "namespace"
    try:
        _read_only(b"/", True)
        _read_only(own, False)
    except OSError:
        answer = "hidden, not read-only"
    here = os.fsencode(Path.cwd())
    (scratch / "upper").mkdir()
    (scratch / "work").mkdir()
    layers = b"lowerdir=%s,upperdir=%s/upper,workdir=%s/work" % (here, own, own)
    if _libc.mount(b"overlay", here, b"overlay", 0, layers) != 0:
        _libc.mount(b"overlay", here, b"overlay", 0, layers + b",userxattr")  # where this fails too it stays read-only
    os.chdir(here)
    _libc.mount(b"proc", b"/proc", b"proc", 0, None)
    _libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=64m")
    return answer


def _read_only(path: bytes, value: bool) -> None:
    flags = (ctypes.c_uint64 * 4)(int(value), int(not value), 0, 0)
    if _libc.syscall(SYS_MOUNT_SETATTR, -100, path, 0x8000, ctypes.byref(flags), ctypes.sizeof(flags)) != 0:
        raise OSError(ctypes.get_errno(), "mount_setattr")


def _limit(limits: Limits) -> None:
    """Limits of the kernel, a process each; `TreeWatch` holds them for all processes together."""
    sizes = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, limits.file)]
    sizes.append((resource.RLIMIT_CPU, int(limits.seconds) + 5))
    if sys.platform == "linux":
        sizes.append((resource.RLIMIT_AS, psutil.Process().memory_info().vms + limits.memory))
        if os.geteuid() != 0:
            sizes.append((resource.RLIMIT_NPROC, limits.processes + _own_processes()))
    for kind, value in sizes:
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _own_processes() -> int:
    """Processes and threads of this user, which count towards the kernel's limit."""
    count, user = 0, os.geteuid()
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        count += (process.info["num_threads"] or 1) if uids and uids.real == user else 0
    return count


def _clean_environment(scratch: Path) -> None:
    """A home of its own, no secrets of the instructor's environment, no network through the libraries."""
    (scratch / "tmp").mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k.startswith(("LAB_", "OMP_", "MKL_", "LC_", "LANG", "PYTHON"))}
    kept |= {key: os.environ[key] for key in ("PATH", "MPLBACKEND", "TOKENIZERS_PARALLELISM") if key in os.environ}
    os.environ.clear()
    os.environ.update(kept | NO_NETWORK | {"HOME": str(scratch), "TMPDIR": str(scratch / "tmp")})


def _drop_privileges() -> None:
    """No capability is left and none can be gained, so the mounts stay as they are."""
    for number in range(64):
        _libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends (Linux)."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that none gets away (Linux)."""
    if _libc is not None:
        _libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


class TreeWatch:
    """Watches the child `pid` of this process and all that comes from it."""

    def __init__(self, pid: int, limits: Limits) -> None:
        self.pid, self.limits, self.started = pid, limits, time.monotonic()
        self.base = psutil.Process().memory_info().rss  # what a fork shares with us from the start
        self.stopped: float | None = None  # when it was told to stop
        self.spared: set[int] = set()  # children of ours that are not the student's: the judge

    def members(self) -> list[psutil.Process]:
        """The child, its descendants, and those that lost their parent and were adopted."""
        try:
            found = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        except psutil.Error:
            found = []
        orphans = [p for p in psutil.Process().children() if p.pid != self.pid and p.pid not in self.spared]
        for orphan in orphans:
            found += [orphan, *_children(orphan)]
        return found

    def check(self) -> str | None:
        """The limit that is passed now, in words; None while all is well."""
        members, memory, seconds = self.members(), 0, 0.0
        for process in members:
            try:
                memory += max(0, process.memory_info().rss - self.base)
                times = process.cpu_times()
                seconds += times.user + times.system
            except psutil.Error:
                continue
        if len(members) > self.limits.processes:
            return f"it started more than {self.limits.processes} processes"
        if memory > self.limits.memory:
            return f"it took more than {self.limits.memory / 2**30:.1f} GB of memory"
        if seconds > self.limits.seconds:
            return f"it computed for more than {self.limits.seconds:g} seconds"
        if time.monotonic() - self.started > self.limits.clock:
            return f"it did not end within {self.limits.clock:g} seconds"
        return None

    def stop(self) -> None:
        """Kill all of it, however often it forks meanwhile."""
        self.stopped = self.stopped or time.monotonic()
        for _ in range(50):
            members = [p for p in self.members() if _alive(p)]
            if not members:
                return
            for process in members:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            while _reap(self.spared):
                continue
            time.sleep(0.01)


def _reap(spared: set[int]) -> bool:
    """Bury one dead child; a spared one is left to who waits for it."""
    for child in psutil.Process().children():
        if child.pid not in spared and not _alive(child):
            try:
                return os.waitpid(child.pid, os.WNOHANG)[0] != 0
            except ChildProcessError:
                return False
    return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
