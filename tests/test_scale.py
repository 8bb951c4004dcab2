"""docs/scale.md: its table is counted on the real architectures, its formula on a real step."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_model
from peft import IA3Config, get_peft_model
from test_train_script import LOSS, VECTORS
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from study.cost import idle_optimizer
from utils.adapters import attach
from utils.config import ROOT
from utils.gpu import format_bytes
from utils.sizes import count_parameters, training_bytes

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
MODELS = {
    "embedded model": GPT2Config.from_pretrained(ROOT / "assets" / "mini-gpt2"),
    "GPT-2": GPT2Config(),
    "GPT-2 XL": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    # T0 (Sanh et al. 2021) is T5 1.1 after language-model adaptation: gated feed-forward, a head of its own
    "T0-11B": T5Config(
        vocab_size=32_128, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
}  # fmt: skip


def counted(config: GPT2Config | T5Config) -> tuple[int, int]:
    """(parameters, what (IA)³ trains), counted on the whole architecture without memory for a single weight."""
    with torch.device("meta"):
        if isinstance(config, GPT2Config):
            model = GPT2LMHeadModel(config)
            return count_parameters(model).total, count_parameters(attach(model, "ia3")).trainable
        model = T5ForConditionalGeneration(config)
        model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)  # not tied in the checkpoint
        total = count_parameters(model).total
        return total, count_parameters(get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM"))).trainable


@pytest.mark.parametrize("name", MODELS)
def test_the_row_of_a_model(name):
    parameters, trained = counted(MODELS[name])
    ia3, full = training_bytes(parameters, trained), training_bytes(parameters, parameters)
    values = (ia3["file"], ia3["held"], full["held"], ia3["all-reduced"], full["all-reduced"], 1000 * ia3["file"])
    row = f"| {name} | {parameters:,} | {trained:,} | {' | '.join(map(format_bytes, values))} |"
    assert row in PAGE.splitlines(), row
    assert name != "T0-11B" or (trained == 1_081_344 and full["held"] > 141e9)  # Liu et al. (2022); one H200


@pytest.mark.parametrize("shape", [{"layers": 2, "width": 32}, {"layers": 4, "width": 64}])
@pytest.mark.parametrize("method", ["ia3", "full"])
def test_what_a_step_holds_is_what_the_formula_says(shape, method):
    """Weights, gradients and AdamW's moments after a real step, byte for byte (its counters of steps apart)."""
    base = count_parameters(make_tiny_model(**shape)).total
    model = attach(make_tiny_model(**shape), method)
    optimizer = idle_optimizer(model)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    held = sum(p.nbytes for p in model.parameters())
    held += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    held += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert held == training_bytes(base, count_parameters(model).trainable, weight=4)["held"]


def test_a_merged_task_is_no_low_rank_change():
    """Why an (IA)³ adapter cannot be handed to a server of LoRA adapters: W diag(l) - W has the rank of W."""
    weight, vector = torch.randn(16, 16), 1 + 0.1 * torch.randn(16)
    assert torch.linalg.matrix_rank(weight * vector - weight) == 16


def test_the_page_states_the_tolerance_of_the_test():
    assert LOSS == VECTORS == 5e-6 and "losses and vectors within 5e-6" in PAGE
