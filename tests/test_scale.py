"""docs/scale.md: its formulas count the same bytes as real models of two sizes; its engines' files can be loaded."""

from __future__ import annotations

import launched
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import make_tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from extensions.recipes import MT0_FULL
from study.cost import idle_optimizer
from utils import scale
from utils.adapters import attach
from utils.config import ROOT
from utils.lab_counts import predict_t5_count
from utils.places import attach_recipe
from utils.sizes import count_parameters, saved_for_backward

SIZES = {size.name: size for size in scale.sizes()}
TINY_T5 = {"vocab_size": 300, "d_model": 32, "d_ff": 48, "num_heads": 3, "d_kv": 8, "num_layers": 2}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def t0(**shape: int) -> T5Config:
    return T5Config(**scale.T0 | shape)


T5_SHAPES = {
    "T0-3B": t0(d_model=2048, d_ff=5120, num_heads=32),
    "T0-11B": t0(d_model=4096, d_ff=10_240, num_heads=64),
    "tiny": t0(**TINY_T5),
    "uneven": t0(**TINY_T5 | {"num_decoder_layers": 3, "d_ff": 40}),
}


def on_meta(config: GPT2Config | T5Config) -> torch.nn.Module:
    """The whole architecture, without memory for a single weight; a T5's head untied, as in the checkpoints."""
    with torch.device("meta"):
        if not isinstance(config, T5Config):
            return GPT2LMHeadModel(config)
        model = T5ForConditionalGeneration(config)
        model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
    return model


@pytest.mark.parametrize(("name", "vectors"), [("T0-3B", 540_672), ("T0-11B", 1_081_344)])
def test_the_papers_counts_come_out_of_the_architecture(name, vectors):
    """Liu et al. (2022) train these many numbers: by closed form, and by peft on the model itself."""
    model = on_meta(T5_SHAPES[name])
    assert SIZES[name].trained == predict_t5_count(T5_SHAPES[name]) == vectors
    assert count_parameters(model).total == SIZES[name].parameters
    assert count_parameters(attach_recipe(model, MT0_FULL)).trainable == vectors


@pytest.mark.parametrize("name", T5_SHAPES)
def test_parameters_of_a_t5_by_closed_form(name):
    model = on_meta(T5_SHAPES[name])
    blocks = sum(p.numel() for stack in (model.encoder, model.decoder) for p in stack.block.parameters())
    assert scale.t5_parameters(T5_SHAPES[name]) == count_parameters(model).total
    assert scale.t5_outside(T5_SHAPES[name]) == count_parameters(model).total - blocks


@pytest.mark.parametrize("name", ["embedded model", "GPT-2", "GPT-2 XL"])
def test_parameters_of_a_gpt2_by_closed_form(name):
    configs = {"GPT-2": GPT2Config(), "GPT-2 XL": GPT2Config(n_embd=1600, n_layer=48, n_head=25)}
    model = on_meta(configs.get(name) or GPT2Config.from_pretrained(ROOT / "assets" / "mini-gpt2"))
    size = SIZES[name]
    assert size.parameters == count_parameters(model).total
    assert size.outside == size.parameters - sum(p.numel() for p in model.transformer.h.parameters())
    assert size.trained == count_parameters(attach(model, "ia3")).trainable


@pytest.mark.parametrize("shape", [{"layers": 2, "width": 32}, {"layers": 4, "width": 64}])
@pytest.mark.parametrize("method", ["ia3", "full"])
def test_what_a_step_holds_is_what_the_formulas_say(shape, method):
    """Weights, gradients and AdamW's moments after a real step, byte for byte (its counters of steps apart)."""
    model = attach(make_tiny_model(**shape), method)
    size, optimizer = scale.gpt2_size("", model.config), idle_optimizer(model)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    counters = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if not t.ndim)
    assert gradients + moments == scale.state_bytes(size.trained if method == "ia3" else size.parameters)
    total = scale.held_bytes(size, weight=4) if method == "ia3" else scale.full_bytes(size)
    assert weights + gradients + moments == total and counters == 4 * len(optimizer.state)


@pytest.mark.parametrize("shape", [{"layers": 2, "width": 32}, {"layers": 6, "width": 64}])
def test_activations_that_checkpointing_keeps(shape):
    model = attach(make_tiny_model(**shape), "ia3").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(8 * 64).reshape(8, 64) % 300
    with saved_for_backward(model) as saved:
        model(input_ids=ids, labels=ids)
    assert scale.checkpointed_bytes(model.config, 8, 64) == pytest.approx(saved.bytes, rel=0.05)


def test_sharding_divides_what_is_held_and_only_that():
    size = SIZES["GPT-2"]
    assert scale.held_bytes(size, 8) == scale.held_bytes(size)
    assert 8 * scale.held_bytes(size, 8, sharded=True) == pytest.approx(scale.held_bytes(size), abs=8)


def test_a_merged_task_is_no_low_rank_change():
    """Why an (IA)³ adapter cannot be handed to a server of LoRA adapters: W diag(l) - W has the rank of W."""
    weight, vector = torch.randn(16, 16), 1 + 0.1 * torch.randn(16)
    assert torch.linalg.matrix_rank(weight * vector - weight) == 16


def test_what_the_page_says_in_words():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert launched.LOSS == launched.VECTORS == 5e-6 and "within 5e-6 and the vectors within 5e-6" in page
    largest, gpt2 = SIZES["T0-11B"], SIZES["GPT-2"]
    assert f"classifier within {launched.WEIGHTS:.0e}".replace("e-0", "e-") in " ".join(page.split())
    assert "does not fit on a GPU of 141 GB" in page and scale.full_bytes(largest) > 141e9
    assert "as much as the base for GPT-2 and a fifth of it at 11B" in page
    assert 1000 * scale.task_bytes(gpt2) == pytest.approx(2 * gpt2.parameters, rel=0.05)
    assert 1000 * scale.task_bytes(largest) == pytest.approx(2 * largest.parameters / 5, rel=0.05)
    assert "a few MiB even at" in page and 2**21 < scale.all_reduced_bytes(largest.trained) < 2**23
    assert all(f"{SIZES[name].trained:,}" in page for name in ("T0-3B", "T0-11B"))


def test_there_is_a_file_for_each_engine():
    assert [path.name for path in CONFIGS] == ["ddp.yaml", "fsdp.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_as_meant(path):
    """Its own loader, which refuses unknown keys, and its own launcher's arguments and environment."""
    config = load_config_from_file(str(path))
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}[path.stem] and not config.use_cpu
    command = ["--config_file", str(path), "--num_processes", "2", "scripts/train.py", "--processes", "2"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.training_script_args == ["--processes", "2"] and arguments.num_processes == 2
    assert (arguments.multi_gpu, arguments.use_fsdp) == (path.stem == "ddp", path.stem == "fsdp")
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if path.stem == "fsdp":
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "GPT2Block"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
