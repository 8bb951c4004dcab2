"""The same on every system: what comes in is pinned, README names a Python that can have it, files keep their bytes."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from utils.config import ROOT
from utils.session import read_pins

DIRECT = [canonicalize_name(name) for name, _ in read_pins(ROOT / "requirements.txt")]
PINNED = {*DIRECT, *(canonicalize_name(name) for name, _ in read_pins(ROOT / "constraints.txt"))}
SYSTEMS = {
    "Linux": {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"},
    "Windows": {"sys_platform": "win32", "os_name": "nt", "platform_machine": "AMD64"},
    "Darwin": {"sys_platform": "darwin", "os_name": "posix", "platform_machine": "arm64"},
}


def needed(system: str, python: str) -> Iterator[str]:
    """The packages that requirements.txt brings with it there, as the installed packages describe what they need."""
    marks = SYSTEMS[system] | {"platform_system": system}
    marks |= {"python_version": python, "python_full_version": f"{python}.9"}
    todo, done = [(name, "") for name in DIRECT], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        yield name
        try:
            described = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another system
            continue
        for requirement in map(Requirement, described):
            if requirement.marker is None or requirement.marker.evaluate(marks | {"extra": extra}):
                todo += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_nothing_comes_in_unpinned(system, python):
    cuda = ("nvidia", "cuda", "triton")  # torch pins these itself
    assert {name for name in needed(system, python) if not name.startswith(cuda)} <= PINNED


def test_the_oldest_python_that_can_have_the_pins_is_the_one_that_is_named():
    here = {canonicalize_name(found.name) for found in metadata.distributions()}
    said = [SpecifierSet(metadata.metadata(name)["Requires-Python"] or "") for name in PINNED & here]
    versions = (f"3.{minor}.{patch}" for minor, patch in itertools.product(range(9, 14), range(20)))
    floor = next(version for version in versions if all(version in each for each in said))
    assert f"Python {floor} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f">= ({floor.replace('.', ', ')})" in makefile and f"needs Python {floor} or newer" in makefile


@pytest.mark.parametrize("path", ["README.md", "assets/mini-gpt2/config.json", "scripts/replay.py"])
def test_a_clone_on_windows_has_the_same_bytes(path):
    """As git would write the file where `core.autocrlf` is set: digests of records would not hold."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "-c", "core.autocrlf=true", "cat-file", "--filters", f"HEAD:{path}"]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    assert written and b"\r" not in written
