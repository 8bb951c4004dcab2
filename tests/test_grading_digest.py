"""What is graded again: a change on our side that can decide a grade changes the course's digest, no other does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from grading_course import write_course

from grading import cells
from grading.course import Course

NAME = "01-Plain.ipynb"
TITLE, SETUP, TWICE, TEST, WHY = 0, 1, 2, 3, 6  # cells of the first notebook


def test_names_of_the_cells_are_right(tmp_path):
    found = cells.read_notebook((write_course(tmp_path) / NAME).read_bytes())["cells"]
    assert [found[n]["id"] for n in (TITLE, SETUP, TWICE, TEST, WHY)] == [
        "title",
        "setup",
        "twice",
        "test-twice",
        "why",
    ]


def digest_after(tmp_path: Path, change: Callable[[list[dict]], object]) -> tuple[str, str]:
    """The digest of the course before and after `change`, which is given the first notebook's cells."""
    root = write_course(tmp_path)
    before, book = Course.load(root).digest(), cells.read_notebook((root / NAME).read_bytes())
    change(book["cells"])
    (root / NAME).write_bytes(cells.write_notebook(book))
    return before, Course.load(root).digest()


def add(place: int, text: str) -> Callable[[list[dict]], object]:
    return lambda found: found[place].update(source=found[place]["source"] + text)


NOTHING = {
    "a word of the lesson": add(TITLE, ", or two"),
    "a word of the model answer": add(WHY, " Of films above all."),
    "an output": lambda found: found[SETUP].update(outputs=[]),
    "an editor's metadata": lambda found: found[SETUP]["metadata"].update(collapsed=True),
}
AGAIN = {
    "a comment in code": add(SETUP, "\n# why"),
    "a solution": add(TWICE, "\n    return 2 * x"),
    "a test": add(TEST, "\nassert twice(0) == 0"),
    "points": lambda found: found[TEST]["metadata"]["nbgrader"].update(points=7),
    "a tag that says who grades": lambda found: found[TEST]["metadata"].update(tags=["grade-adapter"]),
    "an id by which an answer is found": lambda found: found[TWICE].update(id="double"),
    "what a written answer begins as": add(WHY, "\n### BEGIN SOLUTION\nx\n### END SOLUTION"),
    "a cell more": lambda found: found.insert(1, {"cell_type": "code", "id": "x", "metadata": {}, "source": "x = 1"}),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_decides_no_grade_is_not_graded_again(tmp_path, name):
    before, after = digest_after(tmp_path, NOTHING[name])
    assert after == before


@pytest.mark.parametrize("name", AGAIN)
def test_what_may_decide_a_grade_is_graded_again(tmp_path, name):
    before, after = digest_after(tmp_path, AGAIN[name])
    assert after != before


@pytest.mark.parametrize("place", ["utils/small.py", "assets/grading-bands.json"])
def test_a_file_that_decides_is_graded_again(tmp_path, place):
    root = write_course(tmp_path)
    before = Course.load(root).digest()
    (root / place).write_text('{"x": 1}\n', encoding="utf-8")
    assert Course.load(root).digest() != before


def test_another_profile_is_graded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_PROFILE", "mini")
    course = Course.load(write_course(tmp_path))
    before = course.digest()
    monkeypatch.setenv("LAB_PROFILE", "gpt2")
    assert course.digest() != before
