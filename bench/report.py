"""The benchmark's record as text and figures: one table, one figure of all ratios, one figure for each way to grow.

Reads the record only. Not for: measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.rows import NOT_MEASURED, Row, reached
from utils.adapters import METHODS
from utils.metrics import table
from utils.plots import BLUE, GREY, ORANGE, STYLES, apply_style

SERIES = {  # of the growth: the axis, what stays the same
    "size": "parameters of the model",
    "length": "tokens a row, as many rows as keep the tokens the same",
    "batch": "rows of 128 tokens in a batch",
    "residents": "(IA)³ adapters resident on one base",
}
# From 0 and linear: on a log axis the noise would look like growth.
HARDLY_GROWS = {("length", "speed"), ("length", "memory"), ("batch", "speed"), ("residents", "speed")}


def all_rows(record: Mapping) -> list[Row]:
    """The lines of every part, in the order of measuring."""
    return [line for lines in record["rows"].values() for line in lines]


def number(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 1,234, 2.3e+11."""
    return f"{value:.2e}" if value >= 1e7 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(line: Row) -> str:
    """ "2.81 (2.60 to 3.02)", or why there is none."""
    if line["ratio"] is None:
        return line["reason"]
    return f"{number(line['ratio'])} ({number(line['low'])} to {number(line['high'])})"


def aim_text(line: Row) -> str:
    """ "2.5 or more: reached", or nothing where nothing was aimed at."""
    done = reached(line)
    if done is None:
        return ""
    side = "or more" if line["better"] == "higher" else "or less"
    return f"{line['reach']:,g} {side}: {'reached' if done else 'missed'}"


def text_table(record: Mapping) -> str:
    """Every line: what, against what, the ratio with its spread, the aim, both values."""
    rows = [
        {
            "what": line["what"], "against": line["against"], "ratio (lowest to highest)": ratio_text(line),
            "aim": aim_text(line),
            "values": f"{number(line['value'])} | {number(line['yardstick'])} {line['unit']}" if line["ratio"] else "",
        }
        for line in all_rows(record)
    ]  # fmt: skip
    hardware = record["hardware"]
    head = f"{hardware['device']}, {hardware['name']}, {hardware['cores']} cores, torch {record['versions']['torch']}"
    head += f", measured by {record['clock']}"
    return f"{head}\n\n{table(rows, list(rows[0]))}\n"


def ratio_figure(record: Mapping) -> tuple[Figure, str]:
    """A dot for each ratio, a line from its lowest to its highest round, a tick at the aim; and the alt text."""
    apply_style()
    lines = [line for line in all_rows(record) if line["ratio"] is not None]
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
    aims = [reached(line) for line in lines if reached(line) is not None]
    alt = f"Ratios of {len(lines)} measurements with their spread, log scale; {sum(aims)} of {len(aims)} aims reached."
    return figure, alt


def measured(points: Sequence[Mapping]) -> list[Mapping]:
    """The points that have values, sorted by their place."""
    return sorted((point for point in points if "reason" not in point), key=lambda point: point["x"])


def growth_figure(series: str, points: Sequence[Mapping]) -> tuple[Figure, str]:
    """Tokens a second and memory against `series`, and the alt text."""
    apply_style()
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.8))
    found = measured(points)
    (draw_residents if series == "residents" else draw_training)(speed, memory, found)
    for ax, name in ((speed, "speed"), (memory, "memory")):
        ax.set_xscale("log")
        if (series, name) in HARDLY_GROWS:
            ax.set_ylim(0, None)
        else:
            log_axis(ax)
        ax.legend(fontsize=9)
    figure.supxlabel(SERIES[series], fontsize=11)
    speed.set_ylabel("tokens/s")
    memory.set_ylabel("memory (MiB)")
    alt = (
        f"Two panels against {SERIES[series]}, from {found[0]['x']:,} to {found[-1]['x']:,}: "
        f"tokens a second, and memory in MiB."
    )
    return figure, alt


def log_axis(ax: Axes) -> None:
    """A vertical log axis with plain numbers at 1, 2 and 5 of every decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def draw_training(speed: Axes, memory: Axes, points: Sequence[Mapping]) -> None:
    """A line for each method."""
    for method in dict.fromkeys(point["method"] for point in points):
        here = [point for point in points if point["method"] == method]
        colour, marker, style = STYLES[method]
        for ax, values in (
            (speed, [point["tokens_per_second"] for point in here]),
            (memory, [point["peak_bytes"] / 2**20 for point in here]),
        ):
            ax.plot([p["x"] for p in here], values, color=colour, marker=marker, linestyle=style, label=METHODS[method])


def draw_residents(speed: Axes, memory: Axes, points: Sequence[Mapping]) -> None:
    """Writing under one adapter and mixed; what the adapters take, and their bare numbers."""
    x = [point["x"] for point in points]
    lines = (
        (speed, "one_tokens_per_second", "one adapter for all rows", BLUE, "o", "-", 1),
        (speed, "mixed_tokens_per_second", "eight rows, each its own", ORANGE, "s", "--", 1),
        (memory, "adapters_bytes", "grown by (process)", BLUE, "o", "-", 2**20),
        (memory, "numbers_bytes", "their numbers alone", GREY, "x", ":", 2**20),
    )
    for ax, key, label, colour, marker, style, unit in lines:
        values = [max(point[key], 1) / unit for point in points]
        ax.plot(x, values, color=colour, marker=marker, linestyle=style, label=label)


def figures(record: Mapping) -> Iterator[tuple[str, Figure, str]]:
    """Name, figure and alt text of all there is to draw."""
    if any(line["ratio"] is not None for line in all_rows(record)):
        yield ("bench", *ratio_figure(record))
    for series, by_place in record["growth"].items():
        points = [point for found in by_place.values() for point in found]
        if measured(points):
            yield (f"growth-{series}", *growth_figure(series, points))


def write_report(record: Mapping, folder: Path) -> list[Path]:
    """The table as `bench.txt`, every figure as PNG with its alt text inside and beside it; the files."""
    (folder / "bench.txt").write_text(text_table(record), encoding="utf-8")
    written, alts = [folder / "bench.txt"], {}
    for name, figure, alt in figures(record):
        path = folder / f"{name}.png"
        figure.savefig(path, metadata={"Software": None, "Description": alt})
        plt.close(figure)
        written.append(path)
        alts[path.name] = alt
    (folder / "alt.txt").write_text("".join(f"{name}: {alt}\n" for name, alt in alts.items()), encoding="utf-8")
    return written


def not_measured(record: Mapping) -> list[str]:
    """Names of the lines without a ratio, for the command's last words."""
    return [line["name"] for line in all_rows(record) if str(line.get("reason", "")).startswith(NOT_MEASURED)]
