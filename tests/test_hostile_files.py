"""Files and settings of unknown origin, mutated by hypothesis: a right value or the documented exception.

No other exception, and no memory that the file decides. The examples are derived from the tests' own source, so every
run tries the same ones.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress

import pytest
import torch
from conftest import make_tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.adapters import AdapterError, attach
from utils.config import PROFILES, ConfigError, override
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


VALUES = st.recursive(
    st.none()
    | st.integers(-3, 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**31, 2**63, 2**64 - 1, 10**30, -(2**63), True, "../../x", "\ud800", "NaN", "F32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
PIECES = (b"\x00", b"\xff\xfe", b'"', b"{", b"1e999", b",", b"9" * 5000, b"[" * 20_000, b'{"a":' * 20_000)


def places(value: object, way: tuple = ()) -> list[tuple]:
    """The ways to all values inside a JSON value, the value itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in [(*way, key), *places(item, (*way, key))]]


@st.composite
def tensor_files(draw, original: bytes) -> bytes:
    """A safetensors file with its bytes changed, or its header in meaning (length to match or not)."""
    if draw(st.integers(0, 2)) == 0:
        raw = bytearray(original)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(raw)))
            end = draw(st.sampled_from([at, at + 1, len(raw)]))
            raw[at:end] = draw(st.binary(max_size=4) | st.sampled_from(PIECES))
        return bytes(raw)
    length = struct.unpack("<Q", original[:8])[0]
    value = json.loads(original[8 : 8 + length])
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(value) or [("new",)]))
        holder = value
        for key in way:
            holder = holder[key]
        if draw(st.integers(0, 3)):
            holder[last] = draw(VALUES)
        elif last in (holder if isinstance(holder, dict) else range(len(holder))):
            del holder[last]
    header = json.dumps(value).encode()
    said = draw(st.just(len(header)) | st.sampled_from([0, 1, 2**20, 2**40, 2**64 - 1]))
    return struct.pack("<Q", said) + header + original[8 + length :]


@pytest.fixture(scope="module", params=["ia3", "lora"])
def adapter(request, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(attach(make_tiny_model(), request.param), tokenizer, folder)
    load_adapter(make_tiny_model(), folder)  # else the test below could pass by refusing all
    return folder, (folder / "adapter_model.safetensors").read_bytes()


@tries(200)
@given(st.data())
def test_an_adapters_tensors_are_finite_or_refused(adapter, draw):
    folder, original = adapter
    (folder / "adapter_model.safetensors").write_bytes(draw.draw(tensor_files(original)))
    try:
        tensors = check_tensors(folder)
    except AdapterError as error:
        assert "again" in str(error)
    else:
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


OVERRIDES = ("steps", "=", "4", ",", "seed", "-1", "1e400", "nan", "0x10", "9" * 5000, "top_p", "__class__", " ")


@tries(800)
@given(text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from(OVERRIDES)).map("".join)))
def test_an_override_gives_a_profile_or_its_own_error(text):
    with suppress(ConfigError):
        assert override(PROFILES["mini"], text).steps > 0
