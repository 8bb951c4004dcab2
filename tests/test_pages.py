"""HTML of a notebook: texts end at a sentence, colour is never alone, the dial works with and without scripts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from utils.pages import show_dial, show_texts, tint, whole_sentences
from utils.plots import contrast

PROMPTS = [f"Prompt {i}" for i in range(8)]
POINTS = [
    {
        "strength": step / 2, "share": (step + 6) / 12,
        "texts": {p: f"text <{step}> & of {p}. Cut off he" for p in PROMPTS},
    }
    for step in range(-6, 7)
]  # fmt: skip
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def shown(monkeypatch):
    bundles: list[dict] = []
    monkeypatch.setattr("utils.pages.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        (" One. Two! Three", "One. Two!"),
        (" no end", "no end ..."),
        ('He said "go!" and', 'He said "go!"'),
        ("A 7.5 of", "A 7.5 of ..."),
    ],
)
def test_texts_end_at_a_sentence(text, ended):
    assert whole_sentences(text) == ended and whole_sentences(ended) == ended


def test_texts_are_tinted_and_the_probability_is_printed(shown):
    show_texts([{"a": "-3", "text": ("<Bad>. x", [0.01, 0.2])}, {"a": "+3", "text": ("Good.", [0.99])}], ["a", "text"])
    html, plain = shown[0]["text/html"], shown[0]["text/plain"]
    assert "&lt;Bad&gt;.<br>" in html and "P(positive) 0.01 / 0.20" in html and html.count("<tr>") == 3
    assert tint(0.01) in html and "text: <Bad>.  [P(positive) 0.01 / 0.20]" in plain
    assert tint(0.5) == "#ffffff" and all(contrast("black", tint(p / 10)) > 7 for p in range(11))


class Table(HTMLParser):
    """The rows of the page's tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_dial_is_small_needs_nothing_from_outside_and_is_a_table_without_scripts(shown):
    show_dial(POINTS)
    html = shown[0]["text/html"]
    assert len(html.encode()) < 120_000 and not re.search(r"https?:|src=", html)
    rows = Table(re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)).rows  # as JupyterLab shows it, untrusted
    assert len(rows) == 1 + 13 * 8 and rows[1][:3] == ["-3", "0%", "Prompt 0"]
    assert rows[1][3].strip() == "text <-6> & of Prompt 0." and "a = +3: 100%" in shown[0]["text/plain"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH: it drags the dial")
def test_the_dial_can_be_dragged_in_a_browser(shown, tmp_path):
    show_dial(POINTS)
    drag = """<pre id="seen"></pre><script>
    var seen = [], dial = document.querySelector(".ia3-dial"), input = dial.querySelector("input");
    function look() {
      seen.push([input.getAttribute("aria-valuetext"), dial.querySelector("output").textContent,
        dial.querySelector(".ia3-bar").style.width, input.labels.length, dial.querySelector("details").open]);
    }
    look();
    input.value = 12; input.dispatchEvent(new Event("input")); look();
    dial.querySelector("select").value = "Prompt 5";
    dial.querySelector("select").dispatchEvent(new Event("change")); look();
    document.getElementById("seen").textContent = JSON.stringify(seen);
    </script>"""
    page = tmp_path / "dial.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{shown[0]['text/html']}{drag}", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    found = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', found.stdout)
    start, right, other = json.loads(seen.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert start[0] == "a = 0" and "50% of the texts" in start[1] and start[3:] == [1, False]
    assert right[0] == "a = +3" and "text <6> & of Prompt 0." in right[1] and right[2] == "100%"
    assert "Prompt 5 text <6>" in other[1]
