"""Devices, and memory: closed forms against what a real forward pass stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from peft import IA3Config, LoraConfig, TaskType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from study.cost import reference_costs
from utils import gpu, sizes
from utils.adapters import attach
from utils.config import PROFILES
from utils.sizes import FOOTPRINTS, activation_bytes, count_parameters

ROOT = Path(__file__).resolve().parents[1]
MODULES = ["c_attn", "mlp.c_proj"]


def model_of(method: str, dropout: float = 0.0, **sizes: int) -> GPT2LMHeadModel:
    """A GPT-2 in training mode with `method` attached, (IA)³ and LoRA by peft directly, not by the course's code."""
    sizes = {"n_layer": 2, "n_embd": 32, "vocab_size": 200, "n_head": 4, "n_positions": 96} | sizes
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))
    if method == "ia3":
        config = IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=MODULES, feedforward_modules=MODULES[1:],
                           fan_in_fan_out=True)  # fmt: skip
        model = get_peft_model(model, config)
    elif method == "lora":
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["c_attn"], fan_in_fan_out=True)
        model = get_peft_model(model, config)
    elif method != "full":
        model = attach(model, method)
    return model.train()


def stored_bytes(model: GPT2LMHeadModel, batch: int, length: int) -> int:
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    with sizes.saved_for_backward(model) as saved:
        model(input_ids=ids, labels=ids, use_cache=False)
    return saved.bytes


@pytest.mark.parametrize("method", sorted(FOOTPRINTS))
@pytest.mark.parametrize("sizes", [{}, {"n_layer": 5, "n_embd": 64}, {"n_layer": 3, "vocab_size": 3000}], ids=str)
def test_activations_agree_with_a_real_pass(method, sizes):
    model = model_of(method, **sizes)
    predicted = activation_bytes(model.config, method, batch=3, length=48)
    assert predicted == pytest.approx(stored_bytes(model, 3, 48), rel=0.05)


@pytest.mark.parametrize("method", sorted(FOOTPRINTS))
def test_activations_of_the_embedded_model_agree_with_what_was_measured(method):
    profile, rows = PROFILES["mini"], reference_costs(PROFILES["mini"])[0]
    config = GPT2Config.from_pretrained(ROOT / profile.model)
    predicted = activation_bytes(config, method, profile.batch_size, profile.block_length)
    assert predicted == pytest.approx(rows[method]["saved_bytes"], rel=0.05)


@pytest.mark.parametrize("method", sorted(FOOTPRINTS))
def test_dropout_is_counted(method):
    model = model_of(method, dropout=0.1)
    predicted = activation_bytes(model.config, method, batch=2, length=64)
    assert predicted == pytest.approx(stored_bytes(model, 2, 64), rel=0.05)
    assert predicted > 1.2 * activation_bytes(model_of(method).config, method, batch=2, length=64)


def peak_of_a_step(model: GPT2LMHeadModel, batch: int, length: int) -> int:
    """Most bytes that the allocator had given out at once during forward and backward, as the profiler saw them."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        output = model(input_ids=ids, labels=ids, use_cache=False)  # holds the logits
        output.loss.backward()
    changes = [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize("method", ["ia3", "lora", "full"])
def test_the_whole_estimate_agrees_with_the_allocator(method, monkeypatch):
    monkeypatch.setattr(sizes, "fast_bf16", lambda _: False)  # the step below runs in float32
    model = model_of(method, n_layer=3, n_embd=64, vocab_size=2000)
    estimate = sizes.estimate_memory(model, method, 4, 64, "cpu")
    expected = estimate.activations + estimate.working
    assert expected == pytest.approx(peak_of_a_step(model, 4, 64), rel=0.10)


def test_ia3_stores_more_activations_than_lora():
    """The claim "fewer parameters, so less memory" is wrong: 02 says so, here is the measurement."""
    assert stored_bytes(model_of("ia3"), 3, 48) > stored_bytes(model_of("lora"), 3, 48)


@pytest.mark.parametrize("method", sorted(FOOTPRINTS))
def test_gradients_are_those_of_the_trainable_parameters(method):
    model = model_of(method)
    estimate = sizes.estimate_memory(model, method, 2, 16, "cpu")
    trainable = count_parameters(model).trainable
    assert estimate.gradients == 4 * trainable
    assert estimate.optimizer == 8 * trainable
    assert estimate.weights == 4 * sum(p.numel() for p in model.parameters())
    parts = (estimate.weights, estimate.gradients, estimate.optimizer, estimate.activations, estimate.working)
    assert estimate.total == sum(parts)


def test_saved_bytes_leave_out_parameters_and_count_a_storage_once():
    layer = torch.nn.Linear(10, 10)
    x = torch.randn(7, 10)
    with sizes.saved_for_backward(layer) as saved:
        layer(x) + layer(x[:3].repeat(1, 1)).sum()
    assert saved.bytes == 4 * (7 * 10 + 3 * 10)
    with torch.no_grad(), sizes.saved_for_backward(layer) as saved:
        layer(x)
    assert saved.bytes == 0


def test_what_does_not_fit_is_refused_with_the_remedy(monkeypatch):
    model = model_of("ia3")
    estimate = sizes.estimate_memory(model, "ia3", 4, 32, "cpu")
    sizes.require_memory(estimate)
    assert estimate.fits
    assert str(estimate).endswith("fits")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=estimate.total))
    tight = sizes.estimate_memory(model, "ia3", 4, 32, "cpu")
    assert "does NOT fit" in str(tight)
    with pytest.raises(gpu.GpuError, match="are free: set LAB_OVERRIDE=batch_size=2 before .* LAB_PROFILE=mini"):
        sizes.require_memory(tight)


def test_unknown_method_is_named():
    with pytest.raises(gpu.GpuError, match="'magic'; known: ia3, ia3_kv, lora"):
        sizes.estimate_memory(model_of("ia3"), "magic", 1, 8)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.delenv("LAB_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A CUDA device as PyTorch would describe it, for machines that have none."""
    monkeypatch.delenv("LAB_DEVICE", raising=False)
    memory = {"free": 10 * 2**30}
    properties = SimpleNamespace(name="NVIDIA Test", major=8, minor=6)
    answers = {
        "is_available": True, "current_device": 0, "is_bf16_supported": True, "synchronize": None,
        "get_device_properties": properties, "reset_peak_memory_stats": None, "max_memory_allocated": 12345,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (memory["free"], 16 * 2**30))
    monkeypatch.setattr(gpu, "_driver_version", lambda: "570.1")
    return memory


@pytest.mark.parametrize(
    ("cuda", "argument", "variable", "found"),
    [
        (False, None, None, "cpu"),
        (False, None, "auto", "cpu"),
        (False, "cuda", None, r"CUDA was asked for .* LAB_DEVICE=cpu"),
        (False, None, "cuda", r"CUDA was asked for .* LAB_DEVICE=cpu"),
        (False, None, "gpu", "'gpu': set LAB_DEVICE to auto, cpu or cuda"),
        (True, None, None, "cuda"),
        (True, None, "cpu", "cpu"),
        (True, "cuda", "cpu", "cuda"),
    ],
)
def test_a_device_is_that_of_the_argument_the_environment_or_the_hardware(monkeypatch, cuda, argument, variable, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv("LAB_DEVICE", raising=False)
    if variable:
        monkeypatch.setenv("LAB_DEVICE", variable)
    if found in ("cpu", "cuda"):
        assert gpu.pick_device(argument).type == found
    else:
        with pytest.raises(gpu.GpuError, match=found):
            gpu.pick_device(argument)


def test_report_on_a_gpu(fake_cuda):
    report = gpu.check_gpu()
    assert (report.device, report.compute_capability, report.bf16, report.reason) == ("cuda:0", "8.6", True, None)
    assert "10.0 GiB free of 16.0 GiB" in str(report)
    assert "no GPU" not in str(report)


def test_cuda_memory_is_what_decides_on_cuda(fake_cuda):
    model = model_of("ia3")
    assert sizes.estimate_memory(model, "ia3", 2, 16, "cuda").available == 10 * 2**30
    fake_cuda["free"] = 1000
    assert not sizes.estimate_memory(model, "ia3", 2, 16, "cuda").fits


def test_peak_memory_on_cuda_is_pytorchs_own(fake_cuda):
    with gpu.PeakMemory() as peak:
        pass
    assert peak.bytes == 12345


@pytest.mark.parametrize(
    ("cuda_build", "driver", "reason"),
    [(None, None, "CPU build"), ("13.0", None, "no NVIDIA driver"), ("13.0", "570.1", "CUDA_VISIBLE_DEVICES")],
)
def test_report_says_why_there_is_no_gpu(no_cuda, monkeypatch, cuda_build, driver, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    monkeypatch.setattr(gpu, "_driver_version", lambda: driver)
    report = gpu.check_gpu()
    assert reason in report.reason
    assert report.device == "cpu"
    assert 0 < report.memory_free <= report.memory_total
    assert all(len(line) > 20 for line in str(report).splitlines())


def test_report_respects_lab_device(fake_cuda, monkeypatch):
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    assert gpu.check_gpu().reason == "LAB_DEVICE=cpu was set"


@pytest.mark.parametrize(("stdout", "driver"), [("570.1\n570.1\n", "570.1"), ("", None), (None, None)])
def test_the_driver_is_what_nvidia_smi_says_and_none_where_it_hangs_or_is_missing(monkeypatch, stdout, driver):
    def answer(*_, **__):
        if stdout is None:
            raise subprocess.TimeoutExpired("nvidia-smi", 10)
        return SimpleNamespace(stdout=stdout)

    monkeypatch.setattr(gpu.subprocess, "run", answer)
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "nvidia-smi")
    assert gpu._driver_version() == driver
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    assert gpu._driver_version() is None


@pytest.mark.parametrize(
    ("flag", "gain", "expected"),
    [(True, 1.6, torch.bfloat16), (True, 0.6, torch.float32), (False, 1.6, torch.float32)],
)
def test_dtype_and_autocast_follow_the_hardware(monkeypatch, flag, gain, expected):
    """Both: a processor that says it has bfloat16, and that is faster with it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": flag})
    monkeypatch.setattr(gpu, "bf16_gain", lambda: gain)
    with gpu.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == expected


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_gain_is_measured_and_changes_nothing(monkeypatch, slow):
    """A processor whose products take twice as long in one of the two formats, on a clock that this test turns."""
    clock, product = [0.0], torch.mm
    threads, state = torch.get_num_threads(), torch.get_rng_state()

    def mm(left, right):
        clock[0] += 2.0 if left.dtype == slow else 1.0
        return product(left, right)

    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", mm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gpu.bf16_gain.__wrapped__() == (2.0 if slow == torch.float32 else 0.5)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_the_gain_is_asked_for_once_and_not_at_import():
    code = (
        "from utils import gpu; print(gpu.bf16_gain.cache_info().misses); gpu.check_gpu(); gpu.check_gpu(); "
        "print(gpu.bf16_gain.cache_info().misses <= 1, gpu.bf16_gain() == gpu.bf16_gain() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["0", "True", "True"]


def test_bf16_copies_of_the_weights_are_in_the_estimate(monkeypatch):
    model, estimates = model_of("ia3"), []
    for fast in (False, True):
        monkeypatch.setattr(sizes, "fast_bf16", lambda _, fast=fast: fast)
        estimates.append(sizes.estimate_memory(model, "ia3", 2, 16, "cpu"))
    assert estimates[1].working - estimates[0].working == estimates[0].weights // 2


def test_peak_memory_on_cpu_sees_a_large_tensor():
    """In a process of its own: here, memory that other tests have freed may be used again, which nobody sees."""
    size = 256 * 2**20
    code = (
        "import torch; from utils.gpu import PeakMemory\n"
        f"with PeakMemory('cpu') as peak: tensor = torch.ones({size // 4}); del tensor\n"
        "print(peak.bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 0.9 * size < int(done.stdout) < 4 * size


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (2**40, "1024.0 GiB")]
)
def test_bytes_as_text(count, text):
    assert gpu.format_bytes(count) == text
