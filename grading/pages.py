"""The pages that grading leaves behind: one for each student, and one with the written answers for who marks them.

Everything a student wrote is escaped; a student's page shows one student's
results, no hidden test and no model answer.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator, Sequence

from grading import PACKAGES, cells, check_modules
from grading.adapter import WEIGHTS, alike, find_adapter_files
from grading.course import Course, Question, profile_name
from grading.marks import number, pseudonym
from grading.run import Graded
from grading.sandbox import is_safe

CHECKING = "exercises"  # the package with `check`
WORDS = {
    "right": "right", "wrong": "not right", "empty": "not attempted", "missing": "missing", "stopped": "stopped",
    "open": "open",
}  # fmt: skip
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
    "td,th{border-bottom:1px solid #ccc;padding:.4em;text-align:left;vertical-align:top}"
    "td:last-child{overflow-wrap:anywhere}"
    ".n{text-align:right;white-space:nowrap}.right{color:#1a6b2f}.wrong,.stopped,.missing{color:#9b1c1c}"
)
REFERENCE = (
    "Notebooks after the training are graded with the reference adapter, so nothing there hangs on your training."
)


def open_points(course: Course, graded: Graded) -> float:
    """Points of the questions that a person still has to read."""
    return sum(q.points for q in course.questions if graded.results[q.grade_id]["points"] is None)


def feedback_page(course: Course, graded: Graded) -> str:
    """One student's page."""
    score, still = number(graded.score()), open_points(course, graded)
    rows = [_row(question, graded.results[question.grade_id]) for question in course.questions]
    remarks = "".join(f"<li>{html.escape(text)}</li>" for text in graded.remarks)
    body = f"<h1>{html.escape(graded.submission.student)}: {score} of {number(course.most)} points</h1>"
    if still:
        body += f"<p>{number(still)} points are still open: a person reads these answers.</p>"
    if remarks:
        body += f"<h2>What you handed in</h2><ul>{remarks}</ul>"
    body += f"<p>{REFERENCE}</p>" if any(q.kind == "adapter" for q in course.questions) else ""
    head = "<tr><th>question</th><th>points</th><th>result</th><th>what it means</th></tr>"
    return _page(graded.submission.student, f"{body}<table>{head}{''.join(rows)}</table>")


def _row(question: Question, result: dict) -> str:
    """What became of one question, as a row of the student's table."""
    word, message = _told(result)
    parts = [message, result.get("comment", "")]
    if result.get("checks"):
        parts[0] = ""
        items = "".join(f"<li>{'yes' if ok else 'NO'}: {html.escape(text)}</li>" for _, ok, text in result["checks"])
        parts.append(f"<ul>{items}</ul>")
    text = "<br>".join([*(html.escape(part) for part in parts[:2] if part), *parts[2:]])
    points = f"{number(result['points']) or 'open'} of {number(question.points)}"
    name = f"{html.escape(question.title)}<br>{html.escape(question.notebook)}"
    state = "" if result.get("by_hand") else result["state"]
    verdict = f'<td class="{state}">{html.escape(word)}</td>'
    return f'<tr><td>{name}</td><td class="n">{points}</td>{verdict}<td>{text}</td></tr>'


def _told(result: dict) -> tuple[str, str]:
    """In a word what became of an answer, and what that means, which does not say the word again."""
    if result.get("by_hand"):
        return "marked by hand", ""
    word = WORDS.get(result["state"], result["state"])
    message = result["message"].removeprefix(f"{word}: ")
    return word, "" if message == word else message


def written_page(course: Course, class_: list[Graded]) -> str:
    """What a person has to read, question by question with its model answer, without the students' names."""
    parts = [
        "<h1>Written answers</h1><p>Points and comments go into written.csv; then run make grade again. The heading of "
        "an answer is the end of its key there.</p>"
    ]
    for question in (q for q in course.questions if q.kind == "written"):
        name = f"{html.escape(question.title)} ({question.grade_id})"
        parts.append(f"<h2>{name}, {number(question.points)} points</h2>{_pre(question.card.partition('<details')[0])}")
        parts.append(
            f"<details open><summary>Model answer and points</summary>{_pre(cells.unmarked(question.source))}</details>"
        )
        for graded in sorted(class_, key=pseudonym):
            answer = graded.results[question.grade_id].get("answer")
            if answer:
                parts.append(f"<h3>{pseudonym(graded)}</h3>{_pre(answer)}")
    return _page("Written answers", "".join(parts) + _others(course, class_))


def _others(course: Course, class_: list[Graded]) -> str:
    """The open questions that are no written answers: nobody has judged them, and each says why."""
    found = [
        f"<li>{pseudonym(graded)}, {html.escape(q.title)} ({q.grade_id}), {number(q.points)} points: "
        f"{html.escape(result.get('failure') or result['message'])}</li>"
        for q in course.questions
        for graded in sorted(class_, key=pseudonym)
        if (result := graded.results[q.grade_id])["state"] == "open" and not result.get("answer")
    ]
    return f"<h2>Open, and no written answer</h2><ul>{''.join(found)}</ul>" if found else ""


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text.strip())}</pre>"


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


# --- the summary ---


def summary(course: Course, class_: list[Graded], aside: Sequence[str]) -> list[str]:
    """What the instructor should know at once; first, where it is so, that nothing was safe."""
    scores = [graded.score() for graded in class_]
    lines = [
        *sandbox_lines(class_),
        f"{len(class_)} submissions, {number(sum(scores) / len(scores))} of {number(course.most)} points on average",
    ]
    if late := [graded.submission.student for graded in class_ if graded.submission.late]:
        lines.append(f"late, as the names of the files say: {', '.join(late)}")
    for graded in class_:
        lost = [plan.name for plan in course.plans if plan.name not in graded.answers]
        if lost and not graded.submission.failure:
            student = graded.submission.student
            lines.append(f"missing or unreadable (grades.csv says why): {student}: {', '.join(lost)}")
    lines += [f"a cell of ours failed in the student edition: {text}" for text in course.troubles]
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
    for graded in class_:
        student = graded.submission.student
        if named := sorted({name for sources in graded.answers.values() for name in _of_library(course, sources)}):
            lines.append(f"answers that import from the course's packages: {student}: {', '.join(named)}")
        told = [*(remark for remark in graded.remarks if ": the answer to " in remark)]
        told += [problem for problem in graded.submission.problems if "not read, only" in problem]
        lines += [f"{student}: {text}" for text in told]
    similar = (*_same_answers(course, class_), *_same_texts(course, class_), *_same_adapters(course, class_))
    return [*lines, *similar, *(f"set aside: {text}" for text in aside)]


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


def _of_library(course: Course, sources: dict[str, str]) -> list[str]:
    """The grade ids of the answers that import of the course's packages what our own solution of that cell does not."""
    ours = {name: _imported_modules(source) for plan in course.plans for name, source in plan.solved().items()}
    packages = set(PACKAGES) - {CHECKING}  # a student may run her check wherever she likes
    return [
        name
        for name, source in sources.items()
        if packages
        & {module.partition(".")[0] for module in _imported_modules(source) - ours.get(name.split()[0], set())}
    ]


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


def _same_adapters(course: Course, class_: list[Graded]) -> Iterator[str]:
    """Adapters that are equal or nearly so, but for those that the course's own seed leads to."""
    due, folder = profile_name(), course.root / "assets" / "adapters"
    usual = {"positive": sorted((folder / due).glob("positive-seed0")), "style": []}
    for task, known in usual.items():
        found = {g.submission.student: find_adapter_files(g.submission.files, due, task).get(WEIGHTS) for g in class_}
        for names in alike({name: data for name, data in found.items() if data}, known):
            what = "the same adapter" if task == "positive" else "the same adapter of an own style"
            yield f"{what}, or nearly (to look at, no verdict): {', '.join(names)}"


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
