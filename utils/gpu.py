"""Which device computes, in which number format, and whether a training run fits into its memory.

For: `check_gpu()` (a report a student can read), the choice of device and dtype, the estimate made *before* training,
and what it really took (`PeakMemory`; `saved_for_backward` from `memory.py`).
Not for: building or training models; a model is only looked at here. The closed forms are in `memory.py`.

The device is CUDA where there is one; `LAB_DEVICE=cpu|cuda|auto` overrides that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import psutil
import torch
from torch import nn

from utils.counts import predict_trainable
from utils.memory import FLOAT32, FOOTPRINTS, activation_bytes, format_bytes, saved_for_backward

__all__ = [
    "GpuError",
    "GpuReport",
    "MemoryEstimate",
    "PeakMemory",
    "autocast",
    "check_gpu",
    "compute_dtype",
    "estimate_memory",
    "fast_bf16",
    "format_bytes",
    "free_memory",
    "pick_device",
    "require_memory",
    "saved_for_backward",
]

USABLE = {"cuda": 0.9, "cpu": 0.7}  # share of the free memory a run may plan with: allocators waste the rest
CPU_ONLY = "this PyTorch is a CPU build ({build}): install a CUDA build to use a GPU"
NO_DRIVER = "PyTorch can use CUDA, but sees no NVIDIA driver: install it, or start the container with its GPU"
NOT_VISIBLE = (
    "there is a driver, but PyTorch sees no GPU: check CUDA_VISIBLE_DEVICES, and that the driver is new enough"
)


class GpuError(RuntimeError):
    """The device asked for is not there, or the run does not fit; the message names the remedy."""


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
    if os.environ.get("LAB_DEVICE") == "cpu":
        return _cpu_report(driver, build, "LAB_DEVICE=cpu was set")
    if not torch.cuda.is_available():
        return _cpu_report(driver, build, _why_no_cuda(driver, build))
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


def _cpu_report(driver: str | None, build: str, reason: str) -> GpuReport:
    memory, cpu = psutil.virtual_memory(), torch.cpu.get_capabilities()
    name = f"{cpu.get('cpu_name') or 'CPU'}, {os.cpu_count()} cores"
    return GpuReport("cpu", name, memory.available, memory.total, None, fast_bf16("cpu"), driver, build, reason)


def _why_no_cuda(driver: str | None, build: str) -> str:
    if torch.version.cuda is None:
        return CPU_ONLY.format(build=build)
    return NO_DRIVER if driver is None else NOT_VISIBLE


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
        reason = _why_no_cuda(_driver_version(), torch.__version__)
        raise GpuError(
            f"CUDA was asked for and is not there: {reason}; or set LAB_DEVICE=cpu (LAB_PROFILE=mini is small)"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the hardware multiplies bfloat16 natively; elsewhere it is emulated, and slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of matrix products under `autocast(device)`; weights and (IA)³ vectors stay float32."""
    return torch.bfloat16 if fast_bf16(device) else torch.float32


def autocast(device: torch.device | str) -> AbstractContextManager:
    """bfloat16 autocast where `fast_bf16`, else a context that changes nothing."""
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


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training step needs, in bytes, beside what is free. `working`: short-lived copies around the loss."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    total: int
    available: int
    fits: bool
    remedy: str

    def __str__(self) -> str:
        rows = [(f.name, format_bytes(getattr(self, f.name))) for f in fields(self)[:7]]
        verdict = "fits" if self.fits else f"does NOT fit: {self.remedy}"
        return "\n".join([*(f"{label:<12}{value:>12}" for label, value in rows), verdict])


def estimate_memory(
    model: nn.Module, method: str, batch: int, length: int, device: torch.device | str | None = None
) -> MemoryEstimate:
    """Bytes that training GPT-2 by `method` on `batch` x `length` tokens needs at its peak, from closed forms.

    float32 weights; gradients and Adam's two moments for the trainable parameters (Kingma and Ba 2015); activations
    from `activation_bytes`. They are counted in float32: bfloat16 autocast keeps less of them, and a bfloat16 copy of
    the weights, which `working` includes. On a CPU the system was seen to hand out up to 1.4 times the total.
    `model` may be the base or already carry the adapter.
    Raises GpuError for an unknown method.
    """
    if method not in FOOTPRINTS:
        raise GpuError(f"no memory estimate for method {method!r}; known: {', '.join(FOOTPRINTS)}")
    device = torch.device(device) if device is not None else pick_device()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = parameters * FLOAT32
    gradients = predict_trainable(model.config, method) * FLOAT32
    activations = activation_bytes(model.config, method, batch, length, device)
    # beside the stored log-probabilities: the logits while held, their gradient, that of the log-probabilities
    working = 3 * FLOAT32 * batch * length * model.config.vocab_size + (weights // 2 if fast_bf16(device) else 0)
    total = weights + 3 * gradients + activations + working
    available = free_memory(device)
    remedy = f"set LAB_OVERRIDE=batch_size={max(1, batch // 2)} before you start Jupyter, or LAB_PROFILE=mini"
    loaded = weights if next(model.parameters()).device.type == device.type else 0  # these are not free any more
    fits = total - loaded <= USABLE[device.type] * available
    return MemoryEstimate(weights, gradients, 2 * gradients, activations, working, total, available, fits, remedy)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`; on a CPU the computer's available RAM.

    PyTorch keeps the blocks it has freed: on a GPU they count as taken for the driver, and as free here.
    """
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def require_memory(estimate: MemoryEstimate) -> None:
    """Raise GpuError with the remedy where `estimate` does not fit; call it before training."""
    if not estimate.fits:
        needed, free = format_bytes(estimate.total), format_bytes(estimate.available)
        raise GpuError(f"training needs about {needed}, and {free} are free: {estimate.remedy}")
