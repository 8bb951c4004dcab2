"""Run the committed notebooks again and write them back with fresh outputs, so that an unchanged rerun is no diff.

For maintainers (`make refresh`) after a change to a notebook or to utils/. Not for students: it rewrites the
committed notebooks, the four or those it is given, `extensions/*.ipynb` too. A notebook is replaced in one step, and
only after it ran to its end; one that fails stays as it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from replay import (
    NOTEBOOKS,
    ROOT,
    ReplayError,
    execute,
    find_notebook,
    keep,
    read_notebook,
    start_console,
)

from utils.runs import write_atomic

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_NOISE = ("ExecuteTime", "execution", "collapsed", "scrolled", "trusted", "jupyter", "vscode")


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Remove from `notebook` (in place) what changes from run to run or from editor to editor, and return it.

    Outputs, counts, ids, tags and nbgrader's metadata stay. Widgets go, with their state: they are dead in a stored
    notebook, and their model ids are random. A cell of an exercise gets its grade_id as its id, which no editor shows;
    answers and tests are folded.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = NotebookNode(KERNEL)
    notebook.metadata["language_info"] = NotebookNode(name="python")  # the Python version would differ by machine
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        for key in CELL_NOISE:
            cell.metadata.pop(key, None)
        data = cell.metadata.get("nbgrader", {})
        cell.id = data.get("grade_id", cell.id)
        if data.get("solution") or data.get("grade"):  # an answer or a test: JupyterLab shows it folded
            cell.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook


def refresh(path: Path, timeout: int) -> None:
    """Execute, normalise and replace the notebook at `path`; `timeout` is in seconds a cell."""
    notebook = read_notebook(path)
    print(f"{path.name}:", flush=True)
    try:
        execute(notebook, path, timeout)
    except BaseException:
        keep(notebook, path.name, ROOT / "build" / "refresh")
        raise
    data = (nbformat.writes(normalise(notebook)).rstrip("\n") + "\n").encode("utf-8")
    changed = data != path.read_bytes()
    write_atomic(path, data)
    print(f"{path.name}: {'rewritten' if changed else 'unchanged'}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Refresh the notebooks named on the command line, or all four; return the exit code."""
    parser = argparse.ArgumentParser(description="Run the committed notebooks and write them back with fresh outputs.")
    parser.add_argument("notebooks", nargs="*", default=NOTEBOOKS, help="paths, or beginnings of names such as 02")
    parser.add_argument("--timeout", type=int, default=900, help="limit for one cell, in seconds")
    options = parser.parse_args(arguments)
    start_console()
    try:
        for path in [find_notebook(name) for name in options.notebooks]:
            refresh(path, options.timeout)
    except ReplayError as error:
        kept = ROOT / "build" / "refresh"
        print(f"\nFAILED {error}\nNo notebook was changed by that; what ran is in {kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The notebook that was running was left as it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
