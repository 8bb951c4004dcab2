"""`written.csv`: the table in which people give points, for what no machine judges and over what one has judged.

It is read in whatever form a spreadsheet has saved it, and written anew without losing a mark.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections import Counter
from pathlib import Path

from grading import GradingError
from grading.cells import ENCODINGS
from grading.course import Course, Question
from grading.run import Graded

HEAD = ("key", "question", "of", "points", "comment", "answer")
NEEDED = {"key", "question", "points", "comment"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula
QUOTED_PART = re.compile(r"([;\t]\s*)'(?=[=+\-@])")
NOT_COUNTED = "written.csv, NOT COUNTED: "  # what a note on a row that fits nothing begins with


def number(value: float | None) -> str:
    """Points as people write them: 4, 2.5; empty while open."""
    return "" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def pseudonym(graded: Graded) -> str:
    """The end of the key, which shows no name."""
    return graded.submission.key.rpartition("-")[2]


def digest(graded: Graded, name: str) -> str:
    """8 hex digits over what was marked: the written answer, else all that was handed in."""
    text = graded.results[name].get("answer") or graded.submission.digest()
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


def decoded(path: Path) -> tuple[str, str]:
    """The text of a table that some program has saved, and what stands between its columns: `,`, `;` or a tab."""
    data, text = path.read_bytes(), ""
    for encoding in (
        ENCODINGS if data.startswith((b"\xff\xfe", b"\xfe\xff")) else [e for e in ENCODINGS if "16" not in e]
    ):
        try:
            text = data.decode(encoding)
            break
        except UnicodeError:
            continue
    return text, max(",;\t", key=text.lstrip().partition("\n")[0].count)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of `written.csv`, saved with commas, semicolons or tabs. Raises GradingError for any other table."""
    text, delimiter = decoded(path)
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows, head = list(table), table.fieldnames or []
    except csv.Error:
        rows, head = [], []
    if not set(head) >= NEEDED:
        raise GradingError(
            f"{path}: its first line must be {','.join(HEAD)}; nothing was overwritten. Bring that line back, take "
            f"{path.name}.bak in its place, or move the file away if it holds no marks"
        )
    return [{key: _unquoted(value) for key, value in row.items() if isinstance(value, str)} for row in rows]


def _unquoted(value: str) -> str:
    """A cell without the quotes that keep a spreadsheet from taking it, or a part of it, for a formula."""
    value = QUOTED_PART.sub(r"\1", value)
    return value[1:] if value.startswith("'") and value[1:].startswith(FORMULA) else value


def take_marks(course: Course, class_: list[Graded], rows: list[dict[str, str]]) -> list[str]:
    """Put points and comments into the results: of open questions, and over what a machine has judged.

    Returns in words what the instructor must know: each row that was not counted, each question whose marks were
    scaled. In `rows` names of students become keys.
    """
    marks, notes = _by_question(course, class_, rows)
    for graded in class_:
        for question in course.questions:
            if row := marks.get((graded.submission.key, question.grade_id)):
                notes += _take(graded, question, row)
    return list(dict.fromkeys(notes))


def _by_question(
    course: Course, class_: list[Graded], rows: list[dict[str, str]]
) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """The rows that say something, by key and question, and notes on those that fit neither."""
    questions = {question.grade_id for question in course.questions}
    students = {graded.submission.key: graded.submission.student for graded in class_}
    names = Counter(students.values())
    # What people may write for a key: a name that only one student has, the key's end, the key.
    keys = {name: key for key, name in students.items() if names[name] == 1}
    keys |= {pseudonym(graded): graded.submission.key for graded in class_} | {key: key for key in students}
    marks: dict[tuple[str, str], dict[str, str]] = {}
    notes = []
    for row in rows:
        if not (row.get("points", "").strip() or row.get("comment", "").strip()):
            continue
        who, name = row.get("key", "").strip(), row.get("question", "").strip()
        row |= {"key": keys.get(who, who), "question": name}
        if who not in keys:
            notes.append(
                f"{NOT_COUNTED}{who[:80]}, {name[:80]}: no such student in the folder, or several of that name"
            )
        elif name not in questions:
            who = students[keys[who]]
            notes.append(f"{NOT_COUNTED}{who}, {name[:80]}: no such question; questions.csv has their names")
        else:
            place = (row["key"], name)
            marks[place] = _together(marks[place], row) if place in marks else row
    return marks, notes


def _together(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """Two rows for one answer as one; points that differ make no number, so they are told and not counted."""
    both = {}
    for name, between in (("points", " or "), ("comment", "; ")):
        said = [row.get(name, "").strip() for row in (one, other)]
        both[name] = between.join(dict.fromkeys(text for text in said if text))
    return one | both


def _take(graded: Graded, question: Question, row: dict[str, str]) -> list[str]:
    """Take one row in, and keep in `result["row"]` what the table says of it from now on; returns notes."""
    result, now = graded.results[question.grade_id], digest(graded, question.grade_id)
    said, comment, of = row.get("points", "").strip(), row.get("comment", ""), row.get("of", "").strip()
    where = f"{graded.submission.student}, {question.grade_id}"
    if said and row.get("answer") and row["answer"] != now:
        if result["state"] == "open":
            comment = f"(an earlier answer had {said} points) {comment}".strip()
            result |= {"comment": comment, "points": None, "row": ("", "", comment, now)}
        else:
            result["row"] = (of, said, comment, row["answer"])
        return [f"{NOT_COUNTED}{where}: the answer is another than the one that got {said} points"]
    result["comment"] = comment
    try:
        points = _points(said, of, question.points)
    except GradingError as error:
        result["row"] = (of, said, comment, now)
        return [f"{NOT_COUNTED}{where}: {error}"]
    result["row"] = ("", number(points), comment, now)
    if points is None:
        return []
    result |= {"points": points, "by_hand": True}
    if _value(of) in (None, 0, question.points):
        return []
    return [f"written.csv: {question.grade_id}: marks out of {of} were scaled to {number(question.points)} points"]


def _points(said: str, of: str, most: float) -> float | None:
    """The points that a row gives, scaled where it was written when the question had other points; None for none.

    Raises GradingError for what is no number of points from 0 to the most.
    """
    points, old = _value(said), _value(of) or most
    if not said:
        return None
    if points is None:
        raise GradingError(f"{said[:20]!r} is no number of points")
    if not 0 <= points <= old:
        raise GradingError(f"{said[:20]} points are not between 0 and {number(old)}")
    return points if old == most else round(points * most / old, 2)


def _value(text: str) -> float | None:
    """The number that is written here, with a point or a comma; None for anything else."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def mark_rows(course: Course, class_: list[Graded], rows: list[dict[str, str]]) -> list[tuple]:
    """The table, in the order of `written.html`: written questions first, and of each its students by the key's end.

    Behind the rows of open questions and marks come those that fit nobody here or no question.
    """
    table: list[tuple] = [HEAD]
    for question in sorted(course.questions, key=lambda question: question.kind != "written"):
        for graded in sorted(class_, key=pseudonym):
            result = graded.results[question.grade_id]
            if result["state"] == "open" or "row" in result:
                of, *mark = result.get("row") or ("", "", "", digest(graded, question.grade_id))
                table.append((graded.submission.key, question.grade_id, of or number(question.points), *mark))
    known = {row[:2] for row in table}
    others = [row for row in rows if (row.get("key"), row.get("question")) not in known]
    return table + [
        tuple(row.get(name, "") for name in HEAD) for row in others if row.get("points") or row.get("comment")
    ]
