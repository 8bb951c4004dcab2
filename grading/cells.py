"""Notebooks in nbgrader's format, version 3: which cell is a solution or a test; stubs; hidden tests.

A notebook is the plain JSON of its file, every source one text; nbgrader itself is not needed.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator, Mapping

from grading import GradingError

STUB = "...  # YOUR CODE HERE"
ANSWER_STUB = "YOUR ANSWER HERE"
SOLUTION = ("### BEGIN SOLUTION", "### END SOLUTION")
HIDDEN = ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
# A test cell with one of these tags gets its points from a submitted adapter (`adapter.py`); kind of question by tag.
ADAPTER_TAGS = {"grade-adapter": "adapter", "grade-style": "style"}
NAME = re.compile(r"[a-zA-Z0-9_-]+")
LONGEST = 100_000  # characters of a cell that is looked into
# What moves a cursor, turns the direction of a line, or has no UTF-8 at all; line ends and tabs are none of these.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
           ast.GeneratorExp)  # fmt: skip

IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (*IMPORTS, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def printable(text: str) -> str:
    """Text of a student's as it may be shown and written anywhere: without control characters and half characters."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def grade_id(cell: Mapping) -> str | None:
    """The id by which nbgrader knows the cell; None for a cell it does not know."""
    return _nbgrader(cell).get("grade_id")


def is_solution(cell: Mapping) -> bool:
    """Whether a student writes in this cell."""
    return bool(_nbgrader(cell).get("solution"))


def is_test(cell: Mapping) -> bool:
    """Whether this cell is a test that a machine runs for points."""
    return bool(_nbgrader(cell).get("grade")) and not is_solution(cell) and cell["cell_type"] == "code"


def is_manual(cell: Mapping) -> bool:
    """Whether a person gives the points: a written answer, or code that no test judges."""
    return bool(_nbgrader(cell).get("grade")) and is_solution(cell)


def points(cell: Mapping) -> float:
    """The points of a graded cell."""
    return float(_nbgrader(cell).get("points", 0))


def tags(cell: Mapping) -> set[str]:
    """The cell's tags."""
    return set(cell["metadata"].get("tags", []))


def _nbgrader(cell: Mapping) -> dict:
    values = cell["metadata"].get("nbgrader", {})
    return values if isinstance(values, dict) else {}


ENCODINGS = ("utf-8-sig", "utf-16", "cp1252", "latin-1")


def read_notebook(data: bytes) -> dict:
    """The notebook in these bytes, in whatever encoding an editor left it; only what grading needs is checked.

    Raises GradingError for what is not a notebook of format 4.
    """
    for encoding in ENCODINGS:
        try:
            notebook = json.loads(data.decode(encoding))
            break
        except UnicodeError:
            continue
        except (ValueError, RecursionError) as error:
            if encoding == ENCODINGS[0]:
                raise GradingError(f"not a notebook ({str(error)[:80]})") from None
    else:
        raise GradingError("not a notebook (no encoding fits)")
    if not (isinstance(notebook, dict) and notebook.get("nbformat") == 4 and isinstance(notebook.get("cells"), list)):
        raise GradingError("not a notebook of format 4")
    for number, cell in enumerate(notebook["cells"], 1):
        source = cell.get("source") if isinstance(cell, dict) else None
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            cell["source"] = source = "".join(source)
        if not isinstance(source, str) or cell.get("cell_type") not in ("code", "markdown", "raw"):
            raise GradingError(f"cell {number} is damaged")
        cell["source"] = source.encode("utf-8", "replace").decode()  # JSON can hold half characters
        if not isinstance(cell.get("metadata"), dict):
            cell["metadata"] = {}
        if not isinstance(cell.get("id", ""), str):
            del cell["id"]
        if not isinstance(_nbgrader(cell).get("grade_id", ""), str):
            del cell["metadata"]["nbgrader"]
    return notebook


def write_notebook(notebook: Mapping) -> bytes:
    """The bytes of a notebook's file, as nbformat writes them: sources by line, keys sorted, UTF-8."""
    stored = [cell | {"source": cell["source"].splitlines(keepends=True)} for cell in notebook["cells"]]
    text = json.dumps({**notebook, "cells": stored}, indent=1, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "replace")


def split_regions(source: str, markers: tuple[str, str]) -> tuple[list[tuple[str, bool]], int]:
    """The lines of `source`, each with whether it lies between the markers (they included), and how many regions.

    Raises GradingError where a marker has no partner.
    """
    lines, inside, regions = [], False, 0
    for line in source.splitlines():
        begins, ends = line.strip() == markers[0], line.strip() == markers[1]
        if begins and inside or ends and not inside:
            raise GradingError(f"{line.strip()!r} without its partner")
        lines.append((line, inside or begins))
        regions += begins
        inside = (inside or begins) and not ends
    if inside:
        raise GradingError(f"{markers[0]!r} without its partner")
    return lines, regions


def unmarked(source: str) -> str:
    """A solution without the lines of its markers."""
    return "\n".join(line for line in source.splitlines() if line.strip() not in SOLUTION)


def stubbed(cell: Mapping) -> str:
    """The source of a solution cell as a student gets it: each solution is one stub line, indented as it was.

    A cell without markers is a stub as a whole, as in nbgrader.
    """
    lines, regions = split_regions(cell["source"], SOLUTION)
    stub = STUB if cell["cell_type"] == "code" else ANSWER_STUB
    if not regions:
        return stub
    kept = []
    for line, inside in lines:
        if line.strip() == SOLUTION[0]:
            kept.append(line[: len(line) - len(line.lstrip())] + stub)
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def without_hidden(source: str) -> str:
    """The source of a test cell as a student gets it: without the hidden tests."""
    kept = [line for line, inside in split_regions(source, HIDDEN)[0] if not inside]
    return "\n".join(kept).rstrip()


def same_source(one: str, other: str) -> bool:
    """Whether two sources differ in white space at line ends and in empty lines only."""
    plain = [[line.rstrip() for line in text.splitlines() if line.strip()] for text in (one, other)]
    return plain[0] == plain[1]


def parse(source: str) -> ast.Module | None:
    """The syntax tree of a code cell, its magics left out; None where it does not parse."""
    try:
        return ast.parse(re.sub(r"^([ \t]*)[%!].*", r"\1pass", source, flags=re.MULTILINE))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def definitions(source: str, kinds: tuple[type[ast.stmt], ...] = DEFINITIONS) -> list[str]:
    """The imports, functions and classes at the top level of a cell, or the `kinds` of them, each for itself."""
    tree = parse(source)
    return [ast.unparse(node) for node in tree.body if isinstance(node, kinds)] if tree else []


@functools.lru_cache(maxsize=500)
def bound_names(source: str) -> frozenset[str]:
    """Names that the cell binds for the cells after it: assignments, functions, classes; not what it imports."""
    if len(source) > LONGEST:
        return frozenset()
    tree = parse(source)
    if tree is None:  # a broken cell still tells what it wanted to define
        found = re.findall(r"^(?:def|class)\s+(\w+)|^(\w+)\s*=", source, re.MULTILINE)
        return frozenset(name for pair in found for name in pair if name)
    names: set[str] = set()
    for node in _outside_functions(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


@functools.lru_cache(maxsize=500)
def imported_names(source: str) -> frozenset[str]:
    """Names that the cell imports for the cells after it: of `import a.b` it is `a`; "*" where all of a module come."""
    tree = parse(source) if len(source) <= LONGEST else None
    found = [n for n in _outside_functions(tree) if isinstance(n, IMPORTS)] if tree else []
    return frozenset(alias.asname or alias.name.partition(".")[0] for node in found for alias in node.names)


def _outside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a cell that act on its own names; a function or class itself, but nothing in it."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, _SCOPES):
            pending.extend(ast.iter_child_nodes(node))


@functools.lru_cache(maxsize=500)
def used_names(source: str) -> frozenset[str]:
    """Every name that the cell reads, at any depth."""
    tree = parse(source) if len(source) <= LONGEST else None
    if tree is None:
        return frozenset(re.findall(r"[^\W\d]\w*", source[:LONGEST]))
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))


def check_format(notebook: Mapping, name: str) -> None:
    """Raise GradingError at the first cell that breaks the format: ids, points, markers in the wrong place."""
    seen: set[str] = set()
    for number, cell in enumerate(notebook["cells"], 1):
        where, identity = f"{name}, cell {number}", grade_id(cell)
        if identity is None:
            if any(marker in cell["source"] for marker in (*SOLUTION, *HIDDEN)):
                raise GradingError(f"{where}: a marker in a cell that nbgrader does not know")
            continue
        if not NAME.fullmatch(identity) or identity in seen:
            raise GradingError(
                f"{where}: grade_id {identity!r} is used twice or has other characters than a-z, 0-9, - _"
            )
        seen.add(identity)
        if (is_test(cell) or is_manual(cell)) and not points(cell) >= 0:
            raise GradingError(f"{where}: {identity} has no points")
        try:
            split_regions(cell["source"], SOLUTION)
            split_regions(cell["source"], HIDDEN)
        except GradingError as error:
            raise GradingError(f"{where}: {error}") from None
        if SOLUTION[0] in cell["source"] and not is_solution(cell) or HIDDEN[0] in cell["source"] and not is_test(cell):
            raise GradingError(f"{where}: {identity} has a marker of another kind of cell")
