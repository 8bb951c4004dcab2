"""The pages that grading leaves behind: one for each student, and one with the written answers for who marks them.

For: `feedback_page`, `written_page`. Everything a student wrote is escaped; a student's page shows one student's
results, no hidden test and no model answer. Not for: tables (`report.py`), the summary (`summary.py`).
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from grading import cells
from grading.marks import number, pseudonym
from grading.summary import open_points

if TYPE_CHECKING:
    from grading.course import Course
    from grading.plan import Question
    from grading.run import Graded

WORDS = {
    "right": "right", "wrong": "not right", "empty": "not attempted", "missing": "missing", "stopped": "stopped",
    "open": "open",
}  # fmt: skip
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
    "td,th{border-bottom:1px solid #ccc;padding:.4em;text-align:left;vertical-align:top}"
    "td:last-child{overflow-wrap:anywhere}"
    ".n{text-align:right;white-space:nowrap}.right{color:#1a6b2f}.wrong,.stopped,.missing{color:#9b1c1c}"
)
REFERENCE = (
    "Notebooks after the training are graded with the reference adapter, so nothing there hangs on your training."
)


def feedback_page(course: Course, graded: Graded) -> str:
    """One student's page."""
    score, still = number(graded.score()), open_points(course, graded)
    rows = [_row(question, graded.results[question.grade_id]) for question in course.questions]
    remarks = "".join(f"<li>{html.escape(text)}</li>" for text in graded.remarks)
    body = f"<h1>{html.escape(graded.submission.student)}: {score} of {number(course.most)} points</h1>"
    if still:
        body += f"<p>{number(still)} points are still open: a person reads these answers.</p>"
    if remarks:
        body += f"<h2>What you handed in</h2><ul>{remarks}</ul>"
    body += f"<p>{REFERENCE}</p>" if any(q.kind == "adapter" for q in course.questions) else ""
    head = "<tr><th>question</th><th>points</th><th>result</th><th>what it means</th></tr>"
    return _page(graded.submission.student, f"{body}<table>{head}{''.join(rows)}</table>")


def _row(question: Question, result: dict) -> str:
    """What became of one question, as a row of the student's table."""
    word, message = _told(result)
    parts = [message, result.get("comment", "")]
    if result.get("checks"):
        parts[0] = ""
        items = "".join(f"<li>{'yes' if ok else 'NO'}: {html.escape(text)}</li>" for _, ok, text in result["checks"])
        parts.append(f"<ul>{items}</ul>")
    text = "<br>".join([*(html.escape(part) for part in parts[:2] if part), *parts[2:]])
    points = f"{number(result['points']) or 'open'} of {number(question.points)}"
    name = f"{html.escape(question.title)}<br>{html.escape(question.notebook)}"
    state = "" if result.get("by_hand") else result["state"]
    verdict = f'<td class="{state}">{html.escape(word)}</td>'
    return f'<tr><td>{name}</td><td class="n">{points}</td>{verdict}<td>{text}</td></tr>'


def _told(result: dict) -> tuple[str, str]:
    """In a word what became of an answer, and what that means, which does not say the word again."""
    if result.get("by_hand"):
        return "marked by hand", ""
    word = WORDS.get(result["state"], result["state"])
    message = result["message"].removeprefix(f"{word}: ")
    return word, "" if message == word else message


def written_page(course: Course, class_: list[Graded]) -> str:
    """What a person has to read, question by question with its model answer, without the students' names."""
    parts = [
        "<h1>Written answers</h1><p>Points and comments go into written.csv; then run make grade again. The heading of "
        "an answer is the end of its key there.</p>"
    ]
    for question in (q for q in course.questions if q.kind == "written"):
        name = f"{html.escape(question.title)} ({question.grade_id})"
        parts.append(f"<h2>{name}, {number(question.points)} points</h2>{_pre(question.card.partition('<details')[0])}")
        parts.append(f"<details open><summary>Model answer and points</summary>{_pre(_model(question))}</details>")
        for graded in sorted(class_, key=pseudonym):
            answer = graded.results[question.grade_id].get("answer")
            if answer:
                parts.append(f"<h3>{pseudonym(graded)}</h3>{_pre(answer)}")
    return _page("Written answers", "".join(parts) + _others(course, class_))


def _others(course: Course, class_: list[Graded]) -> str:
    """The open questions that are no written answers: nobody has judged them, and each says why."""
    found = [
        f"<li>{pseudonym(graded)}, {html.escape(q.title)} ({q.grade_id}), {number(q.points)} points: "
        f"{html.escape(result.get('failure') or result['message'])}</li>"
        for q in course.questions
        for graded in sorted(class_, key=pseudonym)
        if (result := graded.results[q.grade_id])["state"] == "open" and not result.get("answer")
    ]
    return f"<h2>Open, and no written answer</h2><ul>{''.join(found)}</ul>" if found else ""


def _model(question: Question) -> str:
    """Our answer to a written question, its markers taken out."""
    return "\n".join(line for line in question.source.splitlines() if line.strip() not in cells.SOLUTION)


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text.strip())}</pre>"


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
