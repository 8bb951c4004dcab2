"""A trained adapter and its curve, graded from their numbers: what is looked at, what is not believed, the bands."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from grade import adapter_grader
from grading_course import CURVE, adapter_files, run_file, vectors, write_reference
from safetensors.numpy import load_file, save

from grading import GradingError
from grading.adapter import (
    EARLIER,
    SHARES,
    Check,
    Meter,
    alike,
    check_curve,
    find_adapter_files,
    grade_adapter,
    grade_style,
    make_bands,
    other_profile,
)
from grading.course import Question
from grading.intake import Submission
from grading.release import references_of
from grading.run import grade_adapter_question

ROOT = Path(__file__).resolve().parents[1]
BANDS = {"loss_gain": (0.01, 0.5), "positivity_gain": (0.05, 0.9)}
GOOD = adapter_files(vectors())
MEASURED = {"loss_gain": 0.1, "positivity_gain": 0.3, "start_loss": 4.0, "best_loss": 3.85}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("reference") / "positive-seed1")


def test_a_good_adapter_gets_every_point_and_says_what_was_looked_at(reference):
    share, checks = grade_adapter(GOOD, [reference], BANDS, lambda _: MEASURED)
    assert share == sum(SHARES.values()) == 1
    assert [check.name for check in checks] == [
        "file", "shapes", "finite", "trained", "own", "base", "curve", "loss_gain", "positivity_gain"
    ]  # fmt: skip


def test_a_reference_is_known_however_it_is_disguised(reference, tmp_path):
    """One number moved by the smallest step, everything turned up, two of them mixed, noise on it."""
    other = write_reference(tmp_path / "positive-seed2", seed=2)
    one, two, noise = (vectors(seed=seed) for seed in (1, 2, 3))
    nudged = {name: value.copy() for name, value in one.items()}
    first = next(iter(nudged.values()))
    first.flat[0] = np.nextafter(first.flat[0], np.float32(9))
    disguises = [nudged, {name: 1 + 1.7 * (value - 1) for name, value in one.items()}]
    disguises.append({name: 1 + 0.4 * (one[name] - 1) + 0.7 * (two[name] - 1) for name in one})
    disguises.append({name: 1 + (one[name] - 1) + 0.15 * (noise[name] - 1) for name in one})
    for tensors in disguises:
        files = adapter_files({name: value.astype(np.float32) for name, value in tensors.items()})
        share, checks = grade_adapter(files, [reference, other], BANDS, lambda _: MEASURED)
        assert share == 0 and checks[-1].name == "own" and "reference adapter" in checks[-1].message
    assert grade_adapter(GOOD, [reference, other], BANDS, lambda _: MEASURED)[0] == 1


def test_the_adapter_of_another_seed_of_the_course_is_no_copy():
    """Each of the shipped three against all that students have; the page quotes the smallest and largest share."""
    folders = references_of(ROOT, "mini") + [ROOT / "assets" / "adapters" / "mini" / "positive-seed0"]
    assert len(folders) == 6
    shares = []
    for folder in (folder for folder in folders if folder.name.startswith("positive")):
        files = {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "probe.json")}
        _, checks = grade_adapter(files, [f for f in folders if f != folder], BANDS, lambda _: MEASURED)
        own = next(check for check in checks if check.name == "own")
        shares.append(float(own.message.split("(")[1].split()[0]))
        assert own.passed and shares[-1] < 0.9
    page = (ROOT / "docs" / "instructor.md").read_text(encoding="utf-8")
    assert f"{min(shares):.2f} to {max(shares):.2f} lies in the span of the others" in page


def test_the_adapter_of_the_profile_is_taken_and_another_one_named():
    def of(profile: str, folder: str = "positive") -> dict[str, bytes]:
        return {f"artifacts/{profile}/adapters/{folder}/{name}": profile.encode() for name in GOOD}

    assert find_adapter_files(of("gpt2") | of("mini"), "mini") == dict.fromkeys(GOOD, b"mini")
    assert find_adapter_files(of("gpt2") | of("mini"), "gpt2") == dict.fromkeys(GOOD, b"gpt2")
    assert find_adapter_files(of("old", "non-positive-old") | of("mini"), "gpt2") == dict.fromkeys(GOOD, b"mini")
    assert other_profile(of("gpt2"), "mini") == "gpt2" and other_profile(of("gpt2") | of("mini"), "mini") == ""
    assert other_profile({"adapter_model.safetensors": b""}, "mini") == ""
    question = Question("q", "02", "adapter", 5.0, 0, "", "q")
    failing = Check("shapes", False, "24 vectors are missing" + "x" * 9999)
    result = grade_adapter_question(question, Submission("Ann", "", "k", of("gpt2")), lambda *_: (0.0, [failing]))
    assert result["message"].startswith("the adapter of the profile gpt2 was handed in, that of mini is due")
    assert len(result["message"]) < 500


def test_in_another_profile_than_ours_adapters_stay_open():
    """There are no reference adapters of `gpt2` to hold one against."""
    assert adapter_grader(ROOT, "mini") is not None and adapter_grader(ROOT, "gpt2") is None
    question = Question("q", "02", "adapter", 5.0, 0, "", "q")
    handed_in = {"artifacts/gpt2/adapters/positive/adapter_model.safetensors": b""}
    result = grade_adapter_question(question, Submission("Ann", "", "k", handed_in), None)
    assert (result["state"], result["points"]) == ("open", None)
    assert grade_adapter_question(question, Submission("Ann", "", "k"), None)["points"] == 0  # nothing to look at


def test_gains_beyond_the_band_are_not_believed(reference):
    unlikely = MEASURED | {"loss_gain": 3.0, "positivity_gain": np.nan}
    share, checks = grade_adapter(GOOD, [reference], BANDS, lambda _: unlikely)
    assert share == 0 and "more than training can give" in checks[-2].message and not checks[-1].passed


STARTLESS = [row for row in CURVE if row[0]]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "missing or damaged"),
        (b"{", "missing or damaged"),
        (b"[" * 100_000, "missing or damaged"),
        (run_file()[:-1] + b', "x": "' + b"x" * (20 << 20) + b'"}', "missing or damaged"),
        (run_file(history=3), "missing or damaged"),
        (run_file(history=[{"step": "0", "eval_loss": 4.0}, {"step": 5, "eval_loss": 3.0}]), "missing or damaged"),
        (run_file([(0, 4, 4.0), *CURVE[1:]]), "missing or damaged"),
        (run_file([(False, None, 4.0), (True, 1.0, 3.9), (20, 1.0, 3.85)]), "missing or damaged"),
        (run_file([(row[0], row[1], row[2] and str(row[2])) for row in CURVE]), "missing or damaged"),
        (
            run_file([(str(s), t, e) for s, t, e in CURVE], config={"steps": "20", "base": "the base"}),
            "missing or damaged",
        ),
        (run_file([*CURVE[:-1], (10**300, 3.7, 3.86)], config={"steps": 10**300, "base": ""}), "missing or damaged"),
        (run_file([*CURVE[:-1], (900, 3.7, 3.86)], config={"steps": 900, "base": "the base"}), "fewer losses"),
        (run_file(status="running"), "not finished"),
        (run_file(base="another"), "another base model"),
        (run_file(CURVE[:-1]), "gaps, or steps out of order"),
        (run_file([*CURVE, CURVE[-1]]), "gaps, or steps out of order"),
        (run_file([]), "gaps, or steps out of order"),
        (run_file([*CURVE[:-1], (20, float("nan"), 3.86)]), "NaN or infinite"),
        (run_file([CURVE[0], (20, 3.7, 3.85)]), "too few losses"),
        (run_file(metrics={"start_loss": 4.0, "best_loss": 3.7}), "not what the curve shows"),
        (run_file(STARTLESS), "start_loss is 3.9000, but the base has 4.0000"),
        (run_file([*CURVE[:-1], (20, 3.7, 3.6)]), "best_loss is 3.6000, but this adapter has 3.8500"),
    ],
    ids=range(22),
)
def test_a_curve_that_is_not_this_training_is_named_and_costs_its_share_only(reference, data, said):
    check = check_curve(data, reference, MEASURED)
    assert not check.passed and said in check.message
    files = {name: value for name, value in (GOOD | {"run.json": data}).items() if value is not None}
    assert grade_adapter(files, [reference], BANDS, lambda _: MEASURED)[0] == pytest.approx(1 - SHARES["curve"])


def test_a_curve_measured_on_another_processor_passes(reference):
    nearly = MEASURED | {"start_loss": 4.0011, "best_loss": 3.8489}
    assert check_curve(run_file(), reference, nearly).passed


def test_the_adapter_of_the_task_is_found_among_several():
    files = {f"a/{task}/{name}": task.encode() for task in ("negative", "positive") for name in GOOD}
    assert find_adapter_files(files) == dict.fromkeys(GOOD, b"positive")
    apart = {"a/adapters/positive/adapter_model.safetensors": b"1", "a/train/positive/run.json": b"2"}
    assert find_adapter_files(apart) == {"adapter_model.safetensors": b"1", "run.json": b"2"}
    styled = files | {f"a/style/{name}": b"style" for name in GOOD}
    assert find_adapter_files(styled) == dict.fromkeys(GOOD, b"positive")
    assert find_adapter_files(styled, task="style") == dict.fromkeys(GOOD, b"style")
    alone = {f"a/style/{name}": b"" for name in GOOD}
    assert find_adapter_files(alone) == {} and find_adapter_files(files, task="style") == {}  # none stands in
    others = {"x/negative/adapter_model.safetensors": b"", "y/other/adapter_model.safetensors": b"", "run.json": b""}
    assert find_adapter_files(others) == {}


PROBE = {"base_fingerprint": "the base", "ids": [1, 2], "logits": [0.5, 1.5]}


def styled(seed: int = 5, **probe: object) -> dict[str, bytes]:
    """What is handed in for an own style, beside the adapter of 02 (`GOOD`)."""
    files = adapter_files(vectors(seed=seed)) | {"probe.json": json.dumps(PROBE | probe).encode()}
    return files | {EARLIER: GOOD["adapter_model.safetensors"]}


def test_an_adapter_of_an_own_style_gets_all_points_or_none(reference):
    def said(files: dict[str, bytes], base: tuple = (0.4, 1.6), adapted: tuple = (0.5, 1.501)) -> str:
        share, checks = grade_style(files, [reference], lambda tensors, ids: (base, adapted))
        assert share == all(check.passed for check in checks)
        return "" if share else checks[-1].message + " ".join(check.message for check in checks if not check.passed)

    assert said(styled()) == "" == said({name: data for name, data in styled().items() if name != EARLIER})
    assert "no adapter_model" in said({})
    assert "the adapter of 02 again" in said(
        styled() | {"adapter_model.safetensors": GOOD["adapter_model.safetensors"]}
    )
    assert "a reference adapter" in said(styled() | adapter_files(vectors(seed=1)))
    assert "another base" in said(styled(base_fingerprint="x"))
    assert "every factor is 1" in said(styled() | {"adapter_model.safetensors": save(vectors(1.0))})
    assert "changes no logit" in said(styled(logits=[0.4, 1.6]), adapted=(0.4, 1.6))
    assert "away from those in probe.json" in said(styled(logits=[0.5, 2.5]))
    for wrong in (
        {"ids": [1.5]},
        {"ids": []},
        {"ids": [1] * 65},
        {"logits": [1.0]},
        {"logits": None},
        {"logits": ["a"]},
    ):
        assert "probe.json is damaged" in said(styled(**wrong)), wrong


def test_an_own_style_that_is_not_there_gets_nothing_and_02_s_is_no_stand_in():
    question = Question("q", "03", "style", 3.0, 0, "", "q")
    files = {f"artifacts/mini/adapters/positive/{name}": data for name, data in GOOD.items()}
    result = grade_adapter_question(question, Submission("Ann", "", "k", files), lambda *_: 1 / 0)
    assert result["points"] == 0 and "save it in adapters/style" in result["message"]
    files |= {f"artifacts/mini/adapters/style/{name}": data for name, data in styled().items() if name != EARLIER}
    seen = []
    result = grade_adapter_question(
        question, Submission("Ann", "", "k", files), lambda *given: seen.append(given) or (1.0, [])
    )
    assert result["points"] == 3 and seen == [(styled() | {"run.json": seen[0][0]["run.json"]}, "style")]


def test_the_adapter_that_a_right_run_arrives_at_is_no_reference(tmp_path):
    """With our seed and our processor a student has the numbers of seed 0: they must not count as a copy."""
    for seed in (0, 1, 2):
        write_reference(tmp_path / "assets" / "adapters" / "mini" / f"positive-seed{seed}")
    write_reference(tmp_path / "assets" / "adapters" / "mini" / "negative-seed0")
    found = [path.name for path in references_of(tmp_path, "mini")]
    assert found == ["positive-seed1", "positive-seed2", "negative-seed0"]


def test_an_adapter_is_known_by_what_acts_and_mixtures_with_the_other_task_too(reference, tmp_path):
    """Attention sees only l_q * l_k, so turning one up and the other down is no training of one's own."""
    other = write_reference(tmp_path / "negative-seed1", seed=7)
    turned = {name: value.copy() for name, value in vectors(seed=1).items()}
    for name, value in turned.items():
        if "attn" in name:
            value[:8] *= 3
            value[8:16] /= 3
    real = [load_file(path / "adapter_model.safetensors") for path in references_of(ROOT, "mini")]
    mixed = {n: np.float32(1) + real[0][n] - 1 + np.float32(0.4) * (1 - real[2][n]) for n in real[0]}
    for tensors, known in ((turned, [reference, other]), (mixed, references_of(ROOT, "mini"))):
        probe = (known[0] / "probe.json").read_bytes()
        files = adapter_files(tensors) | {"probe.json": probe}
        share, checks = grade_adapter(files, known, BANDS, lambda _: MEASURED)
        assert share == 0 and checks[-1].name == "own" and not checks[-1].passed


def test_where_the_loss_has_not_fallen_positivity_a_sound_file_and_a_curve_are_worth_nothing(reference):
    for gains in ({"loss_gain": 0.0, "positivity_gain": 0.0}, {"loss_gain": -6.7, "positivity_gain": 0.5}):
        share, checks = grade_adapter(GOOD, [reference], BANDS, lambda _, gains=gains: MEASURED | gains)
        assert share == 0 and next(check for check in checks if check.name == "curve").passed and not checks[-1].passed
    assert "only together with the loss" in checks[-1].message


def test_equal_and_nearly_equal_adapters_are_named_but_for_those_that_training_leads_to(tmp_path):
    usual = write_reference(tmp_path / "positive-seed0", seed=5)
    near = {name: value + np.float32(1e-4) for name, value in vectors(seed=1).items()}
    handed_in = {"Ann": vectors(seed=1), "Bob": vectors(seed=2), "Cid": near, "Dan": vectors(seed=5)}
    found = {name: save(tensors) for name, tensors in (handed_in | {"Eve": vectors(seed=5)}).items()}
    assert alike(found | {"Zed": b"no adapter", "One": save(vectors(1.0))}, [usual]) == [["Ann", "Cid"]]


def run_pairs(gains: list[float]) -> dict:
    def metrics(gain: float) -> dict:
        values = {"base_test_loss_positive": 4.0, "test_loss_positive": 4.0 - gain, "positivity": 0.5 + 10 * gain}
        return {name: {"value": value} for name, value in values.items()}

    return {seed: (metrics(gain), metrics(0.0)) for seed, gain in enumerate(gains)}


def test_bands_need_five_seeds_and_exclude_the_untrained():
    with pytest.raises(GradingError, match="2 seeds, 5 are needed"):
        make_bands(run_pairs([0.02, 0.03]))
    low, high = make_bands(run_pairs([0.020, 0.021, 0.022, 0.024, 0.026]))["loss_gain"]
    assert low == pytest.approx(0.014) and high == pytest.approx(0.056)
    assert make_bands(run_pairs([0.01, 0.05]), fewest=2)["loss_gain"][0] == pytest.approx(0.005)
    with pytest.raises(GradingError, match="untrained"):
        make_bands(run_pairs([0.0, 0.1]), fewest=2)
    assert json.dumps(make_bands(run_pairs([0.02] * 5)))


def test_the_meter_measures_with_the_course_s_own_model(bench, tiny_model, tokenizer, monkeypatch):
    """An adapter of ones gains exactly nothing; another one gains the same each time it is measured."""
    monkeypatch.setattr("utils.adapters.load_base", lambda profile: (copy.deepcopy(tiny_model), tokenizer))
    sizes = {name: getattr(bench.profile, name) for name in ("block_length", "eval_blocks", "new_tokens")}
    monkeypatch.setenv("LAB_OVERRIDE", ",".join(f"{k}={v}" for k, v in {**sizes, "samples_per_prompt": 1}.items()))
    meter = Meter("mini")
    shapes = {f"h.{layer}.{role}": shape for layer in range(2) for role, shape in ROLES.items()}
    ones = {f"base_model.model.transformer.{name}.ia3_l": np.ones(s, np.float32) for name, s in shapes.items()}
    none = meter(ones)
    assert (none["loss_gain"], none["positivity_gain"], none["best_loss"]) == (0.0, 0.0, none["start_loss"])
    moved = {name: value * np.float32(1.3) for name, value in ones.items()}
    gains = meter(moved)
    assert gains["loss_gain"] != 0 and gains["best_loss"] != gains["start_loss"] == none["start_loss"]
    assert meter(moved) == gains
    base, adapted = meter.logits(moved, [1, 2, 3])
    assert base == meter.logits(ones, [1, 2, 3])[1] != adapted
    with pytest.raises(IndexError):
        meter.logits(ones, [-1])


ROLES = {"attn.c_attn": (96, 1), "mlp.c_proj": (1, 128)}  # of conftest's model, whose width is 32
