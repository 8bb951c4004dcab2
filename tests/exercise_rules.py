"""What the exercises of a committed notebook must be: notebook -> list of problems (empty where it is fine).

Beside notebook_rules.py, for tests/test_notebooks_static.py. A cell with nbgrader metadata belongs to an exercise; all
others are the lesson.
"""

from __future__ import annotations

import re
import symtable
from collections.abc import Iterator

from nbformat import NotebookNode
from notebook_rules import is_compared, is_exercise, tags

from grading.release import SOLVED

KEYS = {"schema_version", "grade_id", "grade", "solution", "locked", "task"}
ROLES = {  # (cell type, solution, grade, locked) -> what the cell is
    ("markdown", False, False, True): "card",
    ("code", False, False, True): "board",
    ("code", True, False, False): "solution",
    ("code", False, True, True): "test",
    ("markdown", True, True, False): "written",
}
FILES_TAGS = {"grade-adapter", "grade-style"}  # of tests whose points come from files: there is nothing to hide
HELPS = 3
CELLS = 30  # of exercises, in one notebook


def role(cell: NotebookNode) -> str | None:
    """What a cell is in its exercise: card, solution, test, written or board (the scoreboard); None where nothing."""
    data = cell.metadata.get("nbgrader", {})
    return ROLES.get((cell.cell_type, data.get("solution"), data.get("grade"), data.get("locked")))


def exercise_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that belong to exercises, in order."""
    return [cell for cell in notebook.cells if is_exercise(cell)]


def nbgrader_metadata(notebook: NotebookNode) -> list[str]:
    """Version 3 of the metadata: nbgrader skips a cell it cannot read, and gives 0 points without an error."""
    problems = []
    for cell in exercise_cells(notebook):
        data = cell.metadata["nbgrader"]
        wanted = KEYS | ({"points"} if data.get("grade") else set())
        if set(data) != wanted or data.get("schema_version") != 3 or role(cell) is None:
            problems.append(f"cell {cell.id}: no valid metadata of nbgrader, version 3: {dict(data)}")
        if data.get("grade_id") != cell.id:
            problems.append(
                f"cell {cell.id}: its grade_id is {data.get('grade_id')!r}, not the cell's id: run `make refresh`"
            )
        if data.get("grade") and not (type(data.get("points")) is int and data["points"] > 0):
            problems.append(f"cell {cell.id}: points must be a whole number above 0")
    return problems


def whole_exercises(notebook: NotebookNode) -> list[str]:
    """Card, solution, test; card, written answer; card, test of files; at the end card, scoreboard. Nothing between."""
    roles = "".join((role(cell) or "none")[0] if is_exercise(cell) else "-" for cell in notebook.cells)
    problems = [] if re.fullmatch(r"(-|cst|cw|ct)*(cb)?", roles) else [f"exercise cells are out of order: {roles}"]
    if "c" in roles and not roles.endswith("cb"):
        problems.append("a notebook with exercises ends with its scoreboard")
    if (count := len(exercise_cells(notebook))) > CELLS:
        problems.append(f"{count} exercise cells (at most {CELLS})")
    return problems


def helpful_cards(notebook: NotebookNode) -> list[str]:
    """A card has its heading, a line with minutes, difficulty and points, what is graded, and three folded helps."""
    problems = []
    for cell in exercise_cells(notebook):
        if role(cell) == "card" and cell.id != "scoreboard-card":
            parts = (r"^### Exercise \d\.\d+ · \S", r"^\*\d+ minutes, (easy|medium|hard), \d points, ", r"Graded")
            problems += [f"{cell.id}: no {part!r}" for part in parts if not re.search(part, cell.source, re.MULTILINE)]
            if cell.source.count("<details><summary>") != HELPS or cell.source.count("</details>") != HELPS:
                problems.append(f"{cell.id}: there must be {HELPS} folded helps")
    return problems


def marked_regions(notebook: NotebookNode) -> list[str]:
    """Each solution and each test has one marked region; what lies in it is all that the student edition takes out."""
    problems = []
    for cell in exercise_cells(notebook):
        name = {"solution": "SOLUTION", "test": "HIDDEN TESTS"}.get(role(cell))
        marks = re.findall(r"^ *### (BEGIN|END) (.*)$", cell.source, re.MULTILINE)
        wanted = [("BEGIN", name), ("END", name)] if name and not FILES_TAGS & set(tags(cell)) else []
        if cell.cell_type == "code" and marks != wanted:
            problems.append(f"{cell.id}: marks are {marks}, not {wanted}")
    return problems


def exercises_compared(notebook: NotebookNode) -> list[str]:
    """The output of every test and of the scoreboard is compared, and a solution prints nothing."""
    problems = []
    for cell in exercise_cells(notebook):
        if role(cell) in ("test", "board") and not is_compared(cell):
            problems.append(f"{cell.id}: nbval compares nothing: no output, or a tag")
        if role(cell) == "solution" and cell.outputs:
            problems.append(f"{cell.id}: a solution prints something")
    return problems


def folded_sources(notebook: NotebookNode) -> list[str]:
    """In JupyterLab answers and tests are folded, and no other cell is: the next answer is not read by accident."""
    problems = []
    for cell in notebook.cells:
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        if folded != (role(cell) in ("solution", "written", "test")):
            problems.append(f"{cell.id}: is {'folded' if folded else 'not folded'}: run `make refresh`")
    return problems


def names_its_edition(notebook: NotebookNode) -> list[str]:
    """The first line says which edition this is; `grading.release` changes it in the students' edition."""
    return [] if notebook.cells[0].source.splitlines()[:1] == [SOLVED] else [f"the first line is not {SOLVED!r}"]


def lesson_stands_alone(notebook: NotebookNode) -> list[str]:
    """No cell of the lesson uses a name that only an exercise has set, and no exercise sets a name of the lesson."""
    sources = [(is_exercise(cell), cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    set_there = {name for exercise, source in sources if exercise for name in names_set(source, imports=True)}
    problems, known = [], set()
    for exercise, source in sources:
        if not exercise:
            known |= names_set(source, imports=True)
            problems += [
                f"the lesson uses {n!r} of an exercise" for n in sorted(names_used(source) & set_there - known)
            ]
    lesson = {name for exercise, source in sources if not exercise for name in names_set(source)}
    lost = lesson & {name for exercise, source in sources if exercise for name in names_set(source, imports=True)}
    return problems + [f"an exercise sets {name!r}, which the lesson sets too" for name in sorted(lost)]


def names_set(source: str, imports: bool = False) -> set[str]:
    """Names that a cell binds at its top level, functions included; imported ones only where `imports` is set."""
    found = next(_tables(source)).get_symbols()
    return {s.get_name() for s in found if s.is_assigned() or (imports and s.is_imported())}


def names_used(source: str) -> set[str]:
    """Global names that a cell reads, in its functions too."""
    return {
        symbol.get_name()
        for table in _tables(source)
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global())
    }


def _tables(source: str) -> Iterator[symtable.SymbolTable]:
    """Python's tables of a cell's names, that of its top level first; lines of IPython are left out."""
    tables = [symtable.symtable(re.sub(r"^\s*[%!].*", "", source, flags=re.MULTILINE), "cell", "exec")]
    for table in tables:
        yield table
        tables += table.get_children()


RULES = (
    nbgrader_metadata, whole_exercises, helpful_cards, marked_regions, exercises_compared, folded_sources,
    names_its_edition, lesson_stands_alone,
)  # fmt: skip
