"""The student edition: what is in it, what is not, and the same bytes whenever it is made."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from grading_course import ANSWER, write_course

from grading import cells, release
from grading.cells import FormatError
from grading.release import ReleaseError, find_traces, make_student_edition

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
    book = cells.read_notebook((edition[0] / "01-Plain.ipynb").read_bytes())
    sources = {cells.grade_id(cell): cell["source"] for cell in book["cells"]}
    assert sources["twice"] == "def twice(x):\n    ...  # YOUR CODE HERE"
    assert sources["answer"] == "answer = None\n...  # YOUR CODE HERE"
    assert sources["why"] == "YOUR ANSWER HERE"
    assert sources["test-twice"] == "assert twice(2) == 4, 'twice(2) is 4'"


def test_the_zip_is_the_same_byte_for_byte(root, edition, tmp_path):
    again = make_student_edition(root, tmp_path)
    assert again[1].read_bytes() == edition[1].read_bytes()
    assert make_student_edition(root, tmp_path)[1].read_bytes() == edition[1].read_bytes()  # over the one before


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("assets/data.json", '{"x": "doubled_secretly = x + x"}'),
        ("assets/data.json", json.dumps({"x": "for number in range(-50, 50):\n    assert"})),
        ("assets/data.json", json.dumps([ANSWER])),
    ],
)
def test_a_trace_is_found_and_nothing_is_released(tmp_path, place, line):
    root = write_course(tmp_path / "course")
    (root / place).write_text(line, encoding="utf-8")
    with pytest.raises(ReleaseError, match="would show .*data.json"):
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
    with pytest.raises(FormatError, match=said):
        cells.check_format(book, "01-A.ipynb")


def test_names_of_a_cell():
    source = (
        "import os\nfrom a import b\nx, (y, *z) = 1, (2, 3)\ndef f(q):\n    r = 1\nclass C: s = 1\nfor i in x: pass"
    )
    assert cells.bound_names(source) == {"x", "y", "z", "f", "C", "i"}
    assert cells.bound_names("def broken(:\nvalue = 3") == {"broken", "value"}
    assert cells.used_names("g(h.i, [k for k in m])") == {"g", "h", "k", "m"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_notebook_in_another_encoding_is_read(encoding):
    book = {"nbformat": 4, "cells": [{"cell_type": "markdown", "source": ["é ", "ü"], "metadata": {}}]}
    found = cells.read_notebook(json.dumps(book, ensure_ascii=False).encode(encoding))
    assert found["cells"][0]["source"] == "é ü"


FILES = ("adapter_config.json", "adapter_model.safetensors", "probe.json")


def submit(edition: Path, folder: Path, *places: str) -> tuple[list[str], str]:
    """What `submit.py` packs and prints in a folder with empty files at `places`."""
    folder.mkdir()
    (folder / "submit.py").write_bytes((edition / "submit.py").read_bytes())
    for place in places:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("{}")
    done = subprocess.run([sys.executable, "submit.py"], cwd=folder, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / "submission.zip") as archive:
        return archive.namelist(), done.stdout


def test_the_student_packs_notebooks_and_adapters_only(edition, tmp_path):
    wanted = ["01-Plain.ipynb", *(f"artifacts/mini/adapters/positive/{name}" for name in FILES)]
    wanted.append("artifacts/mini/train/positive/run.json")
    others = ("Untitled.ipynb", "artifacts/mini/adapters/positive/notes.txt", "1-mine.ipynb")
    others += ("artifacts/mini/train/positive/checkpoints/run.json", "artifacts/gpt2/adapters/x.txt")
    packed, printed = submit(edition[0], tmp_path / "mine", *wanted, *others)
    assert packed == wanted and "MISSING" not in printed
    assert printed.endswith("Saved all of them? Only what is on disk was packed.\n")


def test_the_student_is_told_what_is_missing(edition, tmp_path):
    negative = [f"artifacts/mini/adapters/negative/{name}" for name in FILES]
    _, printed = submit(edition[0], tmp_path / "mine", "01-Plain.ipynb", "04-Last.ipynb", *negative)
    lost = [line.split(": ")[1] for line in printed.splitlines() if line.startswith("MISSING")]
    adapter = [f"artifacts/mini/adapters/positive/{name}" for name in FILES]
    assert lost == ["notebook 02", "notebook 03", *adapter, "artifacts/mini/train/positive/run.json"]
    packed, printed = submit(edition[0], tmp_path / "empty")
    assert packed == [] and printed.count("MISSING") == 4


def test_the_course_itself_has_a_student_edition(tmp_path):
    """The real notebooks: staged without the assets, which are large and hold no cell."""
    root = Path(__file__).resolve().parent.parent
    files = release.stage(root, tmp_path / "student", ("utils", "requirements.txt"))
    assert {"01-Setup.ipynb", "02-Train.ipynb", "03-Inference.ipynb", "04-Compare.ipynb"} <= {f.name for f in files}
    assert find_traces(root, tmp_path / "student") == []
