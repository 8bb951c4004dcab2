"""What grading leaves behind: tables for the instructor and the platform, pages, the summary."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grading import GradingError, cells
from grading.course import Course
from grading.marks import FORMULA, decoded, mark_rows, number, read_table, take_marks
from grading.pages import feedback_page, open_points, summary, written_page
from grading.release import write_atomic
from grading.run import Graded

PARTICIPANT = re.compile(r"\D*(\d+)\s*")  # "Participant 12345", in the language of the site
INNER = re.compile(r"([;\t]\s*)(?=[=+\-@＝＋－＠])")  # a cell begins there where `;` or tabs separate
OUR_COMMENT = "Lab: "  # how a comment begins that grading wrote, and may write anew
WIDE = str.maketrans("＝＋－＠", "=+-@")  # which some spreadsheets read as the narrow ones


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Hold the folder for one grading. Raises GradingError where another one, still running, holds it."""
    import fcntl

    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GradingError(f"another grading writes to {output}: wait for it, or choose another --output") from None
        except OSError:
            pass  # a file system without locks
        yield


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
    plain = INNER.sub(r"\1'", cells.printable(value))
    return f"'{plain}" if plain.lstrip().translate(WIDE).startswith(FORMULA) else plain


def write_reports(course: Course, class_: list[Graded], output: Path, aside: Sequence[str], how: Export) -> list[str]:
    """Write all files to `output`; returns the summary's lines. Marks in `written.csv` there are taken in first.

    Raises GradingError, with nothing written, where that table cannot be read.
    """
    path = output / "written.csv"
    rows = read_table(path) if path.is_file() else []
    notes = take_marks(course, class_, rows)
    _write_tables(course, class_, output)
    canvas, moodle, more = export(course, class_, how)
    write_table(output / "canvas.csv", canvas)
    if moodle:  # as it came, but for the grades
        write_atomic(output / "moodle.csv", _as_csv(moodle).encode("utf-8", "replace"))
    else:
        (output / "moodle.csv").unlink(missing_ok=True)  # of an earlier run: its grades may be old
    notes = [*more, *notes]
    if path.is_file():
        write_atomic(output / "written.csv.bak", path.read_bytes())
    write_table(path, mark_rows(course, class_, rows))
    _write_feedback(course, class_, output)
    write_atomic(output / "written.html", written_page(course, class_).encode("utf-8", "replace"))
    lines = [*summary(course, class_, aside), *notes]
    write_atomic(output / "summary.txt", ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    return lines


def _write_feedback(course: Course, class_: list[Graded], output: Path) -> None:
    """A page a student; those of students whom a platform has named also in one zip, to be given back at once."""
    back = io.BytesIO()
    with zipfile.ZipFile(back, "w", zipfile.ZIP_DEFLATED) as zipped:
        for graded in class_:
            page = feedback_page(course, graded).encode("utf-8", "replace")
            write_atomic(output / "feedback" / f"{graded.submission.key}.html", page)
            if graded.submission.return_name:
                zipped.writestr(graded.submission.return_name, page)
        named = zipped.namelist()
    if named:
        write_atomic(output / "feedback.zip", back.getvalue())
    else:
        (output / "feedback.zip").unlink(missing_ok=True)


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


# --- back to the learning platform ---


@dataclass(frozen=True)
class Worksheet:
    """Moodle's table: all its rows, the first line included; `grade` and `comments`: the numbers of these columns.

    `comments` is None where the assignment has no feedback comments.
    """

    rows: list[list[str]]
    grade: int
    comments: int | None = None


@dataclass(frozen=True)
class Export:
    """How grades go back. `assignment`: the column's name in Canvas; `open_as_zero`: totals with open points too."""

    assignment: str = "IA3 lab"
    worksheet: Worksheet | None = None
    open_as_zero: bool = False


def read_worksheet(path: Path, grade: str = "Grade", comments: str = "Feedback comments") -> Worksheet:
    """Moodle's grading worksheet as it was downloaded; `grade`, `comments`: names of columns, which Moodle translates.

    Raises GradingError where that column, or the participants' numbers in the first one, are not there.
    """
    try:
        text, delimiter = decoded(path)
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except (OSError, csv.Error) as error:
        raise GradingError(f"{path} cannot be read as Moodle's grading worksheet ({error})") from None
    head = rows[0] if rows else []
    if grade not in head:
        found = ", ".join(head)[:300]
        raise GradingError(f"{path} has no column {grade!r} but {found!r}: name the one of the grade by --moodle-grade")
    if not any(PARTICIPANT.fullmatch(row[0]) for row in rows[1:]):
        raise GradingError(
            f"{path}: its first column must hold Moodle's identifiers, as 'Participant 12345': download the worksheet "
            "anew (assignment, all submissions, download grading worksheet)"
        )
    return Worksheet(rows, head.index(grade), head.index(comments) if comments in head else None)


def export(course: Course, class_: list[Graded], how: Export) -> tuple[list[tuple], list[list[str]], list[str]]:
    """The rows for Canvas, those for Moodle (none without a worksheet), and what the instructor must know, in words."""
    still = [graded for graded in class_ if open_points(course, graded)]
    ready = [graded for graded in class_ if how.open_as_zero or graded not in still]
    notes = []
    if still:
        names = ", ".join(graded.submission.student for graded in still)
        said = "open points count as 0 in" if how.open_as_zero else "points still open (--open-as-zero), left out of"
        notes.append(f"{said} canvas.csv{' and moodle.csv' if how.worksheet else ''}: {names}")
    canvas = [("Student", "ID", "SIS User ID", "SIS Login ID", "Section", how.assignment)]
    canvas += [(g.submission.student, g.submission.lms_id, "", "", "", number(g.score())) for g in ready]
    if how.worksheet is None:
        return canvas, [], notes
    moodle, unknown = _filled(course, how.worksheet, ready)
    return canvas, moodle, notes + unknown


def comment_on(course: Course, graded: Graded) -> str:
    """What stands in the worksheet's column for comments: the total, then each question that lost points, and why."""
    lost = []
    for question in course.questions:
        result = graded.results[question.grade_id]
        if (result["points"] or 0) < question.points:
            why = cells.printable(result.get("comment") or result["message"])
            lost.append(f"{question.title}: {number(result['points']) or 0} of {number(question.points)}, {why}")
    return f"{OUR_COMMENT}{number(graded.score())} of {number(course.most)} points. " + " | ".join(lost)


def _filled(course: Course, worksheet: Worksheet, ready: list[Graded]) -> tuple[list[list[str]], list[str]]:
    """The worksheet with grades and comments of these students, and a note on those who have no row in it.

    A comment that a person wrote in Moodle stays as it is.
    """
    found = {graded.submission.lms_id: graded for graded in ready}
    head, *rows = [list(row) for row in worksheet.rows]
    numbers = [match[1] if (match := PARTICIPANT.fullmatch(row[0])) else "" for row in rows]
    for row, identity in zip(rows, numbers, strict=True):
        if identity and identity in found and len(row) > worksheet.grade:
            row[worksheet.grade] = number(found[identity].score())
            at = worksheet.comments
            if at is not None and len(row) > at and (not row[at].strip() or row[at].startswith(OUR_COMMENT)):
                row[at] = comment_on(course, found[identity])
    lost = [g.submission.student for g in ready if not g.submission.lms_id or g.submission.lms_id not in numbers]
    note = f"moodle.csv: no row of the worksheet has the number of {', '.join(lost)}: enter these grades by hand"
    return [head, *rows], [note] if lost else []
