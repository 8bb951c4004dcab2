"""README.md and docs/: numbers are those of the records, and every command, file, variable and message named exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import readme
from readme import PAGES, PARTS, PICTURE, ROOT, digest, fill, picture_source
from transformers import GPT2Config

from extensions.recipes import RECIPES
from utils.config import PROFILES
from utils.metrics import Estimate
from utils.runs import RunRecord, environment, write_json
from utils.sizes import predict_ia3_count

TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
ALL = "".join(TEXTS.values())
REFERENCE = TEXTS["reference.md"]
MODULES = [path for folder in ("utils", "study", "extensions") for path in sorted((ROOT / folder).glob("*.py"))]
SOURCES = "".join(path.read_text(encoding="utf-8") for path in MODULES)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"artifacts", "build"}
FILES = r"\b(?:\w+/)+[\w.-]+\.(?:py|cfg|md|json|yaml)\b"
FROM_CODE = {"exercises"}  # counted, not measured
FROM_OUTSIDE = {"ModuleNotFoundError", "CUDA out of memory", "NoSuchKernel", "venv", "make test", "FAIL"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_those_of_the_records(page: Path) -> None:
    assert fill(TEXTS[page.name], page=page) == TEXTS[page.name], "run scripts/readme.py"


def test_the_picture_is_of_the_record() -> None:
    assert picture_source(ROOT / PICTURE) == digest(), "the picture was drawn from another dial.json"


def test_every_part_is_marked_once() -> None:
    assert sorted(re.findall(r"<!-- numbers: (\w+) -->", ALL)) == sorted(PARTS)
    assert ALL.count("<!-- end -->") == len(PARTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_files_commands_and_targets_exist(page: Path) -> None:
    text = TEXTS[page.name]
    links = [page.parent / link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = [ROOT / name for name in re.findall(FILES, text) if name.split("/")[0] in FOLDERS]
    modules = [name.replace(".", "/") for name in re.findall(r"python -m ((?:study|bench|extensions)[\w.]*)", text)]
    assert links + files and [path for path in [*links, *files] if not path.exists()] == []
    assert all((ROOT / f"{name}.py").is_file() or (ROOT / name / "__main__.py").is_file() for name in modules)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= TARGETS


def test_readme_is_short_and_begins_with_what_is_run() -> None:
    assert len(TEXTS["README.md"].encode()) <= 7000
    fenced = "\n".join(re.findall(r"^```\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL))
    assert [line.split()[1] for line in fenced.splitlines() if line.startswith("make ")] == ["course", "test"]


def test_variables_are_documented_and_read() -> None:
    documented = set(re.findall(r"^\| `(LAB_[A-Z0-9_]+)` \|", REFERENCE, re.MULTILINE))
    assert documented == set(re.findall(r"\bLAB_[A-Z0-9]+(?:_[A-Z0-9]+)*\b", SOURCES))
    assert set(re.findall(r"\bLAB_[A-Z0-9_]+\b", ALL)) <= documented


def test_counts_in_the_text_are_those_of_the_models() -> None:
    small = GPT2Config.from_pretrained(readme.ASSETS / "mini-gpt2")
    for config in (GPT2Config(), small):
        assert f"{predict_ia3_count(config):,}" in TEXTS["README.md"].split("<!--")[0]


def test_messages_are_quoted_as_they_are_raised() -> None:
    rows = REFERENCE.split("## When something goes wrong")[1].split("\n## ")[0].splitlines()
    quoted = {quote for row in rows[4:] if row.startswith("|") for quote in re.findall("`([^`]+)`", row.split("|")[1])}
    literals = re.sub(r'"\n\s+f?"', "", SOURCES)
    missing = [q for q in quoted - FROM_OUTSIDE if not re.search(_pattern(q), literals)]
    assert len(quoted) > 12 and missing == []


def _pattern(quote: str) -> str:
    """A quoted message as it may stand in the source: a word may be a field of an f-string."""
    return r"\s+".join(rf"(?:{re.escape(word)}|\{{[^}}]+\}})" for word in quote.split())


def fitting(base: str, method: str) -> dict:
    """The configuration of a run that may be compared: its base, its rate, its sampling."""
    profile = PROFILES["mini"]
    return {"base": base, "learning_rate": profile.learning_rates.get(method), **profile.sampling}


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """Made-up records: two seeds of two methods, a dial of four strengths."""
    estimate = Estimate(0.7, 0.6, 0.8, 256).to_dict()
    profile = PROFILES["mini"]
    for method, count in (("base", 0), ("ia3", 10), ("full", 1000)):
        for seed in (0, 1):
            RunRecord(
                "finished", method, "mini", profile.config_id(), fitting("b", method), seed,
                counts={"trainable": count, "total": 1000},
                metrics={"positivity": estimate | {"value": 0.7 - seed / 10}},
                bytes_on_disk=4 * count,
                hardware={"device": "cpu", "name": "a CPU", "cores": 2},
            ).save(tmp_path / f"runs/mini/positive-{method}-seed{seed}.json")  # fmt: skip
    rows = [
        {"seed": seed, "curve": curve, "strength": a, "positivity": estimate | {"value": 0.5 + a / 5},
         "positivity_chars": estimate, "held_out_loss": estimate | {"value": 4.0 + abs(a) / 10},
         "perplexity": estimate | {"value": 100.0 + 10 * abs(a)}}
        for seed in (0, 1) for curve in ("dial", "contrast") for a in (-2.0, -0.5, 0.0, 2.0)
    ]  # fmt: skip
    write_json(tmp_path / "runs/mini/dial.json", {"config_id": profile.config_id(), "base": "b", "rows": rows})
    return tmp_path


def test_labs_part_holds_the_mean_and_the_seeds_of_each_method(tmp_path: Path) -> None:
    recipe = RECIPES["mt0-sentiment"]["mini"]
    assert "| flan-t5-small | Financial PhraseBank | not measured |" in PARTS["labs"](tmp_path)
    for seed, value in ((0, 0.7), (1, 0.8)):
        exact_match = Estimate(value, value - 0.1, value + 0.1, 50).to_dict()
        RunRecord(
            "finished", "ia3", recipe.name, recipe.config_id(), {}, seed,
            counts={"trainable": 1234, "total": 5000}, metrics={"exact_match": exact_match},
        ).save(tmp_path / f"runs/{recipe.name}/ia3-seed{seed}.json")  # fmt: skip
    assert "| (IA)³ | 1,234 | exact match | 0.75 (0.70 to 0.80) | 2 | 50 |" in PARTS["labs"](tmp_path)
    (tmp_path / f"runs/{recipe.name}/base-seed0.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit, match="cannot be written"):
        PARTS["labs"](tmp_path)


def test_parts_hold_what_the_records_hold(assets: Path) -> None:
    text = fill(ALL, assets)
    assert "| (IA)³ | 10 | 40 | 0.65 (0.60 to 0.70) |" in text and "lowest to highest of 2 seeds" in text
    assert "| -2 | 0.10 (0.10 to 0.10) | 0.70 (0.70 to 0.70) | 1.22 | 1.20 |" in text  # exp(0.2), 120 / 100
    assert "| 0 (base) | 0.50" in text and "| -0.5 | 0.40" in text
    assert re.search(r"\*\*GPU path\*\*.*: not measured\.", text)
    assert "a CPU, 2 cores" in text and "base (nothing trained) |" not in text


def test_the_size_of_a_saved_adapter_is_that_of_its_file(assets: Path) -> None:
    assert "What peft saves" not in fill(ALL, assets)
    weights = assets / "adapters" / "mini" / "positive-seed0" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(1234))
    assert "What peft saves of (IA)³ holds the same numbers in 1,234 bytes" in fill(ALL, assets)


def test_a_number_edited_by_hand_is_found(assets: Path) -> None:
    text = fill(ALL, assets)
    assert fill(text, assets) == text
    edited = text.replace("| 40 | 0.65 (", "| 40 | 0.75 (")
    assert edited != text and fill(edited, assets) == text


def test_without_records_nothing_is_invented(tmp_path: Path) -> None:
    text = fill(ALL, tmp_path)
    parts = dict(re.findall(r"<!-- numbers: (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL))
    measured = {name: part for name, part in parts.items() if name not in FROM_CODE}
    assert all("not measured" in part for part in measured.values())
    assert not any(re.search(r"\d\.\d\d", part) for part in measured.values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config_id", "000000000000"),
        ("config", fitting("other", "full")),
        ("config", fitting("b", "full") | {"learning_rate": 1.0}),
        ("config", fitting("b", "full") | {"temperature": 0.1}),
    ],
)
def test_records_that_do_not_belong_together_are_refused(assets: Path, key: str, value: object) -> None:
    path = assets / "runs/mini/positive-full-seed1.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {key: value})
    with pytest.raises(SystemExit, match="cannot be written"):
        fill(ALL, assets)


def test_the_picture_names_the_record_it_was_drawn_from(assets: Path, tmp_path: Path) -> None:
    picture = tmp_path / "docs" / "dial.png"
    assert picture_source(picture) is None
    readme.draw(assets, picture)
    assert picture_source(picture) == digest(assets)
    dial = assets / "runs/mini/dial.json"
    dial.write_text(dial.read_text(encoding="utf-8").replace("0.7", "0.8"), encoding="utf-8")
    assert picture_source(picture) != digest(assets)


def test_seconds_become_minutes(assets: Path) -> None:
    times = assets / "times.json"
    write_json(times, {file: [30.0, 60.04] for file in readme.NOTEBOOKS})
    readme.keep_times(times, assets)
    text = PARTS["notebooks"](assets)
    assert text.count("| 1.5 |") == 4 and f"CPU cores ({environment()[1]['units']})" in text


def test_links_of_a_part_hold_from_any_page(assets: Path) -> None:
    marked = "<!-- numbers: picture -->\n<!-- end -->"
    assert "](docs/images/dial.png)" in fill(marked, assets)
    assert "](images/dial.png)" in fill(marked, assets, ROOT / "docs" / "results.md")
    assert "](../01-Setup.ipynb)" in fill("<!-- numbers: notebooks -->\n<!-- end -->", assets, ROOT / "docs" / "a.md")


def test_the_ladder_and_the_methods_are_those_of_the_records(assets: Path) -> None:
    rows = [{"strength": a, "text": f" was\n{a} | good.", "probability": 0.5 + a / 10} for a in (-1, 0)]
    write_json(assets / "runs/mini/ladder.json", {"prompt": "It", "rows": rows})
    assert PARTS["ladder"](assets).splitlines()[2:] == [
        "| -1 | **It** was -1 \\| good. | 0.40 |", "| 0 (base) | **It** was 0 \\| good. | 0.50 |",
    ]  # fmt: skip
    write_json(assets / "runs/mini/cost.json", {"rows": [{"method": "ia3", "step_ratio": 0.876}]})
    assert "| (IA)³ | 10 | 0.65 (0.60 to 0.70) | 0.88 |" in PARTS["methods"](assets)
    assert "| full fine-tuning | 1,000 | 0.65 (0.60 to 0.70) | not measured |" in PARTS["methods"](assets)


def test_the_instructors_plan_has_the_points_and_minutes_of_the_cards():
    plan = re.findall(
        r"^\| (0\d) \| (\d+) \| (\d+) \| ([\d., ]+) \|$", (ROOT / "docs" / "instructor.md").read_text("utf-8"), re.M
    )
    assert len(plan) == len(readme.NOTEBOOKS)
    for file, (number, points, minutes, read) in zip(readme.NOTEBOOKS, plan, strict=True):
        own = [one for one in readme.EXERCISES.values() if one.notebook == number]
        cells = json.loads((ROOT / file).read_text("utf-8"))["cells"]
        cards = re.findall(r"^\*(\d+) minutes, ", "\n".join("".join(cell["source"]) for cell in cells), re.M)
        assert (int(points), int(minutes)) == (sum(one.points for one in own), sum(map(int, cards)))
        assert read.split(", ") == [one.number for one in own if one.written]
