"""The versions table: OK or FAIL with the pip command; a notebook that starts quiet and seeded."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import warnings
from importlib import metadata

import numpy
import pytest
import torch

from utils import session
from utils.config import PROFILES, ROOT
from utils.session import check_environment


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """What is installed, as this test wants it."""
    versions = {"torch": "2.13.0+cu130", "peft": "0.21.2", "tqdm": "4.70.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(session.metadata, "version", version)
    return versions


@pytest.fixture
def requirements(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# models\ntorch==2.13.0\npeft==0.21.2  # adapters\n\ntqdm==4.70.1\n", encoding="utf-8")
    return path


def row(report: session.EnvironmentCheck, name: str) -> list[str]:
    return next(line.split() for line in str(report).splitlines() if line.startswith(name))


def test_all_versions_agree(installed, requirements):
    report = check_environment(requirements)
    assert report.failures == () and report.command is None
    assert row(report, "torch") == ["torch", "2.13.0", "2.13.0", "OK"]  # the build suffix does not count
    assert "3 of 3 packages OK" in str(report)
    assert "FAIL" not in str(report) and "pip" not in str(report)


def test_wrong_version_fails_with_the_command(installed, requirements):
    installed["peft"] = "0.13.0"
    report = check_environment(requirements)
    assert [package.name for package in report.failures] == ["peft"]
    assert row(report, "peft") == ["peft", "0.21.2", "0.13.0", "FAIL"]
    assert row(report, "torch")[-1] == "OK"
    assert "pip install peft==0.21.2 -c constraints.txt" in str(report)
    assert "2 of 3 packages OK" in str(report)
    installed["peft"] = "0.21.20"
    assert [package.name for package in check_environment(requirements).failures] == ["peft"]


def test_a_missing_package_fails_and_one_command_repairs_all(installed, requirements):
    del installed["tqdm"]
    report = check_environment(requirements)
    assert row(report, "tqdm") == ["tqdm", "4.70.1", "missing", "FAIL"]  # shown although it is no main package
    assert "pip install tqdm==4.70.1 -c constraints.txt" in str(report)
    installed["torch"] = "2.12.0"
    assert check_environment(requirements).command == "pip install torch==2.13.0 tqdm==4.70.1 -c constraints.txt"


def test_the_course_itself_is_readable():
    report = check_environment()
    assert {"torch", "transformers", "peft"} <= {package.name for package in report.packages}
    assert set(session.SHOWN) <= {package.name for package in report.packages}
    for name in ("requirements.txt", "requirements-extensions.txt", "constraints.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        content = [text for line in lines if (text := line.partition("#")[0].strip())]
        assert ["==".join(pin) for pin in session.read_pins(ROOT / name)] == content, name


def test_works_where_no_package_can_be_imported():
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'numpy'): sys.modules[name] = None\n"
        "from utils.session import check_environment\n"
        "print(len(check_environment().packages) > 0)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.strip() == "True"


def test_the_seed_reaches_every_generator():
    def draw():
        return random.random(), numpy.random.get_state()[1][0], float(torch.rand(1))

    session.seed_everything(5)
    first = draw()
    session.seed_everything(5)
    assert draw() == first
    session.seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_a_notebook_starts_quiet_and_seeded(monkeypatch):
    from datasets import are_progress_bars_disabled
    from transformers.utils import logging

    monkeypatch.setenv("LAB_PROFILE", "mini")
    with warnings.catch_warnings(record=True) as caught:
        profile = session.setup_notebook()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
    assert profile == PROFILES["mini"]
    assert [str(warning.message) for warning in caught] == ["something else"]
    assert are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.ERROR
    drawn = torch.rand(1)
    session.seed_everything(profile.seed)
    assert torch.equal(drawn, torch.rand(1))


def test_datasets_is_quiet_though_a_notebook_loads_it_later():
    code = (
        "import sys, utils.session; utils.session.quiet(); print('datasets' in sys.modules); import datasets; "
        "print(datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["False", "True", str(logging.ERROR)], done.stderr
