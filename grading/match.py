"""Which of a student's files is which notebook, and which of their cells answers which exercise.

For: `match`, which survives renamed notebooks, lost metadata, lost cell ids, copies. What it could not find or had to
choose it says in words. Only the sources of solution cells are taken; tests, points and other cells are always ours.
Not for: reading files (`intake.py`), judging (`course.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from grading import GradingError, cells
from grading.course import Course, Plan

MOST_BYTES = 24 << 20  # of a notebook's file
MOST_CELLS = 1000  # of a notebook
MOST_TOGETHER = 4_000_000  # characters of all cells of a submission
MOST_ANSWERS = 500_000  # characters of all answers of a notebook: what crosses to the worker at once
COPY_MARK = re.compile(r"(\s*\(\d{1,4}\)|[-_ ]?copy\s{0,3}\d{0,4})$")


def match(course: Course, files: Mapping[str, bytes]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The answers of a submission by notebook and grade id, and remarks for the student.

    A notebook that was not found is missing from the first; an answer that was not found from its dict.
    """
    found, broken = _notebooks(files)
    again = "ask whether you may hand it in again"
    remarks = [f"{n}: {why}. It could not be graded: open it in Jupyter, save it, {again}" for n, why in broken.items()]
    answers, taken, named = {}, set(), {_stem(PurePosixPath(name).name) for name in broken}
    for plan in course.plans:
        ranked = sorted(((_rank(plan, n, nb), n) for n, nb in found.items() if n not in taken), key=_best_first)
        ranked = [(rank, name) for rank, name in ranked if rank[0] > 0]
        if not ranked:
            if _stem(plan.name) not in named:
                remarks.append(f"{plan.name} was not found in what you handed in: {again}")
            continue
        name = ranked[0][1]
        taken.add(name)
        if PurePosixPath(name).name != plan.name:
            remarks.append(f"{name} was graded as {plan.name}")
        rivals = [n for rank, n in ranked[1:] if rank[0] == ranked[0][0][0] and _claims(course, plan, found[n])]
        remarks += [f"{n} is a second copy of {plan.name} and was not graded" for n in rivals]
        taken.update(rivals)
        answers[plan.name], notes = answers_of(plan, found[name])
        remarks += [f"{plan.name}: {note}" for note in notes]
    return answers, remarks


def _notebooks(files: Mapping[str, bytes]) -> tuple[dict[str, dict], dict[str, str]]:
    """The notebooks among the files by name, those in fewer folders first; by name, why others cannot be read."""
    found, broken, left = {}, {}, MOST_TOGETHER
    for name in sorted(files, key=lambda name: (name.count("/"), name)):
        if PurePosixPath(name).suffix.lower() != ".ipynb":
            continue
        try:
            found[name] = _slim(files[name], left)
            left -= sum(len(cell["source"]) for cell in found[name]["cells"])
        except GradingError as error:
            broken[name] = str(error)
    return found, broken


def _slim(data: bytes, most: int) -> dict:
    """What grading needs of a notebook. Raises GradingError for one that is larger than any of this course."""
    if len(data) > MOST_BYTES:
        raise GradingError(f"more than {MOST_BYTES >> 20} MB (clear its outputs)")
    notebook = cells.read_notebook(data)
    if len(notebook["cells"]) > MOST_CELLS or sum(len(cell["source"]) for cell in notebook["cells"]) > most:
        raise GradingError("more cells, or more text in cells, than can be looked at")
    kept = ("cell_type", "id", "metadata")
    slim = [{key: cell[key] for key in kept if key in cell} for cell in notebook["cells"]]
    for cell, full in zip(slim, notebook["cells"], strict=True):
        cell["source"] = full["source"][: cells.LONGEST + 1]  # enough to see that it is too long
    return {"cells": slim}


def _best_first(item: tuple) -> tuple:
    (known, same_name, written), name = item
    return -known, -written, -same_name, name


def _rank(plan: Plan, name: str, notebook: dict) -> tuple[int, int, int]:
    """How sure it is that this is the plan's notebook: by its cells (0 to 3), by name, answers in it."""
    wanted, ours = set(plan.solution_cells()), {cell.get("id") for cell in plan.notebook["cells"]} - {None}
    ids = {cells.grade_id(cell) for cell in notebook["cells"]}
    same = _stem(PurePosixPath(name).name) == _stem(plan.name)
    known = 0
    if wanted & ids:
        known = 3
    elif len(ours & {cell.get("id") for cell in notebook["cells"]}) > len(ours) / 2:
        known = 2
    elif same or _defines(plan, notebook):
        known = 1
    answers = answers_of(plan, notebook)[0] if known else {}
    unsolved = plan.unsolved()
    written = sum(not cells.same_source(source, unsolved[key]) for key, source in answers.items())
    return known, int(same), written


def _stem(name: str) -> str:
    """A notebook's name without ending, copy marks, case: `01-Setup-Copy1 (2).ipynb` is `01setup`."""
    plain = name[-200:].rsplit(".", 1)[0].lower()
    while (shorter := COPY_MARK.sub("", plain)) != plain:
        plain = shorter
    return re.sub(r"[\W_]+", "", plain)


def _defines(plan: Plan, notebook: dict) -> bool:
    """Whether the notebook defines at least half of the names that our solutions define."""
    wanted = set().union(*(cells.bound_names(source) for source in plan.solved().values()), set())
    has = set().union(*(cells.bound_names(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"), set())
    return bool(wanted) and len(wanted & has) >= len(wanted) / 2


def _claims(course: Course, plan: Plan, notebook: dict) -> bool:
    """Whether no other plan knows this notebook better, so that it is a copy of this plan's."""
    return all(_rank(p, "", notebook)[0] <= _rank(plan, "", notebook)[0] for p in course.plans if p is not plan)


def answers_of(plan: Plan, notebook: dict) -> tuple[dict[str, str], list[str]]:
    """Each answer by grade id, and remarks. Found by grade id, else by cell id, else by the name that it defines."""
    answers, remarks, lost, left = {}, [], [], MOST_ANSWERS
    for name, ours in plan.solution_cells().items():
        found = _candidates(plan, notebook, name, ours)
        if not found:
            lost.append(name)
            continue
        if len(found) > 1:
            remarks.append(f"the cell {name} is there {len(found)} times; the last that is filled in was graded")
        source = _last_written(plan, notebook, found, ours)
        if len(source) > min(cells.LONGEST, left):
            remarks.append(f"the answer in {name} is too long and was not graded")
            continue
        answers[name] = source
        left -= len(source)
    if lost:
        remarks.append(f"no cell for {', '.join(lost)}: was it deleted?")
    return answers, remarks


def _candidates(plan: Plan, notebook: dict, name: str, ours: dict) -> list[dict]:
    """The cells of a student's that may be the answer `name`."""
    found = [c for c in notebook["cells"] if cells.grade_id(c) == name and c["cell_type"] == ours["cell_type"]]
    found = found or [c for c in notebook["cells"] if c.get("id") == ours.get("id") is not None]
    if not found and ours["cell_type"] == "code":
        names = cells.bound_names(ours["source"])
        others = [c for c in notebook["cells"] if c["cell_type"] == "code" and not _is_ours(plan, c, name)]
        found = [c for c in others if names & cells.bound_names(c["source"])][-1:]
    return found


def _last_written(plan: Plan, notebook: dict, found: list[dict], ours: dict) -> str:
    """Of several cells the one that counts in Jupyter too: the last before the test that is not the stub any more.

    Where there is none before the test, the last one anywhere.
    """
    place = plan.notebook["cells"].index(ours)
    tests = [cells.grade_id(cell) for cell in plan.notebook["cells"][place:] if cells.is_test(cell)][:1]
    ends = [n for n, cell in enumerate(notebook["cells"]) if cells.grade_id(cell) in tests]
    early = [c for c in notebook["cells"][: ends[0] if ends else None] if any(c is one for one in found)]
    written = [[c for c in some if not cells.same_source(c["source"], cells.stubbed(ours))] for some in (early, found)]
    return (written[0] or written[1] or found)[-1]["source"]


def _is_ours(plan: Plan, cell: dict, name: str) -> bool:
    """Whether the cell is one that the course gives: then it is no answer to `name`."""
    return any(
        cells.same_source(cell["source"], ours["source"])
        for ours in plan.notebook["cells"]
        if cells.grade_id(ours) != name
    )
