"""The notebooks quote no measurement that nothing stands behind: in 04, each number of the text is looked up here."""

from __future__ import annotations

import math
import re

import nbformat
import pytest
from transformers import GPT2Config

from study.claims import load_claims
from utils.config import ROOT
from utils.sizes import predict_ia3_count, predict_lora_count

MEASUREMENT = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+(?: ?%)?| ?%|e-?\d+)")  # 4.6, 39.8 %, 95 %, 1e-3
PUBLISHED = next(claim.also["gsm8k"] for claim in load_claims() if "gsm8k" in claim.also)
KNOWN = {
    f"{PUBLISHED['minus']} %", f"{PUBLISHED['value']} %", "5e-3", "1e-3",  # peft's comparison, and its two rates
    f"{predict_lora_count(GPT2Config()) / predict_ia3_count(GPT2Config()):.1f}",
    "0.01", f"{math.expm1(0.01):.0%}".replace("%", " %"),  # a change of loss, and what it is in perplexity
    "95 %",  # the level of the intervals
}  # fmt: skip


def prose() -> str:
    """The lesson's text. Exercises (cells with nbgrader metadata) hold examples, which their own tests check."""
    notebook = nbformat.read(ROOT / "04-Compare.ipynb", as_version=4)
    lesson = [cell for cell in notebook.cells if "nbgrader" not in cell.metadata]
    return "\n".join(cell.source for cell in lesson if cell.cell_type == "markdown")


def test_every_number_of_the_comparison_has_a_source():
    assert sorted(set(MEASUREMENT.findall(prose())) - KNOWN) == []


@pytest.mark.parametrize("sentence", ["It reached 0.68 of them.", "That is 45.6 %.", "a rate of 3e-3"])
def test_a_number_typed_by_hand_is_found(sentence):
    assert set(MEASUREMENT.findall(sentence)) - KNOWN
