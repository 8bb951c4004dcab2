"""The process in which a student's code runs: no network, no way to our files, limits on everything.

On Linux, where
the system allows namespaces, the code sees no other process, no network, no socket on disk, nothing of the course's
solutions, and writes to its own folder only (`mounts.py`). Elsewhere proxies are off and limits hold; `facts` says
which of the two it was.

    python -m grading.sandbox     prints the facts of this system as JSON
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

try:
    import resource
except ModuleNotFoundError:  # Windows, where nothing is graded; `scripts/grade.py` says so
    resource = None

from grading import mounts
from grading.mounts import libc

NEW_NETWORK = 0x40000000
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | NEW_NETWORK  # mounts, IPC, processes, network
NEW_USER = 0x10000000
KEYCTL = {"x86_64": 250, "aarch64": 219}  # number of the system call
LEAST_FOR_JUDGE = 1 << 30  # bytes: a test of ours may need more than an answer is allowed
OPEN_FILES = 512
NO_NETWORK = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "no_proxy": "",
    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9",
}  # fmt: skip
# Nothing that holds a path of ours: PYTHONPATH would name the folder of the solved course.
KEPT_VARIABLES = (
    "PATH", "MPLBACKEND", "TOKENIZERS_PARALLELISM", "PYTHONUTF8", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE",
    "HF_HOME", "LD_LIBRARY_PATH", "GRADING_NO_NAMESPACES", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
KEPT_BEGINNINGS = ("LAB_", "OMP_", "MKL_", "LC_", "LANG")


@dataclass(frozen=True)
class Limits:
    """What one answer may use: `seconds` of processor time (the same on a busy machine), `clock` seconds in all.

    `idle`: seconds by the clock in which it may compute nothing at all, as one that sleeps does.
    """

    seconds: float = 60.0
    clock: float = 300.0
    idle: float = 20.0
    memory: int = 2 << 30  # bytes beyond what the course itself needs
    processes: int = 32
    file: int = 32 << 20  # bytes a file, what is printed included
    disk: int = 256 << 20  # bytes of all files together, where namespaces hold


def spawn(work: Callable[[dict], None], scratch: Path, hide: Iterable[Path], limits: Limits, keep_fd: int) -> int:
    """Fork, shut the child in, and call `work(facts)` there; returns the process to watch and to kill.

    `scratch`: the child's home, the one folder it may write to. `hide`: files and folders it must not read. `keep_fd`:
    the one descriptor it keeps. `facts` says what holds: `network`, `files`, `processes`, each "namespace" or "limits";
    `files` is "hidden, not read-only" where the kernel cannot do the second.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        _close_all_but(keep_fd)
        facts = {"network": "limits", "files": "limits", "processes": "limits"}
        if _enter_namespaces(NEW_NAMESPACES):
            inner = os.fork()  # a new process namespace begins with the next child
            if inner:
                die_with_parent()
                _, code = os.waitpid(inner, 0)
                os._exit(os.waitstatus_to_exitcode(code) & 0xFF)
            facts |= {"network": "namespace", "processes": "namespace"}
            facts["files"] = mounts.shut_in(scratch, hide, limits.disk)
        _print_to(scratch / "output.txt")
        _limit(limits)
        _clean_environment(scratch)
        if libc is not None:
            if number := KEYCTL.get(os.uname().machine):
                libc.syscall(number, 1, None)  # KEYCTL_JOIN_SESSION_KEYRING: a new one
            _drop_privileges()
            die_with_parent()
        work(facts)
        status = 0
    except BaseException:  # nothing of a student's may run on in a copy of the grader
        status = 71
    finally:
        os._exit(status)


def restrain(limits: Limits) -> None:
    """For the process that judges, which a student's data steer: no output, no network, memory limited."""
    _print_to(Path(os.devnull))  # what our tests print must not lie in a file
    _enter_namespaces(NEW_NETWORK)
    os.environ.update(NO_NETWORK)
    _limit_memory(max(limits.memory, LEAST_FOR_JUDGE))


def is_safe(facts: dict) -> bool:
    """Whether a student's code can neither read nor change the grader's files, nor reach a network."""
    return facts.get("files") == facts.get("network") == "namespace"


@functools.cache
def probe() -> dict:
    """The facts of this system, tried out in a process of its own; all "limits" where the trial fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        command = [sys.executable, "-m", "grading.sandbox"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, stdin=subprocess.DEVNULL)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"network": "limits", "files": "limits", "processes": "limits"}


def _close_all_but(keep_fd: int) -> None:
    """Standard input, output and errors empty, everything else closed."""
    empty = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(empty, number)
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) != keep_fd:
            try:
                os.close(int(name))
            except OSError:  # the one that listed the folder
                continue


def _print_to(path: Path) -> None:
    """Standard output and errors of this process go to a file."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def _enter_namespaces(which: int) -> bool:
    """Whether this process is now in such namespaces of its own (its children, for processes)."""
    if libc is None or os.environ.get("GRADING_NO_NAMESPACES"):
        return False
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(which | NEW_USER) != 0:  # of its own for root too: a user's key ring would join two answers
        return user == 0 and libc.unshare(which) == 0
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    return True


def _limit(limits: Limits) -> None:
    """Limits of the kernel, a process each; `TreeWatch` holds them for all processes together."""
    sizes = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, limits.file), (resource.RLIMIT_NOFILE, OPEN_FILES)]
    sizes.append((resource.RLIMIT_CPU, int(limits.seconds) + 5))
    if sys.platform == "linux" and os.geteuid() != 0:
        sizes.append((resource.RLIMIT_NPROC, limits.processes + _own_processes()))
    for kind, value in sizes:
        _lower(kind, value)
    _limit_memory(limits.memory)


def _limit_memory(more: int) -> None:
    """At most `more` bytes of addresses beyond what this process has now (Linux)."""
    if sys.platform == "linux":
        _lower(resource.RLIMIT_AS, psutil.Process().memory_info().vms + more)


def _lower(kind: int, value: int) -> None:
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


def allowed_environment() -> dict[str, str]:
    """What of the instructor's environment a process may have in which a student's code runs: no secrets."""
    return {k: v for k, v in os.environ.items() if k in KEPT_VARIABLES or k.startswith(KEPT_BEGINNINGS)}


def _clean_environment(scratch: Path) -> None:
    """A home of its own, no secrets of the instructor's environment, no network through the libraries."""
    (scratch / "tmp").mkdir(exist_ok=True)
    kept = allowed_environment()
    os.environ.clear()
    os.environ.update(kept | NO_NETWORK | {"HOME": str(scratch), "TMPDIR": str(scratch / "tmp")})
    tempfile.tempdir = None  # it remembers the grader's


def _drop_privileges() -> None:
    """No capability is left and none can be gained, so the mounts stay as they are."""
    for number in range(64):
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends (Linux)."""
    if libc is not None:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that none gets away (Linux)."""
    if libc is not None:
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


# --- limits over all processes of one answer together ---


class TreeWatch:
    """Watches the children of this process and all that comes from them, but for the `spared`."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.started = limits, time.monotonic()
        self.base = psutil.Process().memory_info().rss  # what a fork shares with us from the start
        self.stopped: float | None = None  # when it was told to stop
        self.spared: set[int] = set()  # children of ours that are not the student's: the judge
        self.computed: dict[psutil.Process, float] = {}  # processor time of each, when it was last seen
        self.busy, self.busy_at = 0.0, self.started  # processor time, the judge's included, and when it last grew

    def check(self) -> str | None:
        """The limit that is passed now, in words; None while all is well."""
        everything = _children(psutil.Process())
        members = [process for process in everything if process.pid not in self.spared]
        if len(members) > self.limits.processes:
            return f"it started more than {self.limits.processes} processes"
        if self._memory(members) > self.limits.memory:
            return f"it took more than {self.limits.memory / 2**30:.1f} GB of memory"
        if self._memory([p for p in everything if p.pid in self.spared]) > max(self.limits.memory, LEAST_FOR_JUDGE):
            return "what it returns took too much memory"
        if (seconds := self._seconds(members)) > self.limits.seconds:
            return f"it computed for more than {self.limits.seconds:g} seconds"
        judging = sum(sum(_processor_times(process)) for process in everything if process.pid in self.spared)
        if seconds + judging > self.busy + 0.01:
            self.busy, self.busy_at = seconds + judging, time.monotonic()
        elif time.monotonic() - self.busy_at > self.limits.idle:
            return f"it computed nothing for {self.limits.idle:g} seconds: it sleeps, or waits for something"
        if time.monotonic() - self.started > self.limits.clock:
            return f"it did not end within {self.limits.clock:g} seconds"
        return None

    def _memory(self, members: list[psutil.Process]) -> int:
        """Bytes, those of files in memory included."""
        total, files = 0, {}
        for process in members:
            try:
                total += max(0, process.memory_info().rss - self.base)
                files |= _files_in_memory(process.pid)
            except (psutil.Error, OSError):
                continue
        return total + sum(files.values())

    def _seconds(self, members: list[psutil.Process]) -> float:
        """Processor time so far, that of processes which have ended included.

        The kernel adds it to the parent, unless that one ignores its children: then what was seen counts.
        """
        living = 0.0
        for process in members:
            own, ended = _processor_times(process)
            self.computed[process] = max(own, self.computed.get(process, 0.0))
            living += own + ended
        return max(living, sum(self.computed.values()))

    def stop(self) -> None:
        """Kill all of it, however often it forks meanwhile."""
        self.stopped = self.stopped or time.monotonic()
        for _ in range(50):
            members = [p for p in _children(psutil.Process()) if p.pid not in self.spared and _alive(p)]
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


def _files_in_memory(pid: int) -> dict[tuple[int, int], int]:
    """The sizes of the files without a name (memfd) that a process has open; Linux only."""
    sizes = {}
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            if os.readlink(f"{folder}/{name}").startswith("/memfd:"):
                status = os.stat(f"{folder}/{name}")
                sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return sizes


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


def _processor_times(process: psutil.Process) -> tuple[float, float]:
    """Seconds of a process and of its children that have ended; (0, 0) where it has ended itself."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0, 0.0
    return times.user + times.system, times.children_user + times.children_system


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main() -> None:
    """Shut a process in and print what holds there; nothing where that fails."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = spawn(lambda facts: os.write(writer, json.dumps(facts).encode()), Path(folder), [], Limits(), writer)
        os.close(writer)
        os.waitpid(child, 0)
    print(os.read(reader, 1000).decode())


if __name__ == "__main__":
    main()
