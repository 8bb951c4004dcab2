"""A notebook of the course as a grader sees it: its questions, and what each needs of a student's notebook.

For: `Plan`, `Question`, `read_plan`. Not for: a whole course or running it (`course.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grading import cells, release

HEADING = re.compile(r"^#{1,6} (.+)", re.MULTILINE)
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)  # code in a text: its comments are no headings


@dataclass(frozen=True)
class Question:
    """One graded cell. `kind`: "code" (a test judges), "adapter" (`adapter.py` judges), "written" (a person does).

    `title`: the nearest heading above it, for people to read; the id where there is none. `card`: that heading and what
    follows in its cell.
    """

    grade_id: str
    notebook: str
    kind: str
    points: float
    position: int  # of the cell in its notebook
    source: str
    title: str
    card: str = ""


@dataclass(frozen=True)
class Plan:
    """One notebook: the solved cells, and its questions in order."""

    name: str
    notebook: dict
    questions: tuple[Question, ...]

    def solution_cells(self) -> dict[str, dict]:
        """By grade id: every cell in which a student writes, in order."""
        return {cells.grade_id(c): c for c in self.notebook["cells"] if cells.is_solution(c) and cells.grade_id(c)}

    def solved(self) -> dict[str, str]:
        """Our own sources of these cells."""
        return {name: cell["source"] for name, cell in self.solution_cells().items()}

    def unsolved(self) -> dict[str, str]:
        """The sources of the student edition."""
        return {name: cells.stubbed(cell) for name, cell in self.solution_cells().items()}

    def needs(self, question: Question, answers: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """What judging takes: the solution cells to run (grade ids in order), and the names to hand over.

        Those cells are the ones that, in our solution, bind a name the test reads (the last that does, before the
        test); none does: all since the test before. A cell of the student's that reads a name which an earlier one of
        hers binds or imports needs that one too.
        """
        before = [cell for cell in self.notebook["cells"][: question.position] if cell["cell_type"] == "code"]
        writable = {cells.grade_id(c): c for c in before if cells.is_solution(c) and not cells.is_manual(c)}
        order = list(writable)
        bound = {name: cells.bound_names(_unmarked(cell["source"])) for name, cell in writable.items()}
        used = cells.used_names(question.source)
        exports = sorted(used & set().union(*bound.values())) if bound else []
        chosen = {max((n for n in order if name in bound[n]), key=order.index) for name in exports}
        if not chosen:
            chosen = _since_last_test(before)
        own = {name: answers.get(name, "") for name in order}
        hers = {name: cells.bound_names(own[name]) | cells.imported_names(own[name]) for name in order}
        pending = list(chosen)
        while pending:
            name = pending.pop()
            reads = cells.used_names(own[name]) | {"*"}
            earlier = [n for n in order[: order.index(name)] if hers[n] & reads and n not in chosen]
            chosen.update(earlier)
            pending.extend(earlier)
        return [n for n in order if n in chosen], exports

    def imports_before(self, question: Question) -> str:
        """The import statements of the tests before this one, hidden ones included: a later test may count on them."""
        earlier = [q.source for q in self.questions if q.kind == "code" and q.position < question.position]
        return "\n".join(line for source in earlier for line in cells.definitions(source, cells.IMPORTS))

    def base_cells(self, question: Question) -> list[str]:
        """The solution cells that are this question's own, by our solution."""
        return self.needs(question, {})[0]


def _unmarked(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if line.strip() not in cells.SOLUTION)


def _since_last_test(before: list[dict]) -> set[str]:
    last = max((n for n, cell in enumerate(before) if cells.is_test(cell)), default=-1)
    found = [cell for cell in before[last + 1 :] if cells.is_solution(cell) and not cells.is_manual(cell)]
    return {cells.grade_id(cell) for cell in found}


def read_plan(path: Path) -> Plan:
    """The questions of a notebook of the solved edition, in order. Raises FormatError or ReleaseError."""
    notebook, questions, heading, card = release.read_solved(path), [], "", ""
    for position, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown" and not cells.is_solution(cell):
            heading, card = _last_heading(cell["source"]) or (heading, card)
        kind = "written" if cells.is_manual(cell) else "code" if cells.is_test(cell) else None
        if kind == "code" and cells.ADAPTER_TAG in cells.tags(cell):
            kind = "adapter"
        if kind:
            identity = cells.grade_id(cell)
            about = (position, cell["source"], heading or identity, card)
            questions.append(Question(identity, path.name, kind, cells.points(cell), *about))
    return Plan(path.name, notebook, tuple(questions))


def _last_heading(text: str) -> tuple[str, str] | None:
    """The last heading of a text cell, and the text from there on; None where there is none."""
    found = list(HEADING.finditer(FENCED.sub(lambda code: " " * len(code[0]), text)))
    return (found[-1][1].strip(), text[found[-1].start() :]) if found else None
