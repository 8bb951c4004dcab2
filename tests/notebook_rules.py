"""What a committed notebook must be, as small functions: notebook -> list of problems (empty where it is fine).

For tests/test_notebooks_static.py, which runs before any notebook is replayed, because nbval runs a cell without an
execution count and never compares it.

A notebook is a lesson with exercises in it (cells with nbgrader metadata). The limits on length, on the share of text
and on the share of compared cells are about the lesson: exercises are three cells each with a fixed shape, so counted
in, they would push a lesson over its length and hide one that compares little. exercise_rules.py has their own limits.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import nbformat
from nbformat import NotebookNode

CELLS = (35, 60)  # the beat of docs: short enough to finish, long enough to explain
LAB_CELLS = (25, 40)  # of an optional lab in extensions/
MARKDOWN_PER_CODE = (1.1, 1.6)
CODE_LINES = 20
EXERCISE_LINES = 30  # a hard answer, solved, is one cell
MEGABYTES = 2
COMPARED_SHARE = 0.6
IGNORING_TAGS = {"nbval-ignore-output", "nbval-skip"}
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~>-])/(?:home|root|Users|tmp|var|usr|opt|mnt|work|workspace|content|data|private|media|srv)/[\w.-]"
    r"|file://|(?<![A-Za-z])[A-Z]:\\[A-Z]\w"
)
SHELL = re.compile(
    r"^\s*!|^\s*%%?(?!matplotlib\b|config\b|time\b|timeit\b)[a-z]\w*|\bpip3? +install\b|\bwget\b|\bcurl\b"
    r"|\bos\.system\b|\bsubprocess\b|\bget_ipython\b",
    re.MULTILINE,
)
FIGURE_NAME = re.compile(r"^<Figure size .*>$|^<IPython\.core\.display\.\w+ object>$")

Rule = Callable[[NotebookNode], list[str]]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_exercise(cell: NotebookNode) -> bool:
    """Return whether the cell belongs to an exercise, and not to the lesson."""
    return "nbgrader" in cell.metadata


def lesson_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells of the lesson in order, without the exercises."""
    return [cell for cell in notebook.cells if not is_exercise(cell)]


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def texts(cell: NotebookNode) -> Iterator[str]:
    """Yield every text output of a code cell: streams, and each text form of a result."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        for kind, value in output.get("data", {}).items():
            if isinstance(value, str) and not kind.startswith("image/"):
                yield value


def is_compared(cell: NotebookNode) -> bool:
    """Return whether nbval compares anything in this cell's output that could differ.

    A picture is not compared, and its text form `<Figure size ...>` says nothing.
    """
    return not tags(cell) & IGNORING_TAGS and any(
        text.strip() and not FIGURE_NAME.match(text.strip()) for text in texts(cell)
    )


def counts_from_one(notebook: NotebookNode) -> list[str]:
    """Execution counts are 1, 2, 3, ...: the notebook was run once, from top to bottom."""
    return [
        f"code cell {number} has execution count {cell.execution_count}: run `make refresh`"
        for number, cell in enumerate(code_cells(notebook), 1)
        if cell.execution_count != number or any(o.get("execution_count", number) != number for o in cell.outputs)
    ]


def clean_outputs(notebook: NotebookNode) -> list[str]:
    """No error, no stderr, no widget and no widget state is stored."""
    problems = ["widget state is stored: run `make refresh`"] if "widgets" in notebook.metadata else []
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            kinds = [output.output_type, output.get("name", ""), *output.get("data", {})]
            bad = [k for k in kinds if k in ("error", "stderr", "update_display_data") or "widget" in k]
            problems += [f"code cell {number} stores {kind} output" for kind in bad]
    return problems


def no_absolute_paths(notebook: NotebookNode) -> list[str]:
    """Neither sources nor text outputs hold a path of somebody's machine."""
    problems = []
    for number, cell in enumerate(notebook.cells, 1):
        for text in [cell.source, *(texts(cell) if cell.cell_type == "code" else [])]:
            if found := ABSOLUTE_PATH.search(text):
                problems.append(f"cell {number} holds an absolute path: {found.group()!r}")
    return problems


def no_shell(notebook: NotebookNode) -> list[str]:
    """No shell command, installation or download: the same notebook runs on every system."""
    return [
        f"code cell {number} calls {found.group().strip()!r}"
        for number, cell in enumerate(code_cells(notebook), 1)
        if (found := SHELL.search(cell.source))
    ]


def tags_not_comments(notebook: NotebookNode) -> list[str]:
    """What nbval does with a cell is said in tags, and never skips it: a skipped cell is not even run."""
    problems = []
    for number, cell in enumerate(code_cells(notebook), 1):
        if re.search(r"^\s*#+\s*(NBVAL|PYTEST_VALIDATE)_", cell.source, re.MULTILINE):
            problems.append(f"code cell {number} marks itself in a comment: use a tag")
        if "nbval-skip" in tags(cell):
            problems.append(f"code cell {number} is tagged nbval-skip: it would never be replayed")
    return problems


def python_kernel(notebook: NotebookNode) -> list[str]:
    """The kernel is `python3`: a name saved by an editor breaks every cell on other machines."""
    name = notebook.metadata.get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"the kernel is {name!r}, not 'python3': run `make refresh`"]


def cell_ids(notebook: NotebookNode) -> list[str]:
    """Every cell has an id of its own, 1 to 64 of the characters a-z, A-Z, 0-9, - and _."""
    ids = [cell.get("id", "") for cell in notebook.cells]
    problems = [
        f"cell {n} has the id {i!r}" for n, i in enumerate(ids, 1) if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i)
    ]
    return problems + [f"the id {i!r} is used twice" for i in sorted({i for i in ids if ids.count(i) > 1})]


def short_cells(notebook: NotebookNode) -> list[str]:
    """A code cell has at most 20 lines (of an exercise 30), is not empty, and is Python that parses."""
    problems = []
    for number, cell in enumerate(code_cells(notebook), 1):
        lines, most = len(cell.source.splitlines()), EXERCISE_LINES if is_exercise(cell) else CODE_LINES
        if lines > most or not cell.source.strip():
            problems.append(f"code cell {number} has {lines} lines (1 to {most})")
        try:
            ast.parse(re.sub(r"^\s*%.*", "", cell.source, flags=re.MULTILINE))
        except SyntaxError as error:
            problems.append(f"code cell {number} does not parse: {error.msg}")
    return problems


def cell_number(notebook: NotebookNode) -> list[str]:
    """The lesson has 35 to 60 cells."""
    return _within(CELLS, len(lesson_cells(notebook)))


def lab_cell_number(notebook: NotebookNode) -> list[str]:
    """An optional lab has 25 to 40 cells."""
    return _within(LAB_CELLS, len(lesson_cells(notebook)))


def _within(limits: tuple[int, int], count: int) -> list[str]:
    low, high = limits
    return [] if low <= count <= high else [f"{count} cells ({low} to {high})"]


def lesson_only(notebook: NotebookNode) -> list[str]:
    """An optional lab gives no points: it has no exercise that a student edition or a grader would have to know."""
    found = [cell.id for cell in notebook.cells if is_exercise(cell)]
    return [f"cell {name} is an exercise: the four notebooks have those" for name in found]


def finds_utils(notebook: NotebookNode) -> list[str]:
    """The first code cell of an optional lab looks for utils/ one folder up, before it imports from there."""
    first = code_cells(notebook)[0].source
    if 'sys.path.insert(0, "..")' in first.partition("from utils")[0]:
        return []
    return ['the first code cell does not say sys.path.insert(0, "..") before it imports from utils']


def enough_text(notebook: NotebookNode) -> list[str]:
    """The lesson has 1.1 to 1.6 markdown cells for each code cell."""
    kinds = [cell.cell_type for cell in lesson_cells(notebook)]
    code = kinds.count("code")
    ratio = kinds.count("markdown") / max(code, 1)
    low, high = MARKDOWN_PER_CODE
    return (
        [] if low <= ratio <= high else [f"{ratio:.2f} markdown cells for each of {code} code cells ({low} to {high})"]
    )


def text_between_code(notebook: NotebookNode) -> list[str]:
    """No two code cells follow each other without text, but for an exercise's answer and its test, under one card."""
    problems = []
    for number, (first, second) in enumerate(zip(notebook.cells, notebook.cells[1:], strict=False), 1):
        one_exercise = is_exercise(first) and is_exercise(second) and second.metadata["nbgrader"].get("grade")
        if first.cell_type == second.cell_type == "code" and not one_exercise:
            problems.append(f"cells {number} and {number + 1} are code with no text between")
    return problems


def small_file(notebook: NotebookNode) -> list[str]:
    """The file has at most 2 MB."""
    size = len(nbformat.writes(notebook).encode("utf-8")) / 1e6
    return [] if size <= MEGABYTES else [f"{size:.1f} MB (at most {MEGABYTES})"]


def mostly_compared(notebook: NotebookNode) -> list[str]:
    """Of the lesson's cells with output, nbval really compares at least 60 %."""
    with_output = [cell for cell in code_cells(notebook) if cell.outputs and not is_exercise(cell)]
    compared = sum(is_compared(cell) for cell in with_output)
    if with_output and compared / len(with_output) >= COMPARED_SHARE:
        return []
    return [f"{compared} of {len(with_output)} cells with output are compared (at least {COMPARED_SHARE:.0%})"]


def headings_in_order(notebook: NotebookNode) -> list[str]:
    """One title, at the top; no heading is more than one level below the one before it."""
    levels: list[int] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            levels += [len(marks) for marks in re.findall(r"^(#{1,6})\s+\S", text, re.MULTILINE)]
    problems = (
        [] if levels[:1] == [1] and levels.count(1) == 1 else ["there must be one title (#), before all headings"]
    )
    steps = zip(levels, levels[1:], strict=False)
    return problems + [
        f"a heading of level {below} follows one of level {level}" for level, below in steps if below > level + 1
    ]


def figures_have_alt(notebook: NotebookNode) -> list[str]:
    """Every picture has an alt text in its metadata, and no picture is SVG (which nbval would compare)."""
    problems = []
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            for kind in (k for k in output.get("data", {}) if k.startswith("image/")):
                if kind == "image/svg+xml":
                    problems.append(f"code cell {number} stores SVG: show PNG")
                elif not str(output.get("metadata", {}).get(kind, {}).get("alt", "")).strip():
                    problems.append(f"code cell {number} shows a figure without alt text: use utils.plots.show")
    return problems


RULES: tuple[Rule, ...] = (
    counts_from_one, clean_outputs, no_absolute_paths, no_shell, tags_not_comments, python_kernel, cell_ids,
    short_cells, cell_number, enough_text, text_between_code, small_file, mostly_compared, headings_in_order,
    figures_have_alt,
)  # fmt: skip
LAB_RULES: tuple[Rule, ...] = (
    *(rule for rule in RULES if rule is not cell_number), lab_cell_number, lesson_only, finds_utils,
)  # fmt: skip
