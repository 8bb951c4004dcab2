"""Nothing of the course reads a pickle: malicious ones beside every safetensors file are never even opened.

A pickle runs code when it is read, so the proof is not that this one did nothing but that no such file was opened
(Python's own audit event for opening a file). Grading's two processes talk in pickle over a socket, one way, to a
sandbox; tests/test_grading_hostile.py is about that.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from labs import made_tokenizer

from extensions.models import build_model, load_model
from extensions.recipes import RECIPES
from utils import training
from utils.adapters import AdapterError, attach, load_base
from utils.config import PROFILES, ROOT, HubError
from utils.saving import load_adapter, save_adapter

PLANTED = (
    "adapter_model.bin", "adapter_model.pt", "adapter.pkl", "pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt",
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
    "training_args.bin", "pytorch_model_fsdp.bin", "tokenizer.pkl", "vocab.pt",
)  # fmt: skip
PROFILE = replace(
    PROFILES["mini"], block_length=16, batch_size=8, steps=6, eval_every=2, eval_blocks=8,
    learning_rates={"ia3": 3e-2, "full": 1e-2},
)  # fmt: skip

opened: list[str] | None = None  # while a list, the names of the planted files that were opened


def hook(event: str, arguments: tuple) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        name = Path(os.fsdecode(arguments[0])).name
        if name in PLANTED:
            opened.append(name)


@pytest.fixture(scope="module", autouse=True)
def audit():
    """An audit hook stays for the life of the process; between tests it looks at nothing."""
    sys.addaudithook(hook)


@pytest.fixture
def watched(monkeypatch):
    """The planted files that were opened while the test ran."""
    monkeypatch.setattr(sys.modules[__name__], "opened", [])
    return opened


class Evil:
    """Pickled, it is an order to make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.marker),)


def plant(folder: Path, marker: Path) -> None:
    """Put a malicious pickle under every name that a library may know, half of them in torch's zip format."""
    bare = pickle.dumps(Evil(marker))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", bare)
        file.writestr("archive/version", "3")
    for number, name in enumerate(PLANTED):
        (folder / name).write_bytes(archive.getvalue() if number % 2 else bare)
    opened.clear()


def test_the_payload_works_and_the_hook_sees_it(tmp_path, watched):
    """Else the tests below would prove nothing."""
    plant(tmp_path, tmp_path / "marker")
    with (tmp_path / "adapter_model.bin").open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "marker").exists() and watched == ["adapter_model.bin"]


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_beside_an_adapter(tmp_path, tokenizer, watched, method):
    model = attach(make_tiny_model(), method)
    folder = save_adapter(model, tokenizer, tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.bin"))
    plant(folder, tmp_path / "marker")
    load_adapter(make_tiny_model(), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors missing"):
        load_adapter(make_tiny_model(), folder)
    assert watched == [] and not (tmp_path / "marker").exists()


def test_beside_a_model(tmp_path, tokenizer, watched):
    profile = replace(PROFILES["gpt2"], model=str(tmp_path), model_revision=None)
    make_tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plant(tmp_path, tmp_path / "marker")
    load_base(profile, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HubError, match="pytorch_model.bin is not read"):
        load_base(profile, "cpu")
    assert watched == [] and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("lab", list(RECIPES))
def test_beside_a_labs_model(tmp_path, watched, lab):
    recipe = RECIPES[lab]["mini"]
    build_model(recipe).save_pretrained(tmp_path)
    made_tokenizer(recipe.model_type).save_pretrained(tmp_path)
    plant(tmp_path, tmp_path / "marker")
    load_model(replace(recipe, size="full", model=str(tmp_path), model_revision=None), "cpu")
    assert watched == [] and not (tmp_path / "marker").exists()


def test_code_in_a_models_folder_is_not_run(tmp_path, tokenizer):
    """`auto_map` names code in the folder; `trust_remote_code` is nowhere given, and nothing asks for it."""
    make_tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'marker')!r}).touch()\n")
    for name, target in (("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
                         ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]})):  # fmt: skip
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": target}))
    load_base(replace(PROFILES["gpt2"], model=str(tmp_path), model_revision=None), "cpu")
    assert not (tmp_path / "marker").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_checkpoint_with_a_malicious_pickle_is_refused(tmp_path, blocks, monkeypatch, name):
    """The Trainer keeps its states with `torch.save`, and reads them with `weights_only=True`."""

    def run():
        model = attach(make_tiny_model(), "ia3")
        training.train(model, blocks, PROFILE, method="ia3", eval_blocks=blocks.select(range(8)), folder=tmp_path)

    def killer(self, args, state, control, **options):
        if state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Progress, "on_step_end", killer)
        run()
    archive = tmp_path / "checkpoints" / "checkpoint-2" / name
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil(tmp_path / "marker")))
        file.writestr("archive/version", "3")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run()
    assert not (tmp_path / "marker").exists()
    with pytest.raises(pickle.UnpicklingError):  # the file is one that torch would read, and the payload works
        torch.load(archive, weights_only=True)
    torch.load(archive, weights_only=False)
    assert (tmp_path / "marker").exists()


def test_no_source_reads_or_writes_a_pickle():
    banned = r"\b(pickle|marshal|dill|joblib|allow_pickle)\b|torch\.(load|save)\(|trust_remote_code\s*=\s*True"
    for folder in ("utils", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            code = re.sub(r'""".*?"""|#.*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert not re.search(banned, code), path.name
