"""The environment table: OK where versions agree, FAIL with the pip command where one is wrong or missing."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from utils import checks
from utils.checks import CheckError, check_environment
from utils.settings import ROOT


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """What is installed, as this test wants it."""
    versions = {"torch": "2.13.0+cu130", "peft": "0.21.2", "tqdm": "4.70.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(checks.metadata, "version", version)
    return versions


@pytest.fixture
def requirements(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# models\ntorch==2.13.0\npeft==0.21.2  # adapters\n\ntqdm==4.70.1\n", encoding="utf-8")
    return path


def row(report: checks.EnvironmentCheck, name: str) -> list[str]:
    return next(line.split() for line in str(report).splitlines() if line.startswith(name))


def test_all_versions_agree(installed, requirements):
    report = check_environment(requirements)
    assert report.ok and report.failures == () and report.command is None
    assert row(report, "torch") == ["torch", "2.13.0", "2.13.0", "OK"]  # the build suffix does not count
    assert "3 of 3 packages OK" in str(report)
    assert "FAIL" not in str(report) and "pip" not in str(report)


def test_wrong_version_fails_with_the_command(installed, requirements):
    installed["peft"] = "0.13.0"
    report = check_environment(requirements)
    assert not report.ok
    assert row(report, "peft") == ["peft", "0.21.2", "0.13.0", "FAIL"]
    assert row(report, "torch")[-1] == "OK"
    assert "pip install peft==0.21.2 -c constraints.txt" in str(report)
    assert "2 of 3 packages OK" in str(report)


def test_missing_package_fails_with_the_command(installed, requirements):
    del installed["tqdm"]
    report = check_environment(requirements)
    assert row(report, "tqdm") == ["tqdm", "4.70.1", "missing", "FAIL"]  # shown although it is no main package
    assert "pip install tqdm==4.70.1 -c constraints.txt" in str(report)


def test_one_command_repairs_all_failures(installed, requirements):
    installed["torch"] = "2.12.0"
    del installed["tqdm"]
    assert check_environment(requirements).command == "pip install torch==2.13.0 tqdm==4.70.1 -c constraints.txt"


def test_longer_version_is_another_version(installed, requirements):
    installed["peft"] = "0.21.20"
    assert [package.name for package in check_environment(requirements).failures] == ["peft"]


def test_the_course_itself_is_readable():
    report = check_environment()
    assert {"torch", "transformers", "peft"} <= {package.name for package in report.packages}
    assert set(checks.SHOWN) <= {package.name for package in report.packages}
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    assert len(report.packages) == len(pins)


@pytest.mark.parametrize("line", ["torch>=2.0", "torch", "git+https://example.org/x", "torch==2.13.0 extra"])
def test_a_line_that_is_no_pin_is_named(tmp_path, line):
    path = tmp_path / "requirements.txt"
    path.write_text(f"peft==0.21.2\n{line}\n", encoding="utf-8")
    with pytest.raises(CheckError, match="line 2"):
        check_environment(path)


def test_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(CheckError, match="cannot be read"):
        check_environment(tmp_path / "requirements.txt")
    (tmp_path / "requirements.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(CheckError, match="names no package"):
        check_environment(tmp_path / "requirements.txt")


def test_works_where_no_package_can_be_imported():
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'numpy'): sys.modules[name] = None\n"
        "from utils.checks import check_environment\n"
        "print(len(check_environment().packages) > 0)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.strip() == "True"
