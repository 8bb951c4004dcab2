"""The course as a grader sees it: its notebooks, and a runner for answers.

For: `Course` (plans and points), `Runner` (the course, prepared for answers by `worker.py`), `calibrate`, which
proves before any student is graded that our own solutions get every point and the unsolved edition none.
Not for: what a question needs (`plan.py`), submissions (`intake.py`, `match.py`), a whole class (`run.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grading import PACKAGES, cells, check_modules, codec, release, sandbox
from grading.plan import Plan, Question, read_plan
from grading.sandbox import Limits

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = (".ssh", ".aws", ".config", ".gnupg", ".kube", ".docker", ".netrc", ".git-credentials",
           ".cache/huggingface/token")  # fmt: skip


class CourseError(RuntimeError):
    """The course cannot be graded as it is; the message names the question and what to mend."""


class JudgeError(CourseError):
    """One answer could not be judged, through no fault of the course; the message says what happened."""


def profile_name() -> str:
    """The profile that is graded: the variable LAB_PROFILE, else the small one."""
    return os.environ.get("LAB_PROFILE") or "mini"


def _decides(cell: Mapping) -> list:
    """What of a cell can decide a grade: code, the stub of a written answer, and by what its answer is found."""
    is_code, is_answer = cell["cell_type"] == "code", cells.is_solution(cell)
    source = cell["source"] if is_code else cells.stubbed(cell) if is_answer else ""
    return [cell["cell_type"], cell.get("id"), cell["metadata"].get("nbgrader"), sorted(cells.tags(cell)), source]


@dataclass
class Course:
    """The solved course in `root`, and what calibration has found out about it."""

    root: Path
    plans: tuple[Plan, ...]
    inside: set[str] = field(default_factory=set)  # questions whose test runs in the student's process
    troubles: list[str] = field(default_factory=list)  # our own cells that failed in the student edition
    sandbox: dict = field(default_factory=dict)  # what shut our own answers in

    @classmethod
    def load(cls, root: Path = ROOT) -> Course:
        """Read the notebooks. Raises FormatError, ReleaseError, or CourseError where an id is used twice."""
        plans = tuple(read_plan(path) for path in release.course_notebooks(root))
        names = [question.grade_id for plan in plans for question in plan.questions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CourseError(f"the grade_id {twice[0]!r} is used in two notebooks: rename one of them")
        if not names:
            raise CourseError("no graded cell in any notebook: there is nothing to grade")
        return cls(root, plans)

    @property
    def questions(self) -> tuple[Question, ...]:
        """All questions, in the order of the course."""
        return tuple(question for plan in self.plans for question in plan.questions)

    def plan_of(self, question: Question) -> Plan:
        """The notebook of a question."""
        return next(plan for plan in self.plans if plan.name == question.notebook)

    @property
    def most(self) -> float:
        """All points together."""
        return sum(question.points for question in self.questions)

    def digest(self) -> str:
        """16 hex digits over what decides a grade on our side: notebooks, packages, bands, the grader, the profile.

        Of a cell of text only what an answer in it begins as: another wording of the lesson changes no grade.
        """
        digest = hashlib.sha256(profile_name().encode())
        folders = [*(self.root / package for package in PACKAGES), Path(__file__).parent]
        files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        files += [*release.course_notebooks(self.root), self.root / "assets" / "grading-bands.json"]
        for path in files:
            if path.suffix == ".ipynb":
                content = [_decides(cell) for cell in release.read_solved(path)["cells"]]
                digest.update(json.dumps([path.name, content], sort_keys=True).encode())
            elif path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]

    def secrets(self) -> list[Path]:
        """Folders that a student's code must not read: the course's, the grader's, and keys in the instructor's home.

        Of the first two the Python environment stays, where it lies in them (`mounts.py`).
        """
        return [self.root, ROOT, *(Path.home() / name for name in PRIVATE)]


class Runner:
    """The course, prepared for answers; a context manager. Answers can be judged from several threads at once.

    `troubles`: imports, functions and stubs of ours that failed.
    """

    def __init__(self, course: Course, limits: Limits, hide: list[Path]):
        self.course, self.limits = course, limits
        self.hide = [*course.secrets(), *hide]
        self.troubles: list[str] = []
        self.wanted = {question.grade_id for question in course.questions if question.kind == "code"}

    def __enter__(self) -> Runner:
        self.folder = Path(tempfile.mkdtemp(prefix="grading-"))
        self.staged, sockets, self.scratch = (self.folder / name for name in ("course", "s", "answers"))
        try:
            release.stage(self.course.root, self.staged)
            sockets.mkdir(mode=0o700)
            self.scratch.mkdir(mode=0o700)
            self.hide += [self.folder, *(path for _, path in check_modules(self.staged))]
            self._start(sockets)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, sockets: Path) -> None:
        """Start the worker and wait until each wanted test stands ready.

        What it is told comes through its input: its arguments and its environment can be read by a student's code.
        """
        reader, writer = os.pipe()
        environment = sandbox.allowed_environment() | {
            "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": "",
            "LAB_DEVICE": "cpu", "LAB_PROFILE": profile_name(),
        }  # fmt: skip
        if sandbox.probe()["files"] == "limits":
            environment["GRADING_NO_NAMESPACES"] = "1"  # half of them would only break answers
        environment.pop("LAB_ARTIFACTS", None)  # the staged course keeps its own
        with (self.folder / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grading.worker"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
                stdout=output, stderr=output, pass_fds=[writer], start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        told = {"course": str(self.staged), "sockets": str(sockets), "grader": str(ROOT), "events": writer}
        with self.process.stdin as pipe:
            pipe.write((json.dumps(told) + "\n").encode())
        waiting = set(self.wanted)
        with os.fdopen(reader, encoding="utf-8") as events:
            for event in map(json.loads, events):
                waiting.discard(event.get("ready"))
                if "cell" in event:
                    where = f"{event['notebook']}, cell {event['cell']}"
                    self.troubles.append(f"{where}: {event['name']}: {event['message']}")
        if waiting:
            lines = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise CourseError(f"no process takes answers to {sorted(waiting)[0]}: {(lines or ['no output'])[-1]}")

    def __exit__(self, *_: object) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with contextlib.suppress(RecursionError):  # folders in folders, made without namespaces
            shutil.rmtree(self.folder, ignore_errors=True)

    def judge(self, question: Question, answers: Mapping[str, str], inside: bool | None = None) -> dict:
        """The verdict on `answers` (sources by grade id): `passed`, and if not `name`, `message`, `line`, `stopped`.

        Raises JudgeError where there is none, after a second try.
        """
        plan = self.course.plan_of(question)
        run, exports = plan.needs(question, answers)
        job = {
            "cells": [[name, answers[name]] for name in run if name in answers],
            "exports": exports,
            "inside": question.grade_id in self.course.inside if inside is None else inside,
            "hide": [str(path) for path in self.hide],
            "scratch": str(self.scratch),
            "limits": self.limits.to_dict(),
        }
        test = {"source": question.source, "imports": plan.imports_before(question)}
        try:
            with contextlib.suppress(ConnectionError):  # once more, where the machine was short of something
                return self._ask(question.grade_id, job, test)
            return self._ask(question.grade_id, job, test)
        except OSError as error:
            why = f"{type(error).__name__}: {error}"
            raise JudgeError(f"{question.grade_id}: the grader itself failed: {why}") from error

    def _ask(self, name: str, job: dict, test: dict) -> dict:
        """The worker's verdict. Raises OSError where the connection, or what is behind it, breaks."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(3 * self.limits.clock + 300)
            connection.connect(str(self.folder / "s" / name))
            codec.send(connection, job)
            said, _ = codec.receive(connection)
            if "broken" not in said:
                codec.send(connection, test)
                said, _ = codec.receive(connection)
        if "broken" in said:
            raise codec.ClosedError(str(said["broken"]))
        return said


def calibrate(runner: Runner) -> list[str]:
    """Judge our own solutions and the stubs; returns what cannot be graded, in words, and fills `course.inside`."""
    faults, course = [], runner.course
    course.troubles += runner.troubles
    for question in (q for q in course.questions if q.kind == "code"):
        plan = course.plan_of(question)
        right = runner.judge(question, plan.solved(), inside=False)
        course.sandbox = right.get("sandbox") or course.sandbox
        inside = False
        if not right["passed"]:
            apart, right, inside = right, runner.judge(question, plan.solved(), inside=True), True
            if not right["passed"]:
                right = apart
        if not right["passed"]:
            why = right.get("stopped") or f"{right.get('name')}: {right.get('message')}"
            faults.append(f"{question.grade_id}: our own solution does not pass ({why})")
            continue
        if inside:
            course.inside.add(question.grade_id)
        if runner.judge(question, plan.unsolved(), inside=inside)["passed"]:
            faults.append(f"{question.grade_id}: the unsolved edition passes, so the test tests nothing")
    return faults
