"""What grading leaves behind: tables for the instructor and the platform, one page for each student.

For: `write_reports`. Everything a student wrote is escaped; a page shows one student's results and no hidden test.
Not for: grading (`run.py`).
"""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grading.course import Course
    from grading.run import Graded

WORDS = {
    "right": "right", "wrong": "not right", "empty": "not attempted", "missing": "not found", "stopped": "stopped",
    "open": "to be read",
}  # fmt: skip
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}"
    "td,th{border-bottom:1px solid #ccc;padding:.4em;text-align:left;vertical-align:top;overflow-wrap:anywhere}"
    ".n{text-align:right}.right{color:#1a6b2f}.wrong,.stopped,.missing{color:#9b1c1c}"
)
REFERENCE = (
    "Notebooks after the training are graded with the reference adapter, so nothing there hangs on your training."
)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is at any moment either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_table(path: Path, rows: Iterable[Sequence]) -> None:
    """A CSV in UTF-8 that a spreadsheet opens as text: no cell can act as a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_harmless(value) for value in row] for row in rows)
    write_atomic(path, text.getvalue().encode("utf-8-sig", "replace"))


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def number(value: float | None) -> str:
    """Points as people write them: 4, 2.5; empty while open."""
    return "" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def write_reports(
    course: Course, class_: list[Graded], output: Path, aside: Sequence[str], assignment: str
) -> list[str]:
    """Write all files to `output`; returns the summary's lines. Marks in `written.csv` there are taken in first."""
    take_marks(class_, output / "written.csv")
    _write_tables(course, class_, output, assignment)
    for graded in class_:
        page = feedback_page(course, graded)
        write_atomic(output / "feedback" / f"{graded.submission.key}.html", page.encode("utf-8", "replace"))
    write_atomic(output / "written.html", written_page(course, class_).encode("utf-8", "replace"))
    lines = summary(course, class_, aside)
    write_atomic(output / "summary.txt", ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    return lines


def _write_tables(course: Course, class_: list[Graded], output: Path, assignment: str) -> None:
    grades = [("student", "id", "points", "of", "open", "remarks")]
    questions = [("student", "id", "notebook", "question", "points", "of", "state", "graded", "message")]
    canvas = [("Student", "ID", "SIS User ID", "SIS Login ID", "Section", assignment)]
    moodle = [("Identifier", "Full name", "Grade")]
    written = [("key", "question", "of", "points", "comment")]
    for graded in class_:
        one, score = graded.submission, number(graded.score())
        remarks = "; ".join(graded.remarks)
        grades.append(
            (one.student, one.lms_id, score, number(course.most), number(open_points(course, graded)), remarks)
        )
        canvas.append((one.student, one.lms_id, "", "", "", score))
        moodle.append((f"Participant {one.lms_id}" if one.lms_id else "", one.student, score))
        for question in course.questions:
            result = graded.results[question.grade_id]
            row = (one.student, one.lms_id, question.notebook, question.grade_id, number(result["points"]))
            how = result.get("mode", "person" if question.kind == "written" else "")
            questions.append((*row, number(question.points), result["state"], how, result["message"]))
            if result["state"] == "open":
                mark = (number(result["points"]), result.get("comment", ""))
                written.append((one.key, question.grade_id, number(question.points), *mark))
    tables = {"grades": grades, "questions": questions, "canvas": canvas, "moodle": moodle, "written": written}
    for name, rows in tables.items():
        write_table(output / f"{name}.csv", rows)


def open_points(course: Course, graded: Graded) -> float:
    """Points of the questions that a person still has to read."""
    return sum(q.points for q in course.questions if graded.results[q.grade_id]["points"] is None)


def take_marks(class_: list[Graded], path: Path) -> None:
    """Put the points and comments that somebody wrote into `written.csv` into the results of open questions."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        marks = {(row.get("key"), row.get("question")): row for row in csv.DictReader(file)}
    for graded in class_:
        for name, result in graded.results.items():
            row = marks.get((graded.submission.key, name))
            if row and result["state"] == "open":
                result["comment"] = row.get("comment") or ""
                try:
                    result["points"] = min(
                        max(float((row.get("points") or "").replace(",", ".")), 0.0), float(row["of"])
                    )
                except (ValueError, KeyError, TypeError):
                    result["points"] = None


def summary(course: Course, class_: list[Graded], aside: Sequence[str]) -> list[str]:
    """What the instructor should know at once."""
    scores = [graded.score() for graded in class_]
    lines = [
        f"{len(class_)} submissions, {number(sum(scores) / len(scores))} of {number(course.most)} points on average"
    ]
    facts = next((graded.sandbox for graded in class_ if graded.sandbox), None)
    if facts:
        network = (
            "cut off by a namespace" if facts["network"] == "namespace" else "not cut off: proxies off, Hub offline"
        )
        lines.append(f"network: {network}; files: {facts['files']}; processes: {facts['processes']}")
    lines += [f"a cell of ours failed in the student edition: {text}" for text in course.troubles]
    if course.inside:
        names = ", ".join(sorted(course.inside))
        lines.append(f"judged inside the student's process (live objects; look twice at full points): {names}")
    if still := sum(open_points(course, graded) > 0 for graded in class_):
        lines.append(f"{still} submissions have written answers to be read: written.html, then points into written.csv")
    same: dict[tuple, list[str]] = {}
    for graded in class_:
        for notebook, answers in graded.answers.items():
            same.setdefault((notebook, *sorted(answers.items())), []).append(graded.submission.student)
    unsolved = {(plan.name, *sorted(plan.unsolved().items())) for plan in course.plans}
    for (notebook, *_), names in ((k, v) for k, v in same.items() if len(v) > 1 and k not in unsolved):
        lines.append(f"the same answers in {notebook}: {', '.join(names)}")
    return [*lines, *(f"set aside: {text}" for text in aside)]


def feedback_page(course: Course, graded: Graded) -> str:
    """One student's page."""
    score, still = number(graded.score()), open_points(course, graded)
    rows = []
    for question in course.questions:
        result = graded.results[question.grade_id]
        state = html.escape(WORDS.get(result["state"], result["state"]))
        message = html.escape(result["message"])
        if result.get("comment"):
            message += f"<br>{html.escape(result['comment'])}"
        if result.get("checks"):
            items = "".join(
                f"<li>{'yes' if ok else 'NO'}: {html.escape(text)}</li>" for _, ok, text in result["checks"]
            )
            message = f"<ul>{items}</ul>"
        points = f"{number(result['points']) or 'open'} of {number(question.points)}"
        name = f"{html.escape(question.title)}<br>{html.escape(question.notebook)}"
        rows.append(
            f'<tr><td>{name}</td><td class="n">{points}</td><td class="{result["state"]}">{state}</td>'
            f"<td>{message}</td></tr>"
        )
    remarks = "".join(f"<li>{html.escape(text)}</li>" for text in graded.remarks)
    body = f"<h1>{html.escape(graded.submission.student)}: {score} of {number(course.most)} points</h1>"
    if still:
        body += f"<p>{number(still)} points are still open: a person reads these answers.</p>"
    if remarks:
        body += f"<h2>What you handed in</h2><ul>{remarks}</ul>"
    body += f"<p>{REFERENCE}</p>" if any(q.kind == "adapter" for q in course.questions) else ""
    head = "<tr><th>question</th><th>points</th><th>result</th><th>what it means</th></tr>"
    return _page(graded.submission.student, f"{body}<table>{head}{''.join(rows)}</table>")


def written_page(course: Course, class_: list[Graded]) -> str:
    """All written answers, question by question, under the key that `written.csv` uses and without names."""
    parts = ["<h1>Written answers</h1><p>Points and comments go into written.csv; then run make grade again.</p>"]
    for question in (q for q in course.questions if q.kind == "written"):
        name = f"{html.escape(question.title)} ({question.grade_id})"
        parts.append(f"<h2>{name}, {number(question.points)} points</h2>")
        for graded in sorted(class_, key=lambda g: g.submission.key[-6:]):
            answer = graded.results[question.grade_id].get("answer")
            if answer:
                text = f"<pre style='white-space:pre-wrap'>{html.escape(answer)}</pre>"
                parts.append(f"<h3>{graded.submission.key[-6:]}</h3>{text}")
    return _page("Written answers", "".join(parts))


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
