"""scripts/bench.py in tiny sizes: every part runs, is kept at once, taken up again, and never mixed with another's."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import readme_numbers
import torch
from PIL import Image

from bench import __main__ as bench_main
from bench import cuda as bench_cuda
from bench import growth as bench_growth
from bench import report as bench_report
from bench import training as bench_training
from bench import use as bench_use
from bench.rows import QUICK, SHAPES, Sizes, make_model, own_process, reached, row, sizes, unmeasured
from utils.runs import read_json, write_json
from utils.settings import ROOT

TRIAL = Sizes(**QUICK)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    """No GPU, and a folder of one's own for what the course caches."""
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(bench_main, "KEPT", tmp_path / "assets" / "runs" / "bench.json")


@pytest.mark.parametrize(
    "part",
    [
        partial(bench_training.training_rows, TRIAL, "tiny"),
        partial(bench_use.generating_rows, TRIAL, "tiny"),
        partial(bench_use.latency_rows, TRIAL, "tiny"),
        partial(bench_use.switching_rows, TRIAL, "tiny"),
        partial(bench_use.mixed_rows, TRIAL, "tiny"),
        partial(bench_growth.memory_rows, TRIAL, "tiny"),
        partial(bench_cuda.format_rows, TRIAL, "tiny"),
        partial(bench_cuda.compile_rows, TRIAL, "tiny", "eager"),
        partial(bench_cuda.flattened_rows, TRIAL, "tiny"),
        partial(bench_cuda.static_rows, TRIAL, "tiny"),
        partial(bench_cuda.profile_rows, TRIAL, "tiny"),
    ],
    ids=lambda part: part.func.__name__,
)
def test_every_part_gives_ratios_with_their_spread(part):
    lines = part()
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


def test_flattened_reviews_see_nothing_of_each_other():
    padded, flat, tokens = bench_cuda.flattened_batches("tiny", 3, torch.device("cpu"))
    packed = make_model("tiny", attention="reviews")
    model = make_model("tiny")
    labels = flat.pop("labels")
    with torch.no_grad():
        together = packed(**flat, use_cache=False).logits[0]
        apart = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    alone = torch.cat([logits[mask.bool()] for logits, mask in zip(apart, padded["attention_mask"], strict=True)])
    assert together.shape == alone.shape and len(alone) == tokens == labels.numel()
    assert torch.allclose(together, alone, atol=1e-4)


def test_both_ways_of_writing_write_all_that_was_asked_for():
    model = bench_use.endless(make_model("tiny"))
    written = bench_use.one_by_one(model, bench_use.prompts(2), 5)
    assert len(written) == 2
    with torch.no_grad():
        ids = model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=7, do_sample=True, pad_token_id=0)
    assert ids.shape == (1, 8)


def test_a_notebooks_first_result_is_its_first_cell_with_output():
    code = bench_use.first_cells(ROOT / "02-Train.ipynb")
    assert "setup_notebook()" in code and "ia3_config" not in code
    assert {"utils.training", "utils.adapters"} <= set(bench_use.course_imports().removeprefix("import ").split(", "))


def test_opening_is_timed_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(bench_use, "YARDSTICKS", {"bare": "import math", "libraries": "import json"})
    monkeypatch.setattr(bench_use, "opening_programs", lambda: {"something": ("import math, json", "bare")})
    (line,) = bench_use.opening_rows(TRIAL)
    assert line["name"] == "opening-something" and line["better"] == "lower" and line["ratio"] > 0
    assert set(dict(bench_use.opening_programs()).popitem()[1][1:]) <= set(bench_use.AGAINST)
    with pytest.raises(RuntimeError, match="NameError"):
        bench_use.process_seconds("nothing_of_this_name")


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


def test_growth_has_a_point_for_each_method_and_place():
    assert set(bench_growth.places(TRIAL, "length")) == {16, 32} and set(bench_growth.places(TRIAL, "batch")) == {1, 2}
    points = bench_growth.growth_points(TRIAL, "batch", 2)
    assert [point["method"] for point in points] == ["ia3", "full"]
    assert all(point["tokens_per_second"] > 0 and point["batch"] == 2 for point in points)
    (point,) = bench_growth.resident_points(TRIAL, 2)
    layers, width = SHAPES["tiny"][:2]
    assert point["numbers_bytes"] == 2 * 4 * layers * 7 * width and point["mixed_tokens_per_second"] > 0


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr("utils.gpu.free_memory", lambda _: 0)
    monkeypatch.setattr(bench_growth, "train_point", None)
    points = bench_growth.growth_points(TRIAL, "size", next(iter(bench_growth.places(TRIAL, "size"))))
    assert all(point["reason"].startswith("not measured: needs about") for point in points)


def test_a_process_of_ones_own_keeps_what_it_has_made():
    with own_process() as call:
        first, second = call(os.getpid), call(os.getpid)
    with own_process(isolated=False) as call:
        here = call(os.getpid)
    assert first == second != here == os.getpid()


def test_sizes_of_the_shapes_are_those_of_their_names():
    assert bench_growth.count_parameters("124M") == 124_439_808
    named = {name: bench_growth.count_parameters(name) for name in SHAPES if name.endswith("M")}
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
    """Three parts, and one point of growth for two methods."""
    made = Parts()
    points = [
        {"x": 2, "method": method, "tokens_per_second": 5.0, "peak_bytes": 2**20, "step_seconds": 1.0}
        for method in ("ia3", "full")
    ]
    monkeypatch.setattr(bench_main, "parts", lambda _: {n: made.make(n) for n in ("first", "second", "cuda-third")})
    monkeypatch.setattr(bench_main, "growth", lambda _: {("batch", 2): lambda: made.ran.append("batch") or points})
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
    run(tmp_path, "--only", "fir", "growth-batch")
    assert stand_ins.ran == ["second", "first", "batch"]


def test_a_record_of_another_machine_is_not_mixed_in(stand_ins, tmp_path, capsys):
    run(tmp_path)
    record = read_json(tmp_path / "bench.json")
    write_json(tmp_path / "bench.json", record | {"hardware": record["hardware"] | {"cores": 1000}})
    stand_ins.ran = []
    run(tmp_path)
    assert len(stand_ins.ran) == 4 and "begun anew" in capsys.readouterr().out


def test_figures_carry_their_alt_text(stand_ins, tmp_path):
    run(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"bench.png", "growth-batch.png"}
    alts = dict(line.split(": ", 1) for line in (tmp_path / "alt.txt").read_text(encoding="utf-8").splitlines())
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).info["Description"] == alts[path.name]
    assert "2 of 2 aims reached" in alts["bench.png"]


def test_the_figure_of_resident_adapters_can_be_drawn():
    points = [{"x": n, "one_tokens_per_second": 9.0, "mixed_tokens_per_second": 8.0, "adapters_bytes": 0,
               "numbers_bytes": 4 * n} for n in (1, 4)]  # fmt: skip
    figure, alt = bench_report.growth_figure("residents", points)
    assert "from 1 to 4" in alt and len(figure.axes) == 2 and all(len(ax.lines) == 2 for ax in figure.axes)


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
    text = readme_numbers.bench_part(tmp_path / "assets")
    assert "| later |  | not measured: not run yet |" in text
    assert "| the first thing | another | 1.75 (1.5 to 2) | 1.5 or more: reached |" in text
    assert "something" not in text and "**CUDA**: not measured." in text
    assert readme_numbers.bench_part(tmp_path).count("not measured") == 2


def test_the_real_parts_have_names_of_their_own():
    names = list(bench_main.parts(TRIAL))
    assert len(set(names)) == len(names) and {"opening", "training-tiny", "cuda-profile"} <= set(names)
    (line,) = bench_main.parts(TRIAL)["cuda-compile"]()
    assert line["reason"] == "not measured: no CUDA here"
    assert {series for series, _ in bench_main.growth(TRIAL)} == set(bench_report.SERIES)
