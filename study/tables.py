"""Rows of the tables of 04 and of the claims lab, ready to show: records in, one row a method or a pair of them out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from study.comparison import paired_difference, summarise
from utils.adapters import METHODS
from utils.metrics import METRICS, Estimate, mean_interval
from utils.runs import RunRecord

COSTS = ("trainable", "bytes_on_disk", "saved_bytes", "step_ratio", "latency_ratio", "merged_latency_ratio")
RIVAL_SCORES = {
    "positivity": "positive: words", "positivity_chars": "positive: characters",
    "positivity_embeddings": "positive: embeddings", "perplexity": "perplexity of its own text, x base",
}  # fmt: skip


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


def at_price(rows: Sequence[Mapping], curve: str, score: str, price: float, sign: int) -> dict[int, float]:
    """By seed, `score` where real reviews cost `price` times the base's perplexity; straight between two strengths.

    `sign` 1 goes towards positive strengths, -1 towards negative ones. A seed that never costs so much is left out.
    """
    values = {}
    for base in (row for row in rows if row["curve"] == "contrast" and row["strength"] == 0):
        own = [row for row in rows if row["curve"] == curve and row["seed"] == base["seed"] and score in row]
        arm = [base, *sorted((r for r in own if sign * r["strength"] > 0), key=lambda row: abs(row["strength"]))]
        costs = [math.exp(row["held_out_loss"]["value"] - base["held_out_loss"]["value"]) for row in arm]
        if max(costs) >= price and score in base:
            level = base[score]["value"] if score == "perplexity" else 1
            shares = [row[score]["value"] / level for row in arm]
            values[base["seed"]] = float(np.interp(price, np.maximum.accumulate(costs), shares))
    return values


def rival_rows(rows: Sequence[Mapping], prices: Sequence[float]) -> list[dict[str, str]]:
    """A row for each direction, price and score: both rivals at this price, and their difference, seed by seed."""
    lines = []
    for sign, price in ((sign, price) for sign in (1, -1) for price in prices):
        for score, label in RIVAL_SCORES.items():
            first, second = (at_price(rows, curve, score, price, sign) for curve in ("contrast", "steering"))
            both = sorted(first.keys() & second.keys())
            if not both:
                continue
            gap = mean_interval([first[seed] - second[seed] for seed in both])
            line = {"towards": "praise" if sign > 0 else "blame", "price": f"x {price:.2f}", "score": label}
            line |= {name: mean_interval([found[seed] for seed in both]).text(2)
                     for name, found in (("contrast", first), ("steering", second))}  # fmt: skip
            lines.append(line | {"contrast - steering": f"{gap.text(2)} {side(gap)}"})
    return lines
