"""The workflows are valid YAML with time limits, and every command, target, script and file they name exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PYTHONS = (".venv/bin/python", "python")  # the one is made by `make env`; the other is that of a job without make
KEPT = {  # by workflow, what a failed job keeps; the others run no notebook, or publish them
    "cpu.yml": ["build/course", "build/replay.xml", "build/extensions.xml"],
    "gpu.yml": ["build/course", "build/replay.xml"],
    "systems.yml": ["build/course"],
}


def jobs(path: Path) -> Iterator[tuple[str, dict]]:
    yield from yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()


def commands(path: Path) -> Iterator[str]:
    for _, job in jobs(path):
        for step in job["steps"]:
            yield from filter(None, map(str.strip, step.get("run", "").splitlines()))


def problems_of(command: str) -> list[str]:
    """Say what a command of a workflow or of .ci/run names that does not exist."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "make":
        return [f"make has no target {word}" for word in words[1:] if word not in TARGETS]
    if words[0] not in PYTHONS:
        return [f"unknown command {words[0]}"]
    if words[1] == "-c":
        ast.parse(words[2])
        return []
    files = [word.split("=")[-1] for word in words[1:] if "/" in word or "." in word]
    return [f"no file {name}" for name in files if not (ROOT / name).exists()]


def test_all_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["audit.yml", "cpu.yml", "gpu.yml", "pages.yml", "systems.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    found = list(commands(path))
    assert found
    assert [problem for command in found for problem in problems_of(command)] == []


@pytest.mark.parametrize("command", ["make cours", "bash x.sh", ".venv/bin/python scripts/none.py"])
def test_a_wrong_command_is_found(command: str) -> None:
    assert problems_of(command)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_time_limits_and_kept_notebooks(path: Path) -> None:
    for name, job in jobs(path):
        assert job["timeout-minutes"] <= 90, name
        assert all(step["timeout-minutes"] <= job["timeout-minutes"] for step in job["steps"] if "run" in step), name
        if path.name in KEPT:
            upload = job["steps"][-1]
            assert upload["if"] == "failure()" and upload["with"]["path"].split() == KEPT[path.name]


def test_gpu_workflow_asserts_cuda_and_keeps_the_cache() -> None:
    path = ROOT / ".github" / "workflows" / "gpu.yml"
    ((_, job),) = jobs(path)
    assert job["env"]["LAB_PROFILE"] == "gpt2"
    assert "vars.GPU_RUNNER" in job["runs-on"] and "self-hosted" in job["runs-on"]
    assert any("torch.cuda.is_available()" in command for command in commands(path))
    assert any(step.get("uses", "").startswith("actions/cache@") for step in job["steps"])
    triggers = yaml.safe_load(path.read_text(encoding="utf-8"))[True]  # YAML 1.1 reads the key `on` as true
    assert "schedule" in triggers and triggers["pull_request"]["types"] == ["labeled"]


def test_ci_run_calls_targets_that_exist_and_the_slow_tests_which_make_test_leaves_out() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
    called = re.findall(r"^make (\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert called == ["course", "test-extensions", "test-slow", "test"] and set(called) <= TARGETS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert 'pytest tests -m "not slow"' in makefile and "pytest tests -m slow\n" in makefile
    assert "make test-slow" in commands(ROOT / ".github" / "workflows" / "cpu.yml")


def test_no_step_hides_a_failure_and_every_make_target_has_its_rules() -> None:
    for path in [*WORKFLOWS, ROOT / "Makefile", ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\| *true|continue-on-error|^\t-[^-]", text, re.MULTILINE), path.name
    for target in sorted(TARGETS):
        dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt", "requirements-audit.txt"])
def test_versions_are_exact(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins and all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)


def test_no_package_is_pinned_twice() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "constraints.txt"))
    names = [re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)]
    assert len(names) == len(set(names))


@pytest.mark.skipif(os.name == "nt", reason="make is not there")
def test_make_works_in_a_folder_with_quotes_and_brackets_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "Ann's lab (1) & more"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "<$LAB_ARTIFACTS> $@"\n')
    python.chmod(0o755)
    (folder / ".venv" / "installed.txt").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LAB_", "MAKE"))}
    for target, command in (("course", "scripts/replay.py 01-Setup"), ("test-notebooks", "-m pytest --nbval")):
        done = subprocess.run(["make", target], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"<{folder}/build/artifacts> {command}" in done.stdout
