"""The optional labs' run records: what one run is, where its record lies, and which records fit today's recipe.

For: `LabBench` (what all runs of a recipe share), `measure_lab` (one run, as `python -m extensions` makes it),
`reference_runs` (what a notebook reads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor
from transformers import PreTrainedModel

from extensions.encoding import encode, make_collator
from extensions.models import load_model
from extensions.recipes import BERT_DOCUMENT, BLOOM_BASE, RECIPES, Recipe
from extensions.scoring import accuracy, commonest, f1, majority, task_scores
from extensions.tasks import load_task, with_test
from extensions.training import attach_recipe, train_recipe
from utils.adapters import base_fingerprint
from utils.config import ASSETS, artifacts_dir
from utils.runs import RunRecord, digest, environment, load_runs, read_json, write_atomic, write_json
from utils.sizes import count_parameters

METHOD_NAMES = {
    "ia3": "(IA)³",
    "ia3_document": "(IA)³, the document's places",
    "ia3_frozen": "(IA)³, head frozen",
    "head": "head only",
    "full": "full fine-tuning",
    "base": "nothing trained",
}
BERT_ONLY = ("ia3_document", "ia3_frozen", "head")


def lab_folder(recipe: Recipe, assets: Path = ASSETS) -> Path:
    """`assets/runs/<recipe.name>`, with the data's name behind it where they are not the recipe's own."""
    own = recipe.data == RECIPES[recipe.lab][recipe.size].data
    return assets / "runs" / (recipe.name if own else f"{recipe.name}-{recipe.data_name}")


def attach_method(model: PreTrainedModel, recipe: Recipe, method: str) -> PreTrainedModel | PeftModel:
    """As `attach_recipe`; also document 001's places, and the paper's without a task type, which freezes the head."""
    if method == "ia3_document":
        return attach_recipe(model, replace(recipe, **BERT_DOCUMENT))
    if method == "ia3_frozen":
        return get_peft_model(
            model,
            IA3Config(target_modules=recipe.target_modules, feedforward_modules=list(recipe.feedforward_modules)),
        )
    return attach_recipe(model, recipe, method)


@dataclass
class LabBench:
    """What all runs of a recipe share, loaded once: rows and examples by part, the tokenizer, the base's fingerprint.

    The recipe's seed decides the rows, so that every run sees the same ones; a run's own seed decides a new head, the
    order of the examples and dropout.
    """

    profile: Recipe  # by the name that it has in `comparison.Bench`

    def __post_init__(self) -> None:
        self.rows = with_test(load_task(self.profile))
        model, self.tokenizer, self.description = load_model(self.profile)
        self.fingerprint = base_fingerprint(model)
        self.examples = {part: encode(self.profile, rows, self.tokenizer) for part, rows in self.rows.items()}
        self.learned: dict[str, Tensor] = {}

    def fresh(self, seed: int) -> PreTrainedModel:
        """A model that nothing was attached to; a new head is drawn from `seed`.

        One that knows nothing, where the data have a part "base" for that, first learns it: once, kept in `artifacts/`.
        """
        if "base" not in self.rows:
            return load_model(replace(self.profile, seed=seed))[0]
        model = load_model(self.profile)[0]
        if not self.learned:
            self.learned = self._learn_base(model)
        model.load_state_dict(self.learned)
        return model.eval()

    def _learn_base(self, model: PreTrainedModel) -> dict[str, Tensor]:
        recipe, folder = replace(self.profile, **BLOOM_BASE), artifacts_dir(self.profile) / "labs" / "base"
        state = folder / "model.safetensors"
        made_by = {"config_id": recipe.config_id(), "base": self.fingerprint, **recipe.learning_rates}
        if state.is_file() and read_json(folder / "made_by.json") == made_by | {"sha256": digest(state)}:
            return load_file(state)
        train_recipe(
            attach_recipe(model, recipe, "full"), self.examples["base"], recipe, method="full",
            eval_blocks=self.examples["validation"], folder=folder, seed=recipe.seed,
            collator=make_collator(recipe, self.tokenizer), task="base",
        )  # fmt: skip
        learned = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # tied weights become two
        if PartialState().is_main_process:
            write_atomic(state, to_safetensors(learned))
            write_json(folder / "made_by.json", made_by | {"sha256": digest(state)})
        return learned


def train_lab(
    bench: LabBench, method: str, seed: int, folder: Path | str, *, rate: float | None = None,
    recipe: Recipe | None = None, examples: Dataset | None = None, checkpointing: bool = False,
) -> tuple[PreTrainedModel | PeftModel, RunRecord]:  # fmt: skip
    """The model that `method` trained and the record of that; validation chose its step, no test row was read.

    `recipe` and `examples` are the bench's unless given (a shorter run for a sweep); so is the rate of `method`.
    `checkpointing` as in `train`.
    """
    recipe = recipe or bench.profile
    model = attach_method(bench.fresh(seed), recipe, method)
    record = train_recipe(
        model,
        examples or bench.examples["train"],
        recipe,
        method=method,
        task=recipe.lab,
        eval_blocks=bench.examples["validation"],
        folder=folder,
        seed=seed,
        learning_rate=rate or learning_rate(recipe, method),
        collator=make_collator(recipe, bench.tokenizer),
        checkpointing=checkpointing,
    )
    record.config["base"] = bench.fingerprint  # of a model that first learned its base part, what it began as
    return model, record


def learning_rate(recipe: Recipe, method: str) -> float:
    """The recipe's rate of `method`; a variant of (IA)³ has (IA)³'s."""
    return recipe.learning_rates.get(method, recipe.learning_rates["ia3"])


def measure_lab(bench: LabBench, method: str, seed: int, folder: Path | str, *, rate: float | None = None) -> RunRecord:
    """Train `method`, score it on the test rows. "base" trains nothing; of a classifier it is the commonest class."""
    recipe, test = bench.profile, bench.rows["test"]
    if method == "base":
        record, scores = _untrained(bench, seed)
    else:
        model, record = train_lab(bench, method, seed, folder, rate=rate)
        scores = task_scores(model, recipe, test, bench.examples["test"], bench.tokenizer)
    if column := {"SEQ_CLS": "label", "SEQ_2_SEQ_LM": "target"}.get(recipe.task_type):
        scores["majority"] = majority(bench.rows["train"][column], test[column])
    record.config |= {"test_examples": len(test), "data": recipe.data_name, "model": bench.description}
    record.metrics |= {name: estimate.to_dict() for name, estimate in scores.items()}
    return record


def _untrained(bench: LabBench, seed: int) -> tuple[RunRecord, dict]:
    """The base's record, and its scores: those of the commonest class where its head is only a random one."""
    recipe, test = bench.profile, bench.rows["test"]
    model = bench.fresh(seed)
    versions, hardware = environment()
    record = RunRecord(
        status="finished", method="base", task=recipe.lab, profile=recipe.name, config_id=recipe.config_id(),
        config={"base": bench.fingerprint}, seed=seed, versions=versions, hardware=hardware,
        counts={"trainable": 0, "total": count_parameters(model).total},
    )  # fmt: skip
    if recipe.task_type != "SEQ_CLS":
        return record, task_scores(model, recipe, test, bench.examples["test"], bench.tokenizer)
    guesses = [commonest(bench.rows["train"]["label"])] * len(test)
    return record, {"accuracy": accuracy(guesses, test["label"]), "f1": f1(guesses, test["label"])}


def reference_runs(recipe: Recipe, assets: Path = ASSETS) -> tuple[list[RunRecord], list[str]]:
    """The records of this recipe by method and seed, and why others are left out; no record at all is no error."""
    folder, order = lab_folder(recipe, assets), list(METHOD_NAMES)
    found, excluded = load_runs(folder, recipe.config_id()) if folder.is_dir() else ([], [])
    return sorted(found, key=lambda r: (order.index(r.method), r.seed)), excluded


def methods_of(recipe: Recipe, methods: Sequence[str]) -> list[str]:
    """Those of `methods` that the recipe's model has: a head alone, and the variants of document 001, are BERT's."""
    return [m for m in methods if recipe.task_type == "SEQ_CLS" or m not in BERT_ONLY]
