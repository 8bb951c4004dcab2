"""The course as a grader sees it: its questions, what each needs of a student's notebook, and a runner for answers.

For: `Course` (plan and points), `Runner` (one notebook of the course, kept running by `worker.py`), `calibrate`, which
proves before any student is graded that our own solutions get every point and the unsolved edition none.
Not for: submissions (`intake.py`, `match.py`), a whole class (`run.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grading import cells, codec, release
from grading.sandbox import Limits

ROOT = Path(__file__).resolve().parent.parent
HEADING = re.compile(r"#+ (.+)")
# What a student's code must not read on the grader's machine, beside notebooks, submissions and results.
SECRET = (".git", "build", "tests", "grading", "scripts", "docs")
PRIVATE = (".ssh", ".aws", ".config", ".gnupg", ".kube", ".netrc", ".git-credentials", ".cache/huggingface/token")


class CourseError(RuntimeError):
    """The course cannot be graded as it is; the message names the question and what to mend."""


@dataclass(frozen=True)
class Question:
    """One graded cell. `kind`: "code" (a test judges), "adapter" (`adapter.py` judges), "written" (a person does).

    `title`: the heading that it stands under, for people to read; the id where there is none.
    """

    grade_id: str
    notebook: str
    kind: str
    points: float
    position: int  # of the cell in its notebook
    source: str
    title: str


@dataclass(frozen=True)
class Plan:
    """One notebook: the solved cells, and its questions in order."""

    name: str
    notebook: dict
    questions: tuple[Question, ...]

    def solution_cells(self) -> dict[str, dict]:
        """By grade id: every cell in which a student writes, in order."""
        return {cells.grade_id(c): c for c in self.notebook["cells"] if cells.is_solution(c) and cells.grade_id(c)}

    def solved(self) -> dict[str, str]:
        """Our own sources of these cells."""
        return {name: cell["source"] for name, cell in self.solution_cells().items()}

    def unsolved(self) -> dict[str, str]:
        """The sources of the student edition."""
        return {name: cells.stubbed(cell) for name, cell in self.solution_cells().items()}

    def needs(self, question: Question, answers: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """What judging takes: the solution cells to run (grade ids in order), and the names to hand over.

        Those cells are the ones that, in our solution, bind a name the test reads (the last that does, before the
        test); none does: all since the test before. A cell of the student's that reads a name which an earlier one of
        hers binds needs that one too.
        """
        before = [cell for cell in self.notebook["cells"][: question.position] if cell["cell_type"] == "code"]
        writable = {cells.grade_id(c): c for c in before if cells.is_solution(c) and not cells.is_manual(c)}
        order = list(writable)
        bound = {name: cells.bound_names(_unmarked(cell["source"])) for name, cell in writable.items()}
        used = cells.used_names(question.source)
        exports = sorted(used & set().union(*bound.values())) if bound else []
        chosen = {max((n for n in order if name in bound[n]), key=order.index) for name in exports}
        if not chosen:
            chosen = _since_last_test(before)
        hers = {name: cells.bound_names(answers.get(name, "")) for name in order}
        pending = list(chosen)
        while pending:
            name = pending.pop()
            reads = cells.used_names(answers.get(name, ""))
            earlier = [n for n in order[: order.index(name)] if hers[n] & reads and n not in chosen]
            chosen.update(earlier)
            pending.extend(earlier)
        return [n for n in order if n in chosen], exports

    def imports_before(self, question: Question) -> str:
        """The import statements of the tests before this one, hidden ones included: a later test may count on them."""
        earlier = [q.source for q in self.questions if q.kind == "code" and q.position < question.position]
        return "\n".join(cells.imports_of(source) for source in earlier)

    def base_cells(self, question: Question) -> list[str]:
        """The solution cells that are this question's own, by our solution."""
        return self.needs(question, {})[0]


def _unmarked(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if line.strip() not in cells.SOLUTION)


def _since_last_test(before: list[dict]) -> set[str]:
    last = max((n for n, cell in enumerate(before) if cells.is_test(cell)), default=-1)
    found = [cell for cell in before[last + 1 :] if cells.is_solution(cell) and not cells.is_manual(cell)]
    return {cells.grade_id(cell) for cell in found}


@dataclass
class Course:
    """The solved course in `root`, and what calibration has found out about it."""

    root: Path
    plans: tuple[Plan, ...]
    inside: set[str] = field(default_factory=set)  # questions whose test runs in the student's process
    troubles: list[str] = field(default_factory=list)  # our own cells that failed in the student edition

    @classmethod
    def load(cls, root: Path = ROOT) -> Course:
        """Read the notebooks. Raises FormatError, ReleaseError, or CourseError where an id is used twice."""
        plans = tuple(_plan(path) for path in release.course_notebooks(root))
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

    @property
    def most(self) -> float:
        """All points together."""
        return sum(question.points for question in self.questions)

    def digest(self) -> str:
        """16 hex digits over everything that decides a grade on our side: notebooks, `utils`, bands, the grader."""
        digest = hashlib.sha256()
        folders = [self.root / "utils", Path(__file__).parent]
        files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        files += [*release.course_notebooks(self.root), self.root / "assets" / "grading-bands.json"]
        for path in files:
            if path.suffix == ".ipynb":
                content = [[c["source"], c["metadata"].get("nbgrader")] for c in release.read_solved(path)["cells"]]
                digest.update(json.dumps([path.name, content], sort_keys=True).encode())
            elif path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]

    def secrets(self) -> list[Path]:
        """Files and folders that a student's code must not read: the course's, and those of the instructor's home."""
        ours = [self.root / name for name in SECRET] + list(self.root.glob("*.ipynb"))
        return ours + [Path.home() / name for name in PRIVATE]


def _plan(path: Path) -> Plan:
    notebook, questions, heading = release.read_solved(path), [], ""
    for position, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown" and not cells.is_solution(cell):
            heading = found[1] if (found := HEADING.match(cell["source"])) else heading
        kind = "written" if cells.is_manual(cell) else "code" if cells.is_test(cell) else None
        if kind == "code" and cells.ADAPTER_TAG in cells.tags(cell):
            kind = "adapter"
        if kind:
            identity = cells.grade_id(cell)
            title = heading or identity
            questions.append(Question(identity, path.name, kind, cells.points(cell), position, cell["source"], title))
    return Plan(path.name, notebook, tuple(questions))


class Runner:
    """One notebook of the course, running; a context manager. Answers can be judged from several threads at once.

    It is ready at its last test, or with `whole` at its end. `troubles`: our own cells that failed until then.
    """

    def __init__(self, course: Course, plan: Plan, limits: Limits, hide: list[Path], *, whole: bool = False):
        self.course, self.plan, self.limits, self.whole = course, plan, limits, whole
        self.hide = [*course.secrets(), *hide]
        self.troubles: list[str] = []
        self.wanted = {question.grade_id for question in plan.questions if question.kind == "code"}

    def __enter__(self) -> Runner:
        self.folder = Path(tempfile.mkdtemp(prefix="grading-"))
        self.staged, sockets = self.folder / "course", self.folder / "s"
        try:
            release.stage(self.course.root, self.staged)
            sockets.mkdir(mode=0o700)
            self.hide.append(sockets)
            self._start(sockets)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, sockets: Path) -> None:
        """Start the worker and wait until each wanted test stands ready."""
        reader, writer = os.pipe()
        environment = os.environ | {
            "GRADING_ROOT": str(ROOT), "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": "", "LAB_DEVICE": "cpu",
            "LAB_PROFILE": os.environ.get("LAB_PROFILE") or "mini",
        }  # fmt: skip
        environment.pop("LAB_ARTIFACTS", None)  # the staged course keeps its own
        command = [sys.executable, "-m", "grading.worker", str(self.staged / self.plan.name), str(sockets), str(writer)]
        with (self.folder / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=self.staged, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                pass_fds=[writer], start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        waiting = set(self.wanted)
        with os.fdopen(reader, encoding="utf-8") as events:
            while waiting or self.whole:
                event = json.loads(events.readline() or "{}")
                waiting.discard(event.get("ready"))
                if "cell" in event:
                    self.troubles.append(f"{self.plan.name}, cell {event['cell']}: {event['name']}: {event['message']}")
                if not event or "done" in event:
                    break
        if waiting:
            lines = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise CourseError(f"{self.plan.name} ended before {sorted(waiting)[0]}: {(lines or ['no output'])[-1]}")

    def __exit__(self, *_: object) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def judge(self, question: Question, answers: Mapping[str, str], inside: bool | None = None) -> dict:
        """The verdict on `answers` (sources by grade id): `passed`, and if not `name`, `message`, `line`, `stopped`."""
        run, exports = self.plan.needs(question, answers)
        inside = question.grade_id in self.course.inside if inside is None else inside
        job = {
            "cells": [[name, answers[name]] for name in run if name in answers],
            "exports": exports,
            "inside": inside,
            "hide": [str(path) for path in self.hide],
            "limits": self.limits.to_dict(),
        }
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(3 * self.limits.clock + 300)
            connection.connect(str(self.folder / "s" / question.grade_id))
            codec.send(connection, job)
            started, _ = codec.receive(connection)
            if "broken" not in started:
                codec.send(connection, {"source": question.source, "imports": self.plan.imports_before(question)})
                started, _ = codec.receive(connection)
        if "broken" in started:
            raise CourseError(f"{question.grade_id}: the grader itself failed: {started['broken']}")
        return started


def calibrate(runner: Runner) -> list[str]:
    """Judge our own solutions and the stubs; returns what cannot be graded, in words, and fills `course.inside`."""
    faults = []
    runner.course.troubles += runner.troubles
    for question in (q for q in runner.plan.questions if q.grade_id in runner.wanted):
        right = runner.judge(question, runner.plan.solved(), inside=False)
        inside = False
        if not right["passed"]:
            apart, right, inside = right, runner.judge(question, runner.plan.solved(), inside=True), True
            if not right["passed"]:
                right = apart
        if not right["passed"]:
            why = right.get("stopped") or f"{right.get('name')}: {right.get('message')}"
            faults.append(f"{question.grade_id}: our own solution does not pass ({why})")
            continue
        if inside:
            runner.course.inside.add(question.grade_id)
        if runner.judge(question, runner.plan.unsolved(), inside=inside)["passed"]:
            faults.append(f"{question.grade_id}: the unsolved edition passes, so the test tests nothing")
    return faults
