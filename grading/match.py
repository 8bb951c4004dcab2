"""Which of a student's files is which notebook, and which of their cells answers which exercise.

It survives renamed notebooks, lost metadata, lost cell ids, copies; what could not be found or had to be chosen it says
in words. Only the sources of solution cells are taken; tests, points and other cells are always ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from grading import GradingError, cells
from grading.course import Course, Plan, key_of

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
        ranked = [(_rank(plan, n, nb), n) for n, nb in found.items() if n not in taken]
        ranked = sorted((one for one in ranked if one[0][0] > 0), key=lambda one: ([-n for n in one[0]], one[1]))
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
        if not name.lower().endswith((".ipynb", ".ipynb.json")):  # the second as browsers save it
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


def _rank(plan: Plan, name: str, notebook: dict) -> tuple[int, int, int]:
    """How sure it is that this is the plan's notebook: by its cells (0 to 3), answers in it, by name."""
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
    written = sum(not cells.same_source(answers.get(key, stub), stub) for key, stub in unsolved.items())
    return known, written, int(same)


def _stem(name: str) -> str:
    """A notebook's name without ending, copy marks, case: `01-Setup-Copy1 (2).ipynb` is `01setup`."""
    plain = name[-200:].lower().removesuffix(".json").rsplit(".", 1)[0]
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
    parts = {name: _candidates(plan, notebook, name, ours) for name, ours in plan.solution_cells().items()}
    taken = {id(cell) for found in parts.values() for cell in found}
    own = [(n, c) for n, c in enumerate(notebook["cells"]) if id(c) not in taken and _is_own(plan, c)]
    start = 0  # own cells from this place on are still to be looked at
    for name, ours in plan.solution_cells().items():
        if not (found := parts[name]):
            lost.append(name)
            continue
        chosen, end = _written(plan, notebook, found, ours)
        place = next(n for n, cell in enumerate(notebook["cells"]) if cell is chosen[-1])
        sources = {key_of(name, number - len(chosen)): cell["source"] for number, cell in enumerate(chosen, 1)}
        if ours["cell_type"] == "code":
            around = [(n, cell) for n, cell in own if start <= n < end]
            above, below = ([cell for n, cell in around if (n < place) is early] for early in (True, False))
            sources |= {key_of(name, number - len(above) - len(chosen)): c["source"] for number, c in enumerate(above)}
            sources |= {key_of(name, number): cell["source"] for number, cell in enumerate(below, 1)}
            start = max(start, min(end, len(notebook["cells"])))
            if len(found) > 1:
                remarks.append(f"the cell {name} is there {len(found)} times; those above its test were run, in order")
            if cells.same_source(sources[name], cells.stubbed(ours)) and (names := cells.bound_names(ours["source"])):
                where = [n for n, cell in own if names & _given(cell["source"])]
                if any(place < n < end for n in where):
                    remarks.append(f"the answer to {name} was taken from a cell of your own below it")
                elif any(n >= end for n in where):
                    remarks.append(f"the answer to {name} stands below its test and was not graded: move it up")
        if sum(map(len, sources.values())) > min(cells.LONGEST, left):
            sources = {name: sources[name]}
        if len(sources[name]) > min(cells.LONGEST, left):
            remarks.append(f"the answer in {name} is too long and was not graded")
            continue
        answers |= sources
        left -= sum(map(len, sources.values()))
    if lost:
        remarks.append(f"no cell for {', '.join(lost)}: was it deleted?")
    return answers, remarks


def _given(source: str) -> frozenset[str]:
    """What a cell gives to the cells after it."""
    return cells.bound_names(source) | cells.imported_names(source)


def _is_own(plan: Plan, cell: dict) -> bool:
    """Whether a student has added this code cell, and it gives other cells something."""
    if cell["cell_type"] != "code" or cells.grade_id(cell) or not _given(cell["source"]):
        return False
    ids = {ours.get("id") for ours in plan.notebook["cells"]} - {None}
    return cell.get("id") not in ids and not _is_ours(plan, cell, "")


def _candidates(plan: Plan, notebook: dict, name: str, ours: dict) -> list[dict]:
    """The cells of a student's that may be the answer `name`."""
    found = [c for c in notebook["cells"] if cells.grade_id(c) == name and c["cell_type"] == ours["cell_type"]]
    found = found or [c for c in notebook["cells"] if c.get("id") == ours.get("id") is not None]
    if not found and ours["cell_type"] == "code":
        names = cells.bound_names(ours["source"])
        others = [c for c in notebook["cells"] if c["cell_type"] == "code" and not _is_ours(plan, c, name)]
        found = [c for c in others if names & cells.bound_names(c["source"])][-1:]
    return found


def _written(plan: Plan, notebook: dict, found: list[dict], ours: dict) -> tuple[list[dict], int]:
    """Of several cells those that count in Jupyter too: all above the test that are not the stub any more, in order.

    Of a text, and where there is none above the test, the last one anywhere. And the place of the test, or the end.
    """
    place = plan.notebook["cells"].index(ours)
    tests = [cells.grade_id(cell) for cell in plan.notebook["cells"][place:] if cells.is_test(cell)][:1]
    ends = [n for n, cell in enumerate(notebook["cells"]) if cells.grade_id(cell) in tests] or [len(notebook["cells"])]
    early = [c for c in notebook["cells"][: ends[0]] if any(c is one for one in found)]
    written = [[c for c in some if not cells.same_source(c["source"], cells.stubbed(ours))] for some in (early, found)]
    if written[0] and ours["cell_type"] == "code":
        return written[0], ends[0]
    return (written[0] or written[1] or found)[-1:], ends[0]


def _is_ours(plan: Plan, cell: dict, name: str) -> bool:
    """Whether the cell is one that the course gives: then it is no answer to `name`."""
    return any(
        cells.same_source(cell["source"], ours["source"])
        for ours in plan.notebook["cells"]
        if cells.grade_id(ours) != name
    )
