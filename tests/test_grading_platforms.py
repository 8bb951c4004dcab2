"""What goes back to Canvas and Moodle: the form that each imports, and no total that is not final without a word."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import pytest
from grading_course import judged, write_plain_course

from grading import GradingError
from grading.course import Course
from grading.intake import collect
from grading.report import Export, export, read_worksheet, write_reports
from grading.run import Graded
from scripts import grade

# As Moodle 4 writes it: the importer finds the columns by these names, the participant by the end of the first cell.
WORKSHEET = """Identifier,"Full name",Status,Grade,"Maximum grade","Last modified (grade)","Feedback comments"
"Participant 4711","Ann Lee","Submitted for grading - ",,100.00,-,
"Participant 4712","Bob","Submitted for grading - ",,100.00,-,"=1+1, said"
"Participant 4799","Zed","No submission - ",5.00,100.00,"Sunday, 1 March 2026, 9:00 AM",
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course.load(write_plain_course(tmp_path_factory.mktemp("course")))


@pytest.fixture
def worksheet(tmp_path) -> Path:
    (tmp_path / "worksheet.csv").write_text(WORKSHEET, encoding="utf-8-sig")
    return tmp_path / "worksheet.csv"


def read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def class_of(course: Course) -> list[Graded]:
    """Ann has all her points, Bob's answer is still to be read, Cid has no number of the platform's."""
    class_ = [judged(course, "Ann Lee", "4711"), judged(course, "Bob", "4712"), judged(course, "Cid")]
    for graded in (class_[0], class_[2]):
        graded.results["why"]["points"] = 3.5
    return class_


def test_the_worksheet_comes_back_as_it_was_with_the_grades_in_it(course, worksheet, tmp_path):
    how = Export(worksheet=read_worksheet(worksheet))
    lines = write_reports(course, class_of(course), tmp_path, [], how)
    before, after = list(csv.reader(WORKSHEET.splitlines())), read(tmp_path / "moodle.csv")
    assert [row[3] for row in after] == ["Grade", "9.5", "", "5.00"]  # Bob's is not final; Moodle skips empty ones
    assert [row[:3] + row[4:6] for row in after] == [row[:3] + row[4:6] for row in before]
    assert [row[6] for row in after[2:]] == ["=1+1, said", ""]  # a person's comment, and nobody's
    assert after[1][6].startswith("Lab: 9.5 of ") and "3.5 of 5" in after[1][6]
    again = read_worksheet(tmp_path / "moodle.csv")  # our own comment is written anew
    again.rows[1][6] = "Lab: 0 of 10 points. "
    assert export(course, class_of(course), Export(worksheet=again))[1][1][6] == after[1][6]
    assert any(
        "moodle.csv" in line and line.endswith("the number of Cid: enter these grades by hand") for line in lines
    )


def test_a_total_with_open_points_is_exported_only_where_that_is_said(course, worksheet, tmp_path):
    canvas, moodle, notes = export(course, class_of(course), Export("Lab"))
    assert canvas == [
        ("Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Lab"),
        ("Ann Lee", "4711", "", "", "", "9.5"),
        ("Cid", "", "", "", "", "9.5"),
    ]
    assert moodle == [] and len(notes) == 1 and "left out" in notes[0] and notes[0].endswith(": Bob")
    how = Export("Lab", read_worksheet(worksheet), open_as_zero=True)
    canvas, moodle, notes = export(course, class_of(course), how)
    assert ("Bob", "4712", "", "", "", "6") in canvas and moodle[2][3] == "6"
    assert "open points count as 0" in notes[0] and notes[0].endswith(": Bob")


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("Ann Lee_4711_assignsubmission_file_", "Ann Lee_4711_assignsubmission_file_/feedback.html"),
        ("Ann Lee_4711_assignsubmission_file_01-A.ipynb", "Ann Lee_4711_assignsubmission_file_/feedback.html"),
        ("leeann_LATE_4711_99_lab.zip", "leeann_LATE_4711_99_feedback.html"),
        ("Ann", ""),
    ],
)
def test_a_page_goes_back_under_the_name_that_the_platform_gave(name, inside, course, tmp_path):
    (tmp_path / "in" / name).mkdir(parents=True)
    (submission,), _ = collect(tmp_path / "in")
    assert submission.return_name == inside
    graded = judged(course, "Ann Lee", "4711")
    graded.submission.return_name = inside
    write_reports(course, [graded], tmp_path, [], Export())
    assert (tmp_path / "feedback.zip").exists() == bool(inside)
    if inside:
        with zipfile.ZipFile(tmp_path / "feedback.zip") as zipped:
            page = next((tmp_path / "feedback").iterdir()).read_bytes()
            assert {name: zipped.read(name) for name in zipped.namelist()} == {inside: page}


def test_the_table_for_marks_has_the_order_of_the_page(course, tmp_path):
    class_ = class_of(course)
    write_reports(course, class_, tmp_path, [], Export())
    keys = [row[0].rpartition("-")[2] for row in read(tmp_path / "written.csv")[1:]]
    page = (tmp_path / "written.html").read_text("utf-8")
    assert keys == sorted(keys, key=page.index)


def test_without_a_worksheet_none_of_an_earlier_run_is_left(course, worksheet, tmp_path):
    write_reports(course, class_of(course), tmp_path, [], Export(worksheet=read_worksheet(worksheet)))
    write_reports(course, class_of(course), tmp_path, [], Export())
    assert not (tmp_path / "moodle.csv").exists() and (tmp_path / "canvas.csv").exists()


def test_a_worksheet_in_another_language_needs_the_name_of_its_column(worksheet):
    text = WORKSHEET.replace(",Grade,", ",Bewertung,").replace("Participant", "Teilnehmer/in").replace(",", ";")
    worksheet.write_text(text, encoding="cp1252")
    with pytest.raises(GradingError, match="Bewertung.*--moodle-grade"):
        read_worksheet(worksheet)
    assert read_worksheet(worksheet, "Bewertung").grade == 3


@pytest.mark.parametrize("text", [None, "", "Name,Grade\nAnn,\n", "\x00"])
def test_what_is_no_worksheet_is_said_before_anything_is_graded(worksheet, course, text, capsys):
    if text is None:
        worksheet.unlink()
    else:
        worksheet.write_text(text)
    with pytest.raises(GradingError, match="worksheet"):
        read_worksheet(worksheet)
    options = [str(worksheet.parent), "--root", str(course.root), "--output", str(worksheet.parent / "out")]
    assert grade.main([*options, "--unsafe", "--moodle", str(worksheet)]) == 1
    assert "FAILED" in capsys.readouterr().err
