"""What a student is told: is the environment right, is the answer to an exercise right.

For: `check_environment()`, the installed packages against `requirements.txt`, with the pip command that repairs them;
`check()`, one exercise in one line that says todo, pass or fail; `scoreboard()`. Needs nothing but the standard library
until an exercise is checked, so the first also works where a package is missing.
Not for: what a right answer is (`exercises_*.py`), figures (`plots.py`), the GPU (`gpu.py`), or grades: a check
runs in the student's own process and can be fooled there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from utils.settings import ROOT

REQUIREMENTS = ROOT / "requirements.txt"


SHOWN = ("torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "scikit-learn", "matplotlib")


PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;]+)")


class CheckError(ValueError):
    """A check cannot be made; the message says what is missing or wrong."""


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
    def ok(self) -> bool:
        """True where every package has the version the course was written with."""
        return not self.failures

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
    """Compare what is installed with the `name==version` lines of `requirements`; imports none of the packages.

    Raises `CheckError` where the file is missing or a line is not such a pin.
    """
    pins = read_pins(Path(requirements))
    return EnvironmentCheck(tuple(PackageCheck(name, version, installed_version(name)) for name, version in pins))


def read_pins(path: Path) -> list[tuple[str, str]]:
    """The `(name, version)` pins of a requirements file, in its order; comments and empty lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckError(f"{path.name} cannot be read ({error.strerror}): run this in the course's folder") from error
    pins = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = PIN.fullmatch(content)
        if found is None:
            raise CheckError(f"{path.name}, line {number}: {content!r} is not name==version")
        pins.append((found[1], found[2]))
    if not pins:
        raise CheckError(f"{path.name} names no package: restore the file")
    return pins


def installed_version(name: str) -> str | None:
    """The installed version without its build suffix (`2.13.0`, not `2.13.0+cpu`); None where it is not installed."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None
