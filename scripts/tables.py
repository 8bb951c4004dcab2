"""A table in Markdown, for the pages that scripts write. Not for: what a notebook prints (`utils/metrics.py`)."""

from __future__ import annotations

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The rows under their titles, as GitHub and Jupyter render them."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (titles, ["---"] * len(titles), *rows)) + "\n"
