"""What platforms, archivers and systems do to submissions, each met somewhere: the honest lose nothing by it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from grading_course import HOSTILE_LIMITS, PLAIN, TWICE, as_files, as_zip, judged, nb, put, write_plain_course

from grading import submit
from grading.course import Course, Runner
from grading.intake import collect
from grading.marks import read_table
from grading.match import match
from grading.pages import summary
from grading.report import write_table
from grading.run import grade_class

ROOT = Path(__file__).resolve().parents[1]
forks = pytest.mark.skipif(sys.platform == "win32", reason="grading forks")
linux = pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="a Linux system call")
ONE = nb({"twice": TWICE})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_course(tmp_path_factory.mktemp("course"))


def test_where_nothing_can_fork_the_advice_is_shown(tmp_path):
    """Windows has neither of these modules, and no fork."""
    gone = "import os, psutil, sys\nsys.modules |= {'resource': None, 'fcntl': None}\ndel os.fork\n"
    run = [sys.executable, "-c", gone + f"from scripts import grade\nsys.exit(grade.main([{str(tmp_path)!r}]))"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "run it in WSL" in done.stderr and "Traceback" not in done.stderr


# --- archives and names ---


def test_a_zip_of_windows_has_folders(tmp_path):
    adapter = {"adapter_model.safetensors": b"1", "run.json": b"2"}
    files = {name.replace("/", "\\"): data for name, data in as_files({}, adapter).items()}
    (tmp_path / "Ann.zip").write_bytes(as_zip(files | {"..\\evil.json": b"", "C:\\evil.json": b"", "empty\\": b""}))
    (ann,), _ = collect(tmp_path)
    assert "artifacts/mini/adapters/positive/adapter_model.safetensors" in ann.files
    assert not any("evil" in name for name in ann.files) and len(ann.problems) == 2


def test_moodles_loose_files_are_one_students(tmp_path):
    for name in (PLAIN, "02-Numbers.ipynb"):
        (tmp_path / f"Ann Lee_123456_assignsubmission_file_{name}").write_bytes(as_files({})[name])
    for name in ("submission (1).zip", "submission.zip"):
        (tmp_path / f"Bo Li_123457_assignsubmission_file_{name}").write_bytes(as_zip(ONE))
    (tmp_path / "group_1_2").mkdir()
    (tmp_path / "cy_4711_99_01-Plain-1.ipynb").write_bytes(ONE[PLAIN])
    found, aside = collect(tmp_path)
    assert [(one.student, one.lms_id) for one in found] == [
        ("Ann Lee", "123456"), ("Bo Li", "123457"), ("cy", "4711"), ("group_1_2", "")
    ]  # fmt: skip
    assert sorted(found[0].files) == [PLAIN, "02-Numbers.ipynb"] and list(found[2].files) == ["01-Plain-1.ipynb"]
    assert len(aside) == 1 and "Bo Li" in aside[0] and aside[0].endswith("graded together, as one student's")


def test_what_no_student_has_made_is_passed_over_and_what_is_not_read_is_named(root, tmp_path):
    files = {f"{PLAIN}.json": ONE[PLAIN], f"._{PLAIN}": b"\0\5\x16\7", "work.rar": b"Rar!", "__MACOSX/._x.ipynb": b"\0"}
    put(tmp_path, "Ann", files)
    (tmp_path / "Bob.zip").write_bytes(as_zip(files))
    course = Course.load(root)
    for one in collect(tmp_path)[0]:
        answers, remarks = match(course, one.files)
        assert answers[PLAIN]["twice"] == TWICE and remarks == [f"{PLAIN}.json was graded as {PLAIN}"]
        assert one.problems == ["work.rar: not read, only notebooks, adapters and zips are"]
    ann = judged(course, "Ann")
    ann.submission.problems = list(one.problems)
    assert "Ann: work.rar: not read, only notebooks, adapters and zips are" in summary(course, [ann], [])


def test_files_older_than_zips_are_packed_and_a_good_zip_is_replaced_by_a_good_one_only(tmp_path, monkeypatch):
    """A zip that was unpacked east of Greenwich gives files of 1979."""
    (tmp_path / PLAIN).write_bytes(ONE[PLAIN])
    os.utime(tmp_path / PLAIN, (300_000_000, 300_000_000))
    monkeypatch.setattr(submit, "HERE", tmp_path)
    submit.main()
    good = (tmp_path / "submission.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.read(PLAIN) == ONE[PLAIN]
    monkeypatch.setattr(zipfile.ZipFile, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        submit.main()
    assert (tmp_path / "submission.zip").read_bytes() == good


@pytest.mark.parametrize("name", ["Zed;=1+1", "Zed\t=1+1", "Zed; @SUM(1)", "=1;-2"])
def test_no_cell_is_a_formula_whatever_separates(tmp_path, name):
    head = ("key", "question", "of", "points", "comment", "answer")
    write_table(tmp_path / "t.csv", [head, ("k", "q", "", "", name, "")])
    line = (tmp_path / "t.csv").read_text(encoding="utf-8-sig").splitlines()[1]
    cells = [cell.strip(' "') for cell in re.split(r"[;\t,]", line)]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert read_table(tmp_path / "t.csv")[0]["comment"] == name  # and it comes back as it was


# --- what an answer finds, and what it costs ---


@forks
@linux
def test_neither_the_instructors_environment_nor_a_key_ring_reaches_an_answer(root, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    course = Course.load(root)
    question = course.plans[0].questions[0]
    say = "raise ValueError([open(f'/proc/self/{n}').read() for n in ('cmdline', 'environ')], dict(os.environ))"
    keep = "libc.syscall(248, b'user', b'note', b'hello', 5, -4)"  # add_key, to the user's ring
    look = "if libc.syscall(250, 10, -4, b'user', b'note', 0) > 0: raise ValueError('a key of another answer')"
    with Runner(course, HOSTILE_LIMITS, []) as runner:
        told = runner.judge(question, {"twice": f"import os\n{say}"})["problems"][0]["message"]
        assert "PATH=" in told and "secret-token" not in told and str(root) not in told
        library = "import ctypes\nlibc = ctypes.CDLL(None)\n"
        assert runner.judge(question, {"twice": f"{library}{keep}\n{TWICE}"})["passed"]
        assert runner.judge(question, {"twice": f"{library}{look}\n{TWICE}"})["passed"]


def test_answers_that_call_the_library_are_named(root):
    course = Course.load(root)
    class_ = [judged(course, name) for name in ("Ann", "Bob", "Cid")]
    lines = ("from utils.small import double as twice", "import math", "from exercises import check")
    for graded, line in zip(class_, lines, strict=True):
        graded.answers[PLAIN]["twice"] = line
    found = [line for line in summary(course, class_, []) if "packages" in line]
    assert found == ["answers that import from the course's packages: Ann: twice"]


@forks
@pytest.mark.slow
def test_an_answer_that_only_sleeps_is_stopped_long_before_its_clock_ends(root):
    course = Course.load(root)
    question = course.plans[0].questions[0]
    with Runner(course, replace(HOSTILE_LIMITS, idle=5.0), []) as runner:
        slept = runner.judge(question, {"twice": f"import time\ntime.sleep(500)\n{TWICE}"})
        worked = runner.judge(
            question, {"twice": f"import time\nfor _ in range(3):\n    time.sleep(2.5)\n    sum(range(10**6))\n{TWICE}"}
        )
    assert not slept["passed"] and "it computed nothing for 5 seconds" in slept["stopped"] and worked["passed"]


@forks
def test_answers_that_sleep_share_a_clock(root, tmp_path, monkeypatch):
    """The first may wait as long as an answer may; then this student, and nobody else, has little left."""
    clocks, right = {}, Runner.judge

    def judge(self, question, answers, left=float("inf")):
        clocks.setdefault(answers.get("twice"), []).append(left)
        return right(self, question, answers, left)

    monkeypatch.setattr("grading.run.WAITING", 0.01)
    monkeypatch.setattr("grading.course.LEAST_CLOCK", 1.0)
    monkeypatch.setattr(Runner, "judge", judge)
    slow = f"import time\ntime.sleep(2.5)\n{TWICE}"
    put(tmp_path / "in", "Ann", nb({"twice": slow, "answer": "time.sleep(2.5)\nanswer = twice(21)"}))
    put(tmp_path / "in", "Bob", nb({"twice": TWICE}))
    class_ = grade_class(Course.load(root), collect(tmp_path / "in")[0], tmp_path / "state", HOSTILE_LIMITS)
    assert [clocks[TWICE][0], len(clocks[slow])] == [0.6, 2] and clocks[slow][1] < clocks[slow][0]
    assert "did not end within 1 seconds" in class_[0].results["test-answer"]["message"]
