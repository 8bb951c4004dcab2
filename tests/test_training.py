"""Training on a tiny model: it learns, keeps the best step, resumes, and refuses what cannot work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from datasets import Dataset
from transformers import TrainingArguments
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from extensions.recipes import BLOOM_MINI
from utils import training
from utils.adapters import attach, base_fingerprint, scaling_vectors, set_scaling_vectors
from utils.config import PROFILES
from utils.evaluation import held_out_loss
from utils.runs import RunRecord
from utils.sizes import count_parameters, saved_for_backward

PROFILE = replace(
    PROFILES["mini"],
    block_length=16, batch_size=8, steps=12, eval_every=4, eval_blocks=8,
    learning_rates={"ia3": 3e-2, "lora": 1e-2, "full": 1e-2},
)  # fmt: skip


def run(blocks, folder, method="ia3", model=None, **options):
    model = model or attach(make_tiny_model(), method)
    evaluation = blocks.select(range(min(8, len(blocks))))
    return model, training.train(
        model, blocks, PROFILE, method=method, eval_blocks=evaluation, folder=folder, **options
    )


@pytest.mark.parametrize("method", ["ia3", "lora", "full"])
def test_training_lowers_the_held_out_loss_and_records_it(blocks, tmp_path, method):
    model, record = run(blocks, tmp_path, method)
    assert record.metrics["best_loss"] < record.metrics["start_loss"]
    assert record.status == "finished" and record.method == method
    assert record.counts["trainable"] == count_parameters(model).trainable
    assert [row["step"] for row in record.history if "eval_loss" in row] == [0, 4, 8, 12]
    assert RunRecord.load(tmp_path / "run.json") == record
    assert 0 < record.bytes_on_disk - 4 * record.counts["trainable"] < 4096  # the file's header
    assert not model.training


def test_only_the_adapter_moves(blocks, tmp_path):
    before = base_fingerprint(make_tiny_model())
    model, _ = run(blocks, tmp_path)
    assert base_fingerprint(model) == before
    assert any((l != 1).any() for l in scaling_vectors(model).values())


def test_the_best_step_is_kept_not_the_last(blocks, tmp_path):
    """Held out is noise here, so the loss on it rises as training goes on."""
    noise = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    labels = [[-100, *block[1:]] for block in noise]
    evaluation = Dataset.from_dict({"input_ids": noise, "labels": labels}).with_format("torch")
    model = attach(make_tiny_model(), "full")
    record = training.train(model, blocks, PROFILE, method="full", eval_blocks=evaluation, folder=tmp_path)
    losses = {row["step"]: row["eval_loss"] for row in record.history if row["step"] > 0 and "eval_loss" in row}
    assert record.metrics["best_loss"] == min(losses.values()) < losses[12] - 0.1
    with torch.inference_mode():
        ids = evaluation["input_ids"][:]
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(min(losses.values()), abs=1e-3)


def test_the_trainers_loss_is_the_mean_over_predicted_tokens(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "fast_bf16", lambda _: False)  # the loss by hand is in float32
    _, record = run(blocks, tmp_path)
    by_hand = held_out_loss(make_tiny_model(), blocks.select(range(8))).value
    assert record.history[0] == {"step": 0, "eval_loss": pytest.approx(by_hand, abs=1e-5)}


def test_the_same_cell_run_twice_starts_from_the_same_state(blocks, tmp_path):
    model = attach(make_tiny_model(), "ia3")
    _, first = run(blocks, tmp_path, model=model)
    _, second = run(blocks, tmp_path, model=model)
    assert second.time["steps_timed"] == 12 and second.metrics == first.metrics  # started over, not taken up
    assert second.history == first.history and first.metrics["best_loss"] < first.metrics["start_loss"]


def test_after_training_in_bfloat16_the_model_computes_in_float32_again(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "fast_bf16", lambda _: True)
    model, _ = run(blocks, tmp_path)
    fresh = attach(make_tiny_model(), "ia3").eval()
    set_scaling_vectors(fresh, scaling_vectors(model))
    ids = torch.tensor(blocks[:2]["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": -1.0}])
def test_nothing_to_do_is_an_error_not_a_default(blocks, tmp_path, options):
    with pytest.raises(training.TrainingError, match="must be at least 1"):
        run(blocks, tmp_path, **options)


def test_a_fair_run_fixes_schedule_decay_and_precision(tmp_path, monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(training, "fast_bf16", lambda _, fast=fast: fast)
        made = training.training_arguments(
            PROFILES["mini"], tmp_path, torch.device("cpu"), learning_rate=0.01, steps=200, seed=3
        )
        assert (made.weight_decay, made.lr_scheduler_type, made.bf16) == (0.0, "linear", fast)
        assert made.get_warmup_steps(200) == 12 and (made.seed, made.data_seed) == (3, 3)
        assert made.load_best_model_at_end and made.metric_for_best_model == "eval_loss" and not made.greater_is_better


class Killed(Exception):
    pass


def killed(blocks, folder, monkeypatch, event="on_step_end", at=7, **options):
    """A run that dies after step `at`, at that event of the Trainer's."""

    def killer(self, args, state, control, **named):
        if state.global_step == at:
            raise Killed
        return original(self, args, state, control, **named)

    original = getattr(training.Progress, event)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Progress, event, killer)
        run(blocks, folder, **options)


@pytest.fixture(scope="module")
def whole(blocks, tmp_path_factory) -> RunRecord:
    """The record of a run that nobody disturbs."""
    return run(blocks, tmp_path_factory.mktemp("whole"))[1]


@pytest.fixture(scope="module")
def cut(blocks, tmp_path_factory) -> Path:
    """The folder of a run that died after step 10: its checkpoints are of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        killed(blocks, folder, patch, at=10)
    assert RunRecord.load(folder / "running.json").status == "running"
    return folder


def test_an_interrupted_run_goes_on_and_ends_as_the_undisturbed_one(blocks, cut, whole, tmp_path):
    """In a copy of its folder: nothing in it depends on where it lies."""
    shutil.copytree(cut, tmp_path / "copy")
    _, resumed = run(blocks, tmp_path / "copy")
    assert resumed.time["steps_timed"] == 4  # from the checkpoint of step 8, not from the start
    assert (resumed.history, resumed.metrics) == (whole.history, whole.metrics)


def test_a_run_killed_after_its_last_step_is_finished(blocks, whole, tmp_path, monkeypatch):
    """The Trainer itself would train a step too many."""
    killed(blocks, tmp_path, monkeypatch, "on_train_end", at=12)
    assert (tmp_path / "checkpoints" / "checkpoint-12" / "trainer_state.json").exists()
    _, finished = run(blocks, tmp_path)
    assert finished.history == whole.history and finished.time["steps_timed"] == 4


DAMAGE = {
    "optimizer.pt": lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
    "adapter_model.safetensors": lambda data: data[:-1],
    "trainer_state.json": lambda _: b"",
    "rng_state.pth": lambda _: b"\x80\x04.",
    "scheduler.pt": None,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_cannot_be_read_is_dropped(cut, tmp_path, name):
    """The last one, for the one before it; then that too, and the run starts over."""
    folder, record = shutil.copytree(cut, tmp_path / "copy"), RunRecord.load(cut / "running.json")
    for number, left in ((8, "checkpoint-4"), (4, None)):
        path = folder / "checkpoints" / f"checkpoint-{number}" / name
        path.write_bytes(DAMAGE[name](path.read_bytes())) if DAMAGE[name] else path.unlink()
        assert training.resume_point(folder, record) == (left and str(folder / "checkpoints" / left))
        assert not path.parent.exists()


def test_without_its_best_checkpoint_the_last_one_is_dropped_too(cut, tmp_path):
    """Else the run would go on, and end at its last step in the place of its best one."""
    folder, record = shutil.copytree(cut, tmp_path / "copy"), RunRecord.load(cut / "running.json")
    state = folder / "checkpoints" / "checkpoint-8" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_global_step": 4}), encoding="utf-8")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    assert training.resume_point(folder, record) is None


def test_the_run_of_another_seed_starts_over(cut, tmp_path):
    folder, record = shutil.copytree(cut, tmp_path / "copy"), RunRecord.load(cut / "running.json")
    assert training.resume_point(folder, replace(record, seed=1)) is None and not (folder / "checkpoints").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files on this system")
def test_no_file_of_a_checkpoint_stays_mapped(blocks, cut, tmp_path):
    """Windows would refuse to delete it."""
    run(blocks, shutil.copytree(cut, tmp_path / "copy"))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_used_further_as_it_was(blocks, tmp_path, monkeypatch, fails):
    """Evaluation mode, its cache, no autocast, no checkpointing, the same trainable; also where the run dies."""
    model = attach(make_tiny_model(), "ia3")
    before = ({n for n, p in model.named_parameters() if p.requires_grad}, model.config.use_cache, set(vars(model)))
    if fails:
        killed(blocks, tmp_path, monkeypatch, model=model, checkpointing=True)
    else:
        run(blocks, tmp_path, model=model, checkpointing=True)
    after = ({n for n, p in model.named_parameters() if p.requires_grad}, model.config.use_cache, set(vars(model)))
    assert after == (*before[:2], before[2] | {"first_state"}) and before[1] is True
    assert not any(module.training or getattr(module, "gradient_checkpointing", False) for module in model.modules())


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("set_before", "profile", "said"),
    [
        (None, PROFILE, "LAB_OVERRIDE=batch_size=4 before"),
        ("steps=12", PROFILE, "LAB_OVERRIDE=steps=12,batch_size=4 before"),
        (None, replace(BLOOM_MINI, batch_size=8, accumulation=2), "LAB_OVERRIDE=batch_size=4,accumulation=4 before"),
        (None, replace(PROFILE, batch_size=1), "one row: use checkpointing=True, or shorter rows"),
    ],
)
def test_out_of_memory_says_what_fits(blocks, tmp_path, monkeypatch, set_before, profile, said):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(GPT2MLP, "forward", full)
    if set_before:
        monkeypatch.setenv("LAB_OVERRIDE", set_before)
    model, options = attach(make_tiny_model(), "ia3"), {"method": "ia3", "folder": tmp_path, "learning_rate": 0.1}
    with pytest.raises(training.TrainingError, match=f"out of memory with .*{said}"):
        training.train(model, blocks, profile, eval_blocks=blocks, **options)


def test_another_error_is_not_taken_for_a_full_memory(blocks, tmp_path, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(GPT2MLP, "forward", broken)
    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        run(blocks, tmp_path)


def test_one_process_uses_one_gpu_where_there_are_several(tmp_path):
    """Left alone, the Trainer takes all GPUs it sees, and as many batches for a step: another run than on one GPU."""
    options = {"learning_rate": 0.1, "steps": 4, "seed": 0}
    ours = training.training_arguments(PROFILE, tmp_path, torch.device("cpu"), **options)
    stock = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    for arguments, rows in ((ours, 8), (stock, 16)):
        arguments._n_gpu = 2
        assert arguments.train_batch_size == rows


@pytest.mark.parametrize("method", ["ia3", "lora", "bottleneck", "full"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(method):
    """Without `enable_input_require_grads`: the non-reentrant kind needs no input that wants a gradient."""
    gradients, kept = [], []
    ids = torch.arange(32).reshape(2, 16)
    for checkpointing in (False, True):
        model = attach(make_tiny_model(), method).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with saved_for_backward(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        kept.append(saved.bytes)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.6 * kept[0]


def test_train_with_checkpointing_is_the_same_run(blocks, tmp_path, monkeypatch):
    forward, passes = GPT2MLP.forward, []
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: passes.append(self.training) or forward(self, x))
    _, whole = run(blocks, tmp_path / "whole")
    once = sum(passes)
    passes.clear()
    _, record = run(blocks, tmp_path / "short", checkpointing=True)
    assert sum(passes) == 2 * once > 0  # each block forward, and once more on the way back
    assert record.history == whole.history


def test_block_order_depends_on_the_seed_alone(blocks, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    for method in ("ia3", "lora"):
        model = attach(make_tiny_model(), method)
        original = type(model).forward
        order = seen.setdefault(method, [])

        def spy(self, *args, _original=original, _order=order, **inputs):
            if self.training:
                _order.append(inputs["input_ids"][:, 0].tolist())
            return _original(self, *args, **inputs)

        monkeypatch.setattr(type(model), "forward", spy)
        run(blocks, tmp_path / method, method, model)
        monkeypatch.setattr(type(model), "forward", original)
    assert seen["ia3"] == seen["lora"] and len(seen["ia3"]) == PROFILE.steps


def test_what_cannot_be_trained_is_refused(blocks, tmp_path, monkeypatch):
    with pytest.raises(training.TrainingError, match="every parameter is frozen"):
        run(blocks, tmp_path, "base", attach(make_tiny_model(), "base"))
    with pytest.raises(training.TrainingError, match="less than one batch"):
        run(blocks.select(range(7)), tmp_path)
    with pytest.raises(training.TrainingError, match="cache, which checkpointing switches off"):
        run(blocks, tmp_path, "prefix", checkpointing=True, learning_rate=0.1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(training.TrainingError, match="3 processes cannot share batches of 8 blocks evenly"):
        run(blocks, tmp_path)


@pytest.mark.parametrize("after_another", [False, True])
def test_a_diverged_run_is_an_error_and_leaves_the_old_record(blocks, tmp_path, after_another):
    first = run(blocks, tmp_path)[1] if after_another else None
    model = attach(make_tiny_model(), "ia3")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(training.TrainingError, match="lower learning rate"):
        run(blocks, tmp_path, model=model)
    assert RunRecord.load(tmp_path / "running.json").status == "failed"
    assert RunRecord.load(tmp_path / "run.json") == first if first else not (tmp_path / "run.json").exists()
