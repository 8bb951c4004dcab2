"""What goes back to the learning platform: a table for Canvas's gradebook, Moodle's own grading worksheet filled in.

For: `Export`, `read_worksheet`, `export`. A total with points still open is no grade yet, so such students are left out
unless the instructor says that open points are 0. Not for: the other tables (`report.py`).
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grading.marks import decoded, number
from grading.summary import open_points

if TYPE_CHECKING:
    from grading.course import Course
    from grading.run import Graded

PARTICIPANT = re.compile(r"\D*(\d+)\s*")  # "Participant 12345", in the language of the site


class WorksheetError(ValueError):
    """This is not a grading worksheet of Moodle's; nothing was graded. The message says what is missing."""


@dataclass(frozen=True)
class Worksheet:
    """Moodle's table: all its rows, the first line included; `grade` is the number of the column for the grade."""

    rows: list[list[str]]
    grade: int


@dataclass(frozen=True)
class Export:
    """How grades go back. `assignment`: the column's name in Canvas; `open_as_zero`: totals with open points too."""

    assignment: str = "IA3 lab"
    worksheet: Worksheet | None = None
    open_as_zero: bool = False


def read_worksheet(path: Path, grade: str = "Grade") -> Worksheet:
    """Moodle's grading worksheet as it was downloaded; `grade`: the name of its column, which Moodle translates.

    Raises WorksheetError where that column, or the participants' numbers in the first one, are not there.
    """
    try:
        text, delimiter = decoded(path)
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except (OSError, csv.Error) as error:
        raise WorksheetError(f"{path} cannot be read as Moodle's grading worksheet ({error})") from None
    head = rows[0] if rows else []
    if grade not in head:
        found = ", ".join(head)[:300]
        raise WorksheetError(
            f"{path} has no column {grade!r} but {found!r}: name the one of the grade by --moodle-grade"
        )
    if not any(PARTICIPANT.fullmatch(row[0]) for row in rows[1:]):
        raise WorksheetError(
            f"{path}: its first column must hold Moodle's identifiers, as 'Participant 12345': download the worksheet "
            "anew (assignment, all submissions, download grading worksheet)"
        )
    return Worksheet(rows, head.index(grade))


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
    moodle, unknown = _filled(how.worksheet, ready)
    return canvas, moodle, notes + unknown


def _filled(worksheet: Worksheet, ready: list[Graded]) -> tuple[list[list[str]], list[str]]:
    """The worksheet with the grades of these students put in, and a note on those who have no row in it."""
    grades = {graded.submission.lms_id: number(graded.score()) for graded in ready}
    head, *rows = [list(row) for row in worksheet.rows]
    numbers = [found[1] if (found := PARTICIPANT.fullmatch(row[0])) else "" for row in rows]
    for row, identity in zip(rows, numbers, strict=True):
        if identity and identity in grades and len(row) > worksheet.grade:
            row[worksheet.grade] = grades[identity]
    lost = [g.submission.student for g in ready if not g.submission.lms_id or g.submission.lms_id not in numbers]
    note = f"moodle.csv: no row of the worksheet has the number of {', '.join(lost)}: enter these grades by hand"
    return [head, *rows], [note] if lost else []
