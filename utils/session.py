"""Starting a notebook: the versions table, quiet libraries, freed memory kept, the seed.

Needs nothing but the standard library until `setup_notebook` is called, so the table also works where a package is
missing.
"""

import ctypes
import os
import random
import re
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from utils.config import ROOT, Profile, load_profile

REQUIREMENTS = ROOT / "requirements.txt"
SHOWN = ("torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "scikit-learn", "matplotlib")
PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;#]+)", re.MULTILINE)
RUN_ABOVE = "Choose Run > Run All Above Selected Cell, then run this cell again."


@dataclass(frozen=True)
class PackageCheck:
    """One package: the version the course needs, and the installed one (None where it is not installed)."""

    name: str
    required: str
    installed: str | None

    @property
    def state(self) -> str:
        """OK or FAIL; a build suffix such as `+cu130` does not count."""
        return "OK" if self.installed == self.required else "FAIL"


@dataclass(frozen=True)
class EnvironmentCheck:
    """All packages of the requirements. Prints as a table: the main packages, every failure, the pip command."""

    packages: tuple[PackageCheck, ...]

    @property
    def failures(self) -> tuple[PackageCheck, ...]:
        """The packages that are missing or have another version."""
        return tuple(package for package in self.packages if package.state == "FAIL")

    @property
    def command(self) -> str | None:
        """The pip command that repairs the failures, to be run in the course's folder; None where there are none."""
        pins = " ".join(f"{package.name}=={package.required}" for package in self.failures)
        return f"pip install {pins} -c constraints.txt" if pins else None

    def __str__(self) -> str:
        shown = [package for package in self.packages if package.name in SHOWN or package.state == "FAIL"]
        rows = [("package", "required", "installed", "state")]
        rows += [(p.name, p.required, p.installed or "missing", p.state) for p in shown]
        lines = [f"{name:<18}{required:>12}{installed:>12}   {state}" for name, required, installed, state in rows]
        lines.append(f"{len(self.packages) - len(self.failures)} of {len(self.packages)} packages OK")
        if self.command:
            lines.append(f"To repair, run in the course's folder, then restart the kernel:\n  {self.command}")
        return "\n".join(lines)


def check_environment(requirements: Path | str = REQUIREMENTS) -> EnvironmentCheck:
    """Compare what is installed with the `name==version` lines of `requirements`; imports none of the packages."""
    pins = read_pins(Path(requirements))
    return EnvironmentCheck(tuple(PackageCheck(name, version, installed_version(name)) for name, version in pins))


def read_pins(path: Path) -> list[tuple[str, str]]:
    """The `(name, version)` pins of a requirements file, in its order."""
    return PIN.findall(path.read_text(encoding="utf-8"))


def installed_version(name: str) -> str | None:
    """The installed version without its build suffix (`2.13.0`, not `2.13.0+cpu`); None where it is not installed."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def setup_notebook(name: str | None = None) -> Profile:
    """Start a notebook: quiet libraries, freed memory kept, the profile (as `load_profile`), its seed set.

    From then on a NameError comes with the advice of `RUN_ABOVE`. Raises ConfigError.
    """
    quiet()
    reuse_freed_memory()
    advise_on_missing_names()
    profile = load_profile(name)
    seed_everything(profile.seed)
    return profile


def quiet() -> None:
    """Switch off the libraries' progress bars and chatter, which notebooks would store; errors still show."""
    import huggingface_hub.utils
    import transformers

    for library in (transformers.utils.logging, huggingface_hub.utils.logging):
        library.set_verbosity_error()  # the log line "`loss_type=None` was set ..." goes with it
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    if datasets := sys.modules.get("datasets"):
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
    else:  # it takes long to import, and finds these when it is
        os.environ["DATASETS_VERBOSITY"] = "error"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*loss_type=None.*")


def reuse_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors; False where the C library is not glibc.

    glibc's `malloc` hands every block above 32 MiB back to the kernel, which must fill the next one with zeros, page
    by page: for a batch's logits and their gradients a fifth of a training step on a CPU. See mallopt(3).
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def advise_on_missing_names() -> None:
    """From now on, add `RUN_ABOVE` to a NameError that this kernel shows: most come of a restart."""
    from IPython import get_ipython

    def show(shell, kind, error, trace, tb_offset=None) -> None:  # noqa: ANN001 - as IPython calls it
        if kind is NameError:
            error.add_note(f"After a restart of the kernel? {RUN_ABOVE}")
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    if shell := get_ipython():
        shell.set_custom_exc((NameError,), show)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every CUDA device too)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
