"""The course's own notebooks, graded: our solutions get every point a machine can give, an empty copy gets none.

Runs all four notebooks as the grader does, which takes many minutes: set LAB_SLOW_TESTS=1 to run it.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exercises import EXERCISES
from grading import cells
from grading.course import Course
from grading.release import student_notebook

ROOT = Path(__file__).resolve().parents[1]
ADAPTER, RUN = ROOT / "assets/adapters/mini/positive-seed0", ROOT / "assets/runs/mini/positive-ia3-seed0.json"


def hand_in(folder: Path, solved: bool) -> None:
    """The student edition as it is, or with our solutions, a word for each written answer, and an adapter of seed 0."""
    folder.mkdir(parents=True)
    for plan in Course.load(ROOT).plans:
        notebook, answers = student_notebook(plan.notebook), plan.solved() if solved else {}
        for cell in notebook["cells"]:
            if cells.is_solution(cell) and cells.grade_id(cell) in answers:
                cell["source"] = "Words." if cells.is_manual(cell) else answers[cells.grade_id(cell)]
        (folder / plan.name).write_bytes(cells.write_notebook(notebook))
    if solved:
        shutil.copytree(ADAPTER, folder / "artifacts" / "mini" / "adapters" / "positive")
        (folder / "artifacts" / "mini" / "train" / "positive").mkdir(parents=True)
        shutil.copy(RUN, folder / "artifacts" / "mini" / "train" / "positive" / "run.json")


@pytest.mark.skipif(not os.environ.get("LAB_SLOW_TESTS"), reason="many minutes: set LAB_SLOW_TESTS=1")
@pytest.mark.skipif(sys.platform == "win32", reason="grading forks")
@pytest.mark.timeout(3600)
def test_a_solved_copy_gets_every_point_and_an_empty_one_none(tmp_path):
    hand_in(tmp_path / "in" / "Solved", solved=True)
    hand_in(tmp_path / "in" / "Empty", solved=False)
    environment = os.environ | {"LAB_PROFILE": "mini"}
    command = [sys.executable, str(ROOT / "scripts" / "grade.py"), str(tmp_path / "in"), "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "questions.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    lost = {
        (row["question"], row["message"]) for row in rows if row["student"] == "Solved" and row["points"] != row["of"]
    }
    written = [exercise for exercise in EXERCISES.values() if exercise.written]
    assert {name for name, _ in lost} == {f"ex-{one.number.replace('.', '-')}" for one in written}, lost  # still open
    assert {row["state"] for row in rows if row["student"] == "Empty"} == {"empty", "missing"}
    with (tmp_path / "grades.csv").open(encoding="utf-8-sig", newline="") as file:
        grades = {row["student"]: (row["points"], row["of"], row["open"]) for row in csv.DictReader(file)}
    most, still = (sum(exercise.points for exercise in some) for some in (EXERCISES.values(), written))
    assert grades == {"Solved": (f"{most - still}", f"{most}", f"{still}"), "Empty": ("0", f"{most}", "0")}
