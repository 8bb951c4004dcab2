"""What grading leaves behind: tables for the instructor and the platform, one page for each student.

For: `write_reports`; `only_one`, which keeps two graders out of one folder. Everything a student wrote is escaped; a
page shows one student's results and no hidden test. Not for: grading (`run.py`), the marks of people (`marks.py`).
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grading import cells
from grading.marks import FORMULA, mark_rows, number, read_table, take_marks
from grading.summary import open_points, summary

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
WIDE = str.maketrans("＝＋－＠", "=+-@")  # which some spreadsheets read as the narrow ones
REFERENCE = (
    "Notebooks after the training are graded with the reference adapter, so nothing there hangs on your training."
)


class BusyError(RuntimeError):
    """Another grading writes to the same folder."""


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Hold the folder for one grading. Raises BusyError where another one, still running, holds it."""
    import fcntl

    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another grading writes to {output}: wait for it, or choose another --output") from None
        except OSError:
            pass  # a file system without locks
        yield


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is at any moment either the old one or the new one, whole; whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(path: Path, rows: Iterable[Sequence]) -> None:
    """A CSV in UTF-8 that a spreadsheet opens as text: no cell can act as a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_harmless(value) for value in row] for row in rows)
    write_atomic(path, text.getvalue().encode("utf-8-sig", "replace"))


def _harmless(value: object) -> object:
    """A cell that is text and nothing else, on whatever lines a spreadsheet sees."""
    if not isinstance(value, str):
        return value
    plain = cells.printable(value)
    return f"'{plain}" if plain.lstrip().translate(WIDE).startswith(FORMULA) else plain


def write_reports(
    course: Course, class_: list[Graded], output: Path, aside: Sequence[str], assignment: str
) -> list[str]:
    """Write all files to `output`; returns the summary's lines. Marks in `written.csv` there are taken in first.

    Raises MarksError, with nothing written, where that table cannot be read.
    """
    path = output / "written.csv"
    rows = read_table(path) if path.is_file() else []
    notes = take_marks(course, class_, rows)
    _write_tables(course, class_, output, assignment)
    if path.is_file():
        write_atomic(output / "written.csv.bak", path.read_bytes())
    write_table(path, mark_rows(course, class_, rows))
    for graded in class_:
        page = feedback_page(course, graded)
        write_atomic(output / "feedback" / f"{graded.submission.key}.html", page.encode("utf-8", "replace"))
    write_atomic(output / "written.html", written_page(course, class_).encode("utf-8", "replace"))
    lines = [*summary(course, class_, aside), *(f"written.csv: {note}" for note in notes)]
    write_atomic(output / "summary.txt", ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    return lines


def _write_tables(course: Course, class_: list[Graded], output: Path, assignment: str) -> None:
    grades = [("student", "id", "points", "of", "open", "remarks")]
    questions = [("student", "id", "notebook", "question", "points", "of", "state", "graded", "message")]
    canvas = [("Student", "ID", "SIS User ID", "SIS Login ID", "Section", assignment)]
    moodle = [("Identifier", "Full name", "Grade")]
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
    tables = {"grades": grades, "questions": questions, "canvas": canvas, "moodle": moodle}
    for name, rows in tables.items():
        write_table(output / f"{name}.csv", rows)


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


def pseudonym(graded: Graded) -> str:
    """The end of the key, which shows no name."""
    return graded.submission.key.rpartition("-")[2]


def written_page(course: Course, class_: list[Graded]) -> str:
    """All written answers, question by question, under the key that `written.csv` uses and without names."""
    parts = ["<h1>Written answers</h1><p>Points and comments go into written.csv; then run make grade again.</p>"]
    for question in (q for q in course.questions if q.kind == "written"):
        name = f"{html.escape(question.title)} ({question.grade_id})"
        parts.append(f"<h2>{name}, {number(question.points)} points</h2>")
        for graded in sorted(class_, key=lambda g: pseudonym(g)):
            answer = graded.results[question.grade_id].get("answer")
            if answer:
                text = f"<pre style='white-space:pre-wrap'>{html.escape(answer)}</pre>"
                parts.append(f"<h3>{pseudonym(graded)}</h3>{text}")
    return _page("Written answers", "".join(parts))


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
