"""What grading leaves behind: tables for the instructor and the platform, pages, the summary.

For: `write_reports`; `only_one`, which keeps two graders out of one folder. Not for: grading (`run.py`), what is in the
pages (`pages.py`), the marks of people (`marks.py`), the form that a platform wants (`platforms.py`).
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grading import cells
from grading.marks import FORMULA, mark_rows, number, read_table, take_marks
from grading.pages import feedback_page, written_page
from grading.platforms import Export, export
from grading.summary import open_points, summary

if TYPE_CHECKING:
    from grading.course import Course
    from grading.run import Graded

WIDE = str.maketrans("＝＋－＠", "=+-@")  # which some spreadsheets read as the narrow ones


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
    write_atomic(path, _as_csv([_harmless(value) for value in row] for row in rows).encode("utf-8-sig", "replace"))


def _as_csv(rows: Iterable[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _harmless(value: object) -> object:
    """A cell that is text and nothing else, on whatever lines a spreadsheet sees."""
    if not isinstance(value, str):
        return value
    plain = cells.printable(value)
    return f"'{plain}" if plain.lstrip().translate(WIDE).startswith(FORMULA) else plain


def write_reports(course: Course, class_: list[Graded], output: Path, aside: Sequence[str], how: Export) -> list[str]:
    """Write all files to `output`; returns the summary's lines. Marks in `written.csv` there are taken in first.

    Raises MarksError, with nothing written, where that table cannot be read.
    """
    path = output / "written.csv"
    rows = read_table(path) if path.is_file() else []
    notes = take_marks(course, class_, rows)
    _write_tables(course, class_, output)
    notes = [*_write_exports(course, class_, output, how), *notes]
    if path.is_file():
        write_atomic(output / "written.csv.bak", path.read_bytes())
    write_table(path, mark_rows(course, class_, rows))
    for graded in class_:
        page = feedback_page(course, graded)
        write_atomic(output / "feedback" / f"{graded.submission.key}.html", page.encode("utf-8", "replace"))
    write_atomic(output / "written.html", written_page(course, class_).encode("utf-8", "replace"))
    lines = [*summary(course, class_, aside), *notes]
    write_atomic(output / "summary.txt", ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    return lines


def _write_tables(course: Course, class_: list[Graded], output: Path) -> None:
    grades = [("student", "id", "points", "of", "open", "remarks")]
    questions = [("student", "id", "notebook", "question", "points", "of", "state", "graded", "message")]
    for graded in class_:
        one, still = graded.submission, number(open_points(course, graded))
        points = (number(graded.score()), number(course.most), still)
        grades.append((one.student, one.lms_id, *points, "; ".join(graded.remarks)))
        for question in course.questions:
            result = graded.results[question.grade_id]
            row = (one.student, one.lms_id, question.notebook, question.grade_id, number(result["points"]))
            how = result.get("mode", "person" if question.kind == "written" else "")
            state, how = ("marked", "person") if result.get("by_hand") else (result["state"], how)
            questions.append((*row, number(question.points), state, how, result["message"]))
    write_table(output / "grades.csv", grades)
    write_table(output / "questions.csv", questions)


def _write_exports(course: Course, class_: list[Graded], output: Path, how: Export) -> list[str]:
    """The tables for the platforms; returns notes. Moodle's is as it came, but for the grades, or is not there."""
    canvas, moodle, notes = export(course, class_, how)
    write_table(output / "canvas.csv", canvas)
    if moodle:
        write_atomic(output / "moodle.csv", _as_csv(moodle).encode("utf-8", "replace"))
    else:
        (output / "moodle.csv").unlink(missing_ok=True)  # of an earlier run: its grades may be old
    return notes
