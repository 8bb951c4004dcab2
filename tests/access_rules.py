"""What readers who see, print or listen differently need: rules for notebooks and pages.

Notebook -> list of problems, as in notebook_rules.py; for tests/test_access.py. A page of Markdown is read as a
notebook of one cell (`page`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from notebook_rules import code_cells

ALT_WORDS = (12, 60)  # enough to say what is to be seen, short enough to be listened to
ONLY_NAMED = re.compile(r"^(an? |the )?(figure|plot|image|picture|graph|chart)\b", re.IGNORECASE)
SEEN = re.compile(
    r"\b(is|are|has|have|lies?|stands?|stays?|rises?|falls?|goes|go|ends?|leaves?|comes?|peaks?|dips?|flattens?"
    r"|alternates?|overlaps?|moves?|grows?|shrinks?|drops?|crosses|cross)\b"
)
SAYS_NOTHING = {"", "here", "this", "link", "this link", "click here", "more", "read more", "page", "see", "source"}


def page(text: str) -> NotebookNode:
    """A notebook of one cell that holds a page of Markdown."""
    return new_notebook(cells=[new_markdown_cell(text)])


def alt_texts(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """Yield (where, alt text) of every picture: of outputs, and of Markdown."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            yield from ((cell.id, output.metadata.get(kind, {}).get("alt", "")) for kind in kinds)
        if cell.cell_type == "markdown":
            yield from ((cell.id, found) for found in re.findall(r"!\[([^\]]*)\]\(", _prose(cell.source)))


def alt_says_what_is_seen(notebook: NotebookNode) -> list[str]:
    """An alt text has 12 to 60 words, is a sentence that says how something lies, and does not begin "Figure of"."""
    problems = []
    low, high = ALT_WORDS
    for where, alt in alt_texts(notebook):
        words = len(alt.split())
        if not low <= words <= high:
            problems.append(f"{where}: an alt text of {words} words ({low} to {high}): {alt!r}")
        if ONLY_NAMED.match(alt) or not SEEN.search(alt) or not alt.endswith("."):
            problems.append(f"{where}: the alt text does not say in a sentence what is to be seen: {alt!r}")
    return problems


def tables_have_headers(notebook: NotebookNode) -> list[str]:
    """A table begins with a row of column names, none of them empty, above its line of dashes."""
    problems = []
    for cell, text in _markdown(notebook):
        for table in re.findall(r"(?:^[ \t]*\|.*\n?)+", text, re.MULTILINE):
            rows = [[field.strip() for field in row.strip().strip("|").split("|")] for row in table.splitlines()]
            if len(rows) < 2 or not all(re.fullmatch(":?-+:?", field) for field in rows[1]):
                problems.append(f"{cell}: a table without a row of column names: {table.splitlines()[0]!r}")
            elif not all(rows[0]):
                problems.append(f"{cell}: a column without a name: {table.splitlines()[0]!r}")
        if re.search(r"<(table|img)\b", text):
            problems.append(f"{cell}: a table or picture in HTML: write it in Markdown")
    return problems


def links_say_where(notebook: NotebookNode) -> list[str]:
    """A link's text makes sense when the links are read out alone: no "here", no bare address."""
    problems = []
    for cell, text in _markdown(notebook):
        links = [(label, target) for label, target in re.findall(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)", text)]
        for label, target in links:
            if label.strip(" `.*").lower() in SAYS_NOTHING or label.startswith(("http:", "https:")):
                problems.append(f"{cell}: the link {label!r} does not say where it leads: {target}")
        bare = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
        problems += [f"{cell}: a bare address: {url}" for url in re.findall(r"https?://\S+", bare)]
    return problems


def colours_are_not_alone(notebook: NotebookNode) -> list[str]:
    """A cell that draws for itself takes its colours from utils/plots.py."""
    found = re.compile(
        r"""["'](?:#[0-9A-Fa-f]{6}|C\d|tab:\w+|red|green|blue|orange|purple)["']|\bcmap=["'](?!Blues|RdBu_r)"""
    )
    return [f"{cell.id}: a colour of its own, {m.group()}" for cell in code_cells(notebook)
            if (m := found.search(cell.source))]  # fmt: skip


def _markdown(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """Yield (id, text without blocks of code) of every cell of Markdown."""
    return ((cell.id, _prose(cell.source)) for cell in notebook.cells if cell.cell_type == "markdown")


def _prose(text: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)


RULES = (alt_says_what_is_seen, tables_have_headers, links_say_where, colours_are_not_alone)
