"""The table of points that people give: no spreadsheet, no second grading and no new answer loses or moves a mark."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from grading_course import (
    graded_class,
    nb,
    put,
    write_plain_course,
)

from grading.marks import MarksError
from grading.report import BusyError, only_one, write_atomic, write_table
from scripts import grade

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="grading forks")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_course(tmp_path_factory.mktemp("course"))


@pytest.fixture
def marked(root, tmp_path):
    """Two written answers; `again` grades the class anew and gives points and comments by student."""
    for name in ("Ann", "Bob"):
        put(tmp_path / "in", name, nb({"why": f"Because of {name}."}))
    graded_class(tmp_path, root)
    path = tmp_path / "out" / "written.csv"
    path.write_text(path.read_text("utf-8-sig").replace(",why,5,,,", ",why,5,4,good,"), "utf-8-sig")

    def again() -> dict[str, tuple]:
        found, lines = graded_class(tmp_path, root)
        again.lines = lines
        return {n: (g.results["why"]["points"], g.results["why"].get("comment", "")) for n, g in found.items()}

    again.path, again.folder = path, tmp_path / "in"
    return again


def test_marks_survive_every_spreadsheet(marked):
    table = marked.path.read_text("utf-8-sig")
    right = {"Ann": (4.0, "good"), "Bob": (4.0, "good")}
    assert marked() == right
    for data in (table.replace(",", ";").encode("utf-8-sig"), table.replace(",", "\t").encode("utf-16")):
        marked.path.write_bytes(data)
        assert marked() == right
    marked.path.write_bytes(table.replace("good", "très bien").replace("\n", "\r\n").encode("cp1252"))
    assert marked() == {"Ann": (4.0, "très bien"), "Bob": (4.0, "très bien")} == marked()


def test_a_table_that_is_not_ours_stops_before_anything_is_overwritten(marked, root, capsys):
    kept = marked.path.read_bytes()
    for data in (b"", b"a,b\n1,2\n", kept.replace(b"points", b"Punkte")):
        marked.path.write_bytes(data)
        with pytest.raises(MarksError, match="nothing was overwritten"):
            marked()
        assert marked.path.read_bytes() == data
        arguments = [str(marked.folder), "--root", str(root), "--output", str(marked.path.parent), "--unsafe"]
        assert grade.main(arguments) == 1 and "nothing was overwritten" in capsys.readouterr().err


def test_a_mark_belongs_to_the_answer_that_was_read(marked):
    assert marked()["Ann"] == (4.0, "good")
    put(marked.folder, "Ann", nb({"why": "Another answer."}))
    assert marked() == {"Ann": (None, "(an earlier answer had 4 points) good"), "Bob": (4.0, "good")}
    assert any("Ann, why: the answer is another" in line for line in marked.lines)
    assert marked()["Ann"][0] is None


def test_who_is_missing_for_one_run_keeps_her_mark_and_the_table_before_is_kept(marked):
    (marked.folder / "Bob").rename(marked.folder.parent / "Bob")
    before = marked.path.read_bytes()
    assert marked() == {"Ann": (4.0, "good")}
    assert marked.path.with_name("written.csv.bak").read_bytes() == before
    (marked.folder.parent / "Bob").rename(marked.folder / "Bob")
    assert marked()["Bob"] == (4.0, "good")


@pytest.mark.parametrize(
    ("points", "counted"), [("nan", None), ("inf", None), ("4 or 5", None), ("99", 5.0), ("-1", 0.0)]
)
def test_points_that_are_no_points_are_told(marked, points, counted):
    table = marked.path.read_text("utf-8-sig")
    marked.path.write_text(table.replace(",5,4,", f",5,{points},"), "utf-8-sig")
    assert marked()["Ann"][0] == counted
    assert any("Ann, why:" in line for line in marked.lines)


def test_a_table_keeps_one_row_a_student_whatever_a_student_writes(tmp_path):
    write_table(tmp_path / "t.csv", [["x\rEve,,100", " =1+1", "\N{FULLWIDTH EQUALS SIGN}1", "-1", "a\x00"]])
    lines = (tmp_path / "t.csv").read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) == 1 and "' =1+1" in lines[0] and "'\N{FULLWIDTH EQUALS SIGN}1" in lines[0] and "'-1" in lines[0]


def test_two_gradings_do_not_share_a_folder(tmp_path):
    with only_one(tmp_path), pytest.raises(BusyError, match="another grading"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass
    threads = [threading.Thread(target=write_atomic, args=(tmp_path / "x", bytes([n]) * 9999)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "x").read_bytes())) == 1 and not list(tmp_path.glob("*.tmp"))
