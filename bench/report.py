"""The benchmark's record as text and a figure of all ratios."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.rows import Row
from utils.metrics import table
from utils.plots import BLUE, GREY, ORANGE, apply_style

NO_GPU = "What needs a GPU was not measured: there was none.\n"


def all_rows(record: Mapping) -> list[Row]:
    """The lines of every part, in the order of measuring."""
    return [line for lines in record["rows"].values() for line in lines]


def machine(record: Mapping) -> str:
    """ "AMD EPYC, 2 cores (avx2), measured by the clock"."""
    hardware = record["hardware"]
    units = f" ({hardware['units']})" if "units" in hardware else ""
    return f"{hardware['name']}, {hardware['cores']} cores{units}, measured by {record['clock']}"


def number(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 1,234, 2.3e+11."""
    return f"{value:.2e}" if value >= 1e7 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(line: Row) -> str:
    """ "2.81 (2.60 to 3.02)"."""
    return f"{number(line['ratio'])} ({number(line['low'])} to {number(line['high'])})"


def reached(line: Row) -> bool | None:
    """Whether the ratio is as good as was aimed at; None where nothing was aimed at."""
    if line["reach"] is None:
        return None
    return line["ratio"] >= line["reach"] if line["better"] == "higher" else line["ratio"] <= line["reach"]


def aim_text(line: Row) -> str:
    """ "2.5 or more: reached", or nothing where nothing was aimed at."""
    if line["reach"] is None:
        return ""
    side = "or more" if line["better"] == "higher" else "or less"
    return f"{line['reach']:,g} {side}: {'reached' if reached(line) else 'missed'}"


def text_table(record: Mapping) -> str:
    """Every line: what, against what, the ratio with its spread, the aim, both values."""
    rows = [
        {
            "what": line["what"], "against": line["against"], "ratio (lowest to highest)": ratio_text(line),
            "aim": aim_text(line), "values": f"{number(line['value'])} | {number(line['yardstick'])} {line['unit']}",
        }
        for line in all_rows(record)
    ]  # fmt: skip
    last = NO_GPU if record["hardware"]["device"] == "cpu" else ""
    return f"{machine(record)}, torch {record['versions']['torch']}\n\n{table(rows, list(rows[0]))}\n{last}"


def ratio_figure(record: Mapping) -> tuple[Figure, str]:
    """A dot for each ratio, a line from its lowest to its highest round, a tick at the aim; and the alt text."""
    apply_style()
    lines = all_rows(record)
    figure, ax = plt.subplots(figsize=(9, 1 + 0.27 * len(lines)))
    for place, line in enumerate(lines):
        ax.plot((line["low"], line["high"]), (place, place), color=BLUE, linewidth=2)
        ax.plot(line["ratio"], place, color=BLUE, marker="o")
        if line["reach"] is not None:
            ax.plot(line["reach"], place, color=ORANGE, marker="|", markersize=14, markeredgewidth=3, zorder=1)
    ax.axvline(1, color=GREY, linewidth=1)
    ax.set(xscale="log", xlabel="ratio (log scale); dot: median, line: lowest to highest round, bar: aim",
           yticks=range(len(lines)))  # fmt: skip
    ax.set_yticklabels([line["name"] for line in lines], fontsize=8)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    aims = [reached(line) for line in lines if line["reach"] is not None]
    alt = f"Ratios of {len(lines)} measurements with their spread, log scale; {sum(aims)} of {len(aims)} aims reached."
    return figure, alt


def write_report(record: Mapping, folder: Path) -> str:
    """`bench.txt` and `bench.png` (its alt text in the metadata) in `folder`; the text."""
    text, (figure, alt) = text_table(record), ratio_figure(record)
    (folder / "bench.txt").write_text(text, encoding="utf-8")
    figure.savefig(folder / "bench.png", metadata={"Software": None, "Description": alt})
    plt.close(figure)
    return text
