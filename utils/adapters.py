"""(IA)³ on GPT-2, and what it is compared with: load the base, attach a method, its learned vectors, merge.

(IA)³ (Liu et al. 2022, arXiv:2205.05638) multiplies keys, values and the feed-forward's inner activation by learned
vectors that start at 1. In GPT-2 query, key and value come out of one matrix, `c_attn`, so peft scales the query
too; `mlp.c_proj` is scaled on its input, which is the inner activation.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from utils.config import Profile, load_pretrained
from utils.gpu import pick_device
from utils.sizes import LORA_RANK, PREFIX_TOKENS, bottleneck_size, is_adapter, is_head

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


class AdapterError(RuntimeError):
    """An adapter cannot be made, saved, loaded or used as asked; the message names cause and remedy."""


# --- the base ---


def load_base(
    profile: Profile, device: torch.device | str | None = None
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The profile's GPT-2 in float32 and evaluation mode on `device`, and its tokenizer (padding: end of text).

    Raises `HubError` where the files cannot be had or used.
    """

    def load(name: str | Path, **options: object) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
        model, info = GPT2LMHeadModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        if info["missing_keys"]:
            raise ValueError(f"its weights have no {min(info['missing_keys'])}")
        return model.eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)

    model, tokenizer = load_pretrained(profile, load)
    model.config.loss_type = "ForCausalLM"
    # Adapters record this name; a repository id or a folder name, never a path of the machine they were made on.
    model.config._name_or_path = model.name_or_path = profile.model_name
    tokenizer.pad_token = tokenizer.eos_token
    return model.to(device or pick_device()), tokenizer


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


def plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside, whether or not peft has wrapped it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def carries_adapter(model: nn.Module) -> bool:
    """True when this model is wrapped by peft, or holds adapter layers of peft's or of ours."""
    return isinstance(model, PeftModel) or any(isinstance(m, (BaseTunerLayer, Bottleneck)) for m in model.modules())


def check_unmerged(model: nn.Module) -> None:
    """`AdapterError` while an adapter is written into the weights of `model` (peft's `merge_adapter`).

    Factors that are set, switched or saved then act on other weights than the base's, and to divide them out again
    (`unmerge_adapter`) is not exact.
    """
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise AdapterError(
            "an adapter is merged into the weights of this model, so that no other one acts as it should: load a fresh "
            "base, and merge a copy with merge(model)"
        )


# --- attaching a method ---


def ia3_config(model: PreTrainedModel | None = None) -> IA3Config:
    """The course's (IA)³ configuration for GPT-2; given a model, checks that it has both targets.

    peft takes a list that names too little without a word. Raises `AdapterError` naming the missing module and what the
    model has instead.
    """
    targets, feedforward = ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]
    if model is not None:
        names = [name for name, _ in model.named_modules()]
        missing = [target for target in targets if not any(name.endswith("." + target) for name in names)]
        if missing:
            raise AdapterError(
                f"{type(model).__name__} has no {' and no '.join(missing)}: choose target modules, and feed-forward "
                f"modules among them, from what it has: {', '.join(linear_modules(model))}"
            )
    return IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=True,  # GPT-2's Conv1D stores its weight as (in, out)
    )


def linear_modules(model: nn.Module) -> list[str]:
    """The last two parts of the names of all linear layers, each once: what (IA)³ can be put on."""
    found = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return sorted({".".join([part for part in name.split(".") if not part.isdigit()][-2:]) for name in found})


def lora_config() -> LoraConfig:
    """LoRA of rank 8 on `c_attn` (Hu et al. 2021), scaled by alpha / r = 2, no dropout."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip


def attach(model: GPT2LMHeadModel, method: str, seed: int = 0) -> GPT2LMHeadModel | PeftModel:
    """Make `model` trainable by `method` (a key of `METHODS`) in place; peft's methods also wrap it.

    All but prefix tuning leave the logits as they were; every module stays in training or evaluation mode. Raises
    `AdapterError` for an unknown method or a model that carries an adapter already.
    """
    if method not in METHODS:
        raise AdapterError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if carries_adapter(model):
        raise AdapterError("this model already carries an adapter: load a fresh base with load_base(profile)")
    modes = {module: module.training for module in model.modules()}
    mode = model.training
    torch.manual_seed(seed)  # LoRA's A, the prefix and the bottleneck's way down start at random
    if method in ("ia3", "ia3_kv"):
        model = get_peft_model(model, ia3_config(model))
    elif method == "lora":
        model = get_peft_model(model, lora_config())
    elif method == "prefix":
        # keys and values of 20 virtual tokens are learned in each layer (Li & Liang 2021), without a projection
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PREFIX_TOKENS)
        model = get_peft_model(model, config)
    elif method == "bottleneck":
        insert_bottlenecks(model)
    else:  # BitFit (Ben Zaken et al. 2022) trains every bias, those of the norms included
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or (method == "bitfit" and name.endswith(".bias")))
    if method == "ia3_kv":
        hold_queries(model)
    for module in model.modules():
        module.training = modes.get(module, mode)
    return model


# --- the rivals that peft does not have ---


class Bottleneck(nn.Module):
    """The adapter of Houlsby et al. (2019): d -> r -> d with GELU between; it starts at 0, so the model is unchanged.

    Input and output (..., d); the caller adds the output to what it read.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """up(GELU(down(hidden)))."""
        return self.up(nn.functional.gelu(self.down(hidden), approximate="tanh"))


def insert_bottlenecks(model: nn.Module) -> None:
    """Pfeiffer et al. (2021): freeze the model; one `Bottleneck` behind the feed-forward module of each block."""
    model.requires_grad_(False)
    for block in model.transformer.h:
        adapter = Bottleneck(model.config.n_embd, bottleneck_size(model.config))
        block.mlp.adapter = adapter.to(model.device, model.dtype)
        block.mlp.register_forward_hook(lambda module, _inputs, output: output + module.adapter(output))


def hold_queries(model: nn.Module) -> None:
    """Keep the query third of every `c_attn` vector at 1: keys, values and feed-forward are left, as in the paper.

    Call it when the model is on its device.
    """
    for name, parameter in model.named_parameters():
        if ".c_attn.ia3_l." in name:  # (3d, 1): queries, keys, values
            free = torch.ones(parameter.shape, device="cpu")
            free[: len(free) // 3] = 0
            hold(parameter, free)


def hold(parameter: nn.Parameter, free: Tensor) -> None:
    """Let training change only the entries where `free` (0 or 1, of the same shape, on the CPU) is 1.

    A hook zeroes the gradient of the others, and Adam without weight decay leaves alone what has no gradient.
    `held` tells `count_parameters` how many entries of the tensor cannot move.
    """
    parameter.held = int((free == 0).sum())
    parameter.register_hook(lambda gradient: gradient * free.to(gradient))


# --- what was learned ---


def ia3_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
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


def scaling_vectors(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Copies of the vectors on the CPU: `"<layer>.attention"` (3d,) for q, k, v; `"<layer>.feedforward"` (4d,)."""
    return {key: p.detach().flatten().cpu().clone() for key, p in ia3_parameters(model, name).items()}


@torch.no_grad()
def set_scaling_vectors(model: nn.Module, vectors: dict[str, Tensor], name: str | None = None) -> None:
    """Write `vectors` (as `scaling_vectors` gives them) into the model.

    Raises `AdapterError` when keys or sizes differ, and for a model whose weights an adapter is merged into.
    """
    check_unmerged(model)
    parameters = ia3_parameters(model, name)
    if {k: p.numel() for k, p in parameters.items()} != {k: v.numel() for k, v in vectors.items()}:
        raise AdapterError("these vectors do not fit the model: other layers, other width, or a part missing")
    for key, parameter in parameters.items():
        parameter.copy_(vectors[key].to(parameter).view_as(parameter))


@contextlib.contextmanager
def vectors_restored(model: nn.Module) -> Iterator[None]:
    """Inside, the scaling vectors may be set to anything; at the end, also after an error, they are as before."""
    before = scaling_vectors(model)
    try:
        yield
    finally:
        set_scaling_vectors(model, before)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run of any method has to keep: copies of the parameters that want a gradient, by name, on the CPU."""
    return {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put `trainable_state` of one model into another with the same method attached. KeyError where names differ."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if differing := sorted(wanted.keys() ^ state.keys()):
        raise KeyError(f"this state does not fit the model: {differing[0]} is on one side only")
    for name, parameter in wanted.items():
        parameter.copy_(state[name])


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
