"""(IA)³ on GPT-2: its configuration, attaching it or a rival, counting, the learned vectors, several at once.

(IA)³ (Liu et al. 2022, arXiv:2205.05638) multiplies keys, values and the feed-forward's inner activation by learned
vectors that start at 1. In GPT-2 query, key and value come out of one matrix, `c_attn`, so peft scales the query
too; `mlp.c_proj` is scaled on its input, which is the inner activation. Not for: training or generating loops.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from utils.config import Profile
from utils.generation import Sample, generate
from utils.gpu import pick_device
from utils.hub import model_folder
from utils.storage import (  # the other half of this module; students import from here
    AdapterError,
    base_fingerprint,
    carries_adapter,
    find_adapter,
    load_adapter,
    plain_model,
    read_probe,
    save_adapter,
)

__all__ = [
    "METHODS", "AdapterError", "AdapterLibrary", "ParameterCount", "attach", "base_fingerprint",
    "count_parameters", "find_adapter", "ia3_config", "load_adapter", "load_base", "lora_config", "merge",
    "predict_gpt2_groups", "predict_ia3_count", "predict_lora_count", "read_probe", "save_adapter",
    "scaling_vectors", "set_scaling_vectors",
]  # fmt: skip

METHODS = {"base": "base (nothing trained)", "ia3": "(IA)³", "lora": "LoRA r=8", "full": "full fine-tuning"}
LORA_RANK = 8
ROLES = {"attention": "attn.c_attn", "feedforward": "mlp.c_proj"}


def load_base(
    profile: Profile, device: torch.device | str | None = None
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The profile's GPT-2 in float32 and evaluation mode on `device`, and its tokenizer (padding: end of text)."""
    folder = model_folder(profile)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    model.config.loss_type = "ForCausalLM"
    # Adapters record this name; a repository id or a folder name, never a path of the machine they were made on.
    model.config._name_or_path = model.name_or_path = profile.model_name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return model.to(device or pick_device()), tokenizer


def ia3_config(model: PreTrainedModel | None = None) -> IA3Config:
    """The course's (IA)³ configuration for GPT-2; given a model, checks that both targets are in every block.

    Raises `AdapterError` naming the missing module and what the model has instead.
    """
    if model is not None:
        names = [name for name, _ in model.named_modules()]
        for target in ("c_attn", "mlp.c_proj"):
            if sum(name.endswith("." + target) for name in names) != model.config.num_hidden_layers:
                linear = sorted({".".join(n.split(".")[-2:]) for n, m in model.named_modules() if hasattr(m, "weight")})
                raise AdapterError(f"{type(model).__name__} has no {target} in each block; it has: {', '.join(linear)}")
    return IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,  # GPT-2's Conv1D stores its weight as (in, out)
    )


def lora_config() -> LoraConfig:
    """LoRA of rank 8 on `c_attn` (Hu et al. 2021), scaled by alpha / r = 2, no dropout."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip


def attach(model: GPT2LMHeadModel, method: str, seed: int = 0) -> GPT2LMHeadModel | PeftModel:
    """Make `model` trainable by `method` (a key of `METHODS`); peft methods change it in place and wrap it.

    Raises `AdapterError` for an unknown method or a model that carries an adapter already.
    """
    if method not in METHODS:
        raise AdapterError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if carries_adapter(model):
        raise AdapterError("this model already carries an adapter: load a fresh base with load_base(profile)")
    torch.manual_seed(seed)  # LoRA's A starts at random
    if method == "ia3":
        return get_peft_model(model, ia3_config(model))
    if method == "lora":
        return get_peft_model(model, lora_config())
    return model.requires_grad_(method == "full")


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: `total` counts a tied matrix once; `groups` names where they sit."""

    trainable: int
    total: int
    groups: dict[str, int]

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100 * self.trainable / self.total


def group_of(name: str) -> str:
    """The group of a parameter, from its name."""
    if "ia3_" in name or "lora_" in name:
        return "adapter"
    for part, group in (("wte", "token embedding"), ("wpe", "position embedding"), (".attn.", "attention"),
                        (".mlp.", "feed-forward")):  # fmt: skip
        if part in name:
            return group
    return "layer norms"


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Count by walking the model (works on the meta device, nothing need be downloaded)."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        groups[group_of(name)] = groups.get(group_of(name), 0) + parameter.numel()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCount(trainable, sum(groups.values()), groups)


def predict_gpt2_groups(config: GPT2Config) -> dict[str, int]:
    """Closed form for L layers of width d: attention L(4d²+4d), feed-forward L(8d²+5d), layer norms (4L+2)d."""
    d, layers = config.n_embd, config.n_layer
    return {
        "token embedding": config.vocab_size * d,  # the output head is the same matrix
        "position embedding": config.n_positions * d,
        "attention": layers * (4 * d * d + 4 * d),
        "feed-forward": layers * (8 * d * d + 5 * d),
        "layer norms": (4 * layers + 2) * d,
    }


def predict_ia3_count(config: GPT2Config, attention: bool = True, feedforward: bool = True) -> int:
    """L (3d + 4d): one number for each output of `c_attn` and for each input of `mlp.c_proj`."""
    return config.n_layer * config.n_embd * (3 * attention + 4 * feedforward)


def predict_lora_count(config: GPT2Config, rank: int = LORA_RANK) -> int:
    """L r (d + 3d): A is (r, d) and B is (3d, r) on each `c_attn`."""
    return config.n_layer * rank * 4 * config.n_embd


def merge(model: PeftModel, in_place: bool = False) -> GPT2LMHeadModel:
    """A plain GPT-2 with the active adapter multiplied into its weights; the base stays clean unless `in_place`.

    Raises `AdapterError` when the merged weights would not be finite.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError("merge() needs a model with an adapter: this one is plain, perhaps merged already")
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

    @property
    def tasks(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self.model.peft_config) if self.model else []

    def load(self, task: str, folder: Path | str) -> None:
        """Load and verify the adapter in `folder` as `task`; `AdapterError` when the name is taken or the file bad."""
        if task in self.tasks:
            raise AdapterError(f"task {task!r} is loaded already: remove({task!r}) first")
        self.model = load_adapter(self.model or self.base, folder, name=task)

    def remove(self, task: str) -> None:
        """Forget `task`; after the last one the base is plain again."""
        self._check(task)
        if len(self.tasks) == 1:
            self.base, self.model = self.model.unload(), None
        else:
            self.model.delete_adapter(task)

    @contextmanager
    def use(self, task: str | None) -> Iterator[GPT2LMHeadModel | PeftModel]:
        """The model with `task` active, or the bare base for None; the adapter active before comes back at the end."""
        if task is None:
            if self.model is None:
                yield self.base
            else:
                with self.model.disable_adapter():
                    yield self.model
            return
        self._check(task)
        before = self.model.active_adapter
        self.model.set_adapter(task, inference_mode=True)
        try:
            yield self.model
        finally:
            if before in self.tasks:
                self.model.set_adapter(before, inference_mode=True)

    def generate(self, task: str | None, prompts: Sequence[str], **options: object) -> list[Sample]:
        """`utils.generation.generate` under `task` (None: the base)."""
        with self.use(task) as model:
            return generate(model, self.tokenizer, prompts, **options)

    def _check(self, task: str) -> None:
        if task not in self.tasks:
            raise AdapterError(f"no adapter named {task!r}: loaded are {', '.join(self.tasks) or 'none'}")
