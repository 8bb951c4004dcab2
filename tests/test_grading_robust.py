"""Submissions that are broken, huge or forged: they cost their own points, and nobody else's grading notices them."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import sys
import threading
import time
import unicodedata
import zipfile
from pathlib import Path

import pytest
from grading_course import (
    FORGER,
    HOSTILE_LIMITS,
    PLAIN,
    TWICE,
    as_zip,
    begin,
    code,
    graded_cell,
    graded_class,
    handed_in,
    nb,
    notebook,
    put,
    solution,
    write_course,
    write_plain_course,
)

from grading import GradingError, cells, codec, intake
from grading.course import Course, Runner
from grading.intake import collect, file_key
from grading.match import _stem, answers_of, match
from grading.release import write_atomic
from grading.run import Graded

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="grading forks")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_course(tmp_path_factory.mktemp("course"))


# --- one bad submission, the others graded ---


def edited(change) -> dict[str, bytes]:
    book = handed_in({"twice": TWICE})[PLAIN]
    change(book)
    return {PLAIN: json.dumps(book).encode()}


def in_nbgrader(value: object):
    return lambda book: book["cells"][0].update(metadata={"nbgrader": {"grade_id": value}})


def damaged(method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of which thirty bytes of the first file arrived wrong."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name in ("a.ipynb", PLAIN):
            archive.writestr(name, nb({"twice": TWICE})[PLAIN])
    found = bytearray(data.getvalue())
    for place in range(200, 230):
        found[place] ^= 0xFF
    return bytes(found)


def forged(line: str) -> dict[str, bytes]:
    return nb({"twice": FORGER + line, "answer": "answer = 42"})


NESTED = b'{"problems": [{"cell": ' + b"[" * 900 + b"]" * 900 + b'}], "values": {"twice": {"data": 3}}}'
# name -> what is handed in, points for the two questions
BAD = {
    "half a character raised": (nb({"twice": "raise ValueError('\\ud800')", "answer": "answer = 42"}), (0, 2)),
    "half a character written": (edited(lambda b: b["cells"][-1].update(source="Because \ud800")), (4, 0)),
    "half a character in code": (edited(lambda b: b["cells"][4].update(source="answer = 42 # \ud800")), (4, 2)),
    "grade id a list": (edited(in_nbgrader([])), (4, 0)),
    "grade id a table": (edited(in_nbgrader({})), (4, 0)),
    "cell id a list": (edited(lambda b: b["cells"][0].update(id=[])), (4, 0)),
    "damaged deflate": (damaged(), (4, 0)),
    "damaged lzma": (damaged(zipfile.ZIP_LZMA), (4, 0)),
    "problems a number": (forged("put({'problems': 5, 'values': {'twice': {'data': 3}}})"), (0, 2)),
    "problems too deep": (forged(f"put({NESTED!r})"), (0, 2)),
    "a number too large": (forged("put({'problems': [{'line': 10**300}], 'values': {}})"), (0, 2)),
    "no values": (forged("put({})"), (0, 2)),
    "json replaced": (nb({"twice": "import json\njson.dumps = lambda *a, **k: '{}'", "answer": "answer = 42"}), (0, 2)),
}


@pytest.fixture(scope="module")
def bad_class(root, tmp_path_factory) -> tuple[dict[str, Graded], list[str]]:
    tmp_path = tmp_path_factory.mktemp("bad")
    for name, (files, _) in BAD.items():
        if isinstance(files, bytes):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / f"{name}.zip").write_bytes(files)
        else:
            put(tmp_path / "in", name, files)
    put(tmp_path / "in", "zz honest", nb({"twice": TWICE, "answer": "answer = 42"}))
    first = graded_class(tmp_path, root, jobs=2)
    again = graded_class(tmp_path, root, jobs=2)  # from what was kept
    assert {n: g.score() for n, g in first[0].items()} == {n: g.score() for n, g in again[0].items()}
    return first


@pytest.mark.parametrize("name", BAD)
def test_what_is_damaged_or_forged_costs_its_own_question(bad_class, name):
    results = bad_class[0][name].results
    assert (results["test-twice"]["points"], results["test-answer"]["points"]) == BAD[name][1], results


def test_the_others_are_graded(bad_class):
    assert bad_class[0]["zz honest"].score() == 6 and len(bad_class[0]) == len(BAD) + 1


def test_what_breaks_the_grader_leaves_the_points_open_and_is_told(root, tmp_path, monkeypatch):
    """Whatever it is, at whichever place; the next start tries again."""
    for name in ("Ann", "Bob", "Cid"):
        put(tmp_path / "in", name, nb({"twice": TWICE}))
    right, read = Runner.judge, intake.read_into

    def judge(self, question, answers, left=0.0):
        if threading.current_thread() is not threading.main_thread() and not broken:
            broken.append(question)
            raise GradingError("a socket broke")
        return right(self, question, answers)

    def read_into(submission, path):
        if path.name == "Bob":
            raise PermissionError(13, "Permission denied")
        read(submission, path)

    def match_(course, files):
        return 1 / 0 if unlucky and len(seen) == 2 or seen.append(1) else match(course, files)

    broken, seen, unlucky = [], [], True
    monkeypatch.setattr(Runner, "judge", judge)
    monkeypatch.setattr(intake, "read_into", read_into)
    monkeypatch.setattr("grading.run.match", match_)
    found, lines = graded_class(tmp_path, root)
    assert [found[name].results["test-twice"]["points"] for name in ("Ann", "Bob", "Cid")] == [None] * 3
    told = "\n".join(lines)
    assert "Ann, test-twice: a socket broke" in told and "Bob could not be read (PermissionError" in told
    assert "Cid, why: its notebooks could not be read (ZeroDivisionError" in told
    monkeypatch.setattr(intake, "read_into", read)
    unlucky = False
    found, _ = graded_class(tmp_path, root)
    assert [found[name].results["test-twice"]["points"] for name in ("Ann", "Bob", "Cid")] == [4] * 3


def test_a_worker_that_is_gone_is_asked_twice_and_then_named(root):
    course = Course.load(root)
    question = course.plans[0].questions[0]
    with Runner(course, HOSTILE_LIMITS, []) as runner:
        asked, right = [], runner._ask

        def once(*arguments):
            asked.append(1)
            if len(asked) == 1:
                raise ConnectionResetError
            return right(*arguments)

        runner._ask = once
        assert runner.judge(question, {"twice": TWICE})["passed"] and len(asked) == 2
        del runner._ask
        (runner.folder / "s" / question.grade_id).unlink()
        with pytest.raises(GradingError, match="the grader itself failed"):
            runner.judge(question, {"twice": TWICE})


# --- time and memory before any limit ---


def test_looking_at_files_takes_no_time(root):
    course, started = Course.load(root), time.monotonic()
    assert _stem("copy " * 30 + "x.ipynb") == "copy" * 30 + "x" and _stem("01-A-Copy1 (2).ipynb") == "01a"
    assert cells.parse("\n" * 60_000 + "%magic") is not None
    book = handed_in({"twice": TWICE})[PLAIN]
    book["cells"] += [code("big", "a=1\n" * 200_000), code("blank", "\n" * 90_000)]
    for cell in book["cells"]:
        if cells.grade_id(cell) == "twice":
            cell |= {"metadata": {}, "id": "another"}
    answers, _ = match(course, {PLAIN: json.dumps(book).encode()})
    assert answers[PLAIN]["twice"] == TWICE
    many = {"cells": [code(str(n), "") for n in range(5000)], "metadata": {}, "nbformat": 4}
    assert "more cells" in match(course, {"x.ipynb": json.dumps(many).encode()})[1][0]
    assert "MB" in match(course, {"x.ipynb": b" " * (25 << 20)})[1][0]
    assert time.monotonic() - started < 15


def test_answers_that_are_too_long_together_do_not_reach_the_worker(tmp_path):
    names = [f"f{number}" for number in range(8)]
    cells_of = [solution(name, begin(f"def {name}(x):\n#:\n    return x")) for name in names]
    root = write_course(tmp_path, ())
    (root / "01-A.ipynb").write_bytes(cells.write_notebook(notebook(*cells_of, graded_cell("test", "f7(1)", 1))))
    long = {"cells": [cell | {"source": "#" * 99_990} for cell in cells_of]}
    answers, remarks = answers_of(Course.load(root).plans[0], long)
    assert list(answers) == names[:5] and "f7 is too long" in remarks[-1]
    assert len(json.dumps("\U0001f600" * sum(map(len, answers.values())))) < codec.MOST_JSON


def test_zips_in_zips_are_counted_together(tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(intake, "MOST_IN_ALL", 3 << 20)
    inner = as_zip({f"{n}.zip": bytes(1 << 20) for n in range(40)})
    (tmp_path / "bomb.zip").write_bytes(as_zip({f"t{n}.zip": inner for n in range(5)}))
    monkeypatch.setattr(intake, "MOST_ENTRIES", 500)
    (tmp_path / "many.zip").write_bytes(
        as_zip({f"d{n}.zip": as_zip({f"{k}.txt": b"" for k in range(99)}) for n in range(20)})
    )
    (tmp_path / "empty.zip").write_bytes(b"")
    bomb, empty, many = collect(tmp_path)[0]
    assert bomb.size <= 3 << 20 and any("too large" in problem for problem in bomb.problems)
    assert any("more than 500 entries" in problem for problem in many.problems) and len(many.problems) <= 50
    assert empty.problems == ["the zip: empty"]


def test_what_is_no_file_is_set_aside(tmp_path):
    folder = put(tmp_path / "in", "Ann", nb({"twice": TWICE}))
    os.mkfifo(folder / "pipe.ipynb")
    os.mkfifo(folder / "Ann" / "pipe.ipynb")
    here = Path.cwd()
    try:
        os.chdir(folder)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("socket.json")
        (folder / "deep").mkdir()
        os.chdir("deep")
        for _ in range(60):
            os.mkdir("a")
            os.chdir("a")
    finally:
        os.chdir(here)
    put(folder, "\N{MATHEMATICAL BOLD CAPITAL A}" * 62, nb({}))
    put(folder, "\x1b[31mred", nb({}))
    found, aside = collect(folder)
    by_name = {one.student: one for one in found}
    assert list(by_name["Ann"].files) == [PLAIN] and "folders deep" in by_name["deep"].problems[0]
    assert len(aside) == 2 and all("neither a folder" in line for line in aside)
    assert not any("\x1b" in one.student for one in found)
    write_atomic(tmp_path / f"{found[-1].key}.json", b"")  # a name that a disk takes
    assert max(len(f"{one.key}.html".encode()) for one in found) < 200


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_the_instructors_affair(tmp_path):
    folder = put(tmp_path / "in", "Ann", nb({"twice": TWICE}))
    (folder / "Ann" / PLAIN).chmod(0)
    (one,), _ = collect(folder)
    assert "PermissionError" in one.failure


# --- who is who ---


def test_students_are_neither_merged_in_silence_nor_taken_for_copies(tmp_path):
    good = nb({"twice": TWICE})
    for name in ("Ann", "Ann Copy", "Group (1)", "Group (2)", "Eve"):
        put(tmp_path, name, good)
    (tmp_path / "Eve.zip").write_bytes(as_zip(nb({"twice": "def twice(x): return 0"})))
    for form in ("NFC", "NFD"):
        put(tmp_path, unicodedata.normalize(form, "José"), good)
    for number in (1, 2):
        (tmp_path / f"leeann_4711_9{number}_0{number}-x.ipynb").write_bytes(good[PLAIN])
    found, aside = collect(tmp_path)
    names = [one.student for one in found]
    assert names == ["Ann", "Ann Copy", "Eve", "Group (1)", "Group (2)", "José", "leeann"]
    assert len(found[2].files) == 2  # both are looked at
    told = "graded together, as one student's"
    assert [unicodedata.normalize("NFC", line) for line in aside] == [f"Eve, Eve.zip: {told}", f"José, José: {told}"]


def test_keys_are_long_and_a_second_one_is_set_aside(tmp_path, monkeypatch):
    assert re.fullmatch(r"Ann-Lee-[0-9a-f]{16}", file_key("Ann Lee", ""))
    monkeypatch.setattr(intake, "file_key", lambda name, identity: "same")
    for name in ("Ann", "Bob"):
        put(tmp_path, name, nb({}))
    found, aside = collect(tmp_path)
    assert [one.student for one in found] == ["Ann"] and "another student" in aside[0]


def test_of_cells_with_one_id_those_above_the_test_run_in_order(root):
    plan = Course.load(root).plans[0]
    book = handed_in({"twice": "def twice(x): return x"})[PLAIN]
    place = [cells.grade_id(cell) for cell in book["cells"]].index("twice")
    first = book["cells"][place]
    book["cells"][place + 1 : place + 1] = [
        first | {"source": TWICE},
        first | {"source": cells.stubbed(plan.notebook["cells"][place])},
    ]
    book["cells"].append(first | {"source": "def twice(x): return 'after the test'"})
    answers, remarks = answers_of(plan, book)
    assert answers["twice"] == TWICE and "4 times; those above" in remarks[0]
    assert {k: v for k, v in answers.items() if k.startswith("twice ")} == {"twice -1": "def twice(x): return x"}


def test_an_import_of_an_earlier_exercise_is_there_as_in_jupyter(root):
    plan = Course.load(root).plans[0]
    question = plan.questions[1]
    for first, second in (
        ("import math", "answer = math.prod([6, 7])"),
        ("from math import *", "answer = prod([6, 7])"),
    ):
        assert plan.needs(question, {"twice": f"{first}\n{TWICE}", "answer": second})[0] == ["twice", "answer"]
    assert plan.needs(question, {"twice": "import math", "answer": "answer = 42"})[0] == ["answer"]
