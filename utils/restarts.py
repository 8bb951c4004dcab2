"""After a restart of the kernel: a cell that misses a name says which section makes it, and what to run.

For: `explain_missing_names()`, which `setup_notebook` and `setup_lab` call. Not for: a NameError of the reader's own.
Where no cell above makes the name, Python's message is shown as it is; code that catches a NameError (the exercises'
checks do) never sees another one: only what is shown changes.
"""

from __future__ import annotations

import json
import os
import re
import symtable
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from utils.settings import ROOT

HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
RUN_ABOVE = "Choose Run > Run All Above Selected Cell, then run this cell again."


def explain_missing_names() -> None:
    """From now on, add to a NameError shown in this kernel what to run; does nothing outside IPython.

    Can be called any number of times.
    """
    from IPython import get_ipython

    if shell := get_ipython():
        shell.set_custom_exc((NameError,), _show)


def _show(
    shell: object, kind: type[NameError], error: NameError, trace: TracebackType, tb_offset: int | None = None
) -> None:
    """Show `error` as IPython does, its message longer where there is advice; IPython calls this as its own method."""
    if kind is NameError and _raised_in_a_cell(trace, shell.user_ns):
        cell = shell.history_manager.input_hist_raw[-1]
        if heading := made_under(error.name, cell, _notebooks()):
            error.args = (
                f"{error}. It is made above, under {heading!r}, and this kernel has not run that. {RUN_ABOVE}",
            )
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset, running_compiled_code=True)


def _raised_in_a_cell(trace: TracebackType, names: dict) -> bool:
    """Whether the last frame is code of a cell (then its globals are the kernel's `names`), and not of a library."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals is names


def _notebooks() -> list[Path]:
    """The course's notebooks, with the reader's copies of them; first the one Jupyter started this kernel for."""
    own = Path(os.environ.get("JPY_SESSION_NAME") or "none.ipynb")
    others = sorted({*ROOT.glob("*.ipynb"), *ROOT.glob("extensions/*.ipynb")} - {own})
    return [own, *others] if own.is_file() else others


def made_under(name: str, cell: str, notebooks: Iterable[Path]) -> str | None:
    """The heading under which the cells above `cell` (its source) make `name` last; None where none of them does.

    The first of `notebooks` that holds the cell is taken. A file that is not a notebook is passed over.
    """
    for path in notebooks:
        try:
            cells = list(read_cells(path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        sources = [source for _, source in cells]
        if cell.strip() in sources:
            above = cells[: sources.index(cell.strip())]
            return next((heading for heading, source in reversed(above) if name in names_made(source)), None)
    return None


def read_cells(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (the last heading above it, source) of each code cell of the notebook at `path`.

    Raises one of OSError, ValueError, TypeError, KeyError and AttributeError where it is not a notebook.
    """
    heading = path.stem
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            yield heading, source
        elif found := HEADING.findall(source):
            heading = found[-1]


def names_made(source: str) -> set[str]:
    """The names that the code binds for the cells below it: assigned, imported, defined. None if it does not parse."""
    try:
        symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    except SyntaxError:
        return set()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
