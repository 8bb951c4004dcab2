"""Runs of several methods that may be compared: made in one way, loaded with a check, averaged over seeds.

`measure_run` trains one method and measures it, the same for `python -m study` and for 04 where no reference run fits;
`comparison_runs` hands 04 its records and says whose they are; `summarise` averages them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from datasets import Dataset

from utils.adapters import METHODS, attach, base_fingerprint, load_base
from utils.config import ASSETS, PROFILES, Profile, artifacts_dir
from utils.data import PROMPTS, load_reviews, review_blocks
from utils.evaluation import evaluate_samples, held_out_loss
from utils.generation import generate
from utils.gpu import fast_bf16
from utils.judges import load_judges
from utils.metrics import Estimate, mean_interval, middle
from utils.runs import RunError, RunRecord, environment, load_runs
from utils.saving import save_adapter
from utils.session import reuse_freed_memory
from utils.sizes import count_parameters, estimate_memory, require_memory
from utils.training import train


class Bench:
    """What all runs of a profile share, loaded once: reviews, the clean base, its fingerprint, the judges."""

    def __init__(self, profile: Profile) -> None:
        reuse_freed_memory()
        self.profile = profile
        self.reviews = load_reviews(profile)
        self.base, self.tokenizer = load_base(profile)
        self.fingerprint = base_fingerprint(self.base)
        self.judges = load_judges(profile, self.reviews)

    def blocks(self, part: str, label: str, **options: int) -> Dataset:
        """Packed blocks of one label in one part; options as for `review_blocks`."""
        return review_blocks(self.reviews[part], label, self.tokenizer, self.profile.block_length, **options)


def measure_run(
    bench: Bench, task: str, method: str, seed: int, folder: Path | str, adapter_folder: Path | str | None = None
) -> RunRecord:
    """Train `method` on reviews of `task` and measure it. Validation chooses the step, test reviews are only reported.

    Checkpoints and the bare training record go to `folder`; an interrupted training there is taken up again. An
    (IA)³ adapter is saved to `adapter_folder` where one is given. Raises GpuError where it would not fit in memory.
    """
    profile = bench.profile
    model = attach(load_base(profile)[0], method, seed)
    if method == "base":
        versions, hardware = environment()
        counts = {"trainable": 0, "total": count_parameters(model).total}
        record = RunRecord(
            status="finished", method="base", task=task, profile=profile.name, config_id=profile.config_id(),
            config={"base": bench.fingerprint}, seed=seed, counts=counts, versions=versions, hardware=hardware,
        )  # fmt: skip
        return measured(bench, model, record)
    require_memory(estimate_memory(model, method, profile.batch_size, profile.block_length))
    record = measured(bench, model, train_one(bench, model, task, method, seed, folder))
    if method == "ia3" and adapter_folder is not None:
        save_adapter(model, bench.tokenizer, adapter_folder, config_id=profile.config_id())
    return record


def train_one(
    bench: Bench, model: object, task: str, method: str, seed: int, folder: Path | str,
    blocks: Dataset | None = None, rate: float | None = None,
) -> RunRecord:  # fmt: skip
    """The one way a compared run is trained: blocks, validation blocks, seed; blocks and `rate` None: the profile's."""
    profile = replace(bench.profile, seed=seed)
    return train(
        model,
        blocks or bench.blocks("adapter", task, reviews=profile.train_reviews),
        profile,
        method=method,
        task=task,
        eval_blocks=bench.blocks("validation", task, limit=profile.eval_blocks),
        folder=folder,
        seed=seed,
        learning_rate=rate,
    )


def measured(bench: Bench, model: object, record: RunRecord) -> RunRecord:
    """`record` with the loss on test reviews of both labels, the base's beside it, and every score of its text."""
    profile, found = bench.profile, {}
    for label in ("positive", "negative"):
        test = bench.blocks("test", label, limit=profile.eval_blocks)
        found[f"test_loss_{label}"] = held_out_loss(model, test)
        found[f"base_test_loss_{label}"] = held_out_loss(bench.base, test)
    samples = generate(model, bench.tokenizer, PROMPTS, seed=record.seed, **profile.sampling)
    found |= evaluate_samples(samples, bench.judges, bench.base, bench.tokenizer)
    record.config |= {"bf16": fast_bf16(model.device), "prompts": len(PROMPTS), **profile.sampling}
    record.metrics |= {name: estimate.to_dict() for name, estimate in found.items()}
    return record


def sweep_run(bench: Bench, method: str, rate: float, seed: int, folder: Path | str) -> RunRecord:
    """Train `method` at the learning rate `rate` as `measure_run` does; validation only, no test review is read."""
    model = attach(load_base(bench.profile)[0], method, seed)
    return train_one(bench, model, "positive", method, seed, folder, rate=rate)


def sweep_losses(records: Iterable[RunRecord]) -> dict[str, dict[float, float]]:
    """Lowest validation loss by method and learning rate, a mean over seeds; infinite where a run diverged."""
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        loss = record.metrics["best_loss"] if record.status == "finished" else math.inf
        found.setdefault(record.method, {}).setdefault(record.config["learning_rate"], []).append(loss)
    return {m: {rate: fmean(losses[rate]) for rate in sorted(losses)} for m, losses in found.items()}


def chosen_rates(records: Iterable[RunRecord]) -> dict[str, float]:
    """For each method the rate with the lowest validation loss."""
    return {method: min(losses, key=losses.get) for method, losses in sweep_losses(records).items()}


def usable_runs(
    folder: Path, profile: Profile, fingerprint: str, refuse: Callable[..., str | None] | None = None
) -> tuple[list[RunRecord], list[str]]:
    """The records in `folder` that fit this profile *and* this base model, and why each other one was left out.

    `refuse(record, profile, fingerprint)` gives the reason, as `misfit` does where nothing else is said.
    """
    if not folder.is_dir():
        return [], [f"no run records for profile {profile.name}"]
    found, excluded = load_runs(folder, config_id=profile.config_id())
    usable = []
    for record in found:
        if reason := (refuse or misfit)(record, profile, fingerprint):
            excluded.append(f"{record.task}-{record.method}-seed{record.seed}: {reason}")
        else:
            usable.append(record)
    return usable, excluded


def misfit(record: RunRecord, profile: Profile, fingerprint: str) -> str | None:
    """Why `record` may not stand beside today's runs of `profile` on the base `fingerprint`; None where it may."""
    if reason := stranger(record, profile, fingerprint):
        return reason
    rate = profile.learning_rates.get(record.method)
    if record.config.get("learning_rate") != rate:
        return f"trained at a rate of {record.config.get('learning_rate')}, not {rate}"
    sampled = {key: record.config.get(key) for key in profile.sampling}
    if record.status == "finished" and sampled != profile.sampling:
        return "its text was sampled in another way"
    return None


def stranger(record: RunRecord, profile: Profile, fingerprint: str) -> str | None:
    """Why `record` is of another experiment than `profile` on the base `fingerprint`; None where it is of this one."""
    if record.config_id != profile.config_id():
        return f"another configuration ({record.config_id}, not {profile.config_id()})"
    return "made with another base model" if record.config.get("base") != fingerprint else None


def comparison_runs(
    profile: Profile, fingerprint: str | None = None, methods: Sequence[str] = tuple(METHODS), assets: Path = ASSETS
) -> tuple[list[RunRecord], str, list[str]]:
    """Runs of all `methods` on positive reviews: (records in the order of `methods`, whose they are, what is left out).

    They fit the base of this `fingerprint`; None: the profile's base as it is on this computer.

    Reference runs where there is at least one that fits for *every* method. Else one seed of each method is trained
    here, the same way (minutes; kept under `artifacts_dir(profile)/compare`, so that a second call only loads them).
    """
    fingerprint = fingerprint or base_fingerprint(load_base(profile)[0])
    records, excluded = usable_runs(assets / "runs" / profile.name, profile, fingerprint)
    records, source = [record for record in records if record.task == "positive"], "reference run"
    if missing := [method for method in methods if method not in {record.method for record in records}]:
        excluded.append(f"no reference run that fits for: {', '.join(missing)}")
        folder, bench, source = artifacts_dir(profile) / "compare", None, "trained on this computer, one seed"
        records = [run for run in usable_runs(folder / "records", profile, fingerprint)[0] if run.seed == profile.seed]
        for method in methods:
            if method in {record.method for record in records}:
                continue
            print(f"no record for {method}: making one")
            bench, name = bench or Bench(profile), f"positive-{method}-seed{profile.seed}"
            records.append(measure_run(bench, "positive", method, profile.seed, folder / name))
            records[-1].save(folder / "records" / f"{name}.json")
    return sorted((r for r in records if r.method in methods), key=lambda r: methods.index(r.method)), source, excluded


def repeat_run(profile: Profile, method: str) -> RunRecord:
    """The run of `method` with the profile's seed on this computer: 02's where it is (IA)³'s, else trained here."""
    work = artifacts_dir(profile)
    if method == "ia3":
        try:
            return RunRecord.load(work / "train" / "positive" / "run.json")
        except RunError:
            print("no run of 02 here: training (IA)³")
    model = attach(load_base(profile)[0], method, profile.seed)
    return train_one(Bench(profile), model, "positive", method, profile.seed, work / "live" / method)


def study_runs(profile: Profile, study: str, assets: Path = ASSETS) -> tuple[list[RunRecord], str, list[str]]:
    """Reference runs beside the comparison: (records, the profile they are of, what is left out and why).

    `study` is "sweep" (every method at several rates) or "ablations". Where `profile` has none that fit, the embedded
    `mini` profile's are given. What is trained at other rates than the profile's counts in a sweep only.
    """
    refuse = stranger if study == "sweep" else misfit
    records, excluded = [], []
    for candidate in dict.fromkeys((profile, PROFILES["mini"])):  # once where they are the same
        folder = assets / "runs" / candidate.name / study
        if folder.is_dir():
            fingerprint = base_fingerprint(load_base(candidate)[0])
            records, left_out = usable_runs(folder, candidate, fingerprint, refuse)
            excluded += left_out
        if records:
            break
    return records, candidate.name, excluded or ([] if records else [f"no records of the study {study}"])


def summarise(records: Iterable[RunRecord], metrics: Sequence[str], by: str = "method") -> list[dict[str, object]]:
    """One row a method, in order of first appearance: `method`, each metric's mean over seeds with its 95 % interval.

    `by` may name an entry of the records' configuration instead ("variant"). With one seed only, the run's own
    interval. A metric that no run of a group has is None.
    """
    groups: dict[object, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.method if by == "method" else record.config[by], []).append(record)
    return [
        {by: group} | {name: _over_seeds([run.value(name) for run in runs]) for name in metrics}
        for group, runs in groups.items()
    ]


def _over_seeds(values: list) -> object:
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return values[0] if values else None
    if len(set(values)) == 1 and not isinstance(values[0], Estimate):
        return values[0]  # a count: the same for every seed
    return mean_interval([middle(value) for value in values])


def paired_difference(records: Sequence[RunRecord], method: str, other: str, metric: str) -> Estimate:
    """`method` minus `other`, seed by seed (equal seeds saw the same blocks in the same order), with its interval.

    Raises ValueError where no seed has both.
    """
    values: dict[str, dict[int, float]] = {method: {}, other: {}}
    for record in records:
        if record.method in values and (value := record.value(metric)) is not None:
            values[record.method][record.seed] = middle(value)
    common = sorted(values[method].keys() & values[other].keys())
    return mean_interval([values[method][seed] - values[other][seed] for seed in common])
