"""What a classroom does to the files: two notebooks at once, a full disk, a read-only folder, odd names, a wrong clock.

Each ends in the right result or in one clear message, and nothing that was there before is lost. Kills are in
test_kills.py, files that somebody made up in test_hostile_files.py, the Hub's faults in test_hub.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model

from utils import data, training
from utils.adapters import attach, scaling_vectors, set_scaling_vectors
from utils.config import PROFILES, ROOT
from utils.runs import BusyError, RunRecord, WriteError, locked, replace_folder, standing, write_atomic
from utils.saving import find_adapter, load_adapter, save_adapter

PROFILE = replace(
    PROFILES["mini"], block_length=16, batch_size=8, steps=6, eval_every=2, eval_blocks=8,
    learning_rates={"ia3": 3e-2, "full": 1e-2},
)  # fmt: skip
ODD_NAMES = ("two words", "電影評論", "🎬 (IA)³", "a'b\"c", "ümläut.tmp")


def run(blocks, folder: Path, method: str = "ia3", **options):
    model = attach(make_tiny_model(), method)
    evaluation = options.pop("eval_blocks", blocks.select(range(8)))
    return model, training.train(
        model, blocks, PROFILE, method=method, eval_blocks=evaluation, folder=folder, **options
    )


def same(a: RunRecord, b: RunRecord) -> bool:
    """Equal in all but what time decides."""
    return (a.history, a.metrics, a.config, a.seed, a.counts) == (b.history, b.metrics, b.config, b.seed, b.counts)


def adapter_of(value: float):
    model = attach(make_tiny_model(), "ia3")
    set_scaling_vectors(model, {name: torch.full_like(l, value) for name, l in scaling_vectors(model).items()})
    return model


def value_of(folder: Path) -> float:
    """The one value of all vectors of a stored adapter, proved by its probe."""
    (value,) = {
        v for l in scaling_vectors(load_adapter(make_tiny_model(), folder)).values() for v in l.unique().tolist()
    }
    return value


# --- two at once ---


def test_a_second_training_in_the_same_folder_is_refused_and_the_first_goes_on(blocks, tmp_path, monkeypatch):
    met = []
    original = training.Progress.on_step_end

    def meanwhile(self, args, state, control, **options):
        if state.global_step == 3 and not met:
            met.append(True)
            with pytest.raises(BusyError, match="another notebook or program is training in .*wait until it has ended"):
                run(blocks, tmp_path / "one")
        original(self, args, state, control, **options)

    monkeypatch.setattr(training.Progress, "on_step_end", meanwhile)
    _, first = run(blocks, tmp_path / "one")
    assert met and same(first, run(blocks, tmp_path / "two")[1])
    assert RunRecord.load(tmp_path / "one" / "run.json") == first


def test_the_lock_goes_with_its_process(tmp_path):
    """As with a kernel that was killed: nobody has to delete a file."""
    lock = tmp_path / training.LOCK
    code = f"from pathlib import Path\nfrom utils.runs import locked\nwith locked(Path({str(lock)!r}), 'x'):\n"
    child = subprocess.Popen(
        [os.sys.executable, "-c", code + "    print('held', flush=True)\n    input()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(BusyError), locked(lock, "training", wait=0):
        pass
    child.kill()
    child.wait()
    with locked(lock, "training", wait=0):
        pass


def test_adapters_saved_to_one_folder_at_once_leave_one_of_them_whole(tokenizer, tmp_path):
    errors = []

    def save(value: float) -> None:
        try:
            for _ in range(4):
                save_adapter(adapter_of(value), tokenizer, tmp_path / "adapter")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(value,)) for value in (0.5, 1.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and value_of(tmp_path / "adapter") in (0.5, 1.5)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", ".adapter.lock"}


def test_reviews_are_prepared_once_for_two_notebooks(tmp_path, monkeypatch, reviews):
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(data, "packaged_csv", lambda: None)
    monkeypatch.setattr(data, "verify_checksum", lambda path: b"")
    started, found = [], []

    def slow(*_):
        started.append(True)
        threading.Event().wait(0.5)
        yield from reviews

    monkeypatch.setattr(data, "read_packaged_reviews", slow)
    threads = [threading.Thread(target=lambda: found.append(data.load_reviews(PROFILE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and len(found) == 2
    assert sum(len(part) for part in found[0].values()) == len(reviews)
    (arrow,) = {path for path in tmp_path.rglob("*.arrow") if "adapter" in path.parts}
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(data.DataError, match="are damaged .*: delete .* and run this again"):
        data.load_reviews(PROFILE)


# --- no room, no right ---


@contextmanager
def size_limit(size: int):
    """No file may grow beyond `size` bytes: writing fails in the middle of a file, as on a disk that fills up."""
    resource = pytest.importorskip("resource", reason="this system does not limit the size of a file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB of its own; only root can have one made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def mount(folder: Path, options: str) -> None:
    made = subprocess.run(["mount", "-o", options, folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this folder cannot be made read-only here: {made.stderr.strip()}")


def test_a_full_disk_keeps_the_old_files_and_says_what_to_do(tokenizer, tmp_path):
    save_adapter(adapter_of(0.5), tokenizer, tmp_path / "adapter")
    RunRecord("finished", "ia3", "mini", "x", {}, 0).save(tmp_path / "run.json")
    with size_limit(300), pytest.raises(WriteError, match=r"run.json: cannot be written .*free some space"):
        RunRecord("finished", "ia3", "mini", "x", {"a": "x" * 9999}, 1).save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json").seed == 0
    for size in (0, 300, 1000, 2000):  # every file that is written fails once
        with (
            size_limit(size),
            pytest.raises(WriteError, match="cannot be written .*free some space, or set LAB_ARTIFACTS"),
        ):
            save_adapter(adapter_of(1.5), tokenizer, tmp_path / "adapter")
        assert value_of(tmp_path / "adapter") == 0.5
        assert not (tmp_path / "adapter.tmp").exists()  # it does not fill the disk further
    save_adapter(adapter_of(1.5), tokenizer, tmp_path / "adapter")
    assert value_of(tmp_path / "adapter") == 1.5


@pytest.mark.parametrize("size", [500, 5_000, 200_000])  # fails at a record, at an optimiser's state, at the weights
def test_training_on_a_full_disk_stops_and_goes_on_when_there_is_room(blocks, tmp_path, size):
    _, whole = run(blocks, tmp_path / "whole", "full")
    with size_limit(size), pytest.raises(WriteError, match="free some space"):
        run(blocks, tmp_path / "full", "full")
    assert not (tmp_path / "full" / "run.json").exists()
    assert same(run(blocks, tmp_path / "full", "full")[1], whole)


def test_a_read_only_folder_can_be_read_and_refuses_by_name(small_disk, tokenizer, blocks, monkeypatch):
    """On a mount of its own: permissions do not bind root."""
    monkeypatch.setenv("LAB_ARTIFACTS", str(small_disk))
    place = small_disk / PROFILE.name / "adapters" / "positive"
    save_adapter(adapter_of(0.5), tokenizer, place, config_id=PROFILE.config_id())
    mount(small_disk, "remount,ro")
    try:
        assert find_adapter(PROFILE, "positive", make_tiny_model()) == (place, "yours")
        assert value_of(place) == 0.5
        for work in (
            lambda: save_adapter(adapter_of(1.5), tokenizer, place),
            lambda: run(blocks, small_disk / PROFILE.name / "runs"),
            lambda: RunRecord("finished", "ia3", "mini", "x", {}, 0).save(small_disk / "run.json"),
        ):
            with pytest.raises(WriteError, match=r"\(Read-only file system\).*set LAB_ARTIFACTS to a folder that can"):
                work()
        assert value_of(place) == 0.5
    finally:
        mount(small_disk, "remount,rw")


# --- names and clocks ---


@pytest.mark.parametrize("name", ODD_NAMES)
def test_folders_with_odd_names(name, tokenizer, blocks, tmp_path, monkeypatch):
    folder = tmp_path / name / name
    _, record = run(blocks, folder)
    assert RunRecord.load(folder / "run.json") == record
    monkeypatch.setenv("LAB_ARTIFACTS", str(folder))
    place = folder / PROFILE.name / "adapters" / "positive"
    save_adapter(adapter_of(0.5), tokenizer, place, config_id=PROFILE.config_id())
    assert value_of(find_adapter(PROFILE, "positive", make_tiny_model())[0]) == 0.5


def test_durations_come_from_a_clock_that_cannot_be_set():
    for folder in ("utils", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            assert not re.search(r"\btime\.time\(|from time import time\b", path.read_text(encoding="utf-8")), path.name


# --- files ---


def test_a_folder_is_never_without_its_old_or_new_content(tmp_path, monkeypatch):
    """Stopped between the two moves, the old one is found; the next replacement does not begin with removing it."""
    for name, text in (("folder", "old"), ("new", "new"), ("newer", "newer")):
        write_atomic(tmp_path / name / "file", text.encode())
    moves = []

    def stop(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise OSError("killed here")
        move(source, target)

    move = os.replace
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(WriteError):
        replace_folder(tmp_path / "new", tmp_path / "folder")
    monkeypatch.setattr(os, "replace", move)
    assert not (tmp_path / "folder").exists()
    assert (standing(tmp_path / "folder") / "file").read_text() == "old"
    replace_folder(tmp_path / "newer", tmp_path / "folder")
    assert (standing(tmp_path / "folder") / "file").read_text() == "newer"
    assert not (tmp_path / "folder.old").exists()
