"""The audit: every number stands in its document or in a record, and every verdict is the one the numbers give."""

from __future__ import annotations

import json
import math
import re
import shutil
import string
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from study import audit, claims
from study.claims import (
    NOT_MEASURED,
    READERS,
    VERDICTS,
    Claim,
    agrees,
    as_text,
    audit_table,
    explain,
    find,
    load_claims,
    source,
    tally,
    verdict_is_consistent,
)
from utils.config import ASSETS, PROFILES
from utils.metrics import Estimate
from utils.runs import RunRecord, write_json

CLAIMS = load_claims()
CONTENT = json.loads((ASSETS / "claims.json").read_text(encoding="utf-8"))
RECORD = json.loads((ASSETS / "runs" / "audit.json").read_text(encoding="utf-8"))
SEEDS = Path(__file__).resolve().parents[2] / "shared" / "seeds"
NAMES = r"GPT-2|T5-large|\bT0\b|mT0|float32|bfloat16|GSM8K|LoRA r=8"  # digits that are no measurement
ROUNDING = {"merged_gap_float32", "merged_gap_bfloat16"}  # the last bits: another processor, another digit
each_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)


def named(claim: Claim) -> dict[str, dict]:
    """Every piece of evidence of a claim under the name that `why` gives it."""
    return {"ours": claim.evidence} | claim.also


def figures(text: str) -> list[float]:
    """The numbers in a document's text; a following M means millions."""
    found = re.findall(r"(\d[\d,]*\.?\d*(?:e-?\d+)?)(M\b)?", text)
    return [float(digits.replace(",", "")) * (1e6 if million else 1) for digits, million in found]


# --- the file -----------------------------------------------------------------------------------------------------


def test_at_least_twenty_claims_of_all_four_documents():
    assert len(CLAIMS) >= 20 and max(Counter(claim.id for claim in CLAIMS).values()) == 1
    assert {claim.document for claim in CLAIMS} == set(CONTENT["documents"]) and len(CONTENT["documents"]) == 4
    topics = {claim.topic for claim in CLAIMS}
    assert {claim.verdict for claim in CLAIMS} <= set(VERDICTS)
    assert sum(len(load_claims(topic=topic)) for topic in topics) == len(CLAIMS)


@each_claim
def test_a_printed_number_is_in_the_quote_and_in_the_check(claim):
    if claim.number is None:
        return
    parts = claim.number.split("; ")
    assert all(part in "\n".join(claim.quote) for part in parts)
    claimed = claim.check["claimed"]
    used = claimed if isinstance(claimed, list) else [claimed, claim.check.get("of", 0)]
    printed = [number for part in parts for number in figures(part)]
    signs = (0, 1)  # "more than nothing", "more than once": not printed
    assert all(number in signs or any(math.isclose(number, p) for p in printed) for number in used)


@each_claim
def test_quotes_are_the_documents_own(claim):
    if not SEEDS.is_dir():
        pytest.skip("the source documents are not beside this copy of the course: ../shared/seeds")
    opening = CONTENT["documents"][claim.document]["opening"]
    texts = [path.read_text(encoding="utf-8") for path in sorted(SEEDS.glob("*.txt"))]
    document = next(text for text in texts if text.lstrip().startswith(opening))
    assert [quote for quote in claim.quote if quote not in document] == []


@each_claim
def test_no_number_of_ours_is_typed_and_each_says_where_it_is_from(claim):
    fields = {field for _, field, _, _ in string.Formatter().parse(claim.why) if field}
    assert fields <= named(claim).keys()
    for text in (claim.claim, re.sub(r"\{\w+\}", "", claim.why)):
        assert not re.search(r"\d", re.sub(NAMES, "", text)), text
    for evidence in named(claim).values():
        assert source(evidence)
        if evidence["kind"] == "test":
            assert find(evidence) == evidence["id"]


# --- the records --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> dict:
    """Every value of the audit, measured now."""
    return audit.measure()


def as_measured(stored: dict, measured: dict) -> list[str]:
    """Names of the stored values that are not what is measured."""

    def same(name: str) -> bool:
        a, b = stored.get(name), measured.get(name)
        if not isinstance(b, float) or not isinstance(a, float):
            return a == b
        return abs(math.log10(a / b)) < 1 if name in ROUNDING else math.isclose(a, b, rel_tol=1e-3)

    return sorted(name for name in stored.keys() | measured.keys() if not same(name))


@pytest.mark.timeout(1200)  # measuring takes seconds; on a computer that is busy with training, minutes
def test_the_record_is_what_is_measured_today(measured):
    assert as_measured(RECORD["values"], measured) == [], "run python -m study.audit"
    assert list(RECORD["values"]) == sorted(RECORD["values"])
    assert RECORD["versions"]["peft"] and RECORD["hardware"]["name"]


@each_claim
def test_every_verdict_is_the_one_the_numbers_give(claim):
    answer = verdict_is_consistent(claim)
    assert answer is not False, f"{claim.verdict!r} does not go with {as_text(find(claim.evidence))}"
    if claim.evidence["kind"] in ("audit", "test", "published"):
        assert answer is True


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder like `assets` with the claims and the audit's record only."""
    shutil.copy(ASSETS / "claims.json", tmp_path)
    write_json(tmp_path / "runs" / "audit.json", RECORD)
    return tmp_path


def test_an_edited_number_turns_a_verdict_over(copied):
    (swapped,) = [claim for claim in CLAIMS if claim.id == "gpt2-count"]
    write_json(copied / "runs" / "audit.json", RECORD | {"values": {"gpt2_ia3_counts": [18432, 124458240]}})
    assert verdict_is_consistent(swapped, copied) is False
    (holds,) = [claim for claim in CLAIMS if claim.id == "bloom-count"]
    assert verdict_is_consistent(holds) is True
    assert verdict_is_consistent(replace(holds, check=holds.check | {"claimed": [344065, 1303455744]})) is False
    assert verdict_is_consistent(replace(holds, verdict="does not hold")) is False


def test_without_a_record_nothing_is_invented(tmp_path):
    mine = [claim for claim in CLAIMS if claim.evidence["kind"] in ("audit", "cost", "runs")]
    assert {claim.evidence["kind"] for claim in mine} == {"audit", "cost", "runs"} < READERS.keys()
    assert [find(claim.evidence, tmp_path) for claim in mine] == [None] * len(mine)
    assert [verdict_is_consistent(claim, tmp_path) for claim in mine] == [None] * len(mine)
    assert tally(mine, tmp_path) == dict.fromkeys(VERDICTS, 0) | {NOT_MEASURED: len(mine)}
    text = audit_table(mine, tmp_path)
    assert not any(verdict in text for verdict in VERDICTS) and "why:" not in text
    assert len(re.findall(NOT_MEASURED, text)) == 2 * len(mine)
    assert find({"kind": "test", "id": "tests/test_claims.py::test_of_nothing"}) is None


def test_cost_is_read_of_todays_configuration_only(tmp_path):
    path = tmp_path / "runs" / "mini" / "cost.json"
    rows = [{"method": "ia3", "step_ratio": 0.9, "merged": None}, {"method": "lora", "step_ratio": 0.6}]
    write_json(path, {"config_id": PROFILES["mini"].config_id(), "rows": rows})
    cost = {"kind": "cost", "method": "ia3", "key": "step_ratio"}
    assert find(cost, tmp_path) == 0.9
    assert find(cost | {"other": "lora"}, tmp_path) == pytest.approx(1.5)
    assert find(cost | {"other": "bitfit"}, tmp_path) is find(cost | {"key": "merged"}, tmp_path) is None
    write_json(path, {"config_id": "another", "rows": rows})
    assert find(cost, tmp_path) is None


def save_run(assets: Path, method: str, seed: int, **metrics: float) -> None:
    """A finished run of today's configuration."""
    profile = PROFILES["mini"]
    config = profile.sampling | {"base": "b", "learning_rate": profile.learning_rates[method]}
    record = RunRecord("finished", method, "mini", profile.config_id(), config, seed, metrics=metrics)
    record.save(assets / "runs" / "mini" / f"positive-{method}-seed{seed}.json")


def test_runs_give_a_mean_a_difference_or_a_setting(tmp_path):
    rate = PROFILES["mini"].learning_rates["ia3"]
    for seed, (ia3, lora) in enumerate([(10, 30), (20, 30), (30, 60)]):
        save_run(tmp_path, "ia3", seed, steps_to_90_percent=ia3)
        save_run(tmp_path, "lora", seed, steps_to_90_percent=lora)
    runs = {"kind": "runs", "method": "ia3", "metric": "steps_to_90_percent"}
    assert find(runs, tmp_path).value == 20 and find(runs, tmp_path).n == 3
    assert find(runs | {"other": "lora"}, tmp_path).value == -20
    assert find(runs | {"other": "full"}, tmp_path) is None
    assert find({"kind": "runs", "method": "ia3", "config": "learning_rate"}, tmp_path) == rate
    assert find({"kind": "runs", "method": "full", "config": "learning_rate"}, tmp_path) is None


# --- agreeing and showing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "check", "answer"),
    [
        (0.0267, {"check": "within", "claimed": 0.03, "tolerance": 0.005}, True),
        (0.0518, {"check": "within", "claimed": 0.01, "tolerance": 0.005}, False),
        (0.12, {"check": "within", "claimed": 5, "of": 45, "tolerance": 0.1}, True),
        (0.01, {"check": "between", "claimed": [0.005, 0.01]}, True),
        ([1, 2], {"check": "equals", "claimed": [1, 2]}, True),
        (False, {"check": "equals", "claimed": True}, False),
        (2.3, {"check": "greater_than", "claimed": 6}, False),
        (Estimate(-5, -9, -1, 3), {"check": "less_than", "claimed": 0}, True),
        (Estimate(-5, -9, -1, 3), {"check": "greater_than", "claimed": 0}, False),
        (Estimate(-5, -9, 1, 3), {"check": "less_than", "claimed": 0}, None),
        (Estimate(0, 0, 0, 3), {"check": "less_than", "claimed": 0}, None),
        (Estimate(-5, -5, -5, 1), {"check": "less_than", "claimed": 0}, None),
    ],
)
def test_agreement(ours, check, answer):
    assert agrees(ours, check) is answer


def test_values_as_text():
    values = [64512, 0.05181, 1.2e-6, True, "ValueError", [3, 4], Estimate(-12.5, -30, 5, 3), None]
    assert [as_text(value) for value in values] == [
        "64,512", "0.0518", "1.2e-06", "yes", "ValueError", "3 of 4", "-12.5 [-30, 5]", NOT_MEASURED,
    ]  # fmt: skip
    assert as_text(0.5, "%") == "0.5 %" and as_text(None, "%") == NOT_MEASURED


def test_the_table_shows_every_claim_within_the_width_of_a_notebook(copied):
    text = audit_table(CLAIMS, copied)
    flat = " ".join(text.split())
    for claim in CLAIMS:
        assert claim.test in flat
        if find(claim.evidence, copied) is not None:
            assert " ".join(explain(claim, copied).split()) in flat
    assert max(map(len, text.splitlines())) <= 120 and "{" not in text
    assert sum(tally(CLAIMS, copied).values()) == len(CLAIMS)
    assert list(claims.COLUMNS)[0] in text.splitlines()[0]
