"""Files of unknown origin, mutated by hypothesis: each loader gives a right value or its documented exception.

No other exception, no code that runs (tests/test_no_pickle.py), no memory that the file decides. The examples are
derived from the tests' own source, so every run tries the same ones.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.adapters import AdapterError, attach
from utils.config import PROFILES, ConfigError, override
from utils.judges import EvaluationError, Judge
from utils.saving import check_tensors, load_adapter, save_adapter

MEMORY = 700 * 2**20  # bytes that all of these tests together may add to the process


def tries(number: int):
    """Settings: `number` examples, the same ones in every run; how long one takes is no test (pytest's limit is)."""
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """What a hostile size would break. Windows has no such count."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


# --- what is mutated, and how ---

NUMBERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**63, 2**64 - 1, 10**30, -(2**63)]), st.floats(), st.booleans()
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=8), st.sampled_from(["(.*)*x", "../../x", "\ud800", "NaN", "F32"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)


def places(value: object, way: tuple = ()) -> list[tuple]:
    """The ways to all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, item in inner for place in places(item, (*way, key)))]


@st.composite
def changed(draw, original: object) -> object:
    """A JSON value with one to three places replaced, removed, or given an unknown neighbour."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(value)[1:])) if places(value)[1:] else ((), None)
        holder = value
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if last is None:
            return draw(VALUES)
        if action == "replace":
            holder[last] = draw(VALUES)
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(VALUES)
    return value


PIECES = (b"\x00", b"\xff\xfe", b'"', b"{", b"1e999", b"\n", b",", b"-", b"9" * 5000)


@st.composite
def broken(draw, original: bytes) -> bytes:
    """Bytes cut off, doubled in part, or with a few of them changed."""
    raw = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        action = draw(st.sampled_from(["cut", "set", "insert", "double", "deep"]))
        if action == "cut":
            del raw[at:]
        elif action == "set":
            raw[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif action == "insert":
            raw[at:at] = draw(
                st.sampled_from([b"\x00", b"\xff\xfe", b'"', b"{", b"1e999", b"\n", b",", b"-", b"9" * 5000])
            )
        elif action == "double":
            raw[at:at] = raw[at : at + 40]
        else:
            raw[at:at] = draw(st.sampled_from([b"[", b'{"a":'])) * 20_000
    return bytes(raw)


def json_files(original: object) -> st.SearchStrategy[bytes]:
    """A JSON file's bytes, changed in meaning or in bytes."""
    text = json.dumps(original)
    return st.one_of(changed(original).map(lambda v: json.dumps(v).encode()), broken(text.encode()))


@st.composite
def tensor_files(draw, original: bytes) -> bytes:
    """A safetensors file with its header changed in meaning (length to match or not), or with its bytes changed."""
    if draw(st.integers(0, 2)) == 0:
        return draw(broken(original))
    length = struct.unpack("<Q", original[:8])[0]
    header = json.dumps(draw(changed(json.loads(original[8 : 8 + length])))).encode()
    said = draw(st.one_of(st.just(len(header)), st.sampled_from([0, 1, 2**20, 2**40, 2**64 - 1])))
    return struct.pack("<Q", said) + header + original[8 + length :]


# --- adapters ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer) -> Path:
    return save_adapter(attach(make_tiny_model(), "ia3"), tokenizer, tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture(scope="module", params=["ia3", "lora"])
def copied(request, tmp_path_factory, tokenizer) -> tuple[Path, dict[str, bytes]]:
    """A folder to write in, and what belongs there."""
    folder = tmp_path_factory.mktemp("copied") / "adapter"
    save_adapter(attach(make_tiny_model(), request.param), tokenizer, folder)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def restored(copied: tuple[Path, dict[str, bytes]], name: str, content: bytes) -> Path:
    folder, files = copied
    for other, original in files.items():
        (folder / other).write_bytes(content if other == name else original)
    return folder


@tries(200)
@given(st.data())
def test_an_adapters_tensors(copied, draw):
    content = draw.draw(tensor_files(copied[1]["adapter_model.safetensors"]))
    folder = restored(copied, "adapter_model.safetensors", content)
    try:
        tensors = check_tensors(folder)
    except AdapterError as error:
        assert "again" in str(error)
    else:
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


OVERRIDES = ("steps", "=", "4", ",", "seed", "-1", "1e400", "nan", "0x10", "9" * 5000, "top_p", "__class__", " ")


@tries(800)
@given(text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from(OVERRIDES)).map("".join)))
def test_overrides(text):
    with suppress(ConfigError):
        assert override(PROFILES["mini"], text).steps > 0


@tries(200)
@given(st.data())
def test_a_judge(tmp_path_factory, draw):
    folder = tmp_path_factory.getbasetemp() / "judge"
    numbers = np.ones(2, np.float32)
    Judge("words", ("good", "bad"), numbers, numbers, 0.0).save(folder)
    path = folder / "judge.safetensors"
    path.write_bytes(draw.draw(tensor_files(path.read_bytes())))
    try:
        assert 0 <= Judge.load(folder).probability(["a good film"])[0] <= 1
    except EvaluationError as error:
        assert "Fit it again" in str(error)


def test_nothing_is_left_over(adapter, tmp_path):
    """The unmutated files are accepted: else every test above could pass by refusing all."""
    shutil.copytree(adapter, tmp_path / "adapter")
    load_adapter(make_tiny_model(), tmp_path / "adapter")
