"""Write the measured parts of README.md, and its picture, from the committed records: no number there is typed by hand.

    python scripts/readme_numbers.py                                    # docs/images/dial.png and the marked parts
    python scripts/readme_numbers.py --check                            # exit code 1 where they are not up to date
    python scripts/readme_numbers.py --replay build/course/times.json   # first keep the times of the last `make course`

A part lies between `<!-- numbers: NAME -->` and `<!-- end -->`. What has no record yet reads "not measured".
tests/test_readme.py holds README.md against this script. Not for: students.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_report import aim_text, all_rows, ratio_text  # noqa: E402
from readme_labs import labs_part  # noqa: E402
from tables import table  # noqa: E402

from utils.adapters import METHODS  # noqa: E402
from utils.checks import EXERCISES  # noqa: E402
from utils.claims import load_claims, tally  # noqa: E402
from utils.comparison import misfit, summarise  # noqa: E402
from utils.config import ASSETS, PROFILES, describe  # noqa: E402
from utils.runs import RunError, RunRecord, environment, load_runs, read_json, write_json  # noqa: E402

README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "instructor.md")
PICTURE = Path("docs/images/dial.png")
MARKED = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ALT = (
    "Three panels over the strength a of the adapter. Above: the share of generated texts judged positive rises from "
    "left to right, by both judges. Below: the perplexity of real reviews under the turned model, and of its own text "
    "under the base, both relative to the base model."
)
NOTEBOOKS = (  # file, goal, artefact in, artefact out
    ("01-Setup.ipynb", "check the computer, meet the reviews and GPT-2, build (IA)³ by hand", "-",
     "judges, the base model's scores"),
    ("02-Train.ipynb", "configure, train, look at the learned vectors, save", "profile and reviews",
     "`artifacts/<profile>/adapters`"),
    ("03-Inference.ipynb", "reload, judge, merge, switch adapters, turn the dial",
     "adapters of 02, or `assets/adapters`", "`artifacts/<profile>/dial.json`"),
    ("04-Compare.ipynb", "(IA)³ beside six other methods, by quality and by cost; ablations; claims put to the test",
     "`assets/runs`, your run of 02", "a run of LoRA, `artifacts/<profile>/live`"),
)  # fmt: skip


def base_part(assets: Path) -> str:
    """The embedded model in one sentence."""
    record = read_json(assets / "mini-gpt2" / "pretraining.json")
    if not record:
        return "Size and quality of the embedded model: not measured.\n"
    bits = record["bits_per_byte"]
    return (
        f"The embedded model has {record['parameters']:,} parameters and reaches {bits['test']:.2f} bits per byte on "
        f"test reviews ({bits['validation']:.2f} on validation reviews). Its card is `assets/mini-gpt2/README.md`.\n"
    )


def dial_part(assets: Path) -> str:
    """The picture, and the contrast curve as a table: means over seeds, with the lowest and the highest seed."""
    record = read_json(assets / "runs" / "mini" / "dial.json")
    if not record:
        return "The strength dial: not measured.\n"
    rows = [row for row in record["rows"] if row["curve"] == "contrast"]
    base = {row["seed"]: row for row in rows if row["strength"] == 0}
    lines = []
    for strength in sorted({row["strength"] for row in rows}):
        here = [row for row in rows if row["strength"] == strength]
        judged = [_range([row[name]["value"] for row in here]) for name in ("positivity", "positivity_chars")]
        prices = [statistics.fmean(price(row, base[row["seed"]]) for row in here) for price in (real_reviews, own_text)]
        lines.append([f"{strength:+g}" if strength else "0 (base)", *judged, *(f"{price:.2f}" for price in prices)])
    texts = rows[0]["positivity"]["n"]
    titles = ["strength a", "positive, words judge", "positive, characters judge", "perplexity of real reviews, x base",
              "perplexity of its own text, x base"]  # fmt: skip
    return (
        f"![{ALT}]({PICTURE.as_posix()})\n\n"
        f"The contrast of two adapters in numbers ({len(base)} seeds, about {texts} texts each; in brackets the "
        f"lowest and the highest seed):\n\n{table(titles, lines)}"
    )


def real_reviews(row: dict, base: dict) -> float:
    """Perplexity of held-out reviews under the turned model, over the base model's."""
    return math.exp(row["held_out_loss"]["value"] - base["held_out_loss"]["value"])


def own_text(row: dict, base: dict) -> float:
    """Perplexity, under the frozen base, of what the turned model writes, over that of what the base writes."""
    return row["perplexity"]["value"] / base["perplexity"]["value"]


def _range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def runs_part(assets: Path) -> str:
    """For each profile: what was measured, on what, a line a method."""
    return "\n".join(_profile_runs(assets, name) for name in PROFILES)


def _profile_runs(assets: Path, name: str) -> str:
    path = {"mini": "Laptop path", "gpt2": "GPU path"}[name]
    heading = f"**{path}**, {describe(PROFILES[name])}:"
    try:
        records, excluded = load_runs(assets / "runs" / name, config_id=PROFILES[name].config_id())
    except RunError:
        records, excluded = [], []
    reasons = {misfit(record, PROFILES[name], records[0].config["base"]) for record in records} - {None}
    excluded += sorted(reasons)
    if excluded:
        raise RunError(f"README.md cannot be written from these records: {'; '.join(excluded)}")
    records = [record for method in METHODS for record in records if record.method == method != "base"]
    records = [record for record in records if record.task == "positive"]
    if not records:
        return f"{heading} not measured.\n"
    hardware = {f"{r.hardware['device']}, {r.hardware['name']}, {r.hardware['cores']} cores" for r in records}
    rows = [_method_row(row, records) for row in summarise(records, ["trainable", "bytes_on_disk"])]
    seeds = len({record.seed for record in records})
    titles = ["method", "trained numbers", "file, bytes", f"positive texts, mean (lowest to highest of {seeds} seeds)"]
    return f"{heading} measured on {' and '.join(sorted(hardware))}.\n\n{table(titles, rows)}{_files(assets, name)}"


def _files(assets: Path, name: str) -> str:
    """Why the file that the notebooks save is a few bytes smaller; nothing where no adapter is there."""
    weights = assets / "adapters" / name / "positive-seed0" / "adapter_model.safetensors"
    if not weights.is_file():
        return ""
    return (
        '\n"File" is the size of one safetensors file with what a method trains, under the parameters\' names in the '
        f"model. What peft saves of (IA)³ holds the same numbers in {weights.stat().st_size:,} bytes: its header "
        "leaves the adapter's name out. Without queries, the queries' factors are in the file too, all 1.\n"
    )


def audit_part(assets: Path) -> str:
    """How many of the documents' claims have each verdict."""
    claims = load_claims()
    counts = ", ".join(f"{verdict}: {count}" for verdict, count in tally(claims, assets).items() if count)
    return f"The documents this course grew from make {len(claims)} claims that were tested. {counts.capitalize()}.\n"


def exercises_part(_assets: Path) -> str:
    """How many exercises there are, and their points."""
    written, files = (sum(getattr(one, kind) for one in EXERCISES.values()) for kind in ("written", "files"))
    points = sum(exercise.points for exercise in EXERCISES.values())
    return (
        f"The notebooks hold {len(EXERCISES) - written - files} coded exercises, each with a check that answers at "
        f"once, and {written} written ones; the trained adapter counts too: {points} points in all.\n"
    )


def grading_part(assets: Path) -> str:
    """What grading a class costs, by `bench_grading.py --keep`."""
    record = read_json(assets / "runs" / "grading.json")
    if not record:
        return "Minutes and memory of a class: not measured.\n"
    fixed, each = record["fixed_seconds"], record["seconds_each"]
    minutes = " and ".join(f"{(fixed + n * each) / 60:.0f} minutes for {n} submissions" for n in (100, 300))
    return (
        f"On {record['hardware']['cores']} CPU cores: {fixed / 60:.0f} minutes once, to bring the notebooks to their "
        f"tests, then {each:.1f} s a submission: {minutes}. Memory at most: {record['memory_bytes'] / 2**30:.1f} GB.\n"
    )


def bench_part(assets: Path) -> str:
    """For a CPU and for CUDA: the benchmark's lines with an aim, and memory, by `bench.py --keep`."""
    kept = read_json(assets / "runs" / "bench.json")
    return "\n".join(_device_bench(kept.get(device), name) for device, name in (("cpu", "CPU"), ("cuda", "CUDA")))


def _is_quoted(line: dict) -> bool:
    """Whether README quotes this line: one with an aim, one on memory, one that was left out on this kind of device."""
    if line["ratio"] is None:
        return not line["name"].startswith("cuda")
    return line["reach"] is not None or line["name"].startswith("memory")


def _device_bench(record: dict | None, name: str) -> str:
    if not record:
        return f"**{name}**: not measured.\n"
    lines = [line for line in all_rows(record) if _is_quoted(line)]
    rows = [(line["what"], line["against"], ratio_text(line), aim_text(line)) for line in lines]
    hardware = record["hardware"]
    heading = f"**{name}**: {hardware['name']}, {hardware['cores']} cores, measured by {record['clock']}."
    return f"{heading}\n\n{table(['what', 'against', 'ratio (lowest to highest round)', 'aim'], rows)}"


def _method_row(row: dict, records: Sequence[RunRecord]) -> list[str]:
    """One line: counts, bytes, the share of positive texts with the lowest and the highest seed."""
    shares = [record.metrics["positivity"]["value"] for record in records if record.method == row["method"]]
    return [METHODS[row["method"]], f"{row['trainable']:,}", f"{row['bytes_on_disk']:,}", _range(shares)]


def notebooks_part(assets: Path) -> str:
    """The four notebooks: goal, minutes of a replay, what comes in and goes out."""
    replay = read_json(assets / "runs" / "mini" / "replay.json")
    rows = []
    for file, goal, before, after in NOTEBOOKS:
        minutes = f"{replay['seconds'][file] / 60:.1f}" if replay else "not measured"
        rows.append([f"[{file.removesuffix('.ipynb')}]({file})", goal, minutes, before, after])
    on = f"\nMinutes: one replay in the `mini` profile on {replay['hardware']['cores']} CPU cores.\n" if replay else ""
    return table(["notebook", "goal", "minutes", "comes in", "goes out"], rows) + on


PARTS: dict[str, Callable[[Path], str]] = {
    "dial": dial_part, "notebooks": notebooks_part, "base": base_part, "runs": runs_part,
    "audit": audit_part, "exercises": exercises_part, "grading": grading_part,
    "labs": labs_part,
    "bench": bench_part,
}  # fmt: skip


def fill(text: str, assets: Path = ASSETS) -> str:
    """README's text, each marked part made anew from the records under `assets`. KeyError for an unknown part."""
    return MARKED.sub(lambda match: match[1] + PARTS[match[2]](assets) + match[3], text)


def digest(assets: Path = ASSETS) -> str | None:
    """SHA-256 of the dial's record, which the picture carries in its metadata; None where there is no record."""
    path = assets / "runs" / "mini" / "dial.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def picture_source(path: Path) -> str | None:
    """The digest in the metadata of the picture at `path`; None where there is no picture."""
    from PIL import Image

    return Image.open(path).info.get("Source") if path.is_file() else None


def draw(assets: Path, path: Path) -> None:
    """The dial's figure as PNG."""
    from utils.dial_plot import dial_figure

    figure = dial_figure(read_json(assets / "runs" / "mini" / "dial.json")["rows"]).figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None, "Source": digest(assets)})


def keep_times(times: Path, assets: Path) -> None:
    """Sum the seconds of each notebook in the runner's `times.json`, and keep them with the hardware as a record."""
    seconds = {name: round(sum(cells), 1) for name, cells in json.loads(times.read_text(encoding="utf-8")).items()}
    write_json(assets / "runs" / "mini" / "replay.json", {"seconds": seconds, "hardware": environment()[1]})


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--replay", type=Path, metavar="TIMES", help="build/course/times.json of a `mini` replay")
    options = parser.parse_args()
    if options.replay:
        keep_times(options.replay, ASSETS)
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    current = all(fill(text) == text for text in texts.values()) and picture_source(ROOT / PICTURE) == digest()
    if options.check or current:
        print("the numbers are up to date" if current else "numbers are out of date: run scripts/readme_numbers.py")
        return 0 if current else 1
    if digest():
        draw(ASSETS, ROOT / PICTURE)
    for page, text in texts.items():
        page.write_text(fill(text), encoding="utf-8")
    print(*(page.name for page in PAGES), "written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
