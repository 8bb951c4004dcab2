"""What computes here: the device, in which number format, and how much memory a block of code took at most.

The device is CUDA where there is one; `LAB_DEVICE=cpu|cuda|auto` overrides that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import psutil
import torch

BF16_GAIN = 1.2  # bfloat16 is used on a processor that multiplies this many times as fast in it as in float32


class GpuError(RuntimeError):
    """The device asked for is not there, or the run does not fit; the message names the remedy."""


def format_bytes(count: int) -> str:
    """A number of bytes with a binary unit: `format_bytes(1536)` is "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@dataclass(frozen=True)
class GpuReport:
    """What computes here. Memory in bytes: the GPU's where there is one, else the computer's RAM. Prints as a table."""

    device: str
    name: str
    memory_free: int
    memory_total: int
    compute_capability: str | None
    bf16: bool
    driver: str | None
    torch_build: str
    reason: str | None  # why there is no GPU

    def __str__(self) -> str:
        rows = [
            ("device", f"{self.device} ({self.name})"),
            ("memory", f"{format_bytes(self.memory_free)} free of {format_bytes(self.memory_total)}"),
            ("compute capability", self.compute_capability),
            ("fast bfloat16", "yes" if self.bf16 else "no"),
            ("driver", self.driver),
            ("PyTorch build", self.torch_build),
            ("no GPU because", self.reason),
        ]
        return "\n".join(f"{label:<19} {value}" for label, value in rows if value is not None)


def check_gpu() -> GpuReport:
    """Report the device of this session (see `pick_device`); never raises where there is no GPU, but says why."""
    driver, build = _driver_version(), torch.__version__
    forced = os.environ.get("LAB_DEVICE") == "cpu"
    if forced or not torch.cuda.is_available():
        memory, cpu = psutil.virtual_memory(), torch.cpu.get_capabilities()
        name = f"{cpu.get('cpu_name') or 'CPU'}, {os.cpu_count()} cores"
        reason = "LAB_DEVICE=cpu was set" if forced else _why_no_cuda(driver)
        return GpuReport("cpu", name, memory.available, memory.total, None, fast_bf16("cpu"), driver, build, reason)
    index = torch.cuda.current_device()
    properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
    return GpuReport(
        device=f"cuda:{index}",
        name=properties.name,
        memory_free=free,
        memory_total=total,
        compute_capability=f"{properties.major}.{properties.minor}",
        bf16=fast_bf16("cuda"),
        driver=driver,
        torch_build=build,
        reason=None,
    )


def _why_no_cuda(driver: str | None) -> str:
    if torch.version.cuda is None:
        return f"this PyTorch is a CPU build ({torch.__version__}): install a CUDA build to use a GPU"
    if driver is None:
        return "PyTorch can use CUDA, but sees no NVIDIA driver: install it, or start the container with its GPU"
    return "there is a driver, but PyTorch sees no GPU: check CUDA_VISIBLE_DEVICES, and that the driver is new enough"


def _driver_version() -> str | None:
    """The NVIDIA driver's version as `nvidia-smi` gives it, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def pick_device(requested: str | None = None) -> torch.device:
    """`requested`, else `LAB_DEVICE`, else "auto": CUDA where there is one. Raises GpuError where it cannot be had."""
    name = requested or os.environ.get("LAB_DEVICE") or "auto"
    if name not in ("auto", "cpu", "cuda"):
        raise GpuError(f"unknown device {name!r}: set LAB_DEVICE to auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        reason = _why_no_cuda(_driver_version())
        raise GpuError(
            f"CUDA was asked for and is not there: {reason}; or set LAB_DEVICE=cpu (LAB_PROFILE=mini is small)"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32; elsewhere `autocast` leaves float32 alone.

    A GPU says so itself. A processor's flag is not enough: an Intel Xeon without AMX has an instruction for it that is
    slower than float32's. So the flag is asked first, then the clock.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    flagged = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(flagged) and bf16_gain() >= BF16_GAIN


@functools.cache
def bf16_gain() -> float:
    """How many times as fast this processor multiplies in bfloat16 as in float32; measured once, in milliseconds.

    256 x 256 on one thread, the fastest of 8 short rounds each, in turn: other programs do not change that.
    """
    threads = torch.get_num_threads()
    matrices = [torch.ones(256, 256, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)]
    fastest = [float("inf"), float("inf")]
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for number in range(9):
                for which, matrix in enumerate(matrices):
                    start = time.perf_counter()
                    torch.mm(matrix, matrix)
                    if number:  # the first round warms up
                        fastest[which] = min(fastest[which], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return fastest[0] / fastest[1]


def autocast(device: torch.device | str) -> AbstractContextManager:
    """bfloat16 autocast where `fast_bf16` (weights and (IA)³ vectors stay float32), else no change."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16) if fast_bf16(device) else contextlib.nullcontext()


class PeakMemory:
    """`with PeakMemory() as peak: ...`, then `peak.bytes`.

    CUDA: the most bytes PyTorch had allocated at once, exact, earlier allocations included. CPU: how much the process
    grew at most (resident memory, sampled every 5 ms), approximate: memory freed before and used again is not seen.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device) if device is not None else pick_device()
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._process, self._stop = psutil.Process(), threading.Event()
        self._start = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._look()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        self._thread.join()
        self._look()
