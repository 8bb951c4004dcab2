"""Ablations of (IA)³: which vectors, which layers, how few reviews, and four ideas for going further.

`ABLATIONS` is the list of small experiments that 04 shows, `measure_ablation` makes the record of one. Each changes one
thing against the (IA)³ run of the same seed and takes over everything else, the learning rate too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import IA3Config, TaskType, inject_adapter_in_model
from torch import Tensor, nn

from study.comparison import Bench, measured, summarise, train_one
from utils.adapters import attach, hold, ia3_config, ia3_parameters, load_base, lora_config
from utils.metrics import middle
from utils.runs import RunRecord
from utils.sizes import inner_size, is_adapter, predict_ia3_count

MIX_RANK = 4
FEW = (8, 32, 128, 512)
THIRDS = ("first", "middle", "last")


@dataclass(frozen=True)
class Ablation:
    """One experiment: `study` and `variant` name it, `method` is what it varies and whose learning rate it takes."""

    study: str
    variant: str
    method: str = "ia3"
    task: str = "positive"
    reviews: int | None = None  # None: the profile's

    @property
    def name(self) -> str:
        """Start of the record's file name."""
        words = [self.study, self.method, self.variant, self.task]
        return "-".join(words).replace(" + ", "+").replace(" ", "_")


VECTORS = ("keys", "values", "feedforward")
PAIRS = tuple(f"{a} + {b}" for a, b in (VECTORS[:2], VECTORS[::2], VECTORS[1:]))
ABLATIONS = (
    *(Ablation("vectors", parts) for parts in VECTORS + PAIRS),
    *(Ablation("layers", f"{third} third") for third in THIRDS),
    *(Ablation("few-shot", f"{n} reviews", method, reviews=n) for n in FEW for method in ("ia3", "lora", "full")),
    Ablation("gradient", "chosen by gradient"),
    Ablation("together", "with LoRA"),
    Ablation("together", "with LoRA at its rate", "lora"),
    *(Ablation("granularity", f"one per {g}", task=t) for g in ("head", "vector") for t in ("positive", "negative")),
    Ablation("low-rank", "low-rank mixing"),
)


def measure_ablation(bench: Bench, ablation: Ablation, seed: int, folder: Path | str) -> RunRecord:
    """Train and measure one ablation as `comparison.measure_run` does; its config names study, variant and modules."""
    model = load_base(bench.profile)[0]
    blocks = enough_blocks(bench, ablation)
    model = build(model, ablation, blocks[: bench.profile.batch_size], seed)
    trained = {n.split(".ia3_l.")[0] for n, p in model.named_parameters() if ".ia3_l." in n and p.requires_grad}
    record = measured(bench, model, train_one(bench, model, ablation.task, ablation.method, seed, folder, blocks))
    record.config |= {"study": ablation.study, "variant": ablation.variant, "modules": sorted(trained)}
    record.config["train_reviews"] = ablation.reviews or bench.profile.train_reviews
    return record


def enough_blocks(bench: Bench, ablation: Ablation) -> Dataset:
    """Training blocks of the ablation; where they are fewer than a batch they are repeated until they are one."""
    profile = bench.profile
    reviews = ablation.reviews or profile.train_reviews
    blocks = bench.blocks("adapter", ablation.task, reviews=reviews)
    return blocks.select([i % len(blocks) for i in range(max(len(blocks), profile.batch_size))])


def build(model: nn.Module, ablation: Ablation, batch: dict[str, list], seed: int = 0) -> nn.Module:
    """`model` with what the ablation trains; `batch`: the first rows of its data, for the choice by gradient.

    All leave the logits as they were. The module returned is a plain GPT-2 with layers inside, so that the Trainer
    keeps all of it. Raises KeyError for a study that is not in `ABLATIONS`.
    """
    torch.manual_seed(seed)
    if ablation.study == "few-shot":
        return attach(model, ablation.method, seed)
    if ablation.study == "gradient":
        modules = choose_modules(scores_by_gradient(model, batch), predict_ia3_count(model.config))
        return inject_adapter_in_model(ia3_on(modules), model)
    if ablation.study == "together":
        inject_adapter_in_model(lora_config(), model)
    inject_adapter_in_model(ia3_config(), model)
    VARIATIONS[ablation.study](model, ablation.variant)
    return model


def study_rows(records: Iterable[RunRecord], study: str, task: str = "positive") -> list[dict[str, object]]:
    """A row for each variant of a study: `label` (with the count), `trainable`, `positivity`, two losses.

    In nats per token: `loss_change` is the loss on test reviews of `task` minus the base's on the same blocks,
    `validation_change` the lowest loss on validation reviews minus that before training.
    """
    after, before = f"test_loss_{task}", f"base_test_loss_{task}"
    metrics = ["trainable", "positivity", after, before, "best_loss", "start_loss"]
    order = [ablation.variant for ablation in ABLATIONS]
    chosen = [record for record in records if record.config["study"] == study and record.task == task]
    chosen.sort(key=lambda record: order.index(record.config["variant"]))
    return [
        {
            "label": f"{row['variant']} ({row['trainable']:,})",
            "loss_change": row[after].value - row[before].value,
            "validation_change": middle(row["best_loss"]) - middle(row["start_loss"]),
        }
        | {key: row[key] for key in ("variant", "trainable", "positivity")}
        for row in summarise(chosen, metrics, by="variant")
    ]


def few_shot_rows(records: Iterable[RunRecord], whole: Iterable[RunRecord], reviews: int) -> list[dict[str, object]]:
    """A row for each method and number of reviews: `method`, `train_reviews`, `positivity`, `loss_change`.

    `loss_change` as in `study_rows`. `whole` are the comparison's records, trained on `reviews` reviews: those of the
    same methods and seeds join in.
    """
    few = [record for record in records if record.config["study"] == "few-shot"]
    drawn, rows = {(record.method, record.seed) for record in few}, []
    metrics = ["positivity", "test_loss_positive", "base_test_loss_positive"]
    for method in dict.fromkeys(record.method for record in few):
        most = [record for record in whole if record.method == method and (method, record.seed) in drawn]
        found = summarise([record for record in few if record.method == method], metrics, by="train_reviews")
        for row in found + [row | {"train_reviews": reviews} for row in summarise(most, metrics)]:
            after, before = row.pop("test_loss_positive"), row.pop("base_test_loss_positive")
            rows.append(row | {"method": method, "loss_change": after.value - before.value})
    return rows


def vary_layers(model: nn.Module, variant: str) -> None:
    """Train only a third of the layers ("first third"), all their vectors."""
    layers = model.config.n_layer
    at = THIRDS.index(variant.split()[0])
    train_only(model, ("queries", *VECTORS), range(at * layers // 3, (at + 1) * layers // 3))


def train_only(model: nn.Module, parts: Collection[str], layers: Collection[int] | None = None) -> None:
    """Hold every factor at 1 that is not of one of `parts` (queries, keys, values, feedforward) in one of `layers`."""
    for key, parameter in ia3_parameters(model).items():
        layer, role = key.split(".")
        sections = ["queries", "keys", "values"] if role == "attention" else ["feedforward"]
        wanted = [part in parts and (layers is None or int(layer) in layers) for part in sections]
        if any(wanted):
            free = torch.tensor(wanted, dtype=torch.float32, device="cpu")
            hold(parameter, free.repeat_interleave(parameter.numel() // len(sections)).view_as(parameter))
        else:
            parameter.requires_grad_(False)


def share_factors(parameter: nn.Parameter, size: int) -> None:
    """Let each `size` neighbouring entries (they start equal) stay equal: a hook gives all of them their mean gradient.

    Adam treats equal gradients equally, so one number is learned for the group, and the others count as held.
    """
    parameter.held = parameter.numel() - parameter.numel() // size

    def mean_of_group(gradient: Tensor) -> Tensor:
        groups = gradient.reshape(-1, size)
        return groups.mean(1, keepdim=True).expand_as(groups).reshape(gradient.shape)

    parameter.register_hook(mean_of_group)


def vary_grain(model: nn.Module, variant: str) -> None:
    """One factor for a head's width of neighbours, or for each of queries, keys, values and feed-forward of a layer."""
    width, head = model.config.n_embd, model.config.n_embd // model.config.n_head
    for key, parameter in ia3_parameters(model).items():
        whole = width if key.endswith("attention") else inner_size(model.config)
        share_factors(parameter, head if variant.endswith("head") else whole)


def train_adapters(model: nn.Module, _variant: str) -> None:
    """Train everything that was added: a second injection has frozen the first."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


class LowRankMixing(nn.Module):
    """h -> h + U V h with U (n, r) = 0 at the start and V (r, n): every factor may also depend on the other inputs."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.normal_(self.reduce.weight, std=width**-0.5)
        nn.init.zeros_(self.expand.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        return hidden + self.expand(self.reduce(hidden))


def mix_low_rank(model: nn.Module, _variant: str) -> None:
    """A `LowRankMixing` of rank 4 behind each scaled `c_attn` (all its outputs), and before each `mlp.c_proj`."""
    for block in model.transformer.h:
        attention, feedforward = block.attn.c_attn, block.mlp.c_proj
        attention.mixing = LowRankMixing(3 * model.config.n_embd, MIX_RANK).to(model.device)
        feedforward.mixing = LowRankMixing(inner_size(model.config), MIX_RANK).to(model.device)
        attention.register_forward_hook(lambda module, _inputs, output: module.mixing(output))
        feedforward.register_forward_pre_hook(lambda module, inputs: (module.mixing(inputs[0]), *inputs[1:]))


VARIATIONS: dict[str, Callable[[nn.Module, str], None]] = {
    "vectors": lambda model, variant: train_only(model, variant.split(" + ")),  # "keys + values"
    "layers": vary_layers,
    "together": train_adapters,
    "granularity": vary_grain,
    "low-rank": mix_low_rank,
}


def ia3_on(modules: Collection[str]) -> IA3Config:
    """(IA)³ on the modules of these full names; a feed-forward's second matrix is scaled on its input."""
    return IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=sorted(modules),
        feedforward_modules=[name for name in sorted(modules) if name.endswith("mlp.c_proj")],
        fan_in_fan_out=True,
    )


def scores_by_gradient(model: nn.Module, batch: dict[str, list]) -> dict[str, tuple[float, int]]:
    """For every matrix of every block: (mean |gradient| of the factors it could be given, their number).

    One backward pass on `batch` with all factors at 1. Adam moves each factor by about the rate whatever the size of
    its gradient, so the first-order fall of the loss is the rate times the sum of |gradient|. `model` stays clean.
    """
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"transformer.h.{layer}.{matrix}" for layer in range(model.config.n_layer) for matrix in matrices]
    model = inject_adapter_in_model(ia3_on(names), copy.deepcopy(model))
    ids, labels = (torch.as_tensor(batch[key], device=model.device) for key in ("input_ids", "labels"))
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    return {
        path.split(".ia3_l.")[0]: (parameter.grad.abs().mean().item(), parameter.numel())
        for path, parameter in model.named_parameters()
        if ".ia3_l." in path
    }


def choose_modules(scores: dict[str, tuple[float, int]], budget: int) -> list[str]:
    """The modules of the highest score that together have at most `budget` factors, best first."""
    chosen: list[str] = []
    for name in sorted(scores, key=lambda name: -scores[name][0]):
        if sum(scores[taken][1] for taken in chosen) + scores[name][1] <= budget:
            chosen.append(name)
    return chosen
