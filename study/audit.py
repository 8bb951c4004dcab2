"""Measure what the source documents claim, as far as it takes no training, and write `assets/runs/audit.json`.

    python -m study.audit

Counts come from full-size models on PyTorch's meta device (shapes without data), behaviour from a small random GPT-2:
no network, no GPU, under two minutes. `assets/claims.json` names the values; `tests/test_claims.py` measures them
again.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MT5Config,
    MT5ForConditionalGeneration,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from utils.adapters import attach, merge, scaling_vectors, set_scaling_vectors
from utils.config import ASSETS
from utils.runs import environment, write_json
from utils.session import quiet
from utils.sizes import count_parameters, estimate_memory, saved_for_backward

Values = dict[str, bool | int | float | str | list[int]]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


# --- helpers ------------------------------------------------------------------------------------------------------
def on_meta(build: Callable, config: PretrainedConfig) -> torch.nn.Module:
    """A model of this shape without data."""
    with torch.device("meta"):
        return build(config)


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 with 124 million parameters, without data."""
    return on_meta(GPT2LMHeadModel, GPT2Config())


def counts(model: torch.nn.Module, **options: object) -> list[int]:
    """Trainable and all parameters, as peft prints them, with (IA)³ configured by `options`."""
    return list(get_peft_model(model, IA3Config(**options)).get_nb_trainable_parameters())


def percent(trainable_and_all: list[int]) -> float:
    """Trainable parameters as a percentage of all."""
    return 100 * trainable_and_all[0] / trainable_and_all[1]


def with_own_head(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with an output head that is not the embedding, as the checkpoints of T0 and mT0 have it."""
    model.lm_head = torch.nn.Linear(model.config.d_model, model.config.vocab_size, bias=False, device="meta")
    return model


def small_gpt2(**options: object) -> GPT2LMHeadModel:
    """The same random GPT-2 at every call: 4 blocks of width 128, random biases, evaluation mode."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **NO_DROPOUT, initializer_range=0.1, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_ids(batch: int = 2, length: int = 48) -> torch.Tensor:
    """Fixed token ids (batch, length) for `small_gpt2`."""
    return (torch.arange(batch * length) * 37 % 512).view(batch, length)


def with_random_ia3(seed: int, model: GPT2LMHeadModel | None = None) -> PeftModel:
    """`small_gpt2` with factors drawn around 1, as if trained."""
    model = attach(model or small_gpt2(), "ia3").eval()
    torch.manual_seed(seed)
    set_scaling_vectors(model, {name: 1 + 0.3 * torch.randn_like(l) for name, l in scaling_vectors(model).items()})
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the fixed ids, float32."""
    return model(token_ids()).logits.float()


# --- counts -------------------------------------------------------------------------------------------------------
def gpt2_ia3() -> Values:
    """The lab sheet's configuration on GPT-2: what it trains, and the mistake that gives the sheet's number."""
    sheet = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    model = get_peft_model(gpt2(), IA3Config(**sheet, feedforward_modules=["mlp.c_proj"]))
    added = {name: p for name, p in model.named_parameters() if p.requires_grad}
    places = {name.split(".ia3_")[0] for name in added}
    found = list(model.get_nb_trainable_parameters())
    return {
        "gpt2_ia3_counts": found,
        "gpt2_ia3_percent": percent(found),
        "gpt2_ia3_roles_swapped": counts(gpt2(), **sheet, feedforward_modules=["c_attn"])[0],
        "gpt2_ia3_vectors_per_place": len(added) // len(places),
        "gpt2_ia3_biases": sum("bias" in name for name in added),
        "gpt2_ia3_feedforward_length": next(p.numel() for name, p in added.items() if "mlp.c_proj" in name),
        "gpt2_width": model.config.n_embd,
    }


def gpt2_rivals() -> Values:
    """LoRA r=8 on c_attn, LoRA on the same two modules as (IA)³, and BitFit on GPT-2."""
    lora, ia3, bitfit = (count_parameters(attach(gpt2(), method)) for method in ("lora", "ia3", "bitfit"))
    both = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    return {
        "gpt2_lora_trainable": lora.trainable,
        "gpt2_lora_percent": lora.percent,
        "gpt2_lora_of_ia3": lora.trainable / ia3.trainable,
        "gpt2_lora_on_both_percent": count_parameters(get_peft_model(gpt2(), both)).percent,
        "gpt2_bitfit_trainable": bitfit.trainable,
        "gpt2_bitfit_percent": bitfit.percent,
    }


def t5_family() -> Values:
    """peft's default places on T5-large, on the shape of T0 with eleven billion parameters, and on mT0-large.

    The checkpoints of the last two have an output head of their own, which transformers 5 ties to the embedding when
    it builds a model from a configuration: mT0-large is counted both ways.
    """
    task = {"task_type": "SEQ_2_SEQ_LM"}
    large = {"d_model": 1024, "d_kv": 64, "num_layers": 24, "num_heads": 16}
    t5 = counts(on_meta(T5ForConditionalGeneration, T5Config(**large, d_ff=4096)), **task)
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    xxl = T5Config(d_model=4096, d_kv=64, num_layers=24, num_heads=64, d_ff=10240, **gated)
    t0 = counts(with_own_head(on_meta(T5ForConditionalGeneration, xxl)), **task)
    shape = MT5Config(**large, d_ff=2816, vocab_size=250112, **gated)
    tied, untied = (on_meta(MT5ForConditionalGeneration, shape) for _ in range(2))
    return {
        "t5_large_trainable": t5[0],
        "t5_large_total": t5[1],
        "t5_large_percent": percent(t5),
        "t0_counts": t0,
        "t0_percent": percent(t0),
        "mt0_counts": counts(with_own_head(untied), **task),
        "mt0_tied_total": counts(tied, **task)[1],
    }


def bloom() -> Values:
    """peft's default places on the BLOOM whose printed shape has 46,145 tokens and 24 blocks of width 2,048."""
    shape = BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16)
    return {"bloom_counts": counts(on_meta(BloomForCausalLM, shape), task_type="CAUSAL_LM")}


def bert() -> Values:
    """BERT-base for two classes: the document's places, and the paper's."""
    document = {
        "target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"],
    }  # fmt: skip
    paper = {
        "target_modules": r".*(key|value|layer\.\d+\.output\.dense)", "feedforward_modules": ["output.dense"],
    }  # fmt: skip
    as_written, as_paper = (
        counts(on_meta(BertForSequenceClassification, BertConfig()), task_type="SEQ_CLS", **places)
        for places in (document, paper)
    )
    return {
        "bert_trainable": as_written[0], "bert_percent": percent(as_written), "bert_paper_percent": percent(as_paper),
    }  # fmt: skip


# --- behaviour ----------------------------------------------------------------------------------------------------
def task_type() -> Values:
    """Whether peft takes the BERT document's task type, and what it raises."""
    try:
        IA3Config(task_type="SEQ_CLASSIFICATION")
    except (TypeError, ValueError) as error:
        return {"seq_classification_accepted": False, "seq_classification_error": type(error).__name__}
    return {"seq_classification_accepted": True, "seq_classification_error": "nothing"}


def merging() -> Values:
    """Largest difference of a logit between the attached and the merged adapter, in float32 and in bfloat16."""
    gaps = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        attached = with_random_ia3(1, small_gpt2().to(dtype))
        gaps[f"merged_gap_{name}"] = (logits(attached) - logits(merge(attached))).abs().max().item()
    return gaps


class IA3Manager:
    """What the lab sheet's class of this name does: one `PeftModel` a task, all around one base."""

    def __init__(self, base_model: GPT2LMHeadModel) -> None:
        self.base_model, self.task_adapters = base_model, {}

    def load_adapter(self, task_name: str, adapter_path: str) -> None:
        """Load an adapter for a task."""
        self.task_adapters[task_name] = PeftModel.from_pretrained(self.base_model, adapter_path)


def manager() -> Values:
    """Whether the sheet's manager still answers with the first task's adapter after the second was loaded."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = {}
        for seed, task in enumerate(("first", "second")):
            model = with_random_ia3(seed)
            model.save_pretrained(f"{folder}/{task}")
            right[task] = logits(model)
        tasks = IA3Manager(small_gpt2())
        for task in right:
            tasks.load_adapter(task, f"{folder}/{task}")
        gap = (logits(tasks.task_adapters["first"].eval()) - right["first"]).abs().max().item()
    return {"manager_keeps_tasks_apart": gap < 1e-5, "manager_gap": gap}


def silent_channel() -> Values:
    """Gradient of what could change a value channel whose weights and bias are 0: (IA)³'s factor, LoRA's row of B."""
    found = {}
    for method, part in (("ia3", ".h.0.attn.c_attn.ia3_l"), ("lora", ".h.0.attn.c_attn.lora_B")):
        model = small_gpt2()
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.weight[:, -1] = 0
            model.transformer.h[0].attn.c_attn.bias[-1] = 0
        model = attach(model, method)
        model(token_ids(), labels=token_ids()).loss.backward()
        gradient = next(p.grad for name, p in model.named_parameters() if part in name)
        found[f"silent_channel_gradient_{method}"] = gradient[-1].abs().max().item()
    return found


# --- cost ---------------------------------------------------------------------------------------------------------
class Operations(TorchDispatchMode):
    """Counts the operations that reach PyTorch's dispatcher inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Count and run."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations() -> Values:
    """Operations of a forward pass of four blocks, less the base's: (IA)³ attached, and merged."""
    models = {"base": small_gpt2(), "ia3": with_random_ia3(0), "merged_ia3": merge(with_random_ia3(0))}
    found = {}
    for name, model in models.items():
        with Operations() as seen:
            logits(model)
        found[name] = seen.count
    return {f"operations_added_by_{name}": found[name] - found["base"] for name in ("ia3", "merged_ia3")}


def multiplications() -> Values:
    """Floating-point operations of a training step's matrix products, (IA)³ as a share of full fine-tuning."""
    found, ids = {}, token_ids(length=64)
    for method in ("ia3", "full"):
        model = attach(small_gpt2(attn_implementation="eager"), method)
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids, use_cache=False).loss.backward()
        found[method] = counter.get_total_flops()
    return {"step_flops_ia3_of_full": found["ia3"] / found["full"]}


def stored_activations() -> Values:
    """Bytes that a real forward pass keeps for its backward pass: (IA)³ against LoRA and full fine-tuning."""
    found = {}
    for method in ("ia3", "lora", "full"):
        model = attach(small_gpt2(), method)
        with saved_for_backward(model) as saved:
            model(token_ids(), labels=token_ids(), use_cache=False)
        found[method] = saved.bytes
    return {f"saved_bytes_ia3_of_{other}": found["ia3"] / found[other] for other in ("lora", "full")}


def training_memory() -> Values:
    """Weights, gradients, Adam's state and activations of GPT-2 on 8 blocks of 512 tokens, float32, no dropout."""
    model = on_meta(GPT2LMHeadModel, GPT2Config(**NO_DROPOUT))
    needs = {method: estimate_memory(model, method, 8, 512, "cpu") for method in ("ia3", "lora", "bitfit", "full")}
    found = {m: need.weights + need.gradients + need.optimizer + need.activations for m, need in needs.items()}
    return {f"training_bytes_ia3_of_{other}": found["ia3"] / found[other] for other in ("lora", "bitfit", "full")}


MEASUREMENTS = (
    gpt2_ia3, gpt2_rivals, t5_family, bloom, bert, task_type, merging, manager, silent_channel, operations,
    multiplications, stored_activations, training_memory,
)  # fmt: skip


def measure() -> Values:
    """Every value, by name in alphabetical order."""
    found: Values = {}
    for measurement in MEASUREMENTS:
        found |= measurement()
    return dict(sorted(found.items()))


def main() -> None:
    """Measure and write the record; `--help` does neither."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    quiet()
    versions, hardware = environment()
    record = {"hardware": hardware, "values": measure(), "versions": dict(sorted(versions.items()))}
    write_json(ASSETS / "runs" / "audit.json", record)
    print(f"assets/runs/audit.json: {len(record['values'])} values")


if __name__ == "__main__":
    main()
