"""The documents' claims, each held against a number of ours: what they say, what we find, and the verdict.

Reads `assets/claims.json`, finds our number in its record, prints the table of 04, and recomputes whether that number
agrees with the verdict in the file. What has no record reads "not measured"; no number of ours is typed by hand.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path

from study.comparison import misfit, paired_difference, summarise
from utils.config import ASSETS, PROFILES, ROOT
from utils.metrics import Estimate
from utils.pages import html_table, show_html
from utils.runs import load_runs, read_json

HOLDS, CONDITION, FAILS, UNTESTED = VERDICTS = (
    "holds", "holds with a condition", "does not hold", "cannot be tested here",
)  # fmt: skip
NOT_MEASURED = "not measured"
COLUMNS = {"claim": 46, "the document says": 24, "we find": 30, "verdict": 14}
Value = bool | int | float | str | list | Estimate


@dataclass(frozen=True)
class Claim:
    """One claim. `number` and `quote` are the document's own text; `why` has `{names}` where numbers belong.

    `evidence` says where our number is, `also` the same for further numbers in `why`, `check` what the document claims
    about ours. Kinds of evidence: `audit`, `cost`, `runs`, `test`, `published`.
    """

    id: str
    topic: str
    claim: str
    document: str
    number: str | None
    quote: list[str]
    test: str
    evidence: dict
    also: dict[str, dict]
    check: dict
    verdict: str
    why: str


def load_claims(path: Path | str = ASSETS / "claims.json", topic: str | None = None) -> list[Claim]:
    """All claims of the file, or those of one topic."""
    claims = json.loads(Path(path).read_text(encoding="utf-8"))["claims"]
    return [Claim(**entry) for entry in claims if topic in (None, entry["topic"])]


# --- our number ---------------------------------------------------------------------------------------------------
def find(evidence: Mapping, assets: Path = ASSETS) -> Value | None:
    """What an `evidence` entry points to; None where the record, the key or the test is missing."""
    return READERS[evidence["kind"]](evidence, assets)


def _from_cost(evidence: Mapping, assets: Path) -> float | None:
    """A method's value in `cost.json`, divided by that of the method `other` where one is named."""
    record = read_json(assets / "runs" / "mini" / "cost.json")
    if record.get("config_id") != PROFILES["mini"].config_id():
        return None
    values = {row["method"]: row.get(evidence["key"]) for row in record["rows"]}
    ours, other = values.get(evidence["method"]), values.get(evidence.get("other"))
    if ours is None or "other" not in evidence:
        return ours
    return ours / other if other else None


def _from_runs(evidence: Mapping, assets: Path) -> Value | None:
    """A metric's mean over seeds, or its difference to `other`'s seed by seed, or a setting that all runs share."""
    folder, profile = assets / "runs" / "mini", PROFILES["mini"]
    runs = load_runs(folder, profile.config_id())[0] if folder.is_dir() else []
    runs = [run for run in runs if run.task == "positive" and not misfit(run, profile, runs[0].config["base"])]
    method, other, metric = evidence["method"], evidence.get("other"), evidence.get("metric")
    runs = [run for run in runs if run.method in (method, other)]
    if "config" in evidence:
        found = {run.config.get(evidence["config"]) for run in runs}
        return found.pop() if len(found) == 1 else None
    if other is None:
        return summarise(runs, [metric])[0][metric] if runs else None
    try:
        return paired_difference(runs, method, other, metric)
    except ValueError:
        return None


def _from_test(evidence: Mapping, _assets: Path) -> str | None:
    """The test's own name, where there is such a test."""
    path, _, name = evidence["id"].partition("::")
    exists = (ROOT / path).is_file() and f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
    return evidence["id"] if exists else None


READERS = {
    "audit": lambda of, assets: read_json(assets / "runs" / "audit.json").get("values", {}).get(of["key"]),
    "cost": _from_cost,
    "runs": _from_runs,
    "test": _from_test,
    "published": lambda of, _: of["value"] - of.get("minus", 0),  # less another number from the same source
}
# --- does it agree? -----------------------------------------------------------------------------------------------
CHECKS = {  # the interval in which our number must lie for the claim to be right, from what is claimed
    "equals": lambda claimed, _: (claimed, claimed),
    "within": lambda claimed, tolerance: (claimed - tolerance, claimed + tolerance),
    "less_than": lambda claimed, _: (-math.inf, claimed),
    "greater_than": lambda claimed, _: (claimed, math.inf),
    "between": lambda claimed, _: tuple(claimed),
}


def agrees(ours: Value, check: Mapping) -> bool | None:
    """Whether our number is as claimed; None where it is an estimate and chance could decide either way.

    `check` has `claimed` (divided by `of` where given), for "within" a `tolerance` in the same unit.
    """
    claimed = check["claimed"] / check["of"] if "of" in check else check["claimed"]
    if check["check"] == "equals":
        return ours == claimed
    low, high = CHECKS[check["check"]](claimed, check.get("tolerance"))
    if not isinstance(ours, Estimate):
        return low <= ours <= high
    if ours.n < 2:
        return None  # one run has no interval
    inside, outside = low < ours.low and ours.high < high, ours.high < low or high < ours.low
    return True if inside else False if outside else None


def verdict_is_consistent(claim: Claim, assets: Path = ASSETS) -> bool | None:
    """Whether the verdict in the file is the one that our number gives; None where nothing is measured yet."""
    ours = find(claim.evidence, assets)
    if ours is None:
        return None
    return claim.verdict in {True: (HOLDS, CONDITION), False: (FAILS,), None: (UNTESTED,)}[agrees(ours, claim.check)]


# --- the table ----------------------------------------------------------------------------------------------------
def as_text(value: Value | None, unit: str = "") -> str:
    """A value as text: integers with separators, other numbers with three significant digits, then the unit."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, Estimate):
        text = f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]"
    elif isinstance(value, list):
        text = " of ".join(map(as_text, value))
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    else:
        text = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    return f"{text} {unit}".strip()


def source(evidence: Mapping) -> str:
    """Where a number lives, in words: the record and its entry, the test, the publication."""
    against = f" against {evidence['other']}" if "other" in evidence else ""
    what = evidence.get("metric") or evidence.get("config")
    return {
        "audit": lambda: f"runs/audit.json, {evidence['key']}",
        "cost": lambda: f"runs/mini/cost.json, {evidence['key']} of {evidence['method']}{against}",
        "runs": lambda: f"run records in runs/mini, {what} of {evidence['method']}{against}",
        "test": lambda: evidence["id"],
        "published": lambda: evidence["source"],
    }[evidence["kind"]]()


def explain(claim: Claim, assets: Path = ASSETS) -> str:
    """The claim's `why` with our numbers in it."""
    named = {"ours": claim.evidence} | claim.also
    return claim.why.format(**{name: as_text(find(e, assets), e.get("unit", "")) for name, e in named.items()})


def audit_table(claims: Sequence[Claim], assets: Path = ASSETS) -> str:
    """One paragraph a claim: claim, document, our number and verdict side by side; below, how it was tested and why.

    Where our number is missing, the verdict reads "not measured" and no reason is given.
    """
    lines = [*_beside(list(COLUMNS)), *_beside(["-" * width for width in COLUMNS.values()])]
    for claim in claims:
        ours = find(claim.evidence, assets)
        says = f"{claim.document}: {claim.number or 'no number'}"
        found, verdict = as_text(ours, claim.evidence.get("unit", "")), NOT_MEASURED if ours is None else claim.verdict
        lines += _beside([claim.claim, says, found, verdict])
        lines += _below("tested", f"{claim.test} [{source(claim.evidence)}]")
        lines += [*(_below("why", explain(claim, assets)) if ours is not None else []), ""]
    return "\n".join(lines).rstrip()


def show_claims(*wanted: str) -> None:
    """Show the claims of these ids or topics as a table; viewers without HTML get `audit_table`."""
    claims, lines = [claim for claim in load_claims() if {claim.id, claim.topic} & {*wanted}], []
    for claim in claims:
        ours = find(claim.evidence)
        says, found = f"{claim.document}: {claim.number or 'no number'}", as_text(ours, claim.evidence.get("unit", ""))
        why = f"{claim.test} {explain(claim) if ours is not None else ''}"
        texts = [_broken(text, width) for text, width in ((says, 22), (found, 22))]
        verdict = _broken(NOT_MEASURED if ours is None else claim.verdict, 14)
        lines.append([f"{_broken(claim.claim)}<br><small>{_broken(why, 70)}</small>", *texts, f"<b>{verdict}</b>"])
    show_html(html_table(list(COLUMNS), lines), audit_table(claims))


def _broken(text: str, width: int = 60) -> str:
    """Text as HTML, in lines of at most `width` characters."""
    return "<br>".join(map(escape, textwrap.wrap(text, width, break_on_hyphens=False)))


def tally(claims: Sequence[Claim], assets: Path = ASSETS) -> dict[str, int]:
    """How many claims have each verdict; those whose number is missing count as "not measured"."""
    found = Counter(NOT_MEASURED if find(claim.evidence, assets) is None else claim.verdict for claim in claims)
    return {verdict: found[verdict] for verdict in (*VERDICTS, NOT_MEASURED)}


def _beside(cells: Sequence[str]) -> list[str]:
    """The cells side by side, each wrapped to its column's width."""
    widths = list(COLUMNS.values())
    wrapped = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(cells, widths, strict=True)]
    rows = zip_longest(*wrapped, fillvalue="")
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _below(label: str, text: str) -> list[str]:
    """A labelled paragraph, indented."""
    text, spaces = f"{label}: {text}", " " * 6
    return textwrap.wrap(text, 118, initial_indent=spaces[:4], subsequent_indent=spaces, break_on_hyphens=False)
