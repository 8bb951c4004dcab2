"""The course as a grader sees it: its notebooks, and a runner for answers.

`calibrate` proves before any student is graded that our own solutions get every point and the unsolved edition none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grading import PACKAGES, GradingError, cells, check_modules, codec, release, sandbox
from grading.sandbox import Limits

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = (".ssh", ".aws", ".config", ".gnupg", ".kube", ".docker", ".netrc", ".git-credentials",
           ".cache/huggingface/token")  # fmt: skip

LEAST_CLOCK = 20.0  # seconds that every answer gets
HEADING = re.compile(r"^#{1,6} (.+)", re.MULTILINE)
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)  # code in a text: its comments are no headings


@dataclass(frozen=True)
class Question:
    """One graded cell. `kind`: "code" (a test judges), "adapter", "style" (`adapter.py` does), "written" (a person).

    `title`: the nearest heading above it, for people to read; the id where there is none. `card`: that heading and what
    follows in its cell.
    """

    grade_id: str
    notebook: str
    kind: str
    points: float
    position: int  # of the cell in its notebook
    source: str
    title: str
    card: str = ""


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
        hers binds or imports needs that one too; so do cells that she has added (`key_of`).
        """
        before = [cell for cell in self.notebook["cells"][: question.position] if cell["cell_type"] == "code"]
        writable = {cells.grade_id(c): c for c in before if cells.is_solution(c) and not cells.is_manual(c)}
        names = list(writable)
        own_cells = [key for key in answers if SPACE in key and key.partition(SPACE)[0] in writable]

        def place(key: str) -> tuple[int, int]:
            name, _, turn = key.partition(SPACE)
            return names.index(name), int(turn or 0)

        order = sorted([*names, *own_cells], key=place)
        bound = {name: cells.bound_names(cells.unmarked(cell["source"])) for name, cell in writable.items()}
        used = cells.used_names(question.source)
        exports = sorted(used & set().union(*bound.values())) if bound else []
        chosen = {max((n for n in names if name in bound[n]), key=names.index) for name in exports}
        if not chosen:
            last = max((n for n, cell in enumerate(before) if cells.is_test(cell)), default=-1)
            chosen = {cells.grade_id(cell) for cell in before[last + 1 :]} & writable.keys()
        own = {name: answers.get(name, "") for name in order}
        hers = {name: cells.bound_names(own[name]) | cells.imported_names(own[name]) for name in order}
        chosen |= {key for key in own_cells if hers[key] & set(exports)}
        pending = list(chosen)
        while pending:
            name = pending.pop()
            reads = cells.used_names(own[name]) | {"*"}
            others = [*order[: order.index(name)], *own_cells]  # a helper may stand below what calls it
            more = {other for other in others if hers[other] & reads and other not in chosen}
            chosen |= more
            pending.extend(more)
        return [n for n in order if n in chosen], exports

    def imports_before(self, question: Question) -> str:
        """The import statements of the tests before this one, hidden ones included: a later test may count on them."""
        earlier = [q.source for q in self.questions if q.kind == "code" and q.position < question.position]
        return "\n".join(line for source in earlier for line in cells.definitions(source, cells.IMPORTS))

    def made(self) -> set[str]:
        """The names that only the run of a lesson makes: a grader does not have them."""
        lessons = [c["source"] for c in self.notebook["cells"] if c["cell_type"] == "code" and not cells.grade_id(c)]
        defined = {name for source in lessons for name in cells.bound_names("\n".join(cells.definitions(source)))}
        return {name for source in lessons for name in cells.bound_names(source)} - defined


SPACE = " "  # no grade id has one


def key_of(name: str, turn: int) -> str:
    """The key of a cell that runs before (`turn` below 0) or after the answer `name`, which itself has turn 0."""
    return f"{name}{SPACE}{turn}" if turn else name


def read_plan(path: Path) -> Plan:
    """The questions of a notebook of the solved edition, in order. Raises GradingError."""
    notebook, questions, heading, card = release.read_solved(path), [], "", ""
    for position, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown" and not cells.is_solution(cell):
            for found in HEADING.finditer(FENCED.sub(lambda code: " " * len(code[0]), cell["source"])):
                heading, card = found[1].strip(), cell["source"][found.start() :]
        kind = "written" if cells.is_manual(cell) else "code" if cells.is_test(cell) else None
        if kind == "code":
            kind = next((cells.ADAPTER_TAGS[tag] for tag in cells.tags(cell) if tag in cells.ADAPTER_TAGS), kind)
        if kind:
            identity = cells.grade_id(cell)
            about = (position, cell["source"], heading or identity, card)
            questions.append(Question(identity, path.name, kind, cells.points(cell), *about))
    return Plan(path.name, notebook, tuple(questions))


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
    troubles: list[str] = field(default_factory=list)  # our own cells that failed in the student edition
    sandbox: dict = field(default_factory=dict)  # what shut our own answers in

    @classmethod
    def load(cls, root: Path = ROOT) -> Course:
        """Read the notebooks. Raises GradingError for one out of format, or an id that is used twice."""
        plans = tuple(read_plan(path) for path in release.course_notebooks(root))
        names = [question.grade_id for plan in plans for question in plan.questions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise GradingError(f"the grade_id {twice[0]!r} is used in two notebooks: rename one of them")
        if not names:
            raise GradingError("no graded cell in any notebook: there is nothing to grade")
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
            raise GradingError(f"no process takes answers to {sorted(waiting)[0]}: {(lines or ['no output'])[-1]}")

    def __exit__(self, *_: object) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with contextlib.suppress(RecursionError):  # folders in folders, made without namespaces
            shutil.rmtree(self.folder, ignore_errors=True)

    def judge(self, question: Question, answers: Mapping[str, str], left: float = math.inf) -> dict:
        """The verdict on `answers` (sources by grade id): `passed`, and if not `name`, `message`, `line`, `stopped`.

        `left`: seconds by the clock that this student's answers have left. Raises GradingError where there is no
        verdict, after a second try.
        """
        plan = self.course.plan_of(question)
        run, exports = plan.needs(question, answers)
        job = {
            "cells": [[name, answers[name]] for name in run if name in answers],
            "exports": exports,
            "hide": [str(path) for path in self.hide],
            "scratch": str(self.scratch),
            "limits": asdict(self.limits) | {"clock": min(self.limits.clock, max(left, LEAST_CLOCK))},
        }
        test = {"source": question.source, "imports": plan.imports_before(question)}
        try:
            with contextlib.suppress(ConnectionError):  # once more, where the machine was short of something
                return self._ask(question.grade_id, job, test)
            return self._ask(question.grade_id, job, test)
        except OSError as error:
            why = f"{type(error).__name__}: {error}"
            raise GradingError(f"{question.grade_id}: the grader itself failed: {why}") from error

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
            raise ConnectionError(str(said["broken"]))
        return said


def calibrate(runner: Runner) -> list[str]:
    """Judge our own solutions and the stubs; returns what cannot be graded, in words."""
    faults, course = [], runner.course
    course.troubles += runner.troubles
    for question in (q for q in course.questions if q.kind == "code"):
        plan = course.plan_of(question)
        right = runner.judge(question, plan.solved())
        course.sandbox = right.get("sandbox") or course.sandbox
        if not right["passed"]:
            why = right.get("stopped") or f"{right.get('name', 'no test was run')}: {right.get('message')}"
            faults.append(f"{question.grade_id}: our own solution does not pass ({why})")
        elif runner.judge(question, plan.unsolved())["passed"]:
            faults.append(f"{question.grade_id}: the unsolved edition passes, so the test tests nothing")
    return faults
