"""README.md: its numbers are those of the records, and every command, file, variable and message it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import readme_numbers
from readme_numbers import PAGES, PARTS, PICTURE, README, ROOT, digest, fill, picture_source
from transformers import GPT2Config

from extensions.recipes import RECIPES
from utils.config import PROFILES
from utils.metrics import Estimate
from utils.runs import RunError, RunRecord, write_json
from utils.sizes import predict_ia3_count

TEXT = README.read_text(encoding="utf-8")
ALL = "".join(page.read_text(encoding="utf-8") for page in PAGES)
SOURCES = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "utils").glob("*.py")))
ALL_PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
FENCED = "\n".join(re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
FROM_CODE = {"exercises", "sizes", "sharding", "tasks"}  # counted or computed, not measured
FROM_OUTSIDE = {"ModuleNotFoundError", "CUDA out of memory", "NoSuchKernel", "venv", "make test", "FAIL"}


def test_every_part_is_marked_once_and_holds_what_the_records_hold() -> None:
    assert fill(ALL) == ALL, "run scripts/readme_numbers.py"
    assert picture_source(ROOT / PICTURE) == digest(), "the picture was drawn from another dial.json"
    assert sorted(re.findall(r"<!-- numbers: (\w+) -->", ALL)) == sorted(PARTS)
    assert ALL.count("<!-- end -->") == len(PARTS)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_files_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [page.parent / link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"\b(?:scripts|tests|assets|utils|grading|configs)/[\w./-]+\.(?:py|cfg|md|json|yaml)\b", text)
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)
    assert files and targets
    # The model card and the picture come with the records they describe.
    late = {"assets/mini-gpt2/README.md"} if "embedded model: not measured" in text else set()
    assert [path for path in [*links, *(ROOT / name for name in {*files} - late)] if not path.exists()] == []
    assert set(targets) <= TARGETS


def test_commands_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[`  ]*(?:#|`))", TEXT)) <= TARGETS
    assert {"course", "test"} <= {line.split()[1] for line in FENCED.splitlines() if line.startswith("make ")}
    nbval = next(line for line in FENCED.splitlines() if "--nbval " in line)
    options = re.search(r"^NBVAL := (.*?[^\\])$", makefile, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ").split()
    assert set(options) - {"$(RUN)"} <= set(nbval.split())


def test_variables_are_documented_and_read() -> None:
    documented = set(re.findall(r"\bLAB_[A-Z0-9_]+\b", TEXT))
    assert documented == set(re.findall(r"\bLAB_[A-Z0-9]+(?:_[A-Z0-9]+)*\b", SOURCES))
    table = TEXT.split("## Environment variables")[1].split("\n## ")[0]
    assert all(f"| `{name}` |" in table for name in documented)


def test_counts_in_the_text_are_those_of_the_models() -> None:
    small = GPT2Config.from_pretrained(readme_numbers.ASSETS / "mini-gpt2")
    for config in (GPT2Config(), small):
        assert f"{predict_ia3_count(config):,}" in TEXT.split("<!--")[0]


def test_messages_are_quoted_as_they_are_raised() -> None:
    rows = TEXT.split("## When something goes wrong")[1].split("\n## ")[0].splitlines()
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
    """Made-up records: two seeds of two methods, a dial of three strengths, the embedded model."""
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
    card = {"parameters": 1234567, "bits_per_byte": {"validation": 1.5, "test": 1.52}}
    write_json(tmp_path / "mini-gpt2/pretraining.json", card)
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
    with pytest.raises(RunError, match="cannot be written"):
        PARTS["labs"](tmp_path)


def test_parts_hold_what_the_records_hold_and_an_edited_number_is_found(assets: Path) -> None:
    text = fill(TEXT, assets)
    assert "1,234,567 parameters and reaches 1.52 bits per byte" in text
    assert "| (IA)³ | 10 | 40 | 0.65 (0.60 to 0.70) |" in text and "lowest to highest of 2 seeds" in text
    assert "| -2 | 0.10 (0.10 to 0.10) | 0.70 (0.70 to 0.70) | 1.22 | 1.20 |" in text  # exp(0.2), 120 / 100
    assert "| 0 (base) | 0.50" in text and "| -0.5 | 0.40" in text
    assert re.search(r"\*\*GPU path\*\*.*: not measured\.", text)
    assert "a CPU, 2 cores" in text and "base (nothing trained) |" not in text
    assert "What peft saves" not in fill(TEXT, assets)
    weights = assets / "adapters" / "mini" / "positive-seed0" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(1234))
    assert "What peft saves of (IA)³ holds the same numbers in 1,234 bytes" in fill(TEXT, assets)
    text = fill(TEXT, assets)
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
    with pytest.raises(RunError, match="README.md cannot be written"):
        fill(TEXT, assets)


def test_the_picture_names_the_record_it_was_drawn_from(assets: Path, tmp_path: Path) -> None:
    picture = tmp_path / "docs" / "dial.png"
    assert picture_source(picture) is None
    readme_numbers.draw(assets, picture)
    assert picture_source(picture) == digest(assets)
    dial = assets / "runs/mini/dial.json"
    dial.write_text(dial.read_text(encoding="utf-8").replace("0.7", "0.8"), encoding="utf-8")
    assert picture_source(picture) != digest(assets)


def test_seconds_become_minutes(assets: Path) -> None:
    times = assets / "times.json"
    write_json(times, {file: [30.0, 60.04] for file, *_ in readme_numbers.NOTEBOOKS})
    readme_numbers.keep_times(times, assets)
    assert fill(TEXT, assets).count("| 1.5 |") == 4
