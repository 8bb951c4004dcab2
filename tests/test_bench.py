"""`python -m bench` in tiny sizes: every part runs, is kept at once, taken up again, and never mixed with another's."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import bench.growth as bench_growth
import pytest
import torch
from PIL import Image
from readme_numbers import bench_part
from transformers import GPT2LMHeadModel

import bench.__main__ as bench_main
import bench.training as bench_training
import bench.use as bench_use
from bench.report import reached
from bench.rows import QUICK, SHAPES, Sizes, make_model, own_process, row, shape_config, sizes, unmeasured
from bench.training import profile_rows, training_rows
from bench.use import (
    AGAINST,
    course_imports,
    endless,
    first_cells,
    generating_rows,
    latency_rows,
    memory_rows,
    mixed_rows,
    opening_rows,
    process_seconds,
    prompts,
    switching_rows,
)
from exercises.inference import one_by_one
from utils.config import PROFILES, ROOT
from utils.runs import read_json, write_json

TRIAL = Sizes(**QUICK)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    """No GPU, small batches, and a folder of one's own for what the course caches."""
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    small = replace(PROFILES["mini"], batch_size=2, block_length=16)
    monkeypatch.setattr(bench_growth, "PROFILES", {"mini": small})
    monkeypatch.setitem(bench_training.PROFILE_OF, "tiny", small)
    monkeypatch.setattr(bench_main, "KEPT", tmp_path / "assets" / "runs" / "bench.json")


PARTS = (training_rows, generating_rows, latency_rows, switching_rows, mixed_rows, memory_rows, profile_rows)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_part_gives_ratios_with_their_spread(part):
    lines = part(TRIAL, "tiny")
    assert len({line["name"] for line in lines}) == len(lines) >= 1
    for line in lines:
        assert line["low"] <= line["ratio"] <= line["high"] and line["value"] >= 0 and line["yardstick"] > 0
        assert line["what"] and line["against"] and line["unit"] and line["better"] in ("higher", "lower")
    json.dumps(lines, allow_nan=False)


def test_the_documents_loop_pads_and_counts_no_padding(monkeypatch):
    monkeypatch.setattr(
        bench_training, "positive_reviews", lambda _: ["A film.", "A much longer film, and a better one."]
    )
    bench_training.document_parts.cache_clear()
    *_, stream = bench_training.document_parts("tiny", 32, 2)
    batch = next(stream)
    assert batch["input_ids"].shape == (2, 32)
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool())
    monkeypatch.setattr(bench_training, "seconds", lambda run: run() or 2.0)
    assert bench_training.document_rate("tiny", 32, 3, 2) == 3 * int(batch["attention_mask"].sum()) / 2.0
    bench_training.document_parts.cache_clear()


def test_both_ways_of_writing_write_all_that_was_asked_for():
    model = endless(make_model("tiny"))
    written = one_by_one(model, prompts(2), 5)
    assert len(written) == 2
    with torch.no_grad():
        ids = model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=7, do_sample=True, pad_token_id=0)
    assert ids.shape == (1, 8)


def test_a_notebooks_first_result_is_its_first_cell_with_output():
    code = first_cells(ROOT / "02-Train.ipynb")
    assert "setup_notebook()" in code and "ia3_config" not in code
    assert {"utils.training", "utils.adapters"} <= set(course_imports().removeprefix("import ").split(", "))


def test_opening_is_timed_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(bench_use, "YARDSTICKS", {"bare": "import math", "libraries": "import json"})
    monkeypatch.setattr(bench_use, "opening_programs", lambda: {"something": ("import math, json", "bare")})
    (line,) = opening_rows(TRIAL)
    assert line["name"] == "opening-something" and line["better"] == "lower" and line["ratio"] > 0
    assert set(dict(bench_use.opening_programs()).popitem()[1][1:]) <= set(AGAINST)
    with pytest.raises(RuntimeError, match="NameError"):
        process_seconds("nothing_of_this_name")


def test_a_busy_machine_is_measured_by_processor_time(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_main.os, "environ", dict(os.environ))
    before = torch.get_num_threads()
    try:
        run(tmp_path, "--one-thread")
        assert torch.get_num_threads() == 1 and bench_main.os.environ["OMP_NUM_THREADS"] == "1"
    finally:
        torch.set_num_threads(before)
    record = read_json(tmp_path / "bench.json")
    assert record["hardware"]["threads"] == 1 and "one thread" in (tmp_path / "bench.txt").read_text(encoding="utf-8")


@pytest.mark.slow  # a fresh process imports the libraries
def test_a_process_of_ones_own_keeps_what_it_has_made():
    with own_process() as call:
        first, second = call(os.getpid), call(os.getpid)
    with own_process(isolated=False) as call:
        here = call(os.getpid)
    assert first == second != here == os.getpid()


def test_sizes_of_the_shapes_are_those_of_their_names():
    with torch.device("meta"):
        named = {n: GPT2LMHeadModel(shape_config(n)).num_parameters() for n in SHAPES if n.endswith("M")}
    assert named["124M"] == 124_439_808
    assert all(abs(count / 1e6 / int(name[:-1]) - 1) < 0.11 for name, count in named.items())
    assert sizes(quick=True) == TRIAL and sizes(quick=False).isolated


def test_an_aim_is_reached_or_missed_in_its_own_direction():
    higher = row("a", "what", "against", [3.0], [1.0], unit="s", reach=2.5)
    lower = row("b", "what", "against", [3.0], [1.0], unit="s", reach=2.5, better="lower")
    assert reached(higher) is True and reached(lower) is False
    assert reached(row("c", "what", "against", [3.0], [1.0], unit="s")) is None
    assert reached(unmeasured("d", "what", "against", "no CUDA here")) is None


class Parts:
    """Stand-ins for the parts, which count how often they are measured and fail while they are told to."""

    def __init__(self) -> None:
        self.ran, self.broken = [], False

    def make(self, name: str):
        def part():
            self.ran.append(name)
            if self.broken and name == "second":
                raise ValueError("no such kernel")
            if name == "cuda-third":
                return [unmeasured(name, "something", "something else", "no CUDA here")]
            return [row(name, f"the {name} thing", "another", [3.0, 4.0], [2.0, 2.0], unit="s", reach=1.5)]

        return part


@pytest.fixture
def stand_ins(monkeypatch) -> Parts:
    """Three parts in the place of the real ones."""
    made = Parts()
    monkeypatch.setattr(bench_main, "parts", lambda _: {n: made.make(n) for n in ("first", "second", "cuda-third")})
    monkeypatch.setattr(bench_main, "growth", lambda _: {}, raising=False)
    return made


def run(folder, *options: str) -> int:
    return bench_main.main(["--quick", "--folder", str(folder), *options])


def test_an_interrupted_run_goes_on_and_what_failed_is_tried_again(stand_ins, tmp_path, capsys):
    stand_ins.broken = True
    assert run(tmp_path) == 0
    captured = capsys.readouterr()
    assert "second: failed: ValueError: no such kernel" in captured.err and "the first thing" in captured.out
    assert "not measured: cuda-third" in captured.out
    stand_ins.broken, stand_ins.ran = False, []
    run(tmp_path)
    assert stand_ins.ran == ["second"]
    assert read_json(tmp_path / "bench.json")["rows"]["second"][0]["ratio"] == 1.75
    run(tmp_path, "--only", "fir")
    assert stand_ins.ran == ["second", "first"]


def test_a_record_of_another_machine_is_not_mixed_in(stand_ins, tmp_path, capsys):
    run(tmp_path)
    record = read_json(tmp_path / "bench.json")
    write_json(tmp_path / "bench.json", record | {"hardware": record["hardware"] | {"cores": 1000}})
    stand_ins.ran = []
    run(tmp_path)
    assert len(stand_ins.ran) == 3 and "begun anew" in capsys.readouterr().out


def test_figures_carry_their_alt_text(stand_ins, tmp_path):
    run(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"bench.png"}
    alts = dict(line.split(": ", 1) for line in (tmp_path / "alt.txt").read_text(encoding="utf-8").splitlines())
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).info["Description"] == alts[path.name]
    assert "2 of 2 aims reached" in alts["bench.png"]


def test_only_a_whole_run_is_kept(stand_ins, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="tiny sizes"):
        run(tmp_path, "--keep")
    monkeypatch.setattr(bench_main, "sizes", lambda _: TRIAL)
    whole = ["--folder", str(tmp_path / "whole"), "--keep"]
    stand_ins.broken = True
    with pytest.raises(SystemExit, match="failed: second"):
        bench_main.main(whole)
    stand_ins.broken = False
    write_json(bench_main.KEPT, {"cuda": {"rows": {}}})
    assert bench_main.main(whole) == 0
    kept = read_json(bench_main.KEPT)
    assert kept["cuda"] == {"rows": {}} and kept["cpu"]["rows"]["first"][0]["ratio"] == 1.75


def test_readme_quotes_what_was_kept(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_main, "sizes", lambda _: TRIAL)
    bench_main.main(["--folder", str(tmp_path / "whole"), "--keep"])
    monkeypatch.setattr(bench_main, "parts", lambda _: {"later": None, "first": None})
    bench_main.keep(read_json(tmp_path / "whole" / "bench.json"), TRIAL)
    text = bench_part(tmp_path / "assets")
    assert "| later |  | not measured: not run yet |" in text
    assert "| the first thing | another | 1.75 (1.5 to 2) | 1.5 or more: reached |" in text
    assert "something" not in text and "**CUDA**: not measured." in text
    assert bench_part(tmp_path).count("not measured") == 2


def test_the_real_parts_have_names_of_their_own():
    names = list(bench_main.parts(TRIAL))
    assert len(set(names)) == len(names) and {"opening", "training-tiny", "cuda-profile"} <= set(names)
    (line,) = bench_main.parts(TRIAL)["cuda-profile"]()
    assert line["reason"] == "not measured: no CUDA here"
