"""What students and the instructor read after a grading: pages, and a summary that leaves nobody out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grading_course import ANSWER, PLAIN, TWICE, judged, nb, put, text, write_course, write_plain_course

from grading import cells
from grading.course import Course, Question, read_plan
from grading.intake import collect
from grading.match import match
from grading.pages import feedback_page, summary, written_page
from grading.run import explain
from scripts import grade

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="grading forks")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course.load(write_plain_course(tmp_path_factory.mktemp("course")))


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of the table of a student's page, by question; the first one is the question's."""
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    return {str(number): row[1:] for number, row in enumerate(found[1:], 1)}


# --- a student's page ---


def test_a_page_says_nothing_twice(course):
    graded = judged(course, "Ann")
    graded.results["test-answer"] = {"state": "stopped", "points": 0.0, "message": "stopped: it did not end"}
    assert rows_of(feedback_page(course, graded)) == {
        "1": ["4 of 4", "right", ""],
        "2": ["0 of 2", "stopped", "it did not end"],
        "3": ["open of 5", "open", "a person reads it"],
    }


def test_a_marked_answer_is_no_longer_to_be_read(course):
    graded = judged(course, "Ann")
    graded.results["why"] |= {"points": 2.0, "by_hand": True, "comment": "too short"}
    page = feedback_page(course, graded)
    assert rows_of(page)["3"] == ["2 of 5", "marked by hand", "too short"] and "still open" not in page


def test_a_failed_check_is_told_without_the_number_that_the_page_has_anyway():
    question = Question("q", "01", "code", 1.0, 0, "assert x", "Exercise 1.1")
    verdict = {"passed": False, "name": "AssertionError", "message": "1.1 fail  a layer norm is missing", "line": 1}
    assert explain(question, verdict) == "a test fails: a layer norm is missing"


def test_columns_of_points_do_not_break(course):
    style = feedback_page(course, judged(course, "Ann")).split("<style>")[1].split("</style>")[0]
    assert "td,th{" in style and "anywhere" not in style.split("td,th{")[1].split("}")[0]
    assert re.search(r"\.n\{[^}]*white-space:nowrap", style)


def test_a_question_is_named_by_the_nearest_heading_wherever_it_stands(tmp_path):
    root = write_course(tmp_path, (PLAIN,))
    book = cells.read_notebook((root / PLAIN).read_bytes())
    book["cells"].insert(
        2, text("card", "Words first.\n\n```\n# no heading\n```\n### Exercise 1 · Twice\n\n*4 points.*")
    )
    (root / PLAIN).write_bytes(cells.write_notebook(book))
    first = read_plan(root / PLAIN).questions[0]
    assert first.title == "Exercise 1 · Twice" and first.card == "### Exercise 1 · Twice\n\n*4 points.*"


def test_the_courses_questions_are_named_by_their_cards():
    titles = {q.grade_id: q.title for q in Course.load(ROOT).questions}
    wanted = {name: f"Exercise {name[3]}.{name[5]} · " for name in titles}
    assert [name for name, title in titles.items() if not title.startswith(wanted[name])] == []


# --- what was not there or could not be read ---


def test_a_broken_notebook_is_told_once_and_with_what_to_do(course):
    answers, remarks = match(course, {PLAIN: b'{"cells": ['})
    assert answers == {} and len(remarks) == 1
    assert re.search(rf"{PLAIN}: not a notebook .*open it in Jupyter, save it, ask whether", remarks[0])
    assert match(course, {})[1] == [
        f"{PLAIN} was not found in what you handed in: ask whether you may hand it in again"
    ]


def test_the_summary_names_who_is_late_and_whose_notebooks_are_missing(course, tmp_path):
    for name in ("annlee_LATE_4711_1_01-Plain.ipynb", "bob_4712_2_01-Plain.ipynb"):
        (tmp_path / name).write_bytes(nb({"twice": TWICE})[PLAIN])
    late = {one.student: one.late for one in collect(tmp_path)[0]}
    assert late == {"annlee": True, "bob": False}
    class_ = [judged(course, name) for name in ("Ann", "Bob")]
    class_[0].submission.late = True
    class_[1].answers = {}
    lines = summary(course, class_, [])
    assert "late, as the names of the files say: Ann" in lines
    assert f"missing or unreadable (grades.csv says why): Bob: {PLAIN}" in lines


# --- for who marks ---


def test_the_page_of_written_answers_has_question_model_answer_and_points(course):
    failed = {"state": "open", "points": None, "message": "", "failure": "a socket broke"}
    page = written_page(course, [judged(course, "Ann Lee", test_twice=failed)])
    assert "why), 5 points" in page and "<pre># One</pre>" in page and ANSWER in page
    assert "Because of films." in page and "Ann" not in page
    assert re.search(r"<h2>Open, and no written answer</h2>.*test-twice\), 4 points: a socket broke", page)
    assert "no written answer" not in written_page(course, [judged(course, "Ann Lee")])


def test_the_same_written_answer_of_several_students_is_named(course):
    texts = {"Ann": "Because  of\nfilms. ", "Bob": "Because of films.", "Cid": "Films.", "Dan": "Films!"}
    class_ = [judged(course, name, why=why) for name, why in texts.items()]
    alike = [line for line in summary(course, class_, []) if "same written answer" in line]
    assert alike == ["the same written answer to why (to look at, no verdict): Ann, Bob"]
    for graded in class_:
        graded.results["why"] = {"state": "empty", "points": 0.0, "message": "not attempted"}
    assert not [line for line in summary(course, class_, []) if "same written answer" in line]


# --- the command itself ---


def test_the_bar_counts_answers_and_begins_with_those_that_were_kept(course, tmp_path, capsys):
    for name in ("Ann", "Bob"):
        put(tmp_path / "in", name, nb({"twice": TWICE}))
    options = [str(tmp_path / "in"), "--root", str(course.root), "--output", str(tmp_path / "out"), "--unsafe"]
    assert grade.main(options) == 0
    put(tmp_path / "in", "Cid", nb({"twice": TWICE}))
    capsys.readouterr()
    assert grade.main(options) == 0
    bar = re.findall(r"answers graded:.*?(\d+)/(\d+) \[", capsys.readouterr().err)
    assert bar[0] == ("6", "9") and bar[-1] == ("9", "9")


def test_a_terminated_grading_leaves_no_folder(course, tmp_path):
    """In a temporary folder of its own, while the answer of a student's hangs."""
    put(tmp_path / "in", "Ann", nb({"twice": "while True: pass"}))
    (tmp_path / "tmp").mkdir()
    options = ["--root", course.root, "--output", tmp_path / "out", "--unsafe", "--seconds", "5", "--clock", "10"]
    command = [sys.executable, ROOT / "scripts" / "grade.py", tmp_path / "in", *options]
    process = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list((tmp_path / "tmp").glob("grading-*/s/*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert not list((tmp_path / "tmp").glob("grading-*"))
