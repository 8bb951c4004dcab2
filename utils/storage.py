"""Adapters on disk, with a proof that they came back right.

An adapter folder holds what peft writes (`adapter_config.json`, `adapter_model.safetensors`) and a
`probe.json`: the fingerprint of the base it belongs to and a few logits of a fixed prompt. Loading
compares both, because peft itself accepts any base whose shapes fit, a merged one included.
Reached through `utils.adapters`. Not for: choosing or training an adapter.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.adapter_files import AdapterError, check_tensors, read_probe
from utils.config import ASSETS, Profile, artifacts_dir
from utils.files import digest, locked, replace_folder, standing, writing
from utils.rivals import Bottleneck
from utils.sizes import is_adapter, is_head

PROBE_PROMPT = "This movie was one of the"
PROBE_LOGITS = 64  # how many logits of the last position are kept
SMALLEST_LIMIT = 2**26  # bytes that an adapter of the smallest base may have
PROBE_TOLERANCE = 1e-2  # logits; float32 on another CPU differs by about 1e-5, a wrong adapter by more than 0.1


def plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside, whether or not peft has wrapped it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def carries_adapter(model: PreTrainedModel) -> bool:
    """True when this model is wrapped by peft, or holds adapter layers of peft's or of ours."""
    return isinstance(model, PeftModel) or any(isinstance(m, (BaseTunerLayer, Bottleneck)) for m in model.modules())


def base_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """16 hex digits of BLAKE2b over the base weights (names, float32 bytes); an attached adapter does not change it.

    Nor does a classification head: it starts at random and is saved with the adapter.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(plain_model(model).named_parameters()):
        if is_adapter(name) or is_head(name):
            continue
        digest.update(name.replace(".base_layer", "").encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def probe_logits(model: PreTrainedModel | PeftModel, ids: list[int]) -> list[float]:
    """The first `PROBE_LOGITS` logits after the last of `ids`, in evaluation mode, without autocast.

    Those of the first token written, for an encoder-decoder; those of the labels, for a classifier.
    """
    was_training = model.training
    model.eval()
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start]], device=model.device)
    logits = model(**inputs).logits
    model.train(was_training)
    return logits.flatten(0, -2)[-1, :PROBE_LOGITS].float().tolist()


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str, *, config_id: str | None = None
) -> Path:
    """Write the active adapter and its probe to `folder`, replacing what is there in one move; returns the folder.

    `config_id`: that of the profile it was trained with, by which `find_adapter` knows it. Raises `AdapterError` for a
    model without adapter, one that was merged, or one with NaN in its adapter; `WriteError` where the disk is full or
    read-only, and the old adapter is then as it was.
    """
    folder = Path(folder)
    if not isinstance(model, PeftModel) or not carries_adapter(model):
        raise AdapterError("save_adapter() saves adapters: attach one first, with attach(base, 'ia3')")
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
            sort_names(saved / "adapter_config.json")
            probe["sha256"] = digest(saved / "adapter_model.safetensors")
            (saved / "probe.json").write_text(json.dumps(probe, indent=1) + "\n", encoding="utf-8")
            replace_folder(saved, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def sort_names(path: Path) -> None:
    """Sort the lists of names in an adapter's configuration: peft writes sets, in an order of each process's own."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    size = sum(parameter.nbytes for parameter in base.parameters())
    check_tensors(folder, limit=max(size, SMALLEST_LIMIT))
    check_name(base, name)
    if not isinstance(base, PeftModel) and carries_adapter(base):
        raise AdapterError(
            "this base already carries another adapter's layers (peft changes the model it is given): "
            "load a fresh base, or keep several adapters in an AdapterLibrary"
        )
    check_base(base, probe, folder)
    before = base.active_adapter if isinstance(base, PeftModel) else None
    flags = {parameter: parameter.requires_grad for parameter in base.parameters()}
    try:
        model = _attach_folder(base, folder, name, trainable)
        if max(probe["ids"]) >= model.get_input_embeddings().num_embeddings:
            raise AdapterError(f"{folder.name}/probe.json has a token that the base has not: save the adapter again")
        now = probe_logits(model, probe["ids"])
        gap = max(abs(a - b) for a, b in zip(now, probe["logits"], strict=True))
        if not gap <= PROBE_TOLERANCE:
            raise AdapterError(f"{folder.name}: the reloaded logits differ by {gap:.3g} from those saved with it")
        if probe.get("sha256") not in (None, digest(folder / "adapter_model.safetensors")):  # older ones have none
            raise AdapterError(
                f"{folder.name} is truncated or corrupt (another SHA-256 than when saved): save it again"
            )
    except Exception as error:
        _detach(base, name, before)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{folder.name} cannot be attached to this base ({error}): save the adapter again"
        ) from error
    return model


def _attach_folder(base: PreTrainedModel | PeftModel, folder: Path, name: str, trainable: bool) -> PeftModel:
    """peft's own loading, onto a plain model or beside other adapters."""
    if not isinstance(base, PeftModel):
        return PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=trainable).eval()
    base.load_adapter(folder, adapter_name=name, is_trainable=trainable)
    base.set_adapter(name, inference_mode=not trainable)
    return base


def _detach(base: PreTrainedModel | PeftModel, name: str, before: str | None) -> None:
    """Take the adapter `name` off again, however far loading it has come, and make `before` the active one."""
    if isinstance(base, PeftModel):
        if name in base.peft_config:
            base.delete_adapter(name)
        base.set_adapter(before, inference_mode=True)
        return
    for path, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(path, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(path, module.original_module)
    if hasattr(base, "peft_config"):
        del base.peft_config


def check_name(base: PreTrainedModel | PeftModel, name: str) -> None:
    """`AdapterError` for a name that peft cannot use, or that would silently replace a loaded adapter."""
    if not name or "." in name:
        raise AdapterError(f"{name!r} cannot name an adapter: use letters, digits and hyphens")
    if isinstance(base, PeftModel) and name in base.peft_config:
        raise AdapterError(f"an adapter named {name!r} is loaded already: choose another name, or remove it first")


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


def check_base(base: PreTrainedModel | PeftModel, probe: dict, folder: Path) -> None:
    """`AdapterError` when `base` is not the model that the adapter was trained on."""
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
