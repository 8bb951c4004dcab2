"""Grade a class: every submission, question by question, resumable, several at once.

A result is written as soon as a submission's notebook is done, under a digest of what was handed in
and of the course, so that a second start takes up where the first one ended and grades nothing twice.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grading import GradingError, cells
from grading.adapter import EARLIER, WEIGHTS, Check, find_adapter_files, other_profile
from grading.course import SPACE, Course, Plan, Question, Runner, calibrate, profile_name
from grading.intake import Submission
from grading.match import match
from grading.release import write_atomic
from grading.sandbox import Limits

VERDICT = re.compile(r"\A\d+\.\d+ (?:fail|todo)  ")  # how a check begins, whose exercise the page names anyway
WAITING = 3  # of a student's answers as many may use the whole clock; then there is little left for the others
AdapterGrader = Callable[[Mapping[str, bytes], str], tuple[float, list[Check]]]  # files, kind of the question


@dataclass
class Graded:
    """One submission and what is known of it: `results` by grade id, remarks for the student."""

    submission: Submission
    answers: dict[str, dict[str, str]]
    remarks: list[str]
    results: dict[str, dict] = field(default_factory=dict)
    sandbox: dict = field(default_factory=dict)

    def score(self) -> float:
        """Points so far, without what a person still has to read."""
        return sum(result["points"] or 0 for result in self.results.values())


def grade_class(
    course: Course,
    submissions: list[Submission],
    state: Path,
    limits: Limits,
    *,
    jobs: int = 1,
    hide: list[Path] | None = None,
    adapter: AdapterGrader | None = None,
    tick: Callable[[str, int], None] = lambda text, count: None,
) -> list[Graded]:
    """Grade what is not graded yet; returns all, in the order of `submissions`.

    `state`: the folder where results are kept. `tick(what, answers done)` is called once with those that were kept,
    with 0 when the course is prepared, and after each answer with 1. Raises GradingError where the course's own
    solutions do not pass.
    """
    state.mkdir(parents=True, exist_ok=True)
    digest = f"{course.digest()}-{json.dumps(asdict(limits), sort_keys=True)}"
    class_ = [_open(course, submission, state, digest) for submission in submissions]
    due = [graded for graded in class_ if not {q.grade_id for q in course.questions} <= graded.results.keys()]
    tick("kept from before", (len(class_) - len(due)) * len(course.questions))
    if not due:
        return class_
    if not any(question.kind == "code" for question in course.questions):
        for graded in due:
            _grade(graded, course, None, adapter, state, digest, tick)
        return class_
    tick("the course", 0)
    with Runner(course, limits, hide or []) as runner:
        if faults := calibrate(runner):
            raise GradingError("; ".join(faults + runner.troubles))
        pool = ThreadPoolExecutor(jobs)
        work = [pool.submit(_grade, graded, course, runner, adapter, state, digest, tick) for graded in due]
        try:
            for future in work:
                future.result()
        finally:  # after Ctrl-C too: what is under way is finished and kept, what waits is not begun
            pool.shutdown(cancel_futures=True)
    return class_


def _open(course: Course, submission: Submission, state: Path, digest: str) -> Graded:
    """The submission with the results that were kept of exactly these files and this course."""
    try:
        answers, remarks = match(course, submission.files)
    except Exception as error:  # one that nobody thought of stops one student, not the class
        answers, remarks = {}, []
        submission.failure = f"its notebooks could not be read ({type(error).__name__}: {str(error)[:80]})"
    graded = Graded(submission, answers, [*submission.problems, *remarks])
    try:
        kept = json.loads((state / f"{submission.key}.json").read_text(encoding="utf-8"))
        if kept["digest"] == [digest, submission.digest()]:
            graded.results, graded.sandbox = kept["results"], kept["sandbox"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not graded yet, or an interrupted disk: graded now
    return graded


def _grade(
    graded: Graded, course: Course, runner: Runner | None, adapter: AdapterGrader | None, state: Path, digest: str,
    tick: Callable[[str, int], None],
) -> None:  # fmt: skip
    """All questions of one submission, then the file with its results.

    A question that could not be judged is open, and is not kept: the next start tries again.
    """
    spent = 0.0  # seconds by the clock on code
    for question in course.questions:
        started = time.monotonic()
        try:
            if graded.submission.failure:
                raise GradingError(graded.submission.failure)
            left = runner.limits.clock * WAITING - spent if runner else 0.0
            plan, submission = course.plan_of(question), graded.submission
            if question.kind in ("adapter", "style"):
                result = grade_adapter_question(question, submission, adapter)
            else:
                result = grade_question(question, plan, graded.answers.get(plan.name), runner, left)
        except Exception as error:  # whatever it is, it is this question's alone
            kind = "" if isinstance(error, GradingError) else f"{type(error).__name__}: "
            why = cells.printable(f"{kind}{str(error)[:200]}")
            result = _result("open", None, "it could not be judged: a person looks at it", failure=why)
        spent += time.monotonic() - started if question.kind == "code" else 0.0
        graded.sandbox = result.pop("sandbox", None) or graded.sandbox
        graded.results[question.grade_id] = result
        tick(graded.submission.student, 1)
    if runner:
        graded.sandbox = graded.sandbox or course.sandbox
    kept = {
        "digest": [digest, graded.submission.digest()],
        "results": {name: result for name, result in graded.results.items() if "failure" not in result},
        "sandbox": graded.sandbox,
    }
    write_atomic(state / f"{graded.submission.key}.json", json.dumps(kept, indent=1).encode())


def _result(state: str, points: float | None, message: str, **more: object) -> dict:
    return {"state": state, "points": points, "message": message, **more}


def grade_question(
    question: Question, plan: Plan, answers: Mapping[str, str] | None, runner: Runner | None, left: float = math.inf
) -> dict:
    """`state` (right, wrong, empty, missing, stopped, open), `points` (None while open), `message` for the student."""
    if answers is None:
        return _result("missing", 0.0, f"no {plan.name} that can be read was handed in")
    stubs = plan.unsolved()
    if question.kind == "written":
        text = answers.get(question.grade_id)
        if text is None:
            return _result("missing", 0.0, "the cell was not found")
        if cells.same_source(text, stubs[question.grade_id]) or not text.strip():
            return _result("empty", 0.0, "not attempted")
        return _result("open", None, "a person reads it and gives the points", answer=text)
    own, exports = plan.needs(question, {})
    added = [name for name in plan.needs(question, answers)[0] if name not in stubs]
    if not any(cells.bound_names(answers[name]) & set(exports) for name in added):
        if own and not any(name in answers for name in own):
            return _result("missing", 0.0, "the cell was not found")
        if own and all(cells.same_source(answers.get(name, stubs[name]), stubs[name]) for name in own):
            return _result("empty", 0.0, "not attempted")
    verdict = runner.judge(question, answers, left=left)
    state = "right" if verdict["passed"] is True else "stopped" if verdict.get("stopped") else "wrong"
    points = question.points if state == "right" else 0.0
    message = explain(question, verdict, plan.made())
    return _result(state, points, message, mode="apart", sandbox=verdict.get("sandbox"))


def explain(question: Question, verdict: Mapping, made: Container[str] = ()) -> str:
    """What a verdict means, in one or two sentences that show nothing of a hidden test.

    `made`: names that the run of a lesson makes.
    """
    if verdict["passed"] is True:
        return "right"
    if verdict.get("stopped"):
        return f"stopped: {verdict['stopped']}"
    texts = [_of_cell(problem) for problem in verdict.get("problems", [])]
    if texts:
        return _with_rule("; ".join(texts)[:1000], made)
    line = verdict.get("line")
    lines, _ = cells.split_regions(question.source, cells.HIDDEN)
    if isinstance(line, int) and 0 < line <= len(lines) and lines[line - 1][1]:
        return "the tests that you can see pass, but it is wrong for other inputs: try the smallest and the strangest"
    name, message = str(verdict.get("name")), str(verdict.get("message") or "")
    if name == "AssertionError":
        message = VERDICT.sub("", message)
        return _with_rule(f"a test fails: {message}", made) if message else f"a test fails in line {line}"
    return _with_rule(f"a test stops with {name}: {message}", made) if verdict.get("name") else message


def _with_rule(text: str, made: Container[str]) -> str:
    """A message, and where a name is missing the rule that says why it is there in a student's notebook."""
    if not (found := re.search(r"name '(\w+)' is not defined", text)):
        return text
    if found[1] in made:
        return f"{text} ({found[1]} comes from running the lesson; answers are judged without, so make it in your cell)"
    return f"{text} (imports and helpers belong into the cell of the answer)"


def _of_cell(problem: Mapping) -> str:
    """Where and why a cell of the student's fails."""
    line = f", line {problem['line']}" if problem.get("line") else ""
    name, _, added = str(problem.get("cell")).partition(SPACE)
    where = f"your {'own cell next to' if added else 'cell'} {name} fails{line}"
    return f"{where}: {problem.get('name')}: {problem.get('message')}"


def grade_adapter_question(question: Question, submission: Submission, adapter: AdapterGrader | None) -> dict:
    """The points of a trained adapter, 02's or the student's own; open where this run grades none."""
    due, own = profile_name(), question.kind == "style"
    files = find_adapter_files(submission.files, due, "style" if own else "positive")
    if not files and (own or adapter is None):
        how = "train it in 03, save it in adapters/style" if own else "run 02"
        return _result("missing", 0.0, f"no adapter was handed in: {how}, then submit.py")
    if adapter is None:
        return _result("open", None, "no machine has looked at the adapter: a person does")
    if own:  # it must not be the other one
        files = files | {EARLIER: find_adapter_files(submission.files, due).get(WEIGHTS, b"")}
    share, checks = adapter(files, question.kind)
    state = "right" if share == 1 else "wrong" if files else "missing"
    failed = [check.message for check in checks if not check.passed]
    if failed and (other := other_profile(submission.files, due)):
        failed.insert(0, f"the adapter of the profile {other} was handed in, that of {due} is due")
    points = round(share * question.points, 2)
    shown = [[check.name, check.passed, check.message] for check in checks]
    return _result(state, points, "; ".join(failed) or "right", mode="data", checks=shown)
