"""The table of points that people give: no spreadsheet, no second grading and no new answer loses or moves a mark."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from grading_course import graded_class, judged, nb, put, write_plain_course

from grading import GradingError
from grading.course import Course, Runner
from grading.marks import HEAD, NOT_COUNTED, read_table
from grading.release import write_atomic
from grading.report import Export, only_one, write_reports, write_table
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
        with pytest.raises(GradingError, match="nothing was overwritten"):
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


@pytest.mark.parametrize("points", ["nan", "inf", "4 or 5", "99", "-1"])
def test_points_that_are_no_points_are_told_and_kept(marked, points):
    table = marked.path.read_text("utf-8-sig")
    marked.path.write_text(table.replace(",5,4,", f",5,{points},"), "utf-8-sig")
    for _ in range(2):  # told until it is mended
        assert marked()["Ann"] == (None, "good")
        assert any(line.startswith(f"{NOT_COUNTED}Ann, why: ") for line in marked.lines)
        assert f",{points},good," in marked.path.read_text("utf-8-sig").replace("'-1", "-1")


def test_a_table_keeps_one_row_a_student_whatever_a_student_writes(tmp_path):
    write_table(tmp_path / "t.csv", [["x\rEve,,100", " =1+1", "\N{FULLWIDTH EQUALS SIGN}1", "-1", "a\x00"]])
    lines = (tmp_path / "t.csv").read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) == 1 and "' =1+1" in lines[0] and "'\N{FULLWIDTH EQUALS SIGN}1" in lines[0] and "'-1" in lines[0]


def test_two_gradings_do_not_share_a_folder(tmp_path):
    with only_one(tmp_path), pytest.raises(GradingError, match="another grading"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass
    threads = [threading.Thread(target=write_atomic, args=(tmp_path / "x", bytes([n]) * 9999)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "x").read_bytes())) == 1 and not list(tmp_path.glob("*.tmp"))


# --- marks over the machine's, on a class that needs no grading ---


@pytest.fixture
def course(root) -> Course:
    return Course.load(root)


def reports(course: Course, folder: Path, *rows: tuple, **wrong: dict) -> tuple[dict, list[str], dict]:
    """The results of Ann, whose table has these rows, the summary, and the table as it is written anew."""
    ann, bob = judged(course, "Ann", **wrong), judged(course, "Bob")
    if rows:
        write_table(folder / "written.csv", [HEAD, *rows])
    lines = write_reports(course, [ann, bob], folder, [], Export())
    table = {(row["key"].split("-")[0], row["question"]): row for row in read_table(folder / "written.csv")}
    return ann.results, lines, table


WRONG = {"state": "wrong", "points": 0.0, "message": "a test fails: twice(2) is 4"}


@pytest.mark.parametrize("who", ["Ann", "key", "end"])
def test_a_mark_by_hand_stands_over_the_machines(course, tmp_path, who):
    key = judged(course, "Ann").submission.key
    who = {"key": key, "end": key.rpartition("-")[2]}.get(who, who)
    for rows in ([(who, "test-twice", "", "1,5", "a slip", "")], []):  # the table as it is written has it too
        results, lines, table = reports(course, tmp_path, *rows, test_twice=WRONG)
        assert results["test-twice"]["points"] == 1.5 and results["test-answer"]["points"] == 2
        assert table["Ann", "test-twice"]["points"] == "1.5" and not [line for line in lines if NOT_COUNTED in line]
        page = (tmp_path / "feedback" / f"{key}.html").read_text("utf-8")
        assert "marked by hand</td><td>a slip</td>" in page and "a test fails" not in page
    assert f"{key},test-twice" in (tmp_path / "written.csv").read_text("utf-8-sig")


def test_a_mark_by_hand_is_dropped_with_the_submission_that_it_was_for(course, tmp_path):
    row = ("Ann", "test-twice", "4", "3", "seen", "00000000")
    for _ in range(2):
        results, lines, table = reports(course, tmp_path, row, test_twice=WRONG)
        assert results["test-twice"] == WRONG | {"row": ("4", "3", "seen", "00000000")}
        assert any(line.startswith(f"{NOT_COUNTED}Ann, test-twice: the answer is another") for line in lines)
        assert table["Ann", "test-twice"]["answer"] == "00000000"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("Anne", "why", "", "3", "", ""), "Anne, why: no such student"),
        (("Ann", "ex-9", "", "3", "", ""), "Ann, ex-9: no such question"),
        (("Ann", "test-twice", "", "4.5", "", ""), "Ann, test-twice: 4.5 points are not between 0 and 4"),
        (("Ann", "test-twice", "", "three", "", ""), "Ann, test-twice: 'three' is no number"),
    ],
)
def test_a_row_that_fits_nothing_is_told_by_name_and_kept(course, tmp_path, row, said):
    for rows in ([row], []):  # told again, as it is still in the table
        results, lines, _ = reports(course, tmp_path, *rows)
        assert results["test-twice"]["points"] == 4 and results["why"]["points"] is None
        assert any(line.startswith(NOT_COUNTED + said) for line in lines)
        assert any(found["points"] == row[3] for found in read_table(tmp_path / "written.csv"))


def test_two_rows_for_one_answer_are_not_counted_where_they_differ(course, tmp_path):
    row = ("Ann", "why", "", "3", "", "")
    assert reports(course, tmp_path, row, row)[0]["why"]["points"] == 3
    results, lines, table = reports(course, tmp_path, row, (*row[:3], "4", "better", ""))
    assert results["why"]["points"] is None and table["Ann", "why"]["points"] == "3 or 4"
    assert any(line.startswith(f"{NOT_COUNTED}Ann, why: '3 or 4'") for line in lines)


def test_marks_are_scaled_once_where_a_question_has_other_points_now(course, tmp_path):
    rows = [(name, "why", "10", "6", "", "") for name in ("Ann", "Bob")]
    results, lines, table = reports(course, tmp_path, *rows)
    assert results["why"]["points"] == 3 and [row["of"] for row in table.values()] == ["5", "5"]
    assert [line for line in lines if "scaled" in line] == ["written.csv: why: marks out of 10 were scaled to 5 points"]
    results, lines, _ = reports(course, tmp_path)
    assert results["why"]["points"] == 3 and not [line for line in lines if "scaled" in line]


def test_grading_again_with_a_mark_by_hand_runs_nothing(marked, root, monkeypatch, capsys):
    """The mark is in the totals, nothing is judged a second time, and the end of the run says what was not counted."""
    with marked.path.open("a", encoding="utf-8") as file:
        file.write("Ann,test-twice,,4,said aloud,\nNobody,why,,1,,\n")
    monkeypatch.setattr(Runner, "__enter__", lambda self: pytest.fail("something was graded twice"))
    assert marked() == {"Ann": (4.0, "good"), "Bob": (4.0, "good")}
    monkeypatch.setattr(grade, "grade", lambda options: marked.lines)
    assert grade.main([str(marked.folder), "--output", str(marked.path.parent), "--unsafe"]) == 0
    said = capsys.readouterr().out
    assert f"{NOT_COUNTED}Nobody, why" in said and "NOT COUNTED, named above: 1" in said
    assert "Ann,,8,11,0," in (marked.path.parent / "grades.csv").read_text("utf-8-sig")
