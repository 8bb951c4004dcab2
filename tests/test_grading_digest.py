"""What is graded again: a change on our side that can decide a grade changes the course's digest, no other does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from grading_course import write_course

from grading import cells
from grading.course import Course

NAME = "01-Plain.ipynb"
Change = Callable[[dict[str, dict]], object]  # of the first notebook's cells, by id


def add(name: str, text: str) -> Change:
    return lambda found: found[name].update(source=found[name]["source"] + text)


NOTHING: dict[str, Change] = {
    "a word of the lesson": add("title", ", or two"),
    "a word of the model answer": add("why", " Of films above all."),
    "an output": lambda found: found["setup"].update(outputs=[]),
    "an editor's metadata": lambda found: found["setup"]["metadata"].update(collapsed=True),
}
AGAIN: dict[str, Change] = {
    "a comment in code": add("setup", "\n# why"),
    "a solution": add("twice", "\n    return 2 * x"),
    "a test": add("test-twice", "\nassert twice(0) == 0"),
    "points": lambda found: found["test-twice"]["metadata"]["nbgrader"].update(points=7),
    "a tag that says who grades": lambda found: found["test-twice"]["metadata"].update(tags=["grade-adapter"]),
    "an id by which an answer is found": lambda found: found["twice"].update(id="double"),
    "what a written answer begins as": add("why", "\n### BEGIN SOLUTION\nx\n### END SOLUTION"),
    "a cell more": lambda found: found.update(x={"cell_type": "code", "id": "x", "metadata": {}, "source": "x = 1"}),
}


@pytest.mark.parametrize("name", [*NOTHING, *AGAIN])
def test_what_may_decide_a_grade_and_nothing_else_is_graded_again(tmp_path, name):
    root = write_course(tmp_path)
    before, book = Course.load(root).digest(), cells.read_notebook((root / NAME).read_bytes())
    found = {cell["id"]: cell for cell in book["cells"]}
    (NOTHING | AGAIN)[name](found)
    (root / NAME).write_bytes(cells.write_notebook(book | {"cells": list(found.values())}))
    assert (Course.load(root).digest() != before) is (name in AGAIN)


def test_a_file_that_decides_and_another_profile_are_graded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_PROFILE", "mini")
    course = Course.load(write_course(tmp_path))
    seen = [course.digest()]
    for place in ("utils/small.py", "assets/grading-bands.json"):
        (tmp_path / place).write_text('{"x": 1}\n', encoding="utf-8")
        seen.append(course.digest())
    monkeypatch.setenv("LAB_PROFILE", "gpt2")
    assert len({*seen, course.digest()}) == 4
