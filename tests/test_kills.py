"""Killed at any moment (SIGKILL), a program that is started again ends with the result of an undisturbed run.

Kill points: just before a change of a file (each that Python announces can be chosen), in the middle of writing a
safetensors file, and at random times. Children are forks of one process that has imported everything
(tests/kill_server.py). Seeded: a failure can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from safetensors.torch import load_file

from utils.runs import RunRecord, standing
from utils.saving import read_probe

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"), pytest.mark.timeout(900)]

SERVER = Path(__file__).with_name("kill_server.py")
PROGRAMS = {"train": 14, "full": 5, "save": 13, "compare": 10}  # how many changes of files are killed before
TORN = {"train": (1, 5), "full": (2,), "save": (1,), "compare": (3, 11)}  # which safetensors files are cut in half
TIMES = {"train": 4, "compare": 3, "replay": 1, "refresh": 1}  # how many kills at random times


class Server:
    """The process that forks; `run(program, folder, kill)` gives its answer."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def run(self, program: str, folder: Path, kill: dict | None = None) -> dict:
        folder.mkdir(parents=True, exist_ok=True)
        request = {"program": program, "folder": str(folder), "kill": kill}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["status"] != "failed", (kill, (folder / "log.txt").read_text(encoding="utf-8")[-3000:])
        return answer


@pytest.fixture(scope="module")
def server():
    started = Server()
    yield started
    started.process.stdin.close()
    started.process.wait()


def start(program: str, folder: Path) -> Path:
    """What lies in the folder before the program runs for the first time: an older result, or notebooks to run."""
    folder.mkdir(parents=True)
    if program in ("replay", "refresh"):
        for number in (1, 2):
            cells = [new_markdown_cell("# Title", id="a"), new_code_cell(f"print({number} + 1)", id="b")]
            notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "x"}})
            nbformat.write(notebook, folder / f"{number}.ipynb")
    return folder


def results(folder: Path) -> dict[str, object]:
    """All that is kept of a program, by path: records without what time decides, everything else by its bytes.

    Reading it is a check: a record or a safetensors file that is cut off is an error here. What the program itself
    would not read is left out: its log, locks, temporary names, checkpoints (which count by their seal).
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.suffix in (".txt", ".lock", ".tmp") or ".tmp/" in name or "checkpoints/" in name:
            continue
        if path.name == "running.json" or path.name == "times.json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.name == "probe.json":
            read_probe(path.parent)
        elif path.suffix == ".json" and path.name != "adapter_config.json":
            values = vars(RunRecord.load(path)).copy()
            found[name] = {key: values[key] for key in values.keys() - {"time", "memory", "created"}}
        elif path.suffix == ".safetensors":
            found[name] = {key: tensor.tolist() for key, tensor in load_file(path).items()}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """By program: what a run that nobody disturbs leaves, how many changes of files it made, how long it took."""
    made: dict[str, tuple[dict, int, float]] = {}

    def get(program: str) -> tuple[dict, int, float]:
        if program not in made:
            folder = start(program, tmp_path_factory.mktemp("undisturbed") / program)
            if program == "save":
                server.run("older", folder)  # an adapter is there already: replacing it is what is killed
            answer = server.run(program, folder)
            made[program] = results(folder), answer["events"], answer["seconds"]
        return made[program]

    return get


def kill_points(program: str, events: int, seconds: float) -> list[dict]:
    """Changes of files spread evenly with a seeded start, the torn files, random times."""
    chance, count = random.Random(program), PROGRAMS.get(program, 3)
    step = events / count
    points = [{"event": 1 + int(step * (i + chance.random()))} for i in range(count)]
    points += [{"torn": number} for number in TORN.get(program, ())]
    return points + [{"after": chance.uniform(0.05, 0.95) * seconds} for _ in range(TIMES.get(program, 0))]


@pytest.mark.parametrize("program", ["train", "full", "save", "compare", "replay", "refresh"])
def test_a_killed_program_started_again_gives_the_undisturbed_result(program, server, undisturbed, tmp_path):
    expected, events, seconds = undisturbed(program)
    assert expected and events > 4
    for number, kill in enumerate(kill_points(program, events, seconds)):
        folder = start(program, tmp_path / str(number))
        if program == "save":
            server.run("older", folder)
        answer = server.run(program, folder, kill)
        assert answer["status"] == "killed" or "after" in kill, kill
        results(folder)  # what is there now is whole
        if program == "save":
            adapter = standing(folder / "positive adapter")  # the old or the new one, and never none
            read_probe(adapter)
        server.run(program, folder)
        assert results(folder) == expected, kill
        shutil.rmtree(folder)


def test_killed_again_and_again_it_still_ends_in_the_same_result(server, undisturbed, tmp_path):
    """Each start goes on from what the kills before have left, and gets a bit further."""
    expected, events, _ = undisturbed("compare")
    chance, folder = random.Random(0), start("compare", tmp_path / "run")
    killed = [server.run("compare", folder, {"event": chance.randrange(1, events // 2)})["status"] for _ in range(8)]
    assert killed.count("killed") >= 4
    server.run("compare", folder)
    assert results(folder) == expected
