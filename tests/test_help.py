"""Every command says what it is for when it is asked, on a console that knows few characters, and does nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

COMMANDS = [
    *(
        [f"scripts/{path.name}"]
        for path in sorted((ROOT / "scripts").glob("*.py"))
        if "__main__" in path.read_text("utf-8")
    ),
    *(["-m", module] for module in ("study", "study.audit", "bench", "extensions")),
]
KEPT = ("*.md", "*.ipynb", "assets/**/*", "docs/**/*", "build/**/*", "artifacts/**/*")


def written() -> dict[Path, int]:
    """When each file that a command could write was last written."""
    return {path: path.stat().st_mtime_ns for pattern in KEPT for path in ROOT.glob(pattern) if path.is_file()}


@pytest.mark.slow  # each is a fresh process, which imports the libraries
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_help(command, tmp_path):
    before = written()
    environment = os.environ | {"PYTHONIOENCODING": "cp437", "LAB_ARTIFACTS": str(tmp_path)}
    call = [sys.executable, *command, "--help"]
    result = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="cp437")
    assert result.returncode == 0, result.stderr[-500:]
    assert result.stdout.startswith("usage: ")
    assert written() == before and not any(tmp_path.iterdir())
