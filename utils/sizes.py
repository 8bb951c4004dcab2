"""Numbers and bytes of GPT-2 and its methods: by formula, counted, and whether a training run fits into memory.

In the formulas: L layers of width d, inner width m (4d in GPT-2), LoRA's rank or the bottleneck's width r, t virtual
tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from utils.gpu import GpuError, fast_bf16, format_bytes, pick_device

if TYPE_CHECKING:
    from transformers import GPT2Config

LORA_RANK = 8
PREFIX_TOKENS = 20
FLOAT32 = 4  # bytes
BOTTLENECK_SHARE = 12  # the bottleneck is a twelfth of the width: 64 on GPT-2
# Parts of parameter names, the first that fits decides: GPT-2's, then those of other architectures.
GROUPS = (
    ("wte", "token embedding"), ("wpe", "position embedding"), (".attn.", "attention"), (".mlp.", "feed-forward"),
    ("LayerNorm", "layer norms"), ("layernorm", "layer norms"), ("layer_norm", "layer norms"),
    ("position_embeddings", "position embedding"), ("relative_attention_bias", "position embedding"),
    ("token_type_embeddings", "token embedding"), ("word_embeddings", "token embedding"),
    ("shared", "token embedding"), ("embed_tokens", "token embedding"), ("lm_head", "head"), ("pooler", "pooler"),
    ("attention", "attention"), ("Attention", "attention"), ("DenseReluDense", "feed-forward"),
    ("intermediate.", "feed-forward"), ("output.dense", "feed-forward"),
)  # fmt: skip


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


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name was added by a method, and is none of the model's own."""
    return any(mark in name for mark in ("ia3_", "lora_", "prompt_encoder.", ".mlp.adapter.", ".mixing."))


def is_head(name: str) -> bool:
    """Whether the parameter of this name belongs to a classification head, which starts at random and is trained."""
    return bool({"classifier", "score"} & set(name.split(".")))


def group_of(name: str) -> str:
    """The group of a parameter, from its name."""
    if is_adapter(name):
        return "adapter"
    if is_head(name):
        return "head"
    return next((group for part, group in GROUPS if part in name), "layer norms")


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count by walking the model (works on the meta device, nothing need be downloaded).

    Trainable is what training can change: an entry that is held (`hold_queries`) does not count.
    """
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        groups[group_of(name)] = groups.get(group_of(name), 0) + parameter.numel()
    trainable = sum(p.numel() - getattr(p, "held", 0) for p in model.parameters() if p.requires_grad)
    return ParameterCount(trainable, sum(groups.values()), groups)


def inner_size(config: GPT2Config) -> int:
    """Width inside the feed-forward layers, m: four times the model's unless the configuration says otherwise."""
    return config.n_inner or 4 * config.n_embd


def bottleneck_size(config: GPT2Config) -> int:
    """Width of the bottleneck adapter, r."""
    return max(1, config.n_embd // BOTTLENECK_SHARE)


def predict_gpt2_groups(config: GPT2Config) -> dict[str, int]:
    """Attention L (4d² + 4d), feed-forward L (2dm + d + m), layer norms (4L + 2) d."""
    d, m, layers = config.n_embd, inner_size(config), config.n_layer
    return {
        "token embedding": config.vocab_size * d,  # the output head is the same matrix
        "position embedding": config.n_positions * d,
        "attention": layers * (4 * d * d + 4 * d),
        "feed-forward": layers * (2 * d * m + d + m),
        "layer norms": (4 * layers + 2) * d,
    }


def predict_ia3_count(
    config: GPT2Config, attention: bool = True, feedforward: bool = True, *, queries: bool = True
) -> int:
    """L (3d + m): a number for each output of `c_attn` (2d without the queries), and one for each inner unit."""
    return config.n_layer * (attention * (2 + queries) * config.n_embd + feedforward * inner_size(config))


def predict_lora_count(config: GPT2Config, rank: int = LORA_RANK) -> int:
    """L r (d + 3d): A is (r, d) and B is (3d, r) on each `c_attn`."""
    return config.n_layer * rank * 4 * config.n_embd


def predict_bitfit_count(config: GPT2Config) -> int:
    """L (7d + m) + d: biases of `c_attn` 3d, of both `c_proj` 2d, of two norms 2d, of `c_fc` m; the last norm's d."""
    return config.n_layer * (7 * config.n_embd + inner_size(config)) + config.n_embd


def predict_prefix_count(config: GPT2Config, tokens: int = PREFIX_TOKENS) -> int:
    """2 L t d: a key and a value for each virtual token in each layer."""
    return 2 * config.n_layer * tokens * config.n_embd


def predict_bottleneck_count(config: GPT2Config) -> int:
    """L (2dr + r + d): a projection down and one up, with their biases."""
    r, d = bottleneck_size(config), config.n_embd
    return config.n_layer * (2 * d * r + r + d)


PREDICTED: dict[str, Callable[[GPT2Config], int]] = {
    "base": lambda _: 0,
    "ia3": predict_ia3_count,
    "ia3_kv": lambda config: predict_ia3_count(config, queries=False),
    "lora": predict_lora_count,
    "bitfit": predict_bitfit_count,
    "prefix": predict_prefix_count,
    "bottleneck": predict_bottleneck_count,
    "full": lambda config: sum(predict_gpt2_groups(config).values()),
}


def predict_trainable(config: GPT2Config, method: str) -> int:
    """Numbers that `method` trains, from the configuration alone. Raises KeyError for a method without a form."""
    return PREDICTED[method](config)


# --- bytes ---
@dataclass
class SavedBytes:
    """Bytes that autograd keeps for the backward pass; final once the `with saved_for_backward(model)` block ends."""

    bytes: int = 0


@contextlib.contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[SavedBytes]:
    """Measure what a forward pass of `model` stores for its backward pass: activations, not parameters.

    Each storage is counted once, however many operations keep it. Run the forward pass inside the block.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    saved.bytes = sum(storage.nbytes() for storage in storages.values())
    storages.clear()


@dataclass(frozen=True)
class Footprint:
    """What a method keeps beside the frozen base's activations, on GPT-2 of width d.

    `a_block` counts per token and layer in units of d, `outside` the same once per token; both are functions of the
    configuration and the length of a block. `untouched`: blocks before the first trainable number, of which nothing is
    kept.
    """

    a_block: Callable[[GPT2Config, int], float]
    outside: Callable[[GPT2Config, int], float] = lambda _config, _length: 0
    untouched: int = 0


FOOTPRINTS: dict[str, Footprint] = {
    # l needs the input of its product: the output of c_attn (3 d), the inside of the feed-forward (4 d)
    "ia3": Footprint(lambda c, _: 3 + inner_size(c) / c.n_embd),
    "ia3_kv": Footprint(lambda c, _: 3 + inner_size(c) / c.n_embd),
    # A needs the normalised input of c_attn (d), B needs the product with A (r)
    "lora": Footprint(lambda c, _: 1 + LORA_RANK / c.n_embd),
    # a bias needs nothing
    "bitfit": Footprint(lambda c, _: 0),
    # keys and values are copied behind the virtual tokens' (2 d for more tokens), which are kept too; one mask for all
    "prefix": Footprint(
        lambda c, length: 2 * (length + 2 * PREFIX_TOKENS) / length,
        outside=lambda c, length: (length + PREFIX_TOKENS) / c.n_embd,
    ),
    # the way down needs its input (d), GELU and the way up need theirs (r each)
    "bottleneck": Footprint(lambda c, _: 1 + 2 * bottleneck_size(c) / c.n_embd, untouched=1),
    # every weight needs its layer's input: two norms' outputs (2 d), the inside of the feed-forward (4 d); the head d
    "full": Footprint(lambda c, _: 2 + inner_size(c) / c.n_embd, outside=lambda *_: 1),
}


def activation_bytes(
    config: GPT2Config, method: str, batch: int, length: int, device: torch.device | str = "cpu"
) -> int:
    """Bytes of float32 activations that `GPT2LMHeadModel` in training mode stores for its backward pass.

    Per token and layer, in units of the width d (from transformers' GPT-2; a test holds it within 5 % of a real pass):
    two layer norms' inputs 2; query, key, value and the attention's output 4; the tanh form of GELU four tensors of
    the inner size 4 x 4 = 16, or one of them (4) where it is fused (`gelu_pytorch_tanh`); what `FOOTPRINTS` adds. Per
    token: the last norm's input (d) and the log-probabilities (vocabulary). Dropout adds its masks, and on a CPU three
    tensors of `length` a head, because the fused attention there knows no dropout. Attention itself stores no matrix
    of `length` x `length`.
    """
    footprint, width = FOOTPRINTS[method], config.n_embd
    gelu = 1 if config.activation_function == "gelu_pytorch_tanh" else 4
    block = 2 + 4 + gelu * inner_size(config) / width
    block += 2 if config.resid_pdrop else 0
    if config.attn_pdrop and torch.device(device).type == "cpu":
        block += 3 * config.n_head * length / width
    blocks = (config.n_layer - footprint.untouched) * block + config.n_layer * footprint.a_block(config, length)
    per_token = width * (blocks + 1 + footprint.outside(config, length)) + config.vocab_size
    return round(FLOAT32 * batch * length * per_token)


USABLE = {"cuda": 0.9, "cpu": 0.7}  # share of the free memory a run may plan with: allocators waste the rest


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training step needs, in bytes, beside what is free. `working`: short-lived copies around the loss."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    total: int
    available: int
    fits: bool
    remedy: str

    def __str__(self) -> str:
        rows = [(f.name, format_bytes(getattr(self, f.name))) for f in fields(self)[:7]]
        verdict = "fits" if self.fits else f"does NOT fit: {self.remedy}"
        return "\n".join([*(f"{label:<12}{value:>12}" for label, value in rows), verdict])


def estimate_memory(
    model: nn.Module, method: str, batch: int, length: int, device: torch.device | str | None = None
) -> MemoryEstimate:
    """Bytes that training GPT-2 by `method` on `batch` x `length` tokens needs at its peak, from closed forms.

    float32 weights; gradients and Adam's two moments for the trainable parameters (Kingma and Ba 2015); activations
    from `activation_bytes`. They are counted in float32: bfloat16 autocast keeps less of them, and a bfloat16 copy of
    the weights, which `working` includes. On a CPU the system was seen to hand out up to 1.4 times the total.
    `model` may be the base or already carry the adapter.
    Raises GpuError for an unknown method.
    """
    if method not in FOOTPRINTS:
        raise GpuError(f"no memory estimate for method {method!r}; known: {', '.join(FOOTPRINTS)}")
    device = torch.device(device) if device is not None else pick_device()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = parameters * FLOAT32
    gradients = predict_trainable(model.config, method) * FLOAT32
    activations = activation_bytes(model.config, method, batch, length, device)
    # beside the stored log-probabilities: the logits while held, their gradient, that of the log-probabilities
    working = 3 * FLOAT32 * batch * length * model.config.vocab_size + (weights // 2 if fast_bf16(device) else 0)
    total = weights + 3 * gradients + activations + working
    available = free_memory(device)
    remedy = f"set LAB_OVERRIDE=batch_size={max(1, batch // 2)} before you start Jupyter, or LAB_PROFILE=mini"
    loaded = weights if next(model.parameters()).device.type == device.type else 0  # these are not free any more
    fits = total - loaded <= USABLE[device.type] * available
    return MemoryEstimate(weights, gradients, 2 * gradients, activations, working, total, available, fits, remedy)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`; on a CPU the computer's available RAM.

    PyTorch keeps the blocks it has freed: on a GPU they count as taken for the driver, and as free here.
    """
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def require_memory(estimate: MemoryEstimate) -> None:
    """Raise GpuError with the remedy where `estimate` does not fit; call it before training."""
    if not estimate.fits:
        needed, free = format_bytes(estimate.total), format_bytes(estimate.available)
        raise GpuError(f"training needs about {needed}, and {free} are free: {estimate.remedy}")


ADAMW = 8  # bytes a number of both moments (Kingma and Ba 2015)


def training_bytes(parameters: int, trained: int, weight: int = 2) -> dict[str, int]:
    """Bytes of training `trained` float32 numbers beside a frozen base of `parameters` numbers of `weight` bytes each.

    "file": the trained numbers. "held": by each data-parallel process, with gradients and AdamW's moments, activations
    apart; where all is trained there is no frozen base beside. "all-reduced": the gradients, once a step, whatever the
    batch; of W processes in a ring each sends 2 (W - 1) / W of it (Patarasu and Yuan 2009).
    """
    frozen = 0 if trained == parameters else weight * parameters
    moved = FLOAT32 * trained
    return {
        "file": FLOAT32 * trained,
        "held": frozen + FLOAT32 * trained + moved + ADAMW * trained,
        "all-reduced": moved,
    }
