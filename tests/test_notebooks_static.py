"""The static gate: every notebook, the optional labs too, keeps its rules, and every rule finds one that breaks it."""

from __future__ import annotations

import copy

import exercise_rules as ex
import nbformat
import notebook_rules as rules
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from replay import EXTENSIONS, NOTEBOOKS, ROOT

from grading.release import SOLVED

ALL_RULES = (*rules.RULES, *ex.RULES)
HERE = [name for name in NOTEBOOKS if (ROOT / name).is_file()]


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_keeps_the_rule(name: str, rule: rules.Rule) -> None:
    if not HERE:
        pytest.skip("no notebook is written yet")
    assert (ROOT / name).is_file(), f"{name} is missing"
    problems = rule(nbformat.read(ROOT / name, as_version=4))
    assert not problems, f"{name}:\n" + "\n".join(problems)


@pytest.mark.parametrize("rule", rules.LAB_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", EXTENSIONS)
def test_optional_lab_keeps_the_rule(name: str, rule: rules.Rule) -> None:
    problems = rule(nbformat.read(ROOT / name, as_version=4))
    assert not problems, f"{name}:\n" + "\n".join(problems)


@pytest.fixture
def good() -> NotebookNode:
    """A lesson of 45 cells that keeps every rule, with two exercises; one cell shows a figure, one an ignored time."""
    cells = [new_markdown_cell(f"{SOLVED}\n\n# Title\n\n```\n#### a comment\n```")]
    for number in range(1, 21):
        printed = new_output("stream", name="stdout", text=f"{number} layers, ratio 1/2, see /{number}\n")
        code = new_code_cell(f"print({number})", execution_count=number, outputs=[printed])
        cells += [new_markdown_cell("## Part" if number % 5 == 0 else "Text"), code]
    figure = new_output(
        "display_data",
        {"image/png": "aaaa", "text/plain": "<Figure size 800x400 with 1 Axes>"},
        metadata={"image/png": {"alt": "A rising line"}},
    )
    cells[4].outputs = [figure]
    cells[6].metadata["tags"] = ["nbval-ignore-output"]
    cells += [new_markdown_cell(f"### Reading {n}") for n in range(4)]
    cells += exercises(count=20)
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for number, cell in enumerate(notebook.cells):
        cell.id = cell.metadata.get("nbgrader", {}).get("grade_id", f"cell-{number}")
    return notebook


def exercises(count: int) -> list[NotebookNode]:
    """A coded exercise, a written one and the scoreboard, after `count` code cells."""
    helps = "<details><summary>Hint</summary>\n\nx\n\n</details>\n" * 3
    card = f"### Exercise 1.1 · Double\n\n*5 minutes, easy, 2 points, about 1 line.* Graded: `double`.\n\n{helps}"
    solution = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
    test = "assert double(1) == 2\n### BEGIN HIDDEN TESTS\nassert double(3) == 6\n### END HIDDEN TESTS"
    cells = [
        new_markdown_cell(card, metadata=grading("card")),
        new_code_cell(solution, execution_count=count + 1, metadata=grading("double", solution=True, locked=False)),
        new_code_cell(test, execution_count=count + 2, metadata=grading("test", grade=True, points=2)),
        new_markdown_cell(card, metadata=grading("written-card")),
        new_markdown_cell("Because.", metadata=grading("why", grade=True, solution=True, locked=False, points=1)),
        new_markdown_cell("## Your points", metadata=grading("scoreboard-card")),
        new_code_cell("board = 1", execution_count=count + 3, metadata=grading("scoreboard")),
    ]
    for cell in (cells[2], cells[-1]):
        cell.outputs = [new_output("stream", name="stdout", text="1.1 pass\n")]
    return cells


def grading(grade_id: str, **fields: object) -> dict[str, dict]:
    """nbgrader's metadata of a cell; locked and without a grade unless said otherwise. Answers and tests are folded."""
    data = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}
    folded = {"jupyter": {"source_hidden": True}} if fields.get("grade") or fields.get("solution") else {}
    return {"nbgrader": data | {"grade_id": grade_id} | fields} | folded


def test_good_notebook_keeps_every_rule(good: NotebookNode) -> None:
    nbformat.validate(good)
    assert {rule.__name__: rule(good) for rule in ALL_RULES if rule(good)} == {}


def replace_cells(notebook: NotebookNode, count: int) -> None:
    notebook.cells = (rules.lesson_cells(notebook) * 2)[:count]


def add_output(notebook: NotebookNode, *output: object, **fields: object) -> None:
    notebook.cells[2].outputs.append(new_output(*output, **fields))


def show(notebook: NotebookNode, kind: str, data: object) -> None:
    add_output(notebook, "display_data", {kind: data})


def set_first(notebook: NotebookNode, **fields: object) -> None:
    notebook.cells[2].update(fields)


def tag_all(notebook: NotebookNode) -> None:
    for cell in rules.code_cells(notebook)[:9]:
        cell.metadata["tags"] = ["nbval-ignore-output"]


def only_figures(notebook: NotebookNode) -> None:
    for cell in rules.code_cells(notebook)[2:10]:
        cell.outputs = copy.deepcopy(notebook.cells[4].outputs)


def part(notebook: NotebookNode, cell_id: str) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def replace_in(notebook: NotebookNode, cell_id: str, old: str, new: str = "") -> None:
    part(notebook, cell_id).source = part(notebook, cell_id).source.replace(old, new, 1)


def change_grading(notebook: NotebookNode, cell_id: str, **fields: object) -> None:
    part(notebook, cell_id).metadata["nbgrader"].update(fields)


def drop(notebook: NotebookNode, cell_id: str) -> None:
    notebook.cells.remove(part(notebook, cell_id))


BREAKS = {
    "no count": (rules.counts_from_one, lambda n: set_first(n, execution_count=None)),
    "counts out of order": (rules.counts_from_one, lambda n: set_first(n, execution_count=7)),
    "error": (rules.clean_outputs, lambda n: add_output(n, "error", ename="E", evalue="", traceback=[])),
    "stderr": (rules.clean_outputs, lambda n: add_output(n, "stream", name="stderr", text="w")),
    "widget": (rules.clean_outputs, lambda n: show(n, "application/vnd.jupyter.widget-view+json", {})),
    "widget state": (rules.clean_outputs, lambda n: n.metadata.update(widgets={})),
    "path in source": (rules.no_absolute_paths, lambda n: set_first(n, source="open('/home/ann/x')")),
    "path in output": (
        rules.no_absolute_paths,
        lambda n: add_output(n, "stream", name="stdout", text="saved in /tmp/x.json"),
    ),
    "path in a result": (rules.no_absolute_paths, lambda n: show(n, "text/html", "<p>in /root/x</p>")),
    "Windows path": (rules.no_absolute_paths, lambda n: set_first(n, source=r"open(r'C:\Users\ann')")),
    "shell": (rules.no_shell, lambda n: set_first(n, source="x = 1\n!ls")),
    "pip magic": (rules.no_shell, lambda n: set_first(n, source="%pip install torch")),
    "cell magic": (rules.no_shell, lambda n: set_first(n, source="%%bash\nls")),
    "wget": (rules.no_shell, lambda n: set_first(n, source="import wget")),
    "comment marker": (rules.tags_not_comments, lambda n: set_first(n, source="# NBVAL_IGNORE_OUTPUT\n1")),
    "skip tag": (rules.tags_not_comments, lambda n: n.cells[2].metadata.update(tags=["nbval-skip"])),
    "other kernel": (rules.python_kernel, lambda n: n.metadata.kernelspec.update(name="venv")),
    "no kernel": (rules.python_kernel, lambda n: n.metadata.pop("kernelspec")),
    "double id": (rules.cell_ids, lambda n: n.cells[3].update(id="cell-2")),
    "bad id": (rules.cell_ids, lambda n: n.cells[3].update(id="a b")),
    "long cell": (rules.short_cells, lambda n: set_first(n, source="x = 1\n" * 21)),
    "empty cell": (rules.short_cells, lambda n: set_first(n, source="")),
    "placeholder": (rules.short_cells, lambda n: set_first(n, source="x = # TODO")),
    "too few cells": (rules.cell_number, lambda n: replace_cells(n, 34)),
    "too many cells": (rules.cell_number, lambda n: replace_cells(n, 61)),
    "too little text": (rules.enough_text, lambda n: n.cells.__delitem__(slice(41, 45))),
    "too much text": (rules.enough_text, lambda n: n.cells.extend(n.cells[44:45] * 12)),
    "two code cells": (rules.text_between_code, lambda n: n.cells.pop(3)),
    "solution after the lesson's code": (rules.text_between_code, lambda n: n.cells.insert(2, part(n, "double"))),
    "solution after a solution": (rules.text_between_code, lambda n: n.cells.insert(46, part(n, "double"))),
    "big file": (rules.small_file, lambda n: show(n, "image/png", "a" * 2_100_000)),
    "too many tagged": (rules.mostly_compared, tag_all),
    "too many figures": (rules.mostly_compared, only_figures),
    "no outputs": (rules.mostly_compared, lambda n: [c.update(outputs=[]) for c in rules.code_cells(n)]),
    "skipped level": (rules.headings_in_order, lambda n: n.cells[1].update(source="### Too deep")),
    "no title": (rules.headings_in_order, lambda n: n.cells[0].update(source="Title")),
    "second title": (rules.headings_in_order, lambda n: n.cells[44].update(source="# Another")),
    "figure without alt": (rules.figures_have_alt, lambda n: show(n, "image/png", "aaaa")),
    "empty alt": (rules.figures_have_alt, lambda n: n.cells[4].outputs[0].metadata["image/png"].update(alt=" ")),
    "exercises in the place of a lesson": (rules.cell_number, lambda n: n.cells.__delitem__(slice(2, 14))),
    "text in cards only": (rules.enough_text, lambda n: n.cells.__setitem__(slice(41, 45), exercises(20)[:1] * 4)),
    "compared in exercises only": (rules.mostly_compared, lambda n: (tag_all(n), n.cells.extend(exercises(23) * 9))),
    "other version": (ex.nbgrader_metadata, lambda n: change_grading(n, "test", schema_version=2)),
    "no points": (ex.nbgrader_metadata, lambda n: part(n, "test").metadata["nbgrader"].pop("points")),
    "zero points": (ex.nbgrader_metadata, lambda n: change_grading(n, "test", points=0)),
    "unlocked test": (ex.nbgrader_metadata, lambda n: change_grading(n, "test", locked=False)),
    "another grade id": (ex.nbgrader_metadata, lambda n: change_grading(n, "test", grade_id="other")),
    "no test": (ex.whole_exercises, lambda n: drop(n, "test")),
    "no card": (ex.whole_exercises, lambda n: drop(n, "written-card")),
    "no scoreboard": (ex.whole_exercises, lambda n: n.cells.__delitem__(slice(-2, None))),
    "too many exercises": (ex.whole_exercises, lambda n: n.cells.__setitem__(slice(45, 48), n.cells[45:48] * 9)),
    "no minutes": (ex.helpful_cards, lambda n: part(n, "card").update(source="### Exercise 1.1 · Double")),
    "two helps": (ex.helpful_cards, lambda n: replace_in(n, "card", "<details>")),
    "no solution": (ex.marked_regions, lambda n: part(n, "double").update(source="def double(x): ...")),
    "unclosed": (ex.marked_regions, lambda n: replace_in(n, "test", "### END HIDDEN TESTS")),
    "silent test": (ex.exercises_compared, lambda n: part(n, "test").update(outputs=[])),
    "ignored test": (ex.exercises_compared, lambda n: part(n, "test").metadata.update(tags=["nbval-ignore-output"])),
    "solution with output": (
        ex.exercises_compared,
        lambda n: part(n, "double").update(outputs=part(n, "test").outputs),
    ),
    "test in full view": (ex.folded_sources, lambda n: part(n, "test").metadata.pop("jupyter")),
    "folded lesson": (ex.folded_sources, lambda n: n.cells[2].metadata.update(jupyter={"source_hidden": True})),
    "no edition": (ex.names_its_edition, lambda n: n.cells[0].update(source=f"# Title\n\n{SOLVED}")),
    "lesson calls an answer": (
        ex.lesson_stands_alone,
        lambda n: n.cells.append(new_code_cell("def later():\n    return double(2)")),
    ),
    "answer overwrites the lesson": (ex.lesson_stands_alone, lambda n: set_first(n, source="double = 1")),
    "SVG": (rules.figures_have_alt, lambda n: show(n, "image/svg+xml", "<svg/>")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_rule_finds_the_break(name: str, good: NotebookNode) -> None:
    rule, damage = BREAKS[name]
    damage(good)
    assert rule(good)


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _ in BREAKS.values()} | set(LAB_BREAKS) == {*ALL_RULES, *rules.LAB_RULES}


def first_code(notebook: NotebookNode, source: str) -> None:
    rules.code_cells(notebook)[0].source = source


LAB_BREAKS = {
    rules.lab_cell_number: lambda n: n.cells.extend(n.cells[:8]),
    rules.lesson_only: lambda n: n.cells.append(exercises(20)[0]),
    rules.finds_utils: lambda n: first_code(n, 'from utils import x\nimport sys\nsys.path.insert(0, "..")'),
}


@pytest.mark.parametrize("rule", LAB_BREAKS, ids=lambda rule: rule.__name__)
def test_rule_of_optional_labs_finds_the_break(good: NotebookNode, rule: rules.Rule) -> None:
    good.cells = rules.lesson_cells(good)[:35]
    first_code(good, 'import sys\n\nsys.path.insert(0, "..")\nfrom utils import x')
    assert rule(good) == []
    LAB_BREAKS[rule](good)
    assert rule(good)
