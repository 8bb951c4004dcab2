"""Cells in another order than from top to bottom: what a notebook needs for that, and what a restarted kernel says."""

from __future__ import annotations

import re

import nbformat
import order_rules
import pytest
from exercise_rules import names_set, names_used
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebook_rules import code_cells
from replay import EXTENSIONS, NOTEBOOKS, ROOT

from utils.session import RUN_ABOVE

ALL = (*NOTEBOOKS, *EXTENSIONS)
SETUP = re.compile(r"\bsetup_(notebook|lab)\(")  # the cell that a restart begins with calls one of them


def read(name: str) -> NotebookNode:
    return nbformat.read(ROOT / name, as_version=4)


@pytest.mark.parametrize("name", ALL)
def test_cells_take_their_names_from_above_and_can_be_run_twice(name: str) -> None:
    notebook = read(name)
    assert [*order_rules.names_from_above(notebook), *order_rules.can_run_twice(notebook)] == []
    setup = next(cell.source for cell in code_cells(notebook) if SETUP.search(cell.source))
    assert names_used(setup) <= names_set(setup, imports=True) | order_rules.KNOWN  # a restart may begin with it


def lesson(*sources: str) -> NotebookNode:
    """A notebook with a cell of code a source, named a, b, c ..., under headings of the same names."""
    cells = []
    for letter, source in zip("abcdef", sources, strict=False):
        cells += [new_markdown_cell(f"## Part {letter}"), new_code_cell(source, id=letter)]
    return new_notebook(cells=cells)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ("x = f(x)", "b: 'x' is made from its own old value"),
        ("x += 1", "b: 'x' is made from its own old value"),
        ("for n in x:\n    x = n", "b: 'x' is made from its own old value"),
        ("x.append(1)", "b: 'x' of an earlier cell is changed"),
        ("print(next(x))", "b: 'x' of an earlier cell is changed"),
        ("y = attach(x, 'ia3')", "b: 'x' of an earlier cell is changed"),
        ("y = x.block.register_forward_hook(f)", "b: 'x' of an earlier cell is changed"),
        ("del x[0]", "b: 'x' of an earlier cell is changed"),
    ],
)
def test_a_cell_that_goes_wrong_the_second_time_is_found(second: str, problem: str) -> None:
    assert problem in order_rules.can_run_twice(lesson("f, x = print, []", second))


@pytest.mark.parametrize(
    "second",
    [
        "x = []\nx.append(1)\nx += [2]",
        "y = [x for x in range(3)]\nx = y",
        "def g():\n    x.append(1)",
        "hook = x.register_forward_hook(f)\nhook.remove()",
        "try:\n    f()\nexcept ValueError as error:\n    print(error)",
        "for n in x:\n    print(n)",
        "model = attach(f(x)[0], 'ia3')",
    ],
)
def test_a_cell_that_starts_anew_is_not_found(second: str) -> None:
    assert order_rules.can_run_twice(lesson("f, x = print, []", second)) == []


def test_a_name_from_below_is_found() -> None:
    notebook = lesson("def f():\n    return y", "import z as w, v\nprint(len(w.x))", "y = 1")
    assert order_rules.names_from_above(notebook) == ["a: no cell above makes 'y'"]


# --- the advice ---------------------------------------------------------------------------------------------------


def test_a_missing_name_comes_with_advice_and_other_errors_do_not() -> None:
    """Only what is shown has it: code that catches a NameError, as the exercises' checks do, sees Python's message."""
    sources = (
        "from utils.session import advise_on_missing_names\nadvise_on_missing_names()\nadvise_on_missing_names()",
        "print(tokenizer)",
        "1 / 0",
        "def f():\n    x\n    x = 1\nf()",
        "try:\n    tokenizer\nexcept NameError as error:\n    assert str(error).endswith('is not defined')",
    )
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(
        notebook, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    errors = [[o for o in cell.outputs if o.output_type == "error"] for cell in notebook.cells]
    assert [found[0].ename if found else "" for found in errors] == [
        "", "NameError", "ZeroDivisionError", "UnboundLocalError", "",
    ]  # fmt: skip
    shown = ["".join(found[0].traceback) if found else "" for found in errors]
    assert [text.count(RUN_ABOVE) for text in shown] == [0, 1, 0, 0, 0]
