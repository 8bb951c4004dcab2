"""What passes in a student's notebook, run from top to bottom, passes in the grader, or the feedback names the rule."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from grading_course import HOSTILE_LIMITS, begin, code, graded_cell, notebook, put, solution, write_course

from grading import cells, codec
from grading.course import Course
from grading.intake import collect
from grading.match import match
from grading.release import student_notebook
from grading.run import grade_class
from scripts.replay import execute

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="grading forks")
NAME = "01-Plain.ipynb"
LESSON = """from fractions import Fraction
from utils.small import double

base = double(21)

def halve(x):
    return x / 2

def shifted(x, by=base):
    return x + by"""
STUB = "stub"  # the answer's cell as it was handed out


def own(source: str) -> dict:
    return code(f"own{abs(hash(source))}", source)


def split(name: str, source: str) -> dict:
    return solution(name, source) | {"id": f"{name}split"}


# exercise -> cells above the answer's, the answer, cells between it and its test
HONEST = {
    "inline": ([], "%matplotlib inline\ndef f_inline(x): return 2 * x", []),
    "bare": ([], "%matplotlib\nget_ipython().run_line_magic('matplotlib', 'inline')\ndef f_bare(x): return 2 * x", []),
    "pylab": ([], "%pylab inline\ndef f_pylab(x): return float(array([x]).sum() * 2)", []),
    "timed": ([], "%%time\n!true\ndef f_timed(x): return 2 * x", []),
    "imported": ([own("import operator as op")], "def f_imported(x): return op.mul(x, 2)", []),
    "helped": ([], "def f_helped(x): return helper(x)", [own("FACTOR = 2\ndef helper(x): return FACTOR * x")]),
    "constant": ([own("TIMES = 2")], "def f_constant(x): return TIMES * x", []),
    "split": ([], "def f_split(x): return 2 * x", [split("split", "print(f_split(3))")]),
    "splitting": ([], "TWO = 2", [split("splitting", "def f_splitting(x): return TWO * x")]),
    "again": ([], "def f_again(x): return x +", [split("again", "def f_again(x): return 2 * x")]),
    "below": ([], STUB, [own("def f_below(x): return 2 * x")]),
    "lesson": ([], "def f_lesson(x): return halve(4 * x) * Fraction(1)", []),
    "earlier": ([], "def f_earlier(x): return f_timed(x)", []),
}
RULED = {  # these do not pass in the grader; the feedback says why
    "value": ([], "def f_value(x): return x * base // 21", [], "comes from running the lesson"),
    "unordered": ([], "def f_unordered(x): return below_it(x)", [], "imports and helpers belong into the cell"),
}


def course_of(root: Path) -> Course:
    members = [code("prelude", LESSON)]
    for name in (*HONEST, *RULED):
        members.append(solution(name, begin(f"def f_{name}(x):\n#:\n    return 2 * x")))
        members.append(graded_cell(f"test-{name}", f"assert f_{name}(3) == 6, 'twice 3 is 6'", 1))
    write_course(root, ())
    (root / NAME).write_bytes(cells.write_notebook(notebook(*members)))
    return Course.load(root)


def handed_in(course: Course) -> dict:
    book = student_notebook(course.plans[0].notebook)
    found = []
    for cell in book["cells"]:
        above, answer, below, *_ = (HONEST | RULED).get(cells.grade_id(cell), ([], STUB, []))
        if answer != STUB:
            cell["source"] = answer
        found += [*above, cell, *below]
    return book | {"cells": [*found, own("def below_it(x): return 2 * x")]}


def in_the_kernel(book: dict, folder: Path) -> dict[str, bool]:
    """Whether each test passes where a student runs all cells in Jupyter."""
    text = cells.write_notebook(book).decode()
    ran = nbformat.reads(text, as_version=4)
    for cell in ran.cells:
        cell.metadata["tags"] = ["raises-exception"]
    execute(ran, folder / NAME, 60)
    tests = [cell for cell in ran.cells if cells.is_test(cell)]
    return {cells.grade_id(cell): all(o.output_type != "error" for o in cell.outputs) for cell in tests}


@pytest.mark.slow
def test_an_honest_class_gets_in_the_grader_what_it_gets_in_jupyter(tmp_path):
    course = course_of(tmp_path / "course")
    book = handed_in(course)
    passed = in_the_kernel(book, tmp_path / "course")
    assert {name for name, fine in passed.items() if not fine} == {"test-unordered"}
    put(tmp_path / "in", "Ann", {NAME: cells.write_notebook(book)})
    (ann,) = grade_class(course, collect(tmp_path / "in")[0], tmp_path / "state", HOSTILE_LIMITS)
    states = {name.removeprefix("test-"): result["state"] for name, result in ann.results.items()}
    messages = {name: result["message"] for name, result in ann.results.items()}
    assert states == dict.fromkeys(HONEST, "right") | dict.fromkeys(RULED, "wrong"), messages
    for name, (*_, said) in RULED.items():
        assert said in messages[f"test-{name}"]
    remarks = "\n".join(ann.remarks)
    assert "the answer to below was taken from a cell of your own below it" in remarks
    assert "split is there 2 times; those above its test were run, in order" in remarks


def test_an_answer_below_its_test_is_told(tmp_path):
    course = course_of(tmp_path / "course")
    book = student_notebook(course.plans[0].notebook)
    book["cells"].append(own("def f_below(x): return 2 * x"))
    put(tmp_path / "in", "Ann", {NAME: cells.write_notebook(book)})
    answers, remarks = match(course, collect(tmp_path / "in")[0][0].files)
    assert "the answer to below stands below its test and was not graded: move it up" in remarks[-1]
    assert answers[NAME].keys() == (HONEST | RULED).keys()


def test_the_task_type_crosses_as_the_text_that_it_is():
    import peft

    tree = codec.encode(peft.IA3Config(task_type=peft.TaskType.CAUSAL_LM, target_modules=["a"]), [])
    assert codec.decode(tree, []).task_type == "CAUSAL_LM" and type(codec.decode(tree, []).task_type) is str
