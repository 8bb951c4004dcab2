"""Killed at any moment (SIGKILL), a program that is started again ends with the result of an undisturbed run.

Kill points: just before a change of a file, and in the middle of writing a file of tensors. Children are forks of one
process that has imported everything (tests/kill_programs.py).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import kill_programs
import pytest
from safetensors.torch import load_file

from utils.runs import RunRecord, standing
from utils.saving import read_probe

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"), pytest.mark.slow]

# By program: how many changes of files are killed before, how many files of tensors are cut in half; spread evenly.
PROGRAMS = {"train": (5, 4), "full": (1, 1), "save": (5, 1), "compare": (3, 1)}


@pytest.fixture(scope="module")
def run():
    """`run(program, folder, kill)`: what the program counted; None where it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_programs"])

    def run(program: str, folder: Path, kill: dict | None = None) -> dict | None:
        folder.mkdir(parents=True, exist_ok=True)
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=kill_programs.child, args=(program, folder, kill or {}, writer))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (kill, (folder / "log.txt").read_text("utf-8")[-3000:])
        return reader.recv() if process.exitcode == 0 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("KILLED_FROM_HERE", "1")
        yield run


def results(folder: Path) -> dict[str, object]:
    """All that is kept of a program, by path: records without what time decides, everything else by its bytes.

    Reading it is a check: a record or a safetensors file that is cut off is an error here. What the program itself
    would not read is left out: its log, locks, temporary names, checkpoints.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.suffix in (".txt", ".lock", ".tmp") or ".tmp/" in name or "checkpoints/" in name:
            continue
        if path.name == "running.json":
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_killed_program_started_again_gives_the_undisturbed_result(program, run, tmp_path):
    def begun(name: str) -> Path:
        if program == "save":  # an adapter is there already: replacing it is what is killed
            run("older", tmp_path / name)
        return tmp_path / name

    whole = begun("whole")
    answer, expected = run(program, whole), results(whole)
    points = [
        {kind: 1 + (2 * number + 1) * answer[of] // (2 * count)}
        for kind, of, count in zip(("event", "torn"), ("events", "torn"), PROGRAMS[program], strict=True)
        for number in range(count)
    ]
    for number, kill in enumerate(points):
        folder = begun(str(number))
        assert run(program, folder, kill) is None, kill
        results(folder)  # what is there now is whole
        if program == "save":
            read_probe(standing(folder / "positive adapter"))  # the old or the new one, and never none
        run(program, folder)
        assert results(folder) == expected, kill
        shutil.rmtree(folder)
