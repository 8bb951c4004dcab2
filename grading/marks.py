"""`written.csv`: the table in which people give points for what no machine judges.

For: `read_table`, in whatever form a spreadsheet has saved it; `take_marks`, which puts its marks into the results;
`mark_rows`, the table written anew without losing a mark. Not for: other tables (`report.py`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grading.course import Course
    from grading.run import Graded

HEAD = ("key", "question", "of", "points", "comment", "answer")
NEEDED = {"key", "question", "points", "comment"}
ENCODINGS = ("utf-8-sig", "utf-16", "cp1252", "latin-1")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula


class MarksError(ValueError):
    """The table of marks cannot be read as one; nothing was written. The message says how to mend it."""


def number(value: float | None) -> str:
    """Points as people write them: 4, 2.5; empty while open."""
    return "" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def digest(graded: Graded, name: str) -> str:
    """8 hex digits over what was marked: the written answer, else all that was handed in."""
    text = graded.results[name].get("answer") or graded.submission.digest()
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of `written.csv`, saved with commas, semicolons or tabs. Raises MarksError for any other table."""
    data, text = path.read_bytes(), None
    for encoding in (
        ENCODINGS if data.startswith((b"\xff\xfe", b"\xfe\xff")) else [e for e in ENCODINGS if "16" not in e]
    ):
        try:
            text = data.decode(encoding)
            break
        except UnicodeError:
            continue
    first = (text or "").lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        table = csv.DictReader(io.StringIO(text or "", newline=""), delimiter=delimiter)
        rows, head = list(table), table.fieldnames or []
    except csv.Error:
        rows, head = [], []
    if not set(head) >= NEEDED:
        raise MarksError(
            f"{path}: its first line must be {','.join(HEAD)}; nothing was overwritten. Bring that line back, take "
            f"{path.name}.bak in its place, or move the file away if it holds no marks"
        )
    return [{key: _unquoted(value) for key, value in row.items() if isinstance(value, str)} for row in rows]


def _unquoted(value: str) -> str:
    """A cell without the quote that keeps a spreadsheet from taking it for a formula."""
    return value[1:] if value.startswith("'") and value[1:].startswith(FORMULA) else value


def take_marks(course: Course, class_: list[Graded], rows: list[dict[str, str]]) -> list[str]:
    """Put points and comments into the results of open questions; returns what could not be taken, in words."""
    marks = {(row.get("key"), row.get("question")): row for row in rows}
    most = {question.grade_id: question.points for question in course.questions}
    notes = []
    for graded in class_:
        for name, result in graded.results.items():
            row = marks.get((graded.submission.key, name))
            if row and result["state"] == "open":
                note = _take(result, row, most[name], digest(graded, name))
                notes += [f"{graded.submission.student}, {name}: {note}"] if note else []
    return notes


def _take(result: dict, row: dict[str, str], most: float, now: str) -> str:
    """Take one row in; what the instructor must know about it, or nothing."""
    said, result["comment"], result["points"] = row.get("points", "").strip(), row.get("comment", ""), None
    if not said:
        return ""
    if row.get("answer") and row["answer"] != now:
        result["comment"] = f"(an earlier answer had {said} points) {result['comment']}".strip()
        return f"the answer is another than the one that got {said} points: it is open again"
    try:
        points = float(said.replace(",", "."))
    except ValueError:
        points = math.nan
    if not math.isfinite(points):
        return f"{said[:20]!r} is no number of points: it stays open"
    result["points"] = min(max(points, 0.0), most)
    return "" if result["points"] == points else f"{said} points were given, {number(result['points'])} counted"


def mark_rows(course: Course, class_: list[Graded], rows: list[dict[str, str]]) -> list[tuple]:
    """The table: a row for each open question, then the marks of those who are not in this class now."""
    table: list[tuple] = [HEAD]
    for graded in class_:
        for question in course.questions:
            result = graded.results[question.grade_id]
            if result["state"] == "open":
                mark = (number(result["points"]), result.get("comment", ""), digest(graded, question.grade_id))
                table.append((graded.submission.key, question.grade_id, number(question.points), *mark))
    known = {row[:2] for row in table}
    others = [row for row in rows if (row.get("key"), row.get("question")) not in known]
    return table + [
        tuple(row.get(name, "") for name in HEAD) for row in others if row.get("points") or row.get("comment")
    ]
