"""The course's own notebooks, graded: our solutions get every point a machine can give, an empty copy gets none.

The grader runs nothing of a lesson but imports, functions and classes: a test holds that no exercise needs more.
"""

from __future__ import annotations

import builtins
import csv
import os
import re
import shutil
import subprocess
import symtable
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exercises import EXERCISES
from grading import cells
from grading.course import Course
from grading.release import student_notebook
from utils.adapters import attach, load_base, scaling_vectors, set_scaling_vectors
from utils.config import PROFILES
from utils.saving import save_adapter

ROOT = Path(__file__).resolve().parents[1]
NEEDS_FILES = {"ex-2-9-test", "ex-3-6-test"}  # their points come from adapters that were handed in: not run here
TRAINS = "ex-3-6"  # an answer that nobody runs, either
ADAPTER, RUN = ROOT / "assets/adapters/mini/positive-seed0", ROOT / "assets/runs/mini/positive-ia3-seed0.json"


def names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell reads from other cells, at any depth, and those that it binds for them."""
    reads, binds, pending = set(), set(), [symtable.symtable(re.sub(r"(?m)^[%!].*", "", source), "cell", "exec")]
    while pending:
        table = pending.pop()
        top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (top or symbol.is_global()):
                reads.add(symbol.get_name())
            if symbol.is_assigned() or symbol.is_imported():
                binds |= {symbol.get_name()} if top or symbol.is_declared_global() else set()
        pending += table.get_children()
    return reads - vars(builtins).keys(), binds


def test_no_exercise_reads_what_only_the_run_of_a_lesson_makes():
    read = {}
    for plan in Course.load(ROOT).plans:
        known, made = set(), set()  # names of exercises, tests, imports, functions; names of what a lesson computes
        for cell in (c for c in plan.notebook["cells"] if c["cell_type"] == "code" and not cells.is_manual(c)):
            wanted, bound = names(cell["source"])
            if cells.is_solution(cell) or cells.is_test(cell):
                read[cells.grade_id(cell)] = (wanted - bound - known) & made
                known |= bound
            else:
                defined = names("\n".join(cells.definitions(cell["source"])))[1]
                known, made = known | defined, (made | bound) - defined
    assert {name: found for name, found in read.items() if found} == {
        **dict.fromkeys(NEEDS_FILES, {"profile"}), TRAINS: {"profile", "reviews", "tokenizer"},
    }  # fmt: skip
    assert len(read) > 35


def hand_in(folder: Path, chosen: Callable[[int], bool]) -> None:
    """The student edition with our solutions in the chosen of its answers, and with an adapter of seed 0.

    A written answer is a word.
    """
    folder.mkdir(parents=True)
    count = 0
    for plan in Course.load(ROOT).plans:
        notebook, answers = student_notebook(plan.notebook), plan.solved()
        for cell in (cell for cell in notebook["cells"] if cells.grade_id(cell) in answers):
            count += 1
            if chosen(count):
                cell["source"] = "Words." if cells.is_manual(cell) else answers[cells.grade_id(cell)]
        (folder / plan.name).write_bytes(cells.write_notebook(notebook))
    if chosen(1):
        shutil.copytree(ADAPTER, folder / "artifacts" / "mini" / "adapters" / "positive")
        (folder / "artifacts" / "mini" / "train" / "positive").mkdir(parents=True)
        shutil.copy(RUN, folder / "artifacts" / "mini" / "train" / "positive" / "run.json")
        save_style(folder / "artifacts" / "mini" / "adapters" / "style")


def save_style(folder: Path) -> None:
    """An adapter like no other: its factors are random."""
    base, tokenizer = load_base(PROFILES["mini"], "cpu")
    model, random = attach(base, "ia3"), torch.Generator().manual_seed(0)
    moved = {place: l + 0.1 * torch.randn(l.shape, generator=random) for place, l in scaling_vectors(model).items()}
    set_scaling_vectors(model, moved)
    save_adapter(model, tokenizer, folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="grading forks")
@pytest.mark.timeout(1200)
def test_a_solved_copy_gets_every_point_an_empty_one_none_and_half_of_one_its_half(tmp_path):
    hand_in(tmp_path / "in" / "Solved", lambda number: True)
    hand_in(tmp_path / "in" / "Empty", lambda number: False)
    hand_in(tmp_path / "in" / "Half", lambda number: number % 2 == 0)
    environment = os.environ | {"LAB_PROFILE": "mini"}
    command = [sys.executable, str(ROOT / "scripts" / "grade.py"), str(tmp_path / "in"), "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "questions.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    of = {name: [row for row in rows if row["student"] == name] for name in ("Solved", "Empty", "Half")}
    lost = {(row["question"], row["message"]) for row in of["Solved"] if row["points"] != row["of"]}
    written = [exercise for exercise in EXERCISES.values() if exercise.written]
    assert {name for name, _ in lost} == {f"ex-{one.number.replace('.', '-')}" for one in written}, lost  # still open
    assert {row["state"] for row in of["Empty"]} == {"empty", "missing"}
    answers = [name for plan in Course.load(ROOT).plans for name in plan.solution_cells()]
    attempted = {name for number, name in enumerate(answers, 1) if number % 2 == 0}
    for row in of["Half"]:
        name = row["question"].removesuffix("-test")
        if name in answers and row["question"] not in NEEDS_FILES:
            right = "right" if name != row["question"] else "open"  # a written answer has no test
            assert row["state"] == (right if name in attempted else "empty"), row
    with (tmp_path / "grades.csv").open(encoding="utf-8-sig", newline="") as file:
        grades = {row["student"]: (row["points"], row["of"], row["open"]) for row in csv.DictReader(file)}
    most, still = (sum(exercise.points for exercise in some) for some in (EXERCISES.values(), written))
    assert grades["Solved"] == (f"{most - still}", f"{most}", f"{still}") and grades["Empty"] == ("0", f"{most}", "0")
