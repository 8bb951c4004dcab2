"""The rows of 04's tables: names, costs, and differences seed by seed."""

from __future__ import annotations

import pytest

from study.tables import method_rows, paired_rows, side
from utils.metrics import Estimate
from utils.runs import RunRecord


def run(method: str, seed: int, positivity: float) -> RunRecord:
    counts = {"trainable": 0 if method == "base" else 7}
    record = RunRecord("finished", method, "mini", "id", {}, seed, counts=counts)
    record.metrics = {"positivity": positivity}
    return record


RECORDS = [
    run(method, seed, value + 0.01 * seed) for method, value in (("base", 0.5), ("ia3", 0.7)) for seed in range(3)
]


def test_a_row_has_its_name_and_costs_and_the_base_is_out_of_competition():
    base, ia3 = method_rows(
        RECORDS, ["trainable", "positivity"], {"ia3": {"step_ratio": 0.9}, "base": {"step_ratio": 1}}
    )
    assert base["name"].startswith("base") and base["trainable"] is None and base["step_ratio"] is None
    assert ia3["name"] == "(IA)³" and ia3["trainable"] == 7 and ia3["step_ratio"] == 0.9 and ia3["saved_bytes"] is None
    assert ia3["positivity"].value == pytest.approx(0.71)
    assert "step_ratio" not in method_rows(RECORDS, ["positivity"])[1]


def test_differences_say_where_their_interval_lies():
    (row,) = paired_rows(RECORDS, [("ia3", "base")], ["positivity"])
    assert row["difference"].startswith("(IA)³ - base") and row["positive, words"].endswith("(above 0)")
    assert (
        "too few seeds"
        in paired_rows(RECORDS[:1] + RECORDS[3:4], [("ia3", "base")], ["positivity"])[0]["positive, words"]
    )
    assert [side(Estimate(0, low, high, 3)) for low, high in ((-2, -1), (-1, 1), (1, 2))] == [
        "(below 0)", "(0 inside)", "(above 0)",
    ]  # fmt: skip
