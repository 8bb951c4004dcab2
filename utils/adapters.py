"""(IA)³ on GPT-2: attaching it or a rival, the learned vectors, merging, several adapters at once.

(IA)³ (Liu et al. 2022, arXiv:2205.05638) multiplies keys, values and the feed-forward's inner activation by learned
vectors that start at 1. In GPT-2 query, key and value come out of one matrix, `c_attn`, so peft scales the query
too; `mlp.c_proj` is scaled on its input, which is the inner activation. Not for: its configuration (`places.py`, which
is reached through here), training or generating loops.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from extensions.recipes import Recipe
from utils.adapter_files import AdapterError, read_probe
from utils.config import Profile
from utils.counts import (  # students import from here
    LORA_RANK,
    PREFIX_TOKENS,
    ParameterCount,
    count_parameters,
    is_adapter,
    is_head,
    predict_gpt2_groups,
    predict_ia3_count,
    predict_lora_count,
    predict_trainable,
)
from utils.generation import Sample, generate
from utils.gpu import pick_device
from utils.hub import GPT2_WAYS, HubError, model_folder
from utils.places import check_task, ia3_config, recipe_config
from utils.rivals import hold_queries, insert_bottlenecks, train_biases
from utils.storage import base_fingerprint, carries_adapter, find_adapter, load_adapter, plain_model, save_adapter

__all__ = [
    "METHODS", "AdapterError", "AdapterLibrary", "ParameterCount", "attach", "attach_recipe", "base_fingerprint",
    "count_parameters", "find_adapter", "ia3_config", "load_adapter", "load_base", "lora_config", "merge",
    "predict_gpt2_groups", "predict_ia3_count", "predict_lora_count", "predict_trainable", "read_probe",
    "recipe_config", "save_adapter", "scaling_vectors", "set_scaling_vectors",
]  # fmt: skip

METHODS = {
    "base": "base (nothing trained)",
    "ia3": "(IA)³",
    "ia3_kv": "(IA)³ without queries",
    "lora": "LoRA r=8",
    "bitfit": "BitFit",
    "prefix": "prefix tuning",
    "bottleneck": "bottleneck adapter",
    "full": "full fine-tuning",
}


MERGEABLE = ("ia3", "ia3_kv", "lora")  # what leaves a plain GPT-2 behind
ROLES = {"attention": "attn.c_attn", "feedforward": "mlp.c_proj"}


def load_base(
    profile: Profile, device: torch.device | str | None = None
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The profile's GPT-2 in float32 and evaluation mode on `device`, and its tokenizer (padding: end of text).

    Raises `HubError` where the files cannot be had or used.
    """
    folder = model_folder(profile)
    try:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the libraries say
        raise HubError(f"{folder} holds no usable GPT-2 ({error}): get its files again.\n{GPT2_WAYS}") from error
    model.config.loss_type = "ForCausalLM"
    # Adapters record this name; a repository id or a folder name, never a path of the machine they were made on.
    model.config._name_or_path = model.name_or_path = profile.model_name
    tokenizer.pad_token = tokenizer.eos_token
    return model.to(device or pick_device()), tokenizer


def lora_config() -> LoraConfig:
    """LoRA of rank 8 on `c_attn` (Hu et al. 2021), scaled by alpha / r = 2, no dropout."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip


def prefix_config() -> PrefixTuningConfig:
    """20 virtual tokens whose keys and values are learned in each layer (Li & Liang 2021), without a projection."""
    return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PREFIX_TOKENS)


def attach_recipe(model: PreTrainedModel, recipe: Recipe, method: str = "ia3") -> PreTrainedModel | PeftModel:
    """As `attach`, on the model of a recipe: "ia3", "full", "base", or "head" (the classification head alone).

    Raises `AdapterError` for another method, a model that carries an adapter, and where `recipe_config` does.
    """
    if carries_adapter(model):
        raise AdapterError("this model already carries an adapter: load a fresh base with load_model(recipe)")
    if method == "ia3":
        return get_peft_model(model, recipe_config(recipe, model))
    if method not in ("full", "base", "head"):
        raise AdapterError(f"unknown method {method!r}: choose from ia3, head, full, base")
    if method == "head":
        check_task("SEQ_CLS", model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" or (method == "head" and is_head(name)))
    return model


def attach(model: GPT2LMHeadModel, method: str, seed: int = 0) -> GPT2LMHeadModel | PeftModel:
    """Make `model` trainable by `method` (a key of `METHODS`) in place; peft's methods also wrap it.

    All but prefix tuning leave the logits as they were. Raises `AdapterError` for an unknown method or a model that
    carries an adapter already.
    """
    if method not in METHODS:
        raise AdapterError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if carries_adapter(model):
        raise AdapterError("this model already carries an adapter: load a fresh base with load_base(profile)")
    torch.manual_seed(seed)  # LoRA's A, the prefix and the bottleneck's way down start at random
    if method in PEFT_CONFIGS:
        model = get_peft_model(model, PEFT_CONFIGS[method](model))
    else:
        PLAIN_METHODS[method](model)
    if method == "ia3_kv":
        hold_queries(model)
    return model


PEFT_CONFIGS = {
    "ia3": ia3_config,
    "ia3_kv": ia3_config,
    "lora": lambda _: lora_config(),
    "prefix": lambda _: prefix_config(),
}
PLAIN_METHODS = {
    "base": lambda model: model.requires_grad_(False),
    "full": lambda model: model.requires_grad_(True),
    "bitfit": train_biases,
    "bottleneck": insert_bottlenecks,
}


def merge(model: PeftModel, in_place: bool = False) -> GPT2LMHeadModel:
    """A plain GPT-2 with the active adapter multiplied into its weights; the base stays clean unless `in_place`.

    Raises `AdapterError` when the merged weights would not be finite.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError("merge() needs a model with an adapter: this one is plain, perhaps merged already")
    if broken := [n for n, p in model.named_parameters() if is_adapter(n) and not torch.isfinite(p).all()]:
        raise AdapterError(f"not merged: {broken[0]} holds NaN or infinity")
    try:
        return (model if in_place else copy.deepcopy(model)).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"not merged: {error}") from error


def ia3_parameters(model: torch.nn.Module, name: str | None = None) -> dict[str, torch.nn.Parameter]:
    """The parameters behind `scaling_vectors`, keyed the same way; `name` None means the active adapter."""
    name = name or (model.active_adapter if isinstance(model, PeftModel) else "default")
    found = {}
    for path, parameter in plain_model(model).named_parameters():
        for role, module in ROLES.items():
            if path.endswith(f"{module}.ia3_l.{name}"):
                found[f"{path.split('.h.')[1].split('.')[0]}.{role}"] = parameter
    if not found:
        raise AdapterError(f"the model has no (IA)³ adapter named {name!r}")
    return found


def scaling_vectors(model: torch.nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Copies of the vectors on the CPU: `"<layer>.attention"` (3d,) for q, k, v; `"<layer>.feedforward"` (4d,)."""
    return {key: p.detach().flatten().cpu().clone() for key, p in ia3_parameters(model, name).items()}


@torch.no_grad()
def set_scaling_vectors(model: torch.nn.Module, vectors: dict[str, Tensor], name: str | None = None) -> None:
    """Write `vectors` (as `scaling_vectors` gives them) into the model; `AdapterError` when keys or sizes differ."""
    parameters = ia3_parameters(model, name)
    if {k: p.numel() for k, p in parameters.items()} != {k: v.numel() for k, v in vectors.items()}:
        raise AdapterError("these vectors do not fit the model: other layers, other width, or a part missing")
    for key, parameter in parameters.items():
        parameter.copy_(vectors[key].to(parameter).view_as(parameter))


class AdapterLibrary:
    """Several named adapters on one base, one active at a time (what the lab sheet's `IA3Manager` set out to be).

    All adapters live in one `PeftModel`. Wrapping the same base once per adapter, as the sheet does, silently
    overwrites the first or runs one task under the other's name.
    """

    def __init__(self, base: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if isinstance(base, PeftModel) or carries_adapter(base):
            raise AdapterError("AdapterLibrary() needs a clean base: load one with load_base(profile)")
        self.base, self.tokenizer = base, tokenizer
        self.model: PeftModel | None = None
        self._layers: list[BaseTunerLayer] = []

    @property
    def tasks(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self.model.peft_config) if self.model else []

    def load(self, task: str, folder: Path | str) -> None:
        """Load and verify the adapter in `folder` as `task`; `AdapterError` when the name is taken or the file bad."""
        self.model = load_adapter(self.model or self.base, folder, name=task)
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def remove(self, task: str) -> None:
        """Forget `task`; after the last one the base is plain again."""
        self._check(task)
        if len(self.tasks) == 1:
            self.base, self.model, self._layers = self.model.unload(), None, []
        else:
            self.model.delete_adapter(task)

    @contextmanager
    def use(self, task: str | None) -> Iterator[GPT2LMHeadModel | PeftModel]:
        """The model with `task` active, or the bare base for None; the adapter active before comes back at the end."""
        if task is not None:
            self._check(task)
        if self.model is None:
            yield self.base
            return
        before = None if self._switched_off() else self.model.active_adapter
        self._switch(task)
        try:
            yield self.model
        finally:
            self._switch(before if before in self.tasks else None)

    def _switched_off(self) -> bool:
        return any(layer.disable_adapters for layer in self._layers)

    def _switch(self, task: str | None) -> None:
        """Make `task` the one that acts, or none; nothing in the model wants a gradient afterwards.

        What peft's `set_adapter` does, without its walk over every module of the model, which takes most of its time.
        """
        for layer in self._layers:
            if layer.disable_adapters != (task is None):
                layer.enable_adapters(task is not None)
            if task is not None:
                layer.set_adapter(task, inference_mode=True)
        if task is not None:
            self.model.active_adapter = task
            if isinstance(self.model.base_model, BaseTuner):
                self.model.base_model.active_adapter = task

    def generate(self, task: str | None, prompts: Sequence[str], **options: object) -> list[Sample]:
        """`utils.generation.generate` under `task` (None: the base)."""
        with self.use(task) as model:
            return generate(model, self.tokenizer, prompts, **options)

    def _check(self, task: str) -> None:
        if task not in self.tasks:
            raise AdapterError(f"no adapter named {task!r}: loaded are {', '.join(self.tasks) or 'none'}")
