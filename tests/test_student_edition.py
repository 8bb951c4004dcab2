"""The student edition: what is in it, what is not, and the same bytes whenever it is made."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from grading_course import ANSWER, write_course
from replay import NOTEBOOKS, ROOT
from safetensors.numpy import save

from grading import GradingError, cells, release
from grading import submit as submit_script
from grading.release import find_traces, make_student_edition

SECRETS = (b"doubled_secretly", b"range(-50, 50)", b"np.mean(values)", ANSWER.encode(), b"BEGIN", b"stored output",
           b"widget state", b"compiled")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_course(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def edition(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_student_edition(root, tmp_path_factory.mktemp("build"))


def test_only_what_is_whitelisted_is_in_it(edition):
    found = {path.relative_to(edition[0]).as_posix() for path in edition[0].rglob("*") if path.is_file()}
    assert found == {
        "01-Plain.ipynb", "02-Numbers.ipynb", "03-Tensors.ipynb", "README.md", "submit.py", "LICENSE",
        "requirements.txt", "constraints.txt", "utils/__init__.py", "utils/small.py", "assets/data.json",
    }  # fmt: skip
    with zipfile.ZipFile(edition[1]) as archive:
        assert {name.removeprefix("course/") for name in archive.namelist()} == found


def test_no_byte_of_it_shows_a_solution_a_hidden_test_or_an_output(root, edition):
    for path in edition[0].rglob("*.*"):
        assert not [secret for secret in SECRETS if secret in path.read_bytes()], path.name
    assert find_traces(root, *edition) == []


def test_solutions_are_stubs_in_their_place_and_cells_keep_their_ids(root, edition):
    for path in sorted(edition[0].glob("*.ipynb")):
        ours, theirs = (json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (root / path.name, path))
        assert [cell["id"] for cell in ours] == [cell["id"] for cell in theirs]
        assert [c["metadata"].get("nbgrader") for c in ours] == [c["metadata"].get("nbgrader") for c in theirs]
        assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in theirs)
        assert not any("slideshow" in cell["metadata"] for cell in theirs)
    tests = [cell for cell in theirs if cells.is_test(cell)]
    assert tests and all("raises-exception" in cell["metadata"]["tags"] for cell in tests)  # "Run all" goes on
    assert [cell["metadata"].get("jupyter") for cell in tests] == [{"source_hidden": True}] * len(tests)
    assert not any("jupyter" in cell["metadata"] for cell in theirs if not cells.is_test(cell))  # an answer is open
    book = cells.read_notebook((edition[0] / "01-Plain.ipynb").read_bytes())
    sources = {cells.grade_id(cell): cell["source"] for cell in book["cells"]}
    assert sources["twice"] == "def twice(x):\n    ...  # YOUR CODE HERE"
    assert sources["answer"] == "answer = None\n...  # YOUR CODE HERE"
    assert sources["why"] == "YOUR ANSWER HERE"
    assert sources["test-twice"] == "assert twice(2) == 4, 'twice(2) is 4'"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_line_names_the_edition_and_the_lesson_is_the_same(name):
    solved = release.read_solved(ROOT / name)
    title, students = solved["cells"][0]["source"], release.student_notebook(solved)["cells"][0]["source"]
    assert title.startswith(release.SOLVED) and students == title.replace(release.SOLVED, release.STUDENTS)
    assert len(students.splitlines()) == len(title.splitlines()) and students.startswith(release.STUDENTS)


def test_the_zip_is_the_same_byte_for_byte(root, edition, tmp_path):
    again = make_student_edition(root, tmp_path)
    assert again[1].read_bytes() == edition[1].read_bytes()
    assert make_student_edition(root, tmp_path)[1].read_bytes() == edition[1].read_bytes()  # over the one before


@pytest.mark.parametrize(
    "line",
    [
        '{"x": "doubled_secretly = x + x"}',
        json.dumps({"x": "for number in range(-50, 50):\n    assert"}),
        json.dumps([ANSWER]),
    ],
)
def test_a_trace_is_found_and_nothing_is_released(tmp_path, line):
    root = write_course(tmp_path / "course")
    (root / "assets" / "data.json").write_text(line, encoding="utf-8")
    with pytest.raises(GradingError, match="would show .*data.json"):
        make_student_edition(root, tmp_path / "build")
    assert not (tmp_path / "build" / "student").exists()
    assert not (tmp_path / "build" / "student.zip").exists()


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("### BEGIN SOLUTION\n1", {"solution": True}, "without its partner"),
        ("### END SOLUTION\n1", {"solution": True}, "without its partner"),
        ("### BEGIN SOLUTION\n1\n### END SOLUTION", {"grade": True, "points": 1}, "another kind of cell"),
        ("### BEGIN HIDDEN TESTS\n1\n### END HIDDEN TESTS", {"solution": True}, "another kind of cell"),
        ("### BEGIN SOLUTION\n1\n### END SOLUTION", None, "does not know"),
    ],
)
def test_a_cell_out_of_format_is_named(source, kind, said):
    metadata = {"nbgrader": {"grade_id": "x", "grade": False, "solution": False, **kind}} if kind else {}
    book = {"cells": [{"cell_type": "code", "source": source, "metadata": metadata}]}
    with pytest.raises(GradingError, match=said):
        cells.check_format(book, "01-A.ipynb")


def test_names_of_a_cell():
    source = (
        "import os\nfrom a import b\nx, (y, *z) = 1, (2, 3)\ndef f(q):\n    r = 1\nclass C: s = 1\nfor i in x: pass"
    )
    assert cells.bound_names(source) == {"x", "y", "z", "f", "C", "i"}
    assert cells.bound_names("def broken(:\nvalue = 3") == {"broken", "value"}
    assert cells.used_names("g(h.i, [k for k in m])") == {"g", "h", "k", "m"}


FILES = ("adapter_config.json", "adapter_model.safetensors", "probe.json")
CONTENT = {".ipynb": b'{"cells": []}', ".safetensors": save({"x": np.ones(3)})}  # of other endings: {}
ADAPTER = [f"{place}/{task}/{name}" for place, names in (("adapters", FILES), ("train", ["run.json"]))
           for task in ("positive", "style") for name in names]  # fmt: skip
WHOLE = (*NOTEBOOKS, *(f"artifacts/mini/{name}" for name in ADAPTER))


def submit(edition: Path, folder: Path, *places: str, **contents: bytes) -> tuple[list[str], list[str]]:
    """What `submit.py` packs, and the lines it prints after their names, in a folder with files at `places`."""
    folder.mkdir()
    (folder / "submit.py").write_bytes((edition / "submit.py").read_bytes())
    for place in places:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.get(path.name, CONTENT.get(path.suffix, b"{}")))
    done = subprocess.run([sys.executable, "submit.py"], cwd=folder, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / "submission.zip") as archive:
        packed = archive.namelist()
        assert all(archive.read(name) == (folder / name).read_bytes() for name in packed)
    return packed, [line for line in done.stdout.splitlines()[1:] if not line.startswith("  ")]


def test_submit_knows_the_notebooks_of_the_course():
    assert submit_script.NOTEBOOKS == NOTEBOOKS


def test_the_student_packs_notebooks_and_adapters_only(edition, tmp_path):
    others = ("Untitled.ipynb", "artifacts/mini/adapters/positive/notes.txt", "1-mine.ipynb")
    others += ("artifacts/mini/train/positive/checkpoints/run.json", "artifacts/gpt2/adapters/x.txt")
    packed, said = submit(edition[0], tmp_path / "mine", *WHOLE, *others)
    assert packed == list(WHOLE)
    assert said == ["4 notebooks. Saved all of them? Only what is on disk was packed."]


@pytest.mark.parametrize("lost", WHOLE)
def test_the_student_is_told_what_is_missing(edition, tmp_path, lost):
    packed, said = submit(edition[0], tmp_path / "mine", *(place for place in WHOLE if place != lost))
    assert packed == [place for place in WHOLE if place != lost]
    assert len(said) == 3 and said[0].startswith(f"MISSING: {lost}: ") and "written all the same" in said[1]


def test_another_task_is_no_stand_in_and_an_empty_folder_is_packed_too(edition, tmp_path):
    negative = [name.replace("positive", "negative") for name in WHOLE]
    _, said = submit(edition[0], tmp_path / "mine", *negative)
    assert [line.split(": ")[1] for line in said[:-2]] == [
        f"artifacts/mini/{name}" for name in ADAPTER if "positive" in name
    ]
    packed, said = submit(edition[0], tmp_path / "empty")
    assert packed == [] and sum(line.startswith("MISSING") for line in said) == 12


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("02-Train.ipynb", CONTENT[".ipynb"][:-3]),
        ("02-Train.ipynb", b""),
        ("04-Compare.ipynb", b"[1, 2]"),
        ("04-Compare.ipynb", b'{"worksheets": []}'),
        ("run.json", b'{"status": "fini'),
        ("adapter_model.safetensors", CONTENT[".safetensors"][:-1]),
        ("adapter_model.safetensors", CONTENT[".safetensors"][:20]),
        ("adapter_model.safetensors", b"version https://example.org/pointer"),
    ],
)
def test_the_student_is_told_what_is_broken_and_may_hand_it_in(edition, tmp_path, name, content):
    packed, said = submit(edition[0], tmp_path / "mine", *WHOLE, **{name: content})
    broken = [f"BROKEN: {place}" for place in WHOLE if place.endswith(name)]
    assert packed == list(WHOLE)
    assert [line.rpartition(": ")[0] for line in said[:-2]] == broken and "written all the same" in said[-2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_notebook_in_another_encoding_is_read_and_not_called_broken(edition, tmp_path, encoding):
    book = {"nbformat": 4, "cells": [{"cell_type": "markdown", "source": ["é ", "ü"], "metadata": {}}]}
    written = json.dumps(book, ensure_ascii=False).encode(encoding)
    assert cells.read_notebook(written)["cells"][0]["source"] == "é ü"
    assert len(submit(edition[0], tmp_path / "mine", *WHOLE, **{"02-Train.ipynb": written})[1]) == 1


def test_the_course_itself_has_a_student_edition(tmp_path):
    """The real notebooks: staged without the assets, which are large and hold no cell."""
    root = Path(__file__).resolve().parent.parent
    files = release.stage(root, tmp_path / "student", ("utils", "requirements.txt"))
    assert {"01-Setup.ipynb", "02-Train.ipynb", "03-Inference.ipynb", "04-Compare.ipynb"} <= {f.name for f in files}
    assert find_traces(root, tmp_path / "student") == []
