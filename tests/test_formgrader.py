"""What the formgrader gets to see, and how its marks come back; nbgrader itself is not needed here."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
from grading_course import TWICE, as_files, write_course

from grading import cells
from grading.course import Course
from grading.report import write_table
from scripts import formgrader


@pytest.fixture
def laid_out(tmp_path) -> Path:
    """One student's answers, laid out."""
    files = as_files({"twice": TWICE, "why": "Because of the films."})
    for name, data in files.items():
        path = tmp_path / "in" / "Ann Lee" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert formgrader.lay_out(Course.load(write_course(tmp_path / "root")), tmp_path / "in", tmp_path / "out") == 1
    return tmp_path / "out"


def test_answers_are_in_our_notebook_and_only_written_ones_are_graded(laid_out):
    """nbgrader would give full points for a test that nobody has run."""
    (folder,) = (laid_out / "submitted").iterdir()
    places = (laid_out / "source", folder)
    books = [cells.read_notebook((place / "course" / "01-Plain.ipynb").read_bytes()) for place in places]
    for book in books:
        graded = [cells.grade_id(cell) for cell in book["cells"] if cells.is_test(cell) or cells.is_manual(cell)]
        assert graded == ["why"] and "range(-50, 50)" not in str(book)
    sources = {cells.grade_id(cell): cell["source"] for cell in books[1]["cells"]}
    assert sources["twice"] == TWICE and sources["why"] == "```text\nBecause of the films.\n```"


def test_marks_come_back_into_the_table(tmp_path, monkeypatch):
    grades = [SimpleNamespace(name="why", manual_score=3.5), SimpleNamespace(name="other", manual_score=None)]
    notebook = SimpleNamespace(grades=grades, comments=[SimpleNamespace(name="why", manual_comment="Good")])
    submission = SimpleNamespace(student=SimpleNamespace(id="Ann-1"), notebooks=[notebook])

    class Gradebook:
        def __init__(self, url: str) -> None:
            assert url.endswith("gradebook.db")

        def __enter__(self) -> Gradebook:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def assignment_submissions(self, name: str) -> list:
            assert name == formgrader.ASSIGNMENT
            return [submission]

    monkeypatch.setitem(sys.modules, "nbgrader", types.ModuleType("nbgrader"))
    monkeypatch.setitem(sys.modules, "nbgrader.api", SimpleNamespace(Gradebook=Gradebook))
    rows = [
        ("key", "question", "of", "points", "comment"),
        ("Ann-1", "why", "5", "", ""),
        ("Bo-2", "why", "5", "2", "x"),
    ]
    write_table(tmp_path / "written.csv", rows)
    assert formgrader.collect_marks(tmp_path, tmp_path / "written.csv") == 1
    with (tmp_path / "written.csv").open(encoding="utf-8-sig", newline="") as file:
        found = list(csv.reader(file))
    assert found[1:] == [["Ann-1", "why", "5", "3.5", "Good"], ["Bo-2", "why", "5", "2", "x"]]
