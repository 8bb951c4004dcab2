"""Training on a tiny model: it learns, keeps the best step, resumes, and refuses what cannot work."""

from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model
from datasets import Dataset

from utils import training
from utils.adapters import attach, scaling_vectors, set_scaling_vectors
from utils.config import PROFILES
from utils.counts import count_parameters
from utils.data import to_blocks
from utils.evaluation import held_out_loss
from utils.runs import RunRecord
from utils.storage import base_fingerprint

PROFILE = replace(
    PROFILES["mini"],
    block_length=16, batch_size=8, steps=12, eval_every=4, eval_blocks=8,
    learning_rates={"ia3": 3e-2, "lora": 1e-2, "full": 1e-2},
)  # fmt: skip


@pytest.fixture
def blocks(reviews, tokenizer) -> Dataset:
    return to_blocks(Dataset.from_list(reviews), tokenizer, 16)


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
    assert record.bytes_on_disk > 4 * record.counts["trainable"]
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
    assert second.history == first.history and first.metrics["best_loss"] < first.metrics["start_loss"]


def test_after_training_in_bfloat16_the_model_computes_in_float32_again(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "fast_bf16", lambda _: True)
    model, _ = run(blocks, tmp_path)
    fresh = attach(make_tiny_model(), "ia3").eval()
    set_scaling_vectors(fresh, scaling_vectors(model))
    ids = torch.tensor(blocks[:2]["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_a_new_run_that_fails_leaves_the_old_record(blocks, tmp_path, monkeypatch):
    _, first = run(blocks, tmp_path)
    model = attach(make_tiny_model(), "ia3")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(training.TrainingError):
        run(blocks, tmp_path, model=model)
    assert RunRecord.load(tmp_path / "run.json") == first


@pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": -1.0}])
def test_nothing_to_do_is_an_error_not_a_default(blocks, tmp_path, options):
    model = attach(make_tiny_model(), "ia3")
    options = {"method": "ia3", "eval_blocks": blocks, "folder": tmp_path} | options
    with pytest.raises(training.TrainingError, match="must be at least 1"):
        training.train(model, blocks, PROFILES["mini"], **options)


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


def test_resume_after_a_kill_gives_the_undisturbed_run(blocks, tmp_path, monkeypatch):
    _, whole = run(blocks, tmp_path / "whole")
    original = training.Progress.on_step_end

    def killer(self, args, state, control, **options):
        if state.global_step == 7:
            raise Killed
        original(self, args, state, control, **options)

    monkeypatch.setattr(training.Progress, "on_step_end", killer)
    with pytest.raises(Killed):
        run(blocks, tmp_path / "cut")
    assert RunRecord.load(tmp_path / "cut" / "running.json").status == "running"
    monkeypatch.setattr(training.Progress, "on_step_end", original)
    model, resumed = run(blocks, tmp_path / "cut")
    assert resumed.time["steps_timed"] == 8  # from the checkpoint of step 4, not from the start
    assert [r["step"] for r in resumed.history] == [r["step"] for r in whole.history]
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_finished_or_different_run_is_started_over(blocks, tmp_path):
    _, first = run(blocks, tmp_path)
    _, again = run(blocks, tmp_path)
    assert again.time["steps_timed"] == 12 and again.metrics == first.metrics
    _, other = run(blocks, tmp_path, seed=1)
    assert other.seed == 1 and other.time["steps_timed"] == 12


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


def test_refusals(blocks, tmp_path):
    with pytest.raises(training.TrainingError, match="every parameter is frozen"):
        run(blocks, tmp_path, "base", attach(make_tiny_model(), "base"))
    with pytest.raises(training.TrainingError, match="less than one batch"):
        run(blocks.select(range(7)), tmp_path)


def test_a_diverged_run_is_an_error_not_a_record(blocks, tmp_path):
    model = attach(make_tiny_model(), "ia3")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(training.TrainingError, match="lower learning rate"):
        run(blocks, tmp_path, model=model)
    assert not (tmp_path / "run.json").exists()


def test_weight_decay_would_pull_the_vectors_to_zero(tiny_model):
    """Why `train` fixes it at 0: decoupled decay shrinks l itself, and the base is at l = 1."""
    model = attach(tiny_model, "ia3")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=1.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(5):
        optimizer.step()
    assert all(torch.allclose(p, torch.full_like(p, 0.9**5)) for p in parameters)


def test_bytes_on_disk_predicted(blocks, tmp_path):
    _, record = run(blocks, tmp_path)
    header = record.bytes_on_disk - 4 * record.counts["trainable"]
    assert 0 < header < 4096


def test_step_ratios_leave_the_models_as_they_were(blocks):
    models = {method: attach(make_tiny_model(), method) for method in ("ia3", "full")}
    before = {name: [p.detach().clone() for p in model.parameters()] for name, model in models.items()}
    ratios = training.step_ratios(models, blocks, batch_size=4, rounds=3)
    assert list(ratios) == ["ia3", "full"] and ratios["full"] == 1.0 and ratios["ia3"] > 0
    for name, model in models.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], model.parameters(), strict=True))
