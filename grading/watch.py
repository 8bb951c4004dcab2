"""Holds limits over all processes of one answer together, and ends them.

For: `TreeWatch`, in the process that has spawned them (`worker.py`). Not for: limits of a single process, which the
kernel holds (`sandbox.py`).
"""

from __future__ import annotations

import os
import time

import psutil

from grading.sandbox import LEAST_FOR_JUDGE, Limits


class TreeWatch:
    """Watches the children of this process and all that comes from them, but for the `spared`."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.started = limits, time.monotonic()
        self.base = psutil.Process().memory_info().rss  # what a fork shares with us from the start
        self.stopped: float | None = None  # when it was told to stop
        self.spared: set[int] = set()  # children of ours that are not the student's: the judge
        self.computed: dict[psutil.Process, float] = {}  # processor time of each, when it was last seen

    def members(self) -> list[psutil.Process]:
        """The descendants of this process, which adopts those that lose their parent."""
        return [p for p in _children(psutil.Process()) if p.pid not in self.spared]

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
        if self._seconds(members) > self.limits.seconds:
            return f"it computed for more than {self.limits.seconds:g} seconds"
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
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            self.computed[process] = times.user + times.system
            living += self.computed[process] + times.children_user + times.children_system
        return max(living, sum(self.computed.values()))

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


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
