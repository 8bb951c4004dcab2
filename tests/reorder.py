"""The notebooks run as students run them, and not from top to bottom: each cell twice, a restart before each section.

For `make test-order`, minutes long and so not part of the unit tests: pytest collects it only where it is named. Each
cell's output is compared with the stored one as nbval compares it; with other sizes (LAB_OVERRIDE) the stored ones do
not hold, and a cell's second output is compared with its first. After a restart a section may also stop with a
NameError, which says what to run.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import nbformat
import notebook_rules as rules
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbval.plugin import get_sanitize_patterns
from replay import NOTEBOOKS, ROOT, first_line

CELL_SECONDS = 900
SETUP = re.compile(r"\bsetup_(notebook|lab)\(")  # the cell that a restart begins with calls one of them
PATTERNS = get_sanitize_patterns((Path(__file__).parent / "nbval_sanitize.cfg").read_text(encoding="ascii"))

Run = Callable[[NotebookNode], Awaitable[list[str]]]


def sections(notebook: NotebookNode) -> dict[str, list[NotebookNode]]:
    """The code cells below each heading of level 2, in order; what stands above the first one is not a section."""
    found: dict[str, list[NotebookNode]] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (headings := re.findall(r"^## (.+)", cell.source, re.MULTILINE)):
            found |= {heading: [] for heading in headings}
        elif cell.cell_type == "code" and found:
            found[list(found)[-1]].append(cell)
    return {heading: cells for heading, cells in found.items() if cells}


def setup_cell(notebook: NotebookNode) -> NotebookNode:
    """The cell that readies a fresh kernel; every notebook has one, above its sections."""
    return next(cell for cell in rules.code_cells(notebook) if SETUP.search(cell.source))


def compared_text(outputs: list[NotebookNode]) -> dict[str, str]:
    """What nbval compares of a cell's outputs: its streams and text forms by kind, sanitised."""
    texts: dict[str, str] = {}
    for output in outputs:
        pieces = {output.name: output.text} if output.output_type == "stream" else output.get("data", {})
        for kind, text in pieces.items():
            if isinstance(text, str) and not kind.startswith("image/"):
                texts[kind] = texts.get(kind, "") + text
    for pattern, replacement in PATTERNS:
        texts = {kind: re.sub(pattern, replacement, text) for kind, text in texts.items()}
    return texts


def error_of(outputs: list[NotebookNode]) -> str | None:
    """The error that a cell ended with, as name and message; None where it ran to its end."""
    return next((f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"), None)


def differences(cell: NotebookNode, outputs: list[NotebookNode]) -> list[str]:
    """Problems of one run of `cell`: the error it ended with, or an output that is not the stored one."""
    if error := error_of(outputs):
        return [f"{cell.id}: {error}"]
    if rules.tags(cell) & rules.IGNORING_TAGS or cell.outputs is None:
        return []
    stored, found = compared_text(cell.outputs), compared_text(outputs)
    kinds = sorted(kind for kind in stored.keys() | found.keys() if stored.get(kind) != found.get(kind))
    return [f"{cell.id}: {k} was {stored.get(k, '')!r}, is now {found.get(k, '')!r}" for k in kinds]


def in_kernel(notebook: NotebookNode, folder: Path, work: Callable[[Run], Awaitable[list[str]]]) -> list[str]:
    """Start a fresh kernel of this Python in `folder`, hand `work` a way to run cells in it, return what it returns.

    A run gives the cell's differences. A cell whose outputs are None, not known, is given those of its first run.
    """
    client = NotebookClient(
        nbformat.v4.new_notebook(metadata=notebook.metadata), timeout=CELL_SECONDS, kernel_name="python3",
        allow_errors=True, coalesce_streams=True, resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],
    )  # fmt: skip

    async def run(cell: NotebookNode) -> list[str]:
        fresh = nbformat.v4.new_code_cell(cell.source)
        client.nb.cells.append(fresh)
        await client.async_execute_cell(fresh, len(client.nb.cells) - 1)
        problems = differences(cell, fresh.outputs)
        cell.outputs = fresh.outputs if cell.outputs is None else cell.outputs
        return problems

    async def session() -> list[str]:
        async with client.async_setup_kernel():
            return await work(run)

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(session())


def run_twice(notebook: NotebookNode, folder: Path) -> list[str]:
    """Differences when every code cell runs twice in a row, in one kernel."""

    async def work(run: Run) -> list[str]:
        problems = []
        for cell in rules.code_cells(notebook):
            for turn in ("first", "second"):
                started = time.monotonic()
                problems += [f"{turn} run of {problem}" for problem in await run(cell)]
                print(f"{cell.id:20} {turn:6} {time.monotonic() - started:6.1f} s", flush=True)
        return problems

    return in_kernel(notebook, folder, work)


def run_section(notebook: NotebookNode, folder: Path, heading: str) -> list[str]:
    """Differences when a fresh kernel runs the setup cell, then the section below `heading` until a NameError."""

    async def work(run: Run) -> list[str]:
        problems = await run(setup_cell(notebook))
        for cell in sections(notebook)[heading]:
            found = await run(cell)
            if any(": NameError: " in problem for problem in found):
                print("stopped, with advice:", first_line(found[0]))
                break
            problems += found
        return problems

    return in_kernel(notebook, folder, work)


def read(name: str) -> NotebookNode:
    """The committed notebook; its outputs are not known where the environment asks for other sizes."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    if os.environ.get("LAB_OVERRIDE"):
        for cell in rules.code_cells(notebook):
            cell.outputs = None
    return notebook


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_can_be_run_twice(name: str) -> None:
    problems = run_twice(read(name), (ROOT / name).parent)
    assert not problems, "\n".join(problems)


HEADINGS = [(name, heading) for name in NOTEBOOKS for heading in sections(read(name))]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "heading"), HEADINGS)
def test_restart_before_a_section_is_right_or_says_what_to_run(name: str, heading: str) -> None:
    problems = run_section(read(name), (ROOT / name).parent, heading)
    assert not problems, "\n".join(problems)
