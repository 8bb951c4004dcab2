"""`python -m bench` in tiny sizes: every part runs, is kept at once, taken up again, and never mixed with another's."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model
from PIL import Image
from readme import bench_part
from torch.utils.flop_counter import FlopCounterMode

import bench.__main__ as bench_main
import bench.rows as bench_rows
import bench.training as bench_training
import bench.use as bench_use
from bench.report import reached
from bench.rows import make_model, own_process, row, sizes
from bench.training import best_size, product_rate, profile_rows, training_flops, training_rows
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
from utils.adapters import attach
from utils.config import PROFILES, ROOT
from utils.data import PROMPTS
from utils.runs import environment, read_json, write_json

TRIAL = sizes(quick=True)["tiny"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    """No GPU, small batches, a few reviews at hand, and folders of one's own for what is written."""
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    monkeypatch.setitem(bench_rows.PROFILE_OF, "tiny", replace(PROFILES["mini"], batch_size=2, block_length=16))
    monkeypatch.setattr(bench_training, "positive_reviews", lambda _: ["A film.", "A much longer film, but good."] * 9)
    monkeypatch.setattr(bench_main, "KEPT", tmp_path / "assets" / "runs" / "bench.json")
    monkeypatch.setattr(bench_main, "BUILD", tmp_path / "build")


PARTS = (training_rows, generating_rows, switching_rows, mixed_rows, memory_rows, profile_rows)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_part_gives_ratios_with_their_spread(part):
    lines = part(TRIAL, "tiny")
    assert len({line["name"] for line in lines}) == len(lines) >= 1
    for line in lines:
        assert line["low"] <= line["ratio"] <= line["high"] and line["value"] >= 0 and line["yardstick"] > 0
        assert line["what"] and line["against"] and line["unit"] and line["better"] in ("higher", "lower")
        assert line["reach"] or line["name"].startswith("memory")
    json.dumps(lines, allow_nan=False)


def test_the_documents_loop_pads_and_counts_no_padding(monkeypatch):
    bench_training.document_parts.cache_clear()
    *_, stream = bench_training.document_parts("tiny", 32, 18)
    batch = next(stream)
    assert batch["input_ids"].shape == (8, 32)
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool())
    monkeypatch.setattr(bench_training, "islice", lambda *_: [batch] * 3)
    monkeypatch.setattr(bench_training, "seconds", lambda run: run() or 2.0)
    assert bench_training.document_rate("tiny", 32, 3, 18) == 3 * int(batch["attention_mask"].sum()) / 2.0
    bench_training.document_parts.cache_clear()


def test_the_flops_of_a_step_are_those_that_are_done():
    model = make_tiny_model(layers=3)
    model.set_attn_implementation("eager")  # its products are counted one by one
    rows, length, width = 2, 16, model.config.n_embd
    model = attach(model, "ia3").train()
    ids = torch.randint(0, 300, (rows, length))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    predicted = rows * length * training_flops(model.config, length)
    spared = 2 * 3 * width**2 * rows * length  # no gradient of the first layer's input
    assert counter.get_total_flops() == predicted - spared and spared < 0.04 * predicted


def test_the_machines_best_product_is_one_of_those_tried():
    assert product_rate(8, torch.bfloat16, repeats=1) > 0
    assert best_size(torch.float32, (4, 8)) in (4, 8)


def test_the_library_writes_as_many_texts_and_tokens_as_we_do(monkeypatch):
    model = endless(make_model("tiny"))
    written = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: written.append(generate(**options)) or written[-1])
    assert len(library_texts(model, samples=2, new_tokens=7)) == 2 * len(PROMPTS) == len(written[0])
    longest = max(map(len, bench_use.tokenizer()(list(PROMPTS))["input_ids"]))
    assert written[0].shape[1] == longest + 7


def test_a_notebooks_first_result_is_its_first_cell_with_output():
    code = first_cells(ROOT / "02-Train.ipynb")
    assert "setup_notebook()" in code and "IA3Config" not in code


def test_opening_is_timed_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(bench_use, "LIBRARIES", "import json")
    monkeypatch.setattr(bench_use, "first_cells", lambda path: f"import math  # {path.name}")
    lines = opening_rows(TRIAL)
    assert [line["name"] for line in lines] == [f"opening-0{number}" for number in (1, 2, 3, 4)]
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
    higher = row("a", "what", "against", [3.0], [1.0], unit="s", reach=2.5)
    lower = row("b", "what", "against", [3.0], [1.0], unit="s", reach=2.5, better="lower")
    assert reached(higher) is True and reached(lower) is False
    assert reached(row("c", "what", "against", [3.0], [1.0], unit="s")) is None


class Parts:
    """Stand-ins for the parts, which count how often they are measured; the second one fails while it is told to."""

    def __init__(self) -> None:
        self.ran, self.broken = [], False

    def make(self, name: str):
        def part():
            self.ran.append(name)
            if self.broken and name == "second":
                raise ValueError("no such kernel")
            return [row(name, f"the {name} thing", "another", [3.0, 4.0], [2.0, 2.0], unit="s", reach=1.5)]

        return part


@pytest.fixture
def stand_ins(monkeypatch) -> Parts:
    """Two parts in the place of the real ones."""
    made = Parts()
    monkeypatch.setattr(bench_main, "parts", lambda _: {name: made.make(name) for name in ("first", "second")})
    return made


def test_an_interrupted_run_goes_on_where_it_was(stand_ins, tmp_path, capsys):
    stand_ins.broken = True
    with pytest.raises(ValueError, match="no such kernel"):
        bench_main.main(["--quick"])
    stand_ins.broken, stand_ins.ran = False, []
    bench_main.main(["--quick"])
    assert stand_ins.ran == ["second"] and "the first thing" in capsys.readouterr().out
    record = read_json(tmp_path / "build" / "bench-quick" / "bench.json")
    assert record["rows"]["second"][0]["ratio"] == 1.75 and record["hardware"] == environment()[1]
    bench_main.main(["--quick", "--only", "fir"])
    assert stand_ins.ran == ["second", "first"]


def test_a_record_of_another_machine_is_not_mixed_in(stand_ins, tmp_path):
    bench_main.main(["--quick"])
    path = tmp_path / "build" / "bench-quick" / "bench.json"
    write_json(path, read_json(path) | {"hardware": {"cores": 1000}})
    bench_main.main(["--quick"])
    assert stand_ins.ran == ["first", "second"] * 2


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


def test_the_figure_carries_its_alt_text(stand_ins, tmp_path):
    bench_main.main(["--quick"])
    alt = Image.open(tmp_path / "build" / "bench-quick" / "bench.png").info["Description"]
    assert "2 of 2 aims reached" in alt


def test_only_a_whole_run_is_kept_and_the_pages_quote_it(stand_ins, tmp_path):
    with pytest.raises(SystemExit, match="tiny sizes"):
        bench_main.main(["--quick", "--keep"])
    with pytest.raises(SystemExit, match="not kept: second not measured"):
        bench_main.main(["--only", "first", "--keep"])
    assert "not measured" in bench_part(tmp_path / "assets")
    bench_main.main(["--keep"])
    kept = read_json(bench_main.KEPT)
    text = bench_part(tmp_path / "assets")
    assert "| the first thing | another | 1.75 (1.5 to 2) | 1.5 or more: reached |" in text
    assert environment()[1]["units"] in text and "What needs a GPU was not measured" in text
    write_json(bench_main.KEPT, {"cuda": kept["cpu"]})
    bench_main.main(["--keep"])
    assert set(read_json(bench_main.KEPT)) == {"cuda", "cpu"}
    assert "What needs a GPU" not in bench_part(tmp_path / "assets")


def test_the_parts_are_the_same_for_every_model():
    names = list(bench_main.parts(sizes(quick=False)))
    mini, large = ([name for name in names if name.endswith(model)] for model in ("mini", "124M"))
    assert [name.removesuffix("-124M") for name in large] == [name.removesuffix("-mini") for name in mini]
    assert names[0] == "opening" and len(set(names)) == len(names) == 11
