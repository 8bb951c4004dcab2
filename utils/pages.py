"""What a notebook shows besides figures: tables, texts and a dial as HTML, with plain text beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from IPython.display import display

from utils.metrics import METRICS, Estimate, best, cell, middle, table

LOW, HIGH = (244, 177, 131), (142, 190, 230)  # orange and blue: black is read well on both and on all between
TEXT_STYLE = "text-align: left; vertical-align: top; padding: 0.4em 0.8em; white-space: normal; max-width: 36em;"
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
    return _table(head, body, caption)


def _table(head: str, body: str, caption: str) -> str:
    """The table around a row of heads and the rows of a body."""
    above = f'<caption style="text-align: left;">{escape(caption)}</caption>' if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _html(value: object, column: str) -> str:
    """A value as HTML, the interval of an `Estimate` in small print."""
    metric = METRICS.get(column)
    if isinstance(value, Estimate):
        interval = value.text(metric.digits if metric else 3).partition(" ")[2]
        return f"{cell(middle(value), metric)} <small>{interval}</small>"
    return escape(cell(value, metric))


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last full sentence; all of it and "..." where no sentence ends."""
    ended = re.match(r".*[.!?](?=[\s\"')]|$)[\"')]*", text, re.DOTALL)
    return " ".join(ended.group().split()) if ended else " ".join(text.split()) + " ..."


def tint(probability: float) -> str:
    """The background of a text with this probability of being positive: orange at 0, white at 1/2, blue at 1."""
    end, share = (HIGH if probability > 0.5 else LOW), abs(2 * probability - 1)
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02x}" for channel in end)


def show_texts(rows: Sequence[Mapping[str, object]], columns: Sequence[str], caption: str = "") -> None:
    """Show texts in columns, one line a row, each ended at a sentence.

    A value is a label, or `(text, probabilities)`: each judge's P(positive) stands below the text, and the first one
    tints it (orange is negative, blue is positive).
    """
    head = "".join(f'<th scope="col" style="{TEXT_STYLE}">{escape(column)}</th>' for column in columns)
    body, plain = "", [caption] if caption else []
    for row in rows:
        body += "<tr>"
        for column in columns:
            if isinstance(row[column], str):
                body += f'<th scope="row" style="{TEXT_STYLE} font-weight: normal;">{escape(row[column])}</th>'
                plain.append(row[column])
                continue
            text, judged = whole_sentences(row[column][0]), " / ".join(f"{p:.2f}" for p in row[column][1])
            colour = f"background-color: {tint(row[column][1][0])}; color: #000000;"
            body += f'<td style="{TEXT_STYLE} {colour}">{escape(text)}<br><small>P(positive) {judged}</small></td>'
            plain.append(f"    {column}: {text}  [P(positive) {judged}]")
        body += "</tr>\n"
    show_html(_table(head, body, caption), "\n".join(plain))


DIAL = """<div class="ia3-dial mathjax_ignore">
<div class="ia3-all" tabindex="0" role="region" aria-label="All texts of the dial"
style="max-height: 26em; overflow: auto;">
<table><caption style="text-align: left;">{caption}</caption>
<thead><tr><th scope="col">a</th><th scope="col">judged positive</th><th scope="col">prompt</th>
<th scope="col">text</th></tr></thead>
<tbody>
{body}</tbody></table></div>
<script>
(function () {{
  document.querySelectorAll(".ia3-dial:not([data-on])").forEach(function (dial) {{
    dial.setAttribute("data-on", "1");
    var all = dial.querySelector(".ia3-all"), texts = {{}}, shares = {{}}, strengths = [], prompts = [];
    all.querySelectorAll("tbody tr").forEach(function (row) {{
      var cell = Array.prototype.map.call(row.children, function (c) {{ return c.textContent; }});
      if (strengths.indexOf(cell[0]) < 0) strengths.push(cell[0]);
      if (prompts.indexOf(cell[2]) < 0) prompts.push(cell[2]);
      texts[cell[0] + "|" + cell[2]] = cell[3];
      shares[cell[0]] = cell[1];
    }});
    var panel = document.createElement("div");
    panel.innerHTML = '<p><label>Prompt <select></select></label></p>' +
      '<p><label>Strength a <input type="range" min="0" step="1" style="width: 60%; vertical-align: middle;">' +
      '</label> <b class="ia3-a"></b></p><div aria-hidden="true" ' +
      'style="background: #e3e3e3; height: 0.9em; max-width: 40em;">' +
      '<div class="ia3-bar" style="background: #0072b2; height: 100%;"></div></div>' +
      '<output aria-live="polite" ' +
      'style="display: block; margin-top: 0.6em; min-height: 7em; max-width: 44em;"></output>';
    var select = panel.querySelector("select"), input = panel.querySelector("input");
    prompts.forEach(function (prompt) {{ select.add(new Option(prompt, prompt)); }});
    input.max = strengths.length - 1;
    input.value = strengths.indexOf("0");
    function turn() {{
      var a = strengths[input.value], out = panel.querySelector("output");
      input.setAttribute("aria-valuetext", "a = " + a);
      panel.querySelector(".ia3-a").textContent = "a = " + a;
      panel.querySelector(".ia3-bar").style.width = shares[a];
      out.textContent = shares[a] + " of the texts at a = " + a + " are judged positive. One of them: ";
      var text = document.createElement("p");
      text.textContent = select.value + " " + texts[a + "|" + select.value];
      out.appendChild(text);
    }}
    input.addEventListener("input", turn);
    select.addEventListener("change", turn);
    var more = document.createElement("details");
    more.innerHTML = "<summary>All texts as a table</summary>";
    more.appendChild(all);
    dial.append(panel, more);
    turn();
  }});
}})();
</script></div>"""


def show_dial(points: Sequence[Mapping[str, object]], caption: str = "One text a prompt at each strength a") -> None:
    """Show a slider over `points` that needs no kernel: `strength`, `share` (0 to 1), `texts` {prompt: continuation}.

    The texts are a table that a small script turns into a slider; where scripts are off, the table stays.
    """
    body, plain = "", [caption]
    for point in points:
        strength = f"{point['strength']:+g}" if point["strength"] else "0"
        plain.append(f"a = {strength}: {point['share']:.0%} of the texts are judged positive")
        for prompt, text in point["texts"].items():
            cells = (f"{point['share']:.0%}", prompt, whole_sentences(text))
            body += f'<tr><th scope="row">{strength}</th>'
            body += "".join(f'<td style="text-align: left;">{escape(value)}</td>' for value in cells) + "</tr>\n"
    show_html(DIAL.format(caption=escape(caption), body=body), "\n".join(plain))
