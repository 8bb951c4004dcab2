"""Rows of 04's tables, ready to show: records in, one row a method or a pair of methods out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from study.comparison import paired_difference, summarise
from utils.adapters import METHODS
from utils.metrics import METRICS, Estimate
from utils.runs import RunRecord

COSTS = ("trainable", "bytes_on_disk", "saved_bytes", "step_ratio", "latency_ratio", "merged_latency_ratio")


def method_rows(
    records: Iterable[RunRecord], metrics: Sequence[str], costs: Mapping[str, Mapping] | None = None
) -> list[dict[str, object]]:
    """A row a method: `method`, its `name`, the mean over seeds of each metric, and what it costs.

    `costs`: the rows of `cost.reference_costs`, by method. The base's own costs are left out: it trains nothing, so it
    stands outside the competition.
    """
    rows = summarise(records, metrics)
    for row in rows:
        found = (costs or {}).get(row["method"], {})
        if costs is not None:
            row |= {key: row.get(key, found.get(key)) for key in COSTS}
        if row["method"] == "base":
            row |= {key: None for key in COSTS if key in row}
        row["name"] = METHODS.get(row["method"], row["method"])
    return rows


def paired_rows(
    records: Sequence[RunRecord], pairs: Iterable[tuple[str, str]], metrics: Sequence[str]
) -> list[dict[str, str]]:
    """A row for each (method, other): the difference in each metric, seed by seed, and where its interval lies."""
    rows = []
    for method, other in pairs:
        gaps = {name: paired_difference(records, method, other, name) for name in metrics}
        texts = {METRICS[name].label: f"{gap.text(METRICS[name].digits + 1)} {side(gap)}" for name, gap in gaps.items()}
        rows.append({"difference": f"{METHODS[method]} - {METHODS[other]}"} | texts)
    return rows


def side(gap: Estimate) -> str:
    """Where the interval of a difference lies: below 0, above 0, or 0 is inside; three seeds are the least."""
    if gap.n < 3:
        return "(too few seeds)"
    return "(below 0)" if gap.high < 0 else "(above 0)" if gap.low > 0 else "(0 inside)"
