"""Files of unknown origin, mutated by hypothesis: each loader gives a right value or its documented exception.

No other exception, no code that runs (tests/test_no_pickle.py), no memory that the file decides. The examples are
derived from the tests' own source, so every run tries the same ones.
"""

from __future__ import annotations

import copy
import json
import math
import resource
import shutil
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import data, tasks
from utils.adapter_files import check_tensors, read_probe
from utils.adapters import AdapterError, attach, load_adapter, load_base, save_adapter
from utils.config import PROFILES
from utils.data import DataError
from utils.hub import HubError, model_folder
from utils.judges import EvaluationError, Judge
from utils.model_files import model_faults
from utils.runs import RunError, RunRecord, load_runs
from utils.settings import ConfigError, override

MEMORY = 700 * 2**20  # bytes that all of these tests together may add to the process


def tries(number: int):
    """Settings: `number` examples, the same ones in every run; how long one takes is no test (pytest's limit is)."""
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """What a hostile size would break."""
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


@tries(600)
@given(st.data())
def test_an_adapters_tensors(copied, draw):
    content = draw.draw(tensor_files(copied[1]["adapter_model.safetensors"]))
    folder = restored(copied, "adapter_model.safetensors", content)
    try:
        tensors = check_tensors(folder, limit=2**20)
    except AdapterError as error:
        assert "again" in str(error)
    else:
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@tries(400)
@given(st.data())
def test_an_adapters_probe(copied, draw):
    folder = restored(copied, "probe.json", draw.draw(json_files(json.loads(copied[1]["probe.json"]))))
    try:
        probe = read_probe(folder)
    except AdapterError as error:
        assert "again" in str(error)
    else:
        assert all(math.isfinite(value) for value in probe["logits"]) and min(probe["ids"]) >= 0


@tries(60)
@given(st.data())
def test_an_adapters_configuration_up_to_peft(copied, draw):
    """All the way: what passes the checks must also attach, or be refused in the same words."""
    config = json.loads(copied[1]["adapter_config.json"])
    folder = restored(copied, "adapter_config.json", draw.draw(json_files(config)))
    base = make_tiny_model()
    try:
        load_adapter(base, folder)
    except AdapterError:
        names = {name for name, _ in make_tiny_model().named_parameters()}
        assert {name for name, _ in base.named_parameters()} == names  # the base is as it was


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 10**9}, "r is 1000000000"),
        ({"peft_type": "VERA"}, "peft_type must be one of"),
        ({"target_modules": "(a|aa)*(a|aa)*(a|aa)*(a|aa)*x"}, "more than 3 repeats"),
        ({"init_lora_weights": "eva"}, "it sets init_lora_weights"),
        ({"layer_replication": [[0, 100000]]}, "it sets layer_replication"),
    ],
)
def test_a_configuration_that_costs_is_refused_before_peft_builds_it(tmp_path, tokenizer, change, message):
    folder = save_adapter(attach(make_tiny_model(), "lora"), tokenizer, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        load_adapter(make_tiny_model(), folder)


def test_tensors_that_are_not_those_saved_with_the_probe_are_refused(tmp_path, tokenizer):
    folder = save_adapter(attach(make_tiny_model(), "ia3"), tokenizer, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1  # the last bit of one number, which no logit shows
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match="SHA-256"):
        load_adapter(make_tiny_model(), folder)


# --- records ---

RECORD = {
    "status": "finished", "method": "ia3", "profile": "mini", "config_id": "0123456789ab", "config": {"steps": 4},
    "seed": 0, "task": "positive", "counts": {"trainable": 10}, "history": [{"step": 0, "eval_loss": 5.0}],
    "metrics": {"positivity": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 100}}, "time": {"run_seconds": 1.5},
    "memory": {"peak_bytes": 99}, "bytes_on_disk": 1234, "versions": {"torch": "2"}, "hardware": {"cores": 2},
    "created": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


@tries(1500)
@given(content=json_files(RECORD))
def test_run_records(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "records"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(content)
    try:
        record = RunRecord.load(folder / "run.json")
    except RunError as error:
        assert "run.json" in str(error)
        assert load_runs(folder)[0] == []
    else:
        for name in ("positivity", "trainable", "run_seconds", "peak_bytes"):
            record.value(name)
        assert all(isinstance(row["step"], int) for row in record.history)
        RunRecord.load(record.save(folder / "run.json"))


@pytest.mark.parametrize("depth", range(400, 1000, 50))
def test_nesting_just_short_of_what_python_reads(tmp_path, depth):
    (tmp_path / "run.json").write_text(json.dumps(RECORD)[:-1] + ', "config": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(RunError):
        RunRecord.load(tmp_path / "run.json")


def test_a_record_that_would_fill_the_memory_is_not_read(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**36)  # sparse: 64 GB that take no room
    with pytest.raises(RunError, match="more than"):
        RunRecord.load(tmp_path / "run.json")


# --- models ---


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@tries(700)
@given(st.data())
def test_a_models_weights_by_their_header(model, draw):
    folder = restored(model, "model.safetensors", draw.draw(tensor_files(model[1]["model.safetensors"][:3000])))
    assert all(isinstance(fault, str) for fault in model_faults(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@tries(40)
@given(st.data())
def test_a_models_configuration_and_tokenizer(model, name, draw):
    folder = restored(model, name, draw.draw(json_files(json.loads(model[1][name]))))
    try:
        load_base(replace(PROFILES["gpt2"], model=str(folder), model_revision=None), "cpu")
    except HubError as error:
        assert "LAB_GPT2_DIR" in str(error)


@pytest.mark.parametrize("change", [{"n_layer": 10**9}, {"n_embd": 10**6}, {"vocab_size": 2**40}, {"n_inner": 10**9}])
def test_a_configuration_of_another_size_than_the_weights(model, change):
    content = json.dumps(json.loads(model[1]["config.json"]) | change).encode()
    folder = restored(model, "config.json", content)
    with pytest.raises(HubError, match=f"config.json does not fit the weights .{next(iter(change))}"):
        model_folder(replace(PROFILES["gpt2"], model=str(folder), model_revision=None))


# --- tables, texts, settings ---

CSV = b'text,label,source\n"a ""fine"" film, really",1,imdb\nbad<br />one,0,imdb\nshort,1,rotten_tomatoes\n'


@tries(600)
@given(content=broken(CSV))
def test_the_reviews_table_even_if_its_checksum_were_right(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "reviews.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        list(data.read_packaged_reviews(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "verify_checksum", Path.read_bytes)
        try:
            rows = list(data.read_packaged_reviews(path))
        except DataError as error:
            assert "install them again" in str(error)
        else:
            assert all(isinstance(row["text"], str) and isinstance(row["label"], int) for row in rows)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt", ".zip"])
@tries(250)
@given(st.data())
def test_the_labs_data(tmp_path_factory, suffix, draw):
    rows = [{"text": "a", "target": "positive"}, {"text": "b@c", "target": "neutral"}]
    original = {
        ".json": json.dumps(rows), ".jsonl": "\n".join(map(json.dumps, rows)), ".txt": "a@positive\nb@c@neutral\n",
    }.get(suffix, "")  # fmt: skip
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    raw = original.encode() if suffix != ".zip" else archive()
    path.write_bytes(draw.draw(broken(raw)))
    try:
        found = tasks.read_phrases(path) if suffix in (".txt", ".zip") else tasks.read_json(path)
    except DataError as error:
        assert path.name in str(error)
    else:
        assert all(isinstance(row, dict) for row in found)


def archive() -> bytes:
    """PhraseBank's archive, as it is published."""
    import io
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("FinancialPhraseBank/Sentences_AllAgree.txt", "a good year@positive\n" * 20)
    return file.getvalue()


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/Sentences_AllAgree.txt", bytes(2**27))
    with pytest.raises(DataError, match="unpacks to more than"):
        tasks.read_phrases(tmp_path / "bomb.zip")


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
