"""`python -m extensions` and extensions/runs.py: one run a record, resumed, never mixed; rates chosen on validation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from labs import SHAPES, made_tokenizer
from transformers import BertForSequenceClassification

from extensions import runs as lab_runs
from extensions.models import build_model
from extensions.recipes import BLOOM_BASE, RECIPES, with_data
from extensions.runs import LabBench, attach_method, lab_folder, measure_lab, methods_of
from extensions.scoring import label_loss, majority
from extensions.tasks import with_test
from study.comparison import chosen_rates
from utils.config import ASSETS
from utils.runs import RunRecord
from utils.sizes import count_parameters

LABS = {
    "bert-paraphrase": [{"sentence1": "a film", "sentence2": f"film {i}", "label": i % 2} for i in range(12)],
    "mt0-sentiment": [
        {"text": f"a film {i}", "target": "negative" if i % 2 else "positive"} for i in range(12)
    ],
    "bloom-chinese-instructions": [
        {"instruction": "计算下面的加法。", "input": f"{i}+1", "output": str(i + 1)} for i in range(12)
    ],
}  # fmt: skip
PARTS = ("train", "validation", "test")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """`python -m extensions`, writing into an empty folder."""
    import extensions.__main__ as module

    monkeypatch.setattr(module, "ASSETS", tmp_path / "assets")
    return module


@pytest.fixture(params=LABS)
def lab(request, tmp_path, monkeypatch):
    """The name of a lab whose model is tiny, with twelve rows a part, and one epoch to train."""
    name = request.param
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    monkeypatch.setenv("LAB_PROFILE", "mini")
    monkeypatch.setenv("LAB_OVERRIDE", "epochs=1,accumulation=1,batch_size=4")
    monkeypatch.delenv("LAB_DATA_DIR", raising=False)
    parts = (*PARTS, "base") if name.startswith("bloom") else PARTS
    rows = DatasetDict({part: Dataset.from_list(LABS[name]) for part in parts})
    tokenizer = made_tokenizer(RECIPES[name]["mini"].model_type)

    def load(recipe):
        shape = SHAPES[name] | {"vocab_size": len(tokenizer)}
        return build_model(replace(recipe, shape=shape)), tokenizer, "a tiny model"

    monkeypatch.setattr(lab_runs, "load_model", load)
    monkeypatch.setattr(lab_runs, "load_task", lambda recipe: rows)
    monkeypatch.setattr(lab_runs, "BLOOM_BASE", BLOOM_BASE | {"epochs": 1, "batch_size": 4})
    return name


def test_every_run_is_a_record_with_scores_and_is_made_once(lab, script, monkeypatch, capsys):
    recipe = script.setup_lab(lab)
    methods = methods_of(recipe, ["ia3", "head", "base"])
    options = ["--lab", lab, "--methods", "ia3", "head", "base", "--seeds", "0", "1", "--only", "runs"]
    script.main(options)
    folder = lab_folder(recipe, script.ASSETS)
    assert folder.name == f"{lab}-mini"
    assert sorted(p.stem for p in folder.glob("*.json")) == sorted(f"{m}-seed{s}" for m in methods for s in (0, 1))
    score = "accuracy" if lab.startswith("bert") else "exact_match"
    for path in folder.glob("*.json"):
        record = RunRecord.load(path)
        assert record.status == "finished" and record.profile == recipe.name and record.config["test_examples"] == 12
        assert 0 <= record.value(score).low <= record.value(score).value <= record.value(score).high <= 1
    assert ("majority" in record.metrics) == (not lab.startswith("bloom"))
    assert f"0 of {2 * len(methods)} records" in capsys.readouterr().out
    monkeypatch.setattr(script, "measure_lab", lambda *_, **__: pytest.fail("made again"))
    script.main(options)
    assert f"{2 * len(methods)} of {2 * len(methods)} records there already\n" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_OVERRIDE", "epochs=2,accumulation=1,batch_size=4")
        with pytest.raises(SystemExit, match="another configuration.*delete it"):
            script.main(options)


@pytest.mark.parametrize("lab", ["bert-paraphrase"], indirect=True)
@pytest.mark.slow
def test_the_sweep_decides_the_rate_of_the_runs_and_reads_no_test_row(lab, script, monkeypatch, capsys):
    monkeypatch.setattr(script, "SWEEP_EXAMPLES", 8)
    bench = LabBench(script.setup_lab(lab))
    bench.rows.pop("test")
    examples = bench.examples.pop("test")
    script.run_sweep(bench, ["ia3", "base"])
    folder = lab_folder(bench.profile, script.ASSETS)
    rates = script.swept_rates(folder, script.sweep_recipe(bench.profile), bench.fingerprint)
    assert list(rates) == ["ia3"]
    swept = rates["ia3"]
    assert f"ia3        {swept:g}" in capsys.readouterr().out
    sweep = [RunRecord.load(path) for path in (folder / "sweep").glob("*.json")]
    assert len(sweep) >= 2 and {record.config["train_examples"] for record in sweep} == {8}
    assert swept == min(sweep, key=lambda record: record.metrics["best_loss"]).config["learning_rate"]
    bench.rows["test"], bench.examples["test"] = bench.rows["validation"], examples
    script.run_all(bench, ["ia3"], [0])
    path = folder / "ia3-seed0.json"
    record = RunRecord.load(path)
    assert record.config["learning_rate"] == swept and record.config["train_examples"] == 12
    record.config["learning_rate"] = 1.0
    record.save(path)
    with pytest.raises(SystemExit, match="trained at a rate of 1, and the sweep chose"):
        script.run_all(bench, ["ia3"], [0])


@pytest.mark.parametrize("lab", ["bert-paraphrase"], indirect=True)
def test_records_of_another_configuration_are_left_out_by_name(lab, script):
    bench = LabBench(script.setup_lab(lab))
    script.run_all(bench, ["ia3", "head", "base"], [0])
    found, excluded = lab_runs.reference_runs(bench.profile, script.ASSETS)
    assert [record.method for record in found] == ["ia3", "head", "base"] and excluded == []
    found, excluded = lab_runs.reference_runs(replace(bench.profile, max_length=7), script.ASSETS)
    assert found == [] and len(excluded) == 3 and "another configuration" in excluded[0]
    assert lab_runs.reference_runs(replace(bench.profile, size="full"), script.ASSETS) == ([], [])
    assert RunRecord.load(lab_folder(bench.profile, script.ASSETS) / "base-seed0.json").value("f1").value == 0


@pytest.mark.parametrize("lab", ["bloom-chinese-instructions"], indirect=True)
def test_a_model_that_knows_nothing_learns_its_base_part_once(lab, script, monkeypatch):
    bench = LabBench(script.setup_lab(lab))
    first = bench.fresh(0).state_dict()
    again = LabBench(bench.profile)
    monkeypatch.setattr(lab_runs, "train_recipe", None)
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.fresh(1).state_dict().items())
    begun = lab_runs.load_model(bench.profile)[0].state_dict()
    assert any(not torch.equal(tensor, first[name]) for name, tensor in begun.items())


def test_data_that_are_not_the_recipes_own_have_a_folder_of_their_own(tmp_path):
    recipe = RECIPES["bert-paraphrase"]["mini"]
    (tmp_path / "mrpc").mkdir()
    assert lab_folder(recipe, tmp_path).name == "bert-paraphrase-mini"
    assert lab_folder(with_data(recipe, tmp_path / "mrpc"), tmp_path).name == "bert-paraphrase-mini-mrpc"


@pytest.mark.parametrize(("method", "count"), [("ia3", 56_834), ("ia3_document", 29_186), ("ia3_frozen", 55_296)])
def test_variants_of_bert_are_counted(method, count):
    model = build_model(RECIPES["bert-paraphrase"]["full"], "meta")
    attached = attach_method(model, RECIPES["bert-paraphrase"]["full"], method)
    assert count_parameters(attached).trainable == count
    assert isinstance(attached.get_base_model(), BertForSequenceClassification)


def test_a_missing_test_part_is_the_validation_part_and_the_majority_is_that_of_training():
    rows = DatasetDict(train=Dataset.from_dict({"x": range(20)}), validation=Dataset.from_dict({"x": range(90, 95)}))
    parts = with_test(rows)
    assert {name: list(part["x"]) for name, part in parts.items()} == {
        "train": list(range(18)), "validation": [18, 19], "test": list(range(90, 95)),
    }  # fmt: skip
    assert with_test(parts) is parts
    assert majority([1, 1, 0], [0, 0, 0, 1]).value == 0.25


def test_the_test_loss_is_the_loss_that_training_reports(lab, tmp_path):
    recipe = replace(RECIPES[lab]["mini"], epochs=1, accumulation=1, batch_size=5)
    bench = LabBench(recipe)
    record = measure_lab(bench, "ia3", 0, tmp_path)
    assert record.value("label_loss").value == pytest.approx(record.metrics["best_loss"], abs=2e-2)  # bf16 on some
    model = bench.fresh(0)
    loss = label_loss(model, recipe, bench.examples["test"], bench.tokenizer, batch_size=5)
    assert loss.value == pytest.approx(label_loss(model, recipe, bench.examples["test"], bench.tokenizer).value, 1e-4)


@pytest.mark.parametrize("lab", RECIPES)
def test_the_small_recipes_rates_are_those_that_their_sweep_chose(lab, script) -> None:
    recipe = RECIPES[lab]["mini"]
    records = [RunRecord.load(path) for path in sorted((lab_folder(recipe, ASSETS) / "sweep").glob("*.json"))]
    rates = chosen_rates(records)
    assert "ia3" in rates and rates == {method: recipe.learning_rates[method] for method in rates}
    assert {record.config_id for record in records} == {script.sweep_recipe(recipe).config_id()}
