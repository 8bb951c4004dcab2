"""Adapters on disk, with a proof that they came back right, and several of them on one base.

An adapter folder holds what peft writes (`adapter_config.json`, `adapter_model.safetensors`) and a `probe.json`: the
fingerprint of the base it belongs to and a few logits of a fixed prompt. Loading compares both, because peft itself
accepts any base whose shapes fit, a merged one included. Tensors are read from safetensors alone: an
`adapter_model.bin` is a pickle, which runs code when it is read.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from utils.adapters import AdapterError, base_fingerprint, carries_adapter, check_unmerged
from utils.config import ASSETS, Profile, artifacts_dir
from utils.generation import Sample, evaluation_mode, generate
from utils.runs import locked, replace_folder, standing, writing

FILES = ("adapter_config.json", "adapter_model.safetensors", "probe.json")
PROBE_PROMPT = "This movie was one of the"
PROBE_LOGITS = 64  # how many logits of the last position are kept
PROBE_TOLERANCE = 1e-2  # logits; float32 on another CPU differs by about 1e-5, a wrong adapter by more than 0.1


# --- saving ---


def probe_logits(model: PreTrainedModel | PeftModel, ids: list[int]) -> list[float]:
    """The first `PROBE_LOGITS` logits after the last of `ids`, in evaluation mode, without autocast.

    Those of the first token written, for an encoder-decoder; those of the labels, for a classifier.
    """
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start]], device=model.device)
    with evaluation_mode(model):
        logits = model(**inputs).logits
    return logits.flatten(0, -2)[-1, :PROBE_LOGITS].float().tolist()


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str, *, config_id: str | None = None
) -> Path:
    """Write the active adapter and its probe to `folder`, replacing what is there in one move; returns the folder.

    `config_id`: that of the profile it was trained with, by which `find_adapter` knows it. Raises `AdapterError` for a
    model without adapter, one that is merged into the weights, or one with NaN; `WriteError` where the disk is full or
    read-only. The old adapter is then as it was.
    """
    folder = Path(folder)
    if not isinstance(model, PeftModel) or not carries_adapter(model):
        raise AdapterError("save_adapter() saves adapters: attach one first, with attach(base, 'ia3')")
    check_unmerged(model)
    name = model.active_adapter
    ids = tokenizer(PROBE_PROMPT)["input_ids"]
    logits = probe_logits(model, ids)
    if not all(map(math.isfinite, logits)):
        raise AdapterError("the adapter gives NaN logits: it was not saved. Lower the learning rate and train again")
    probe = {
        "prompt": PROBE_PROMPT,
        "ids": ids,
        "logits": [round(value, 4) for value in logits],
        "config_id": config_id,
        "base_fingerprint": base_fingerprint(model),
        "merged_fingerprint": base_fingerprint(copy.deepcopy(model).merge_and_unload(adapter_names=[name])),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
    }
    with locked(folder.with_name(f".{folder.name}.lock"), "saving an adapter"), writing(folder):
        scratch = folder.with_name(folder.name + ".tmp")  # what lies there is a killed process's
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            model.save_pretrained(scratch, selected_adapters=[name])
            saved = scratch if name == "default" else scratch / name  # peft puts others into a folder of their own
            (scratch / "README.md").unlink(missing_ok=True)  # peft's empty model card
            (saved / "probe.json").write_text(json.dumps(probe, indent=1) + "\n", encoding="utf-8")
            settings = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
            # peft writes sets of names, in an order of each process's own
            settings = {key: sorted(value) if isinstance(value, list) else value for key, value in settings.items()}
            (saved / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            replace_folder(saved, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


# --- finding and loading ---


def find_adapter(profile: Profile, task: str, base: PreTrainedModel) -> tuple[Path, str]:
    """Folder of the adapter for `task` on `base` and whose it is: "yours" (from 02), else "reference run" (`assets/`).

    The reference is that of the lowest seed there is: the student edition leaves the first one out. One of another
    base model or another configuration is passed over. Raises `AdapterError`, which names what was
    passed over, when none is left.
    """
    wanted, passed = {"base_fingerprint": base_fingerprint(base), "config_id": profile.config_id()}, []
    yours = artifacts_dir(profile) / "adapters" / task
    shipped = sorted((ASSETS / "adapters" / profile.name).glob(f"{task}-seed*"))[:1]
    for folder, source in [(standing(yours), "yours"), *((reference, "reference run") for reference in shipped)]:
        if not (folder / "probe.json").is_file():
            continue
        probe = read_probe(folder)
        if {key: probe.get(key) for key in wanted} == wanted:
            return folder, source
        passed.append(f"{source}: made with another base model or configuration")
    reasons = f" ({'; '.join(passed)})" if passed else ""
    raise AdapterError(f"no {task} adapter for profile {profile.name}{reasons}: run 02-Train.ipynb, it trains one")


def read_probe(folder: Path) -> dict:
    """The probe of an adapter folder; `AdapterError` when the folder is incomplete or the probe unreadable."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"no adapter in {folder.name}/ ({', '.join(missing)} missing): run 02-Train.ipynb first")
    try:
        probe = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
        if not all(probe[name] for name in ("ids", "logits", "base_fingerprint", "merged_fingerprint")):
            raise ValueError("something in it is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder.name}/probe.json is damaged ({error}): save the adapter again") from error
    return probe


def check_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors; `AdapterError` when the file is no safetensors, or a tensor holds NaN or infinity.

    The file is closed afterwards: as long as one is mapped into memory, Windows does not let it be replaced.
    """
    try:
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise AdapterError(
            f"{folder.name}/adapter_model.safetensors is truncated or corrupt ({error}): copy or save it again"
        ) from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(
            f"{folder.name} holds NaN or infinity in {broken[0]} and {len(broken) - 1} more: "
            "its training diverged, train it again with a lower learning rate"
        )
    return tensors


def load_adapter(
    base: PreTrainedModel | PeftModel, folder: Path | str, *, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Attach the adapter in `folder` to `base` under `name` and prove by its probe that it works as when saved.

    `base` is a clean model, or a `PeftModel` that gets one more adapter. Raises `AdapterError`, and leaves the
    base as it was, when files are missing or corrupt, a value is NaN, the base is another one, is merged
    already (the adapter would act twice), carries layers of an adapter that was attached elsewhere, or has one
    of this name.
    """
    folder = standing(Path(folder))
    probe = read_probe(folder)
    check_tensors(folder)
    check_base(base, probe, folder, name)
    before = base.active_adapter if isinstance(base, PeftModel) else None
    flags = {parameter: parameter.requires_grad for parameter in base.parameters()}
    modes = {module: module.training for module in base.modules()}
    try:
        if isinstance(base, PeftModel):
            model = base
            model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
            model.set_adapter(name, inference_mode=not trainable)
        else:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=trainable)
        model.eval()
        if not 0 <= min(probe["ids"]) <= max(probe["ids"]) < model.get_input_embeddings().num_embeddings:
            raise AdapterError(f"{folder.name}/probe.json has a token that the base has not: save the adapter again")
        now = probe_logits(model, probe["ids"])
        gap = max(abs(a - b) for a, b in zip(now, probe["logits"], strict=True))
        if not gap <= PROBE_TOLERANCE:
            raise AdapterError(f"{folder.name}: the reloaded logits differ by {gap:.3g} from those saved with it")
    except Exception as error:  # whatever a damaged file makes the libraries say
        detach(base, name, before)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{folder.name} does not fit this base ({error}): save the adapter again") from error
    return model


def check_base(base: PreTrainedModel | PeftModel, probe: dict, folder: Path, name: str) -> None:
    """`AdapterError` when `base` is not the clean model that the adapter was trained on, or `name` is not free."""
    if not name or "." in name:
        raise AdapterError(f"{name!r} cannot name an adapter: use letters, digits and hyphens")
    if isinstance(base, PeftModel) and name in base.peft_config:
        raise AdapterError(f"an adapter named {name!r} is loaded already: choose another name, or remove it first")
    if not isinstance(base, PeftModel) and carries_adapter(base):
        raise AdapterError(
            "this base already carries another adapter's layers (peft changes the model it is given): "
            "load a fresh base, or keep several adapters in an AdapterLibrary"
        )
    check_unmerged(base)
    found = base_fingerprint(base)
    if found == probe["merged_fingerprint"] != probe["base_fingerprint"]:  # an untrained adapter merges into nothing
        raise AdapterError(
            f"this base has {folder.name} merged into it already: loading it again would apply it twice. "
            "Use the merged model as it is, or load a clean base"
        )
    if found != probe["base_fingerprint"]:
        raise AdapterError(
            f"{folder.name} belongs to another base model (fingerprint {probe['base_fingerprint']}, "
            f"this one has {found}): load the base it was trained on, or train a new adapter"
        )


def detach(base: PreTrainedModel | PeftModel, name: str, before: str | None) -> None:
    """Take the adapter `name` off again, however far loading it has come, and make `before` the active one."""
    if isinstance(base, PeftModel):
        base.set_adapter(before, inference_mode=True)
        if name in base.peft_config:
            base.delete_adapter(name)
        return
    for path, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(path, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(path, module.original_module)
    if hasattr(base, "peft_config"):
        del base.peft_config


# --- several at once ---


class AdapterLibrary:
    """Several named adapters on one base, one active at a time (what the lab sheet's `IA3Manager` set out to be).

    All adapters live in one `PeftModel`. Wrapping the same base once per adapter, as the sheet does, silently
    overwrites the first or runs one task under the other's name. Every method raises `AdapterError` while an adapter is
    merged into the weights.
    """

    def __init__(self, base: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if carries_adapter(base):
            raise AdapterError("AdapterLibrary() needs a clean base: load one with load_base(profile)")
        self.base, self.tokenizer = base, tokenizer
        self.model: PeftModel | None = None
        self.active: str | None = None
        self._bare = ExitStack()  # holds peft's `disable_adapter()` while the bare base is in use

    @property
    def tasks(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self.model.peft_config) if self.model else []

    def load(self, task: str, folder: Path | str) -> None:
        """Load and verify the adapter in `folder` as `task`; `AdapterError` when the name is taken or the file bad."""
        before = self.active
        if self.model and before is None:
            self._switch(self.tasks[0])  # the probe needs the adapters on
        try:
            self.model = load_adapter(self.model or self.base, folder, name=task)
            before = task
        finally:
            if self.model:
                self._switch(before)

    def remove(self, task: str) -> None:
        """Forget `task`; after the last one the base is plain again."""
        self._check(task)
        check_unmerged(self.model)
        others = [name for name in self.tasks if name != task]
        if self.active in (task, None):
            self._switch((others or [task])[0])
        if others:
            self.model.delete_adapter(task)
        else:
            self.base, self.model, self.active = self.model.unload(), None, None

    @contextmanager
    def use(self, task: str | None) -> Iterator[GPT2LMHeadModel | PeftModel]:
        """The model with `task` active, or the bare base for None; the adapter active before comes back at the end."""
        if task is not None:
            self._check(task)
        if self.model is None:
            yield self.base
            return
        before = self.active
        self._switch(task)
        try:
            yield self.model
        finally:
            if self.model:
                self._switch(before if before in self.tasks else None)

    def generate(self, task: str | None, prompts: Sequence[str], **options: object) -> list[Sample]:
        """`utils.generation.generate` under `task` (None: the base)."""
        with self.use(task) as model:
            return generate(model, self.tokenizer, prompts, **options)

    def _check(self, task: str) -> None:
        if task not in self.tasks:
            raise AdapterError(f"no adapter named {task!r}: loaded are {', '.join(self.tasks) or 'none'}")

    def _switch(self, task: str | None) -> None:
        """Make `task` the one that acts, or none; nothing in the model wants a gradient afterwards."""
        check_unmerged(self.model)
        self._bare.close()
        if task is None:
            self._bare.enter_context(self.model.disable_adapter())
        else:
            self.model.set_adapter(task, inference_mode=True)
        self.active = task
