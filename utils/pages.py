"""What a notebook shows besides figures: tables as HTML, with the same table as plain text beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from IPython.display import display

from utils.metrics import METRICS, Estimate, best, cell, compare_table, middle, table

STYLE = "text-align: {side}; padding: 0.2em 0.8em; white-space: nowrap;"


def show_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str], caption: str = "") -> None:
    """Show one line a row; headings, units, digits and good directions are those of `METRICS`.

    A value is text, a number, an `Estimate` (its interval stands small beside it), or None ("-"). The best value of a
    column is bold. Viewers without HTML get `metrics.table`.
    """
    titles = [METRICS[column].title if column in METRICS else column for column in columns]
    lines = [[_html(row.get(column), column) for column in columns] for row in rows]
    for place, column in enumerate(columns):
        for index in best([row.get(column) for row in rows], METRICS.get(column)):
            lines[index][place] = f"<b>{lines[index][place]}</b>"
    show_html(html_table(titles, lines, caption), table(rows, columns))


def show_compared(rows: Sequence[tuple[str, object, object]], caption: str = "") -> None:
    """Show `(what, predicted, measured)` rows as predicted, measured, match; equal means exactly equal."""
    lines = [[escape(what), cell(a, None), cell(b, None), "yes" if a == b else "<b>NO</b>"] for what, a, b in rows]
    show_html(html_table(["", "predicted", "measured", "match"], lines, caption), compare_table(rows))


def show_html(html: str, plain: str) -> None:
    """Show `html`; `plain` says the same where HTML cannot be shown."""
    display({"text/html": html, "text/plain": plain}, raw=True)


def html_table(titles: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose cells are HTML already: the first column heads its row and stands left, the others right."""
    sides = ["left", *["right"] * (len(titles) - 1)]
    head = "".join(
        f'<th scope="col" style="{STYLE.format(side=s)}">{escape(t)}</th>' for t, s in zip(titles, sides, strict=True)
    )
    body = ""
    for first, *others in lines:
        body += f'<tr><th scope="row" style="{STYLE.format(side="left")} font-weight: normal;">{first}</th>'
        body += "".join(f'<td style="{STYLE.format(side="right")}">{text}</td>' for text in others) + "</tr>\n"
    above = f'<caption style="text-align: left;">{escape(caption)}</caption>' if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _html(value: object, column: str) -> str:
    """A value as HTML, the interval of an `Estimate` in small print."""
    metric = METRICS.get(column)
    if isinstance(value, Estimate):
        interval = value.text(metric.digits if metric else 3).partition(" ")[2]
        return f"{cell(middle(value), metric)} <small>{interval}</small>"
    return escape(cell(value, metric))
