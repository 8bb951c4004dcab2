"""`summary.txt`: what the instructor should know at once.

For: `summary`, `open_points`. Not for: tables and pages (`report.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from grading import cells, check_modules
from grading.marks import number
from grading.sandbox import is_safe

if TYPE_CHECKING:
    from grading.course import Course
    from grading.run import Graded


def open_points(course: Course, graded: Graded) -> float:
    """Points of the questions that a person still has to read."""
    return sum(q.points for q in course.questions if graded.results[q.grade_id]["points"] is None)


def summary(course: Course, class_: list[Graded], aside: Sequence[str]) -> list[str]:
    """What the instructor should know at once; first, where it is so, that nothing was safe."""
    scores = [graded.score() for graded in class_]
    lines = [
        *sandbox_lines(class_),
        f"{len(class_)} submissions, {number(sum(scores) / len(scores))} of {number(course.most)} points on average",
    ]
    lines += [*_not_as_expected(course, class_)]
    lines += [f"a cell of ours failed in the student edition: {text}" for text in course.troubles]
    if inside := sorted(course.inside.union(*(graded.inside for graded in class_))):
        names = ", ".join(inside)
        lines.append(f"judged inside the student's process (live objects; look twice at full points): {names}")
    checks = {name for name, _ in check_modules(course.root)}
    for graded in class_:
        for name, result in graded.results.items():
            if "failure" in result:
                lines.append(f"not judged, points open: {graded.submission.student}, {name}: {result['failure']}")
        if named := sorted({name for sources in graded.answers.values() for name in _of_checks(sources, checks)}):
            lines.append(
                f"answers that name the modules of the checks: {graded.submission.student}: {', '.join(named)}"
            )
    if still := sum(open_points(course, graded) > 0 for graded in class_):
        lines.append(
            f"submissions with points still to be given: {still}; read written.html, put points into written.csv"
        )
    alike = (*_same_answers(course, class_), *_same_texts(course, class_))
    return [*lines, *alike, *(f"set aside: {text}" for text in aside)]


def _not_as_expected(course: Course, class_: list[Graded]) -> Iterator[str]:
    """Who was late, and whose notebooks were not there or could not be read."""
    if late := [graded.submission.student for graded in class_ if graded.submission.late]:
        yield f"late, as the names of the files say: {', '.join(late)}"
    for graded in class_:
        lost = [plan.name for plan in course.plans if plan.name not in graded.answers]
        if lost and not graded.submission.failure:
            yield f"missing or unreadable (grades.csv says why): {graded.submission.student}: {', '.join(lost)}"


def sandbox_lines(class_: list[Graded]) -> list[str]:
    """How students' code was shut in."""
    facts = [graded.sandbox for graded in class_ if graded.sandbox]
    if not facts:
        return ["no student's code was run"]
    worst = next((one for one in facts if not is_safe(one)), facts[0])
    network = "cut off by a namespace" if worst["network"] == "namespace" else "not cut off: proxies off, Hub offline"
    line = f"network: {network}; files: {worst['files']}; processes: {worst['processes']}"
    if is_safe(worst):
        return [line]
    return [f"UNSAFE: students' code could read and change files of this machine, and these results. {line}"]


def _of_checks(sources: dict[str, str], checks: set[str]) -> list[str]:
    """The grade ids of the answers that import or name a module which computes right answers."""
    named = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in checks) or r"(?!)")
    return [name for name, text in sources.items() if named.search(text) or checks & _imported_modules(text)]


def _imported_modules(source: str) -> set[str]:
    """Every name that a cell imports, in full; some are modules, some what is in them."""
    tree = cells.parse(source[: cells.LONGEST])
    found = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _same_answers(course: Course, class_: list[Graded]) -> Iterator[str]:
    same: dict[tuple, list[str]] = {}
    for graded in class_:
        for notebook, answers in graded.answers.items():
            same.setdefault((notebook, *sorted(answers.items())), []).append(graded.submission.student)
    unsolved = {(plan.name, *sorted(plan.unsolved().items())) for plan in course.plans}
    for key, names in same.items():
        if len(names) > 1 and key not in unsolved:
            yield f"the same answers in {key[0]}: {', '.join(names)}"


def _same_texts(course: Course, class_: list[Graded]) -> Iterator[str]:
    """Written answers of several students that differ in white space only."""
    for question in (q for q in course.questions if q.kind == "written"):
        same: dict[str, list[str]] = {}
        for graded in class_:
            if answer := graded.results[question.grade_id].get("answer"):
                same.setdefault(" ".join(answer.split()), []).append(graded.submission.student)
        for names in same.values():
            if len(names) > 1:
                yield f"the same written answer to {question.grade_id} (to look at, no verdict): {', '.join(names)}"
