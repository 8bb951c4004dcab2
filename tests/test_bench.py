"""`python -m bench` in tiny sizes: every part runs, is kept at once, taken up again, and never mixed with another's."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from PIL import Image
from readme import bench_part

import bench.__main__ as bench_main
import bench.training as bench_training
import bench.use as bench_use
from bench.report import NO_GPU, reached
from bench.rows import PROFILE_OF, make_model, own_process, row, sizes
from bench.training import profile_rows, training_rows
from bench.use import (
    endless,
    first_cells,
    generating_rows,
    library_texts,
    memory_rows,
    mixed_rows,
    opening_rows,
    process_seconds,
    switching_rows,
)
from utils.config import PROFILES, ROOT
from utils.data import PROMPTS
from utils.runs import read_json, write_json

TRIAL = sizes(quick=True)["tiny"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    """No GPU, small batches, and folders of one's own for what is cached, built and kept."""
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setitem(PROFILE_OF, "tiny", replace(PROFILES["mini"], batch_size=2, block_length=16))
    monkeypatch.setitem(bench_training.WHOLE, "tiny", 32)
    monkeypatch.setattr(bench_training, "DOCUMENT_LENGTH", 16)
    monkeypatch.setattr(bench_training, "positive_reviews", lambda count: ["A film, and a good one, I think."] * count)
    monkeypatch.setattr(bench_main, "KEPT", tmp_path / "assets" / "runs" / "bench.json")
    monkeypatch.setattr(bench_main, "BUILD", tmp_path / "build")
    for made in (bench_training.course_trainer, bench_training.document_parts):
        made.cache_clear()


PARTS = (training_rows, generating_rows, switching_rows, mixed_rows, memory_rows, profile_rows)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_part_gives_ratios_with_their_spread(part):
    lines = part(TRIAL, "tiny")
    assert len({line["name"] for line in lines}) == len(lines) >= 1
    for line in lines:
        assert line["low"] <= line["ratio"] <= line["high"] and line["value"] >= 0 and line["yardstick"] > 0
        assert line["what"] and line["against"] and line["unit"] and line["better"] in ("higher", "lower")
    json.dumps(lines, allow_nan=False)


def test_the_documents_loop_pads_and_counts_no_padding(monkeypatch):
    texts = ["A film.", "A much longer film, and a better one."]
    monkeypatch.setattr(bench_training, "positive_reviews", lambda _: texts)
    *_, stream = bench_training.document_parts("tiny", 32, 2)
    batch = next(stream)
    assert batch["input_ids"].shape == (2, 32)
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool())
    monkeypatch.setattr(bench_training, "seconds", lambda run: run() or 2.0)
    assert bench_training.document_rate("tiny", 32, 3, 2) == 3 * int(batch["attention_mask"].sum()) / 2.0


def test_the_librarys_way_of_writing_writes_all_that_was_asked_for():
    model = endless(make_model("tiny"))
    assert len(library_texts(model, 2, 5)) == 2 * len(PROMPTS)
    with torch.no_grad():
        ids = model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=7, do_sample=True, pad_token_id=0)
    assert ids.shape == (1, 8)


def test_opening_is_timed_up_to_the_first_result_in_fresh_processes(monkeypatch):
    code = first_cells(ROOT / "02-Train.ipynb")
    assert "setup_notebook()" in code and "ia3_config" not in code
    monkeypatch.setattr(bench_use, "LIBRARIES", "import math")
    monkeypatch.setattr(bench_use, "first_cells", lambda notebook: "import math, json")
    lines = opening_rows(TRIAL)
    assert [line["name"] for line in lines] == ["opening-01", "opening-02", "opening-03", "opening-04"]
    assert all(line["better"] == "lower" and line["ratio"] > 0 for line in lines)
    with pytest.raises(RuntimeError, match="NameError"):
        process_seconds("nothing_of_this_name")


def test_a_process_of_ones_own_keeps_what_it_has_made():
    with own_process() as call:
        first, second = call(os.getpid), call(os.getpid)
    with own_process(isolated=False) as call:
        here = call(os.getpid)
    assert first == second != here == os.getpid()


def test_an_aim_is_reached_or_missed_in_its_own_direction():
    assert make_model("124M").num_parameters() == 124_439_808
    higher = row("a", "what", "against", [3.0], [1.0], unit="s", reach=2.5)
    lower = row("b", "what", "against", [3.0], [1.0], unit="s", reach=2.5, better="lower")
    assert reached(higher) is True and reached(lower) is False
    assert reached(row("c", "what", "against", [3.0], [1.0], unit="s")) is None


class StandIns:
    """Two parts in the place of the real ones, which count how often they are measured; the second may fail."""

    def __init__(self) -> None:
        self.ran, self.broken = [], False

    def parts(self, by_model: dict) -> dict:
        return {name: lambda name=name: self.measure(name) for name in ("first", "second")}

    def measure(self, name: str) -> list[dict]:
        self.ran.append(name)
        if self.broken and name == "second":
            raise ValueError("no such kernel")
        return [row(name, f"the {name} thing", "another", [3.0, 4.0], [2.0, 2.0], unit="s", reach=1.5)]


@pytest.fixture
def stand_ins(monkeypatch) -> StandIns:
    made = StandIns()
    monkeypatch.setattr(bench_main, "parts", made.parts)
    return made


def test_an_interrupted_run_goes_on_where_it_was_and_never_with_another_machines(stand_ins, tmp_path):
    path = tmp_path / "build" / "bench-quick" / "bench.json"
    stand_ins.broken = True
    with pytest.raises(ValueError, match="no such kernel"):
        bench_main.main(["--quick"])
    stand_ins.broken, stand_ins.ran = False, []
    bench_main.main(["--quick"])
    assert stand_ins.ran == ["second"] and read_json(path)["rows"]["second"][0]["ratio"] == 1.75
    bench_main.main(["--quick", "--only", "fir"])
    assert stand_ins.ran == ["second", "first"]
    record = read_json(path)
    write_json(path, record | {"hardware": record["hardware"] | {"cores": 1000}})
    bench_main.main(["--quick"])
    assert stand_ins.ran == ["second", "first", "first", "second"]


def test_a_busy_machine_is_measured_by_processor_time(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_main.os, "environ", dict(os.environ))
    before = torch.get_num_threads()
    try:
        bench_main.main(["--quick", "--one-thread"])
        assert torch.get_num_threads() == 1 and bench_main.os.environ["OMP_NUM_THREADS"] == "1"
    finally:
        torch.set_num_threads(before)
    folder = tmp_path / "build" / "bench-quick"
    assert read_json(folder / "bench.json")["hardware"]["threads"] == 1
    assert "one thread" in (folder / "bench.txt").read_text(encoding="utf-8")
    assert "2 of 2 aims reached" in Image.open(folder / "bench.png").info["Description"]


def test_only_a_whole_run_is_kept_and_the_pages_quote_it(stand_ins, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="tiny sizes"):
        bench_main.main(["--quick", "--keep"])
    monkeypatch.setattr(bench_main, "sizes", lambda quick: {"tiny": TRIAL})
    with pytest.raises(SystemExit, match="second not measured yet"):
        bench_main.main(["--keep", "--only", "first"])
    write_json(bench_main.KEPT, {"other": read_json(tmp_path / "build" / "bench" / "bench.json")})
    bench_main.main(["--keep"])
    kept = read_json(bench_main.KEPT)
    assert len(kept["other"]["rows"]) == 1 and kept["cpu"]["rows"]["first"][0]["ratio"] == 1.75
    text = bench_part(tmp_path / "assets")
    assert "| the first thing | another | 1.75 (1.5 to 2) | 1.5 or more: reached |" in text and text.endswith(NO_GPU)
    assert "not measured" in bench_part(tmp_path)


def test_the_real_parts_have_names_of_their_own():
    by_model = sizes(quick=False)
    assert all(scale.isolated for scale in by_model.values())
    assert {"opening", "generating-mini", "training-124M", "memory-mini"} <= bench_main.parts(by_model).keys()
    assert "profile-124M" not in bench_main.parts(by_model)  # it needs a GPU
