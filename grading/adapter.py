"""A trained (IA)³ adapter and the loss curve of its training, graded from their numbers alone.

The tensors are read by the `safetensors` library, never by pickle; the student's `adapter_config.json` is not used; all
losses are measured here, on our base model and our held-out reviews.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from grading import GradingError
from grading.cells import printable

WEIGHTS, PROBE, RUN = "adapter_model.safetensors", "probe.json", "run.json"
EARLIER = "the adapter of 02"  # among the files of a style: the tensors' file that it must not repeat
GAINS = ("loss_gain", "positivity_gain")
SHARES = {"sound": 0.2, "curve": 0.2, "loss_gain": 0.3, "positivity_gain": 0.3}  # of the points
FEWEST_SEEDS = 5
LEAST_CHANGE = 1e-3  # an adapter none of whose factors moved this far from 1 has not been trained
MOST_CHANGE = 10.0
MOST_BYTES = 16 << 20
MOST_RUN = 2 << 20  # bytes of the record of a run, or of a probe
MOST_IDS = 64  # tokens of a probe
PROBE_TOLERANCE = 1e-2  # logits, as in `utils.saving`: processors differ by 1e-5, adapters by more than 0.1
MOST_ALIKE = 0.97  # of another seed's adapter about 0.7 lies in the span of the references
FEWEST_EVALUATIONS = 3  # of held-out reviews that make a curve
LONGEST_INTERVAL = 10  # steps from one recorded loss to the next, at most
MOST_STEPS = 1_000_000
LONGEST_MESSAGE = 300
CURVE_TOLERANCE = 2e-3  # nats per token between a recorded loss and ours: processors round differently

Measure = Callable[[dict[str, np.ndarray]], Mapping[str, float]]
Logits = Callable[[dict[str, np.ndarray], list[int]], tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and in words what was found."""

    name: str
    passed: bool
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message[:LONGEST_MESSAGE]))


def find_adapter_files(files: Mapping[str, bytes], profile: str = "mini", task: str = "positive") -> dict[str, bytes]:
    """The adapter for `task` among a student's files and the record of its run, by file name; empty without adapter.

    Of several the one in a folder of this `profile`, and of this very name, goes first. "style" is the task of the
    student's own adapter, which is never taken for another.
    """
    found = {}
    for name, others in ((WEIGHTS, (WEIGHTS, PROBE)), (RUN, (RUN,))):
        folders = sorted(PurePosixPath(path).parent for path in files if PurePosixPath(path).name == name)
        folders = [folder for folder in folders if ("style" in folder.name) == (task == "style")]
        folders = [folder for folder in folders if task in folder.name or len(folders) == 1]
        ranked = sorted(folders, key=lambda folder: (profile not in folder.parts, folder.name != task))
        found |= {other: files[str(f / other)] for f in ranked[:1] for other in others if str(f / other) in files}
    return found if WEIGHTS in found else {}


def other_profile(files: Mapping[str, bytes], profile: str) -> str:
    """The profile whose adapter was handed in where none of `profile` was; else nothing."""
    parts = [PurePosixPath(path).parts for path in files if PurePosixPath(path).name == WEIGHTS]
    given = [names[names.index("artifacts") + 1] for names in parts if "artifacts" in names[:-2]]
    return given[0] if given and profile not in given else ""


def grade_adapter(
    files: Mapping[str, bytes], references: Sequence[Path], bands: Mapping[str, Sequence[float]], measure: Measure
) -> tuple[float, list[Check]]:
    """`(share of the points, checks)`; a file that is not sound gets nothing and is not measured.

    `references`: folders of adapters that students were given; the first says which keys, shapes and base are right,
    and none of them may be handed in. `bands`: `{"loss_gain": (low, high), ...}`. `measure`: tensors -> the two gains
    and the losses `start_loss` (of the base) and `best_loss` (of the adapter) on the reviews of the curve.
    """
    checks, tensors = check_file(files, references)
    if not all(check.passed for check in checks):
        return 0.0, checks
    gains = measure(tensors)
    checks.append(check_curve(files.get(RUN), references[0], gains))
    for name in GAINS:  # positivity alone is no sign of learning: a model that is broken may gain there
        (low, high), value = bands[name], float(gains[name])
        what = {"loss_gain": "loss on held-out positive reviews, base minus yours, nats per token",
                "positivity_gain": "share of positive texts, yours minus the base's"}[name]  # fmt: skip
        inside = math.isfinite(value) and low <= value <= high
        note = "" if inside else ": too little was learned" if not value > low else ": more than training can give"
        if inside and not all(check.passed for check in checks if check.name in GAINS):
            inside, note = False, ", but it counts only together with the loss"
        checks.append(Check(name, inside, f"{what}: {value:+.4f}, expected {low:+.4f} to {high:+.4f}{note}"))
    if not any(check.passed for check in checks if check.name in GAINS):  # noise, too, is a sound file with a curve
        return 0.0, checks
    share = SHARES["sound"] + sum(SHARES.get(check.name, 0) for check in checks if check.passed)
    return round(share, 6), checks


def grade_style(files: Mapping[str, bytes], references: Sequence[Path], logits: Logits) -> tuple[float, list[Check]]:
    """As `grade_adapter`, for an adapter of the student's own style: all points or none; a person judges the style.

    `logits`: tensors, token ids -> the logits that the base and the adapter give after these, as a probe keeps them.
    """
    checks, tensors = check_file(files, references)
    if all(check.passed for check in checks):
        checks += [_other(files, tensors), _acts(files[PROBE], tensors, logits)]
    return float(all(check.passed for check in checks)), checks


def _other(files: Mapping[str, bytes], tensors: dict[str, np.ndarray]) -> Check:
    try:
        nearness = _cosine(acting(tensors), acting(load(files[EARLIER])))
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, OverflowError):
        return Check("other", True, "there is no adapter of 02 to compare with")
    if nearness > MOST_ALIKE:
        return Check("other", False, f"that is the adapter of 02 again ({nearness:.3f} of it): train on another style")
    return Check("other", True, f"another adapter than that of 02 ({nearness:.3f} of it points the same way)")


def _acts(data: bytes, tensors: dict[str, np.ndarray], logits: Logits) -> Check:
    """Whether the vectors change what the base says, and say what the probe has kept."""
    try:
        probe = json.loads(data if len(data) <= MOST_RUN else b"{}")
        ids, said = probe["ids"], probe["logits"]
        if {type(n) for n in ids} != {int} or {type(n) for n in said} != {float} or not len(ids) <= MOST_IDS:
            raise ValueError
        base, adapted = logits(tensors, ids)
        gap = max(abs(ours - theirs) for ours, theirs in zip(adapted, said, strict=True))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return Check("acts", False, f"{PROBE} is damaged: save the adapter again")
    moved = max(abs(ours - theirs) for ours, theirs in zip(adapted, base, strict=True))
    if not gap <= PROBE_TOLERANCE:
        return Check("acts", False, f"its logits are {gap:.3f} away from those in {PROBE}: save the adapter again")
    if not moved > PROBE_TOLERANCE:
        return Check("acts", False, "it changes no logit: it was hardly trained")
    return Check("acts", True, f"it moves a logit by {moved:.2f}")


def check_curve(data: bytes | None, reference: Path, measured: Mapping[str, float]) -> Check:
    """Whether the run's record is the whole curve of a training that began at our base and ended at this adapter."""
    try:
        run = _curve_of(json.loads(data if data and len(data) <= MOST_RUN else b"{}"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return Check("curve", False, f"{RUN} is missing or damaged: it holds the loss curve of your training")
    rows, curve, steps, said = run["rows"], run["curve"], run["steps"], run["said"]
    problems = {
        "the training was not finished": run["status"] != "finished",
        "it was trained on another base model": run["base"] != _fingerprint(reference),
        "it has gaps, or steps out of order": sorted(set(rows)) != rows or not rows or rows[-1] != steps,
        "a loss is NaN or infinite: the training diverged": not all(map(math.isfinite, run["losses"])),
        "it has too few losses on held-out reviews": len(curve) < FEWEST_EVALUATIONS,
        "it has fewer losses than training records": len(rows) < steps // LONGEST_INTERVAL,
        "its summary is not what the curve shows": bool(curve) and list(said.values()) != [curve[0], min(curve)],
    }
    for problem, there in problems.items():
        if there:
            return Check("curve", False, f"{RUN}: {problem}")
    for name, value in said.items():
        if not abs(value - measured[name]) <= CURVE_TOLERANCE:
            whose = {"start_loss": "the base", "best_loss": "this adapter"}[name]
            return Check("curve", False, f"{RUN}: {name} is {value:.4f}, but {whose} has {measured[name]:.4f}")
    return Check("curve", True, f"{len(rows)} rows up to step {steps}, and it ends where this adapter is")


def _curve_of(run: dict) -> dict:
    """What is looked at of a run's record. Raises TypeError and the like for values of another kind than it writes."""
    history = run["history"]
    losses = [row[name] for row in history for name in ("train_loss", "eval_loss") if name in row]
    said = {name: run["metrics"][name] for name in ("start_loss", "best_loss")}
    rows, steps = [row["step"] for row in history], run["config"]["steps"]
    if {type(value) for value in (*losses, *said.values())} - {float} or {type(n) for n in (*rows, steps)} - {int}:
        raise TypeError
    if not 0 < steps <= MOST_STEPS:
        raise ValueError
    curve = [row["eval_loss"] for row in history if "eval_loss" in row]
    found = {"rows": rows, "steps": steps, "losses": losses, "curve": curve, "said": said}
    return found | {"base": run["config"]["base"], "status": run.get("status")}


def check_file(files: Mapping[str, bytes], references: Sequence[Path]) -> tuple[list[Check], dict[str, np.ndarray]]:
    """The checks that need no model, up to the first that fails, and the tensors."""
    if WEIGHTS not in files:
        return [Check("file", False, f"no {WEIGHTS} was handed in: run 02, then submit.py")], {}
    try:
        if len(files[WEIGHTS]) > MOST_BYTES:
            raise ValueError("it is too large for an adapter")
        tensors = load(files[WEIGHTS])
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        return [Check("file", False, f"{WEIGHTS} is not a safetensors file of plain numbers ({str(error)[:80]})")], {}
    known = [load((folder / WEIGHTS).read_bytes()) for folder in references]
    known = [one for one in known if one.keys() == known[0].keys()]
    checks = [Check("file", True, "a safetensors file")]
    for test in (_shapes, _finite, _trained, _own):
        checks.append(test(tensors, known))
        if not checks[-1].passed:
            return checks, {}
    checks.append(_base(files.get(PROBE), references[0]))
    return checks, tensors


def _shapes(tensors: dict, known: list[dict]) -> Check:
    wanted = {name: (value.shape, value.dtype) for name, value in known[0].items()}
    has = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    if wanted.keys() != has.keys():
        missing, more = sorted(wanted.keys() - has.keys()), sorted(has.keys() - wanted.keys())
        what = f"{len(missing)} of {len(wanted)} vectors are missing" if missing else f"{len(more)} that do not belong"
        return Check("shapes", False, f"{what}, {(missing or more)[0][:80]} for one: see the configuration's targets")
    if bad := sorted(name for name in wanted if wanted[name] != has[name]):
        shape, kind = has[bad[0]]
        return Check(
            "shapes", False, f"{bad[0]} is {kind} {list(shape)}, not {wanted[bad[0]][1]} {list(wanted[bad[0]][0])}"
        )
    return Check("shapes", True, f"{len(has)} vectors, {sum(v.size for v in tensors.values()):,} factors")


def _finite(tensors: dict, _: list[dict]) -> Check:
    bad = sum(not np.isfinite(value).all() for value in tensors.values())
    return Check("finite", not bad, f"NaN or infinity in {bad} vectors: the training diverged" if bad else "all finite")


def _trained(tensors: dict, _: list[dict]) -> Check:
    most = max(float(np.abs(value.astype(np.float64) - 1).max()) for value in tensors.values())
    if most < LEAST_CHANGE:
        return Check("trained", False, "every factor is 1: this adapter has not been trained")
    if most > MOST_CHANGE:
        return Check("trained", False, f"a factor is {most:.3g} away from 1: no training of the course gives that")
    return Check("trained", True, f"factors up to {most:.3f} away from 1")


def acting(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far what acts in the model lies from 1: l_q * l_k, as attention sees only their product, l_v, l_ff."""
    found = []
    for name in sorted(tensors):
        factors = tensors[name].astype(np.float64).ravel()
        if "attn.c_attn" in name:
            query, key, value = np.split(factors, 3)
            factors = np.concatenate([query * key, value])
        found.append(factors - 1)
    return np.concatenate(found)


def alike(adapters: Mapping[str, bytes], known: Sequence[Path] = ()) -> list[list[str]]:
    """Names of those whose adapters (bytes of the tensors' file) are equal or nearly so, in groups.

    One that is nearly one of `known` is left out: where training leads by itself is no sign of copying.
    """
    rows: dict[str, np.ndarray] = {}
    for name, data in adapters.items():
        try:
            rows[name] = acting(load(data))
        except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, OverflowError):
            continue  # the grading has said why
    usual = [acting(load((folder / WEIGHTS).read_bytes())) for folder in known]
    groups: list[list[str]] = []
    for name, row in rows.items():
        if not np.isfinite(row).all() or not row.any() or any(_cosine(row, one) > MOST_ALIKE for one in usual):
            continue
        near = next((group for group in groups if _cosine(row, rows[group[0]]) > MOST_ALIKE), None)
        near.append(name) if near else groups.append([name])
    return [group for group in groups if len(group) > 1]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) if one.shape == other.shape else 0.0


def _own(tensors: dict, known: list[dict]) -> Check:
    """Trainings of other seeds point elsewhere; a copy, however it was scaled, mixed or blurred, does not."""
    moves = [acting(one) for one in known]
    own = acting(tensors)
    span = np.stack(moves, axis=1)
    weights, *_ = np.linalg.lstsq(span, own, rcond=None)
    share = np.linalg.norm(span @ weights) / np.linalg.norm(own)  # the cosine with the nearest mixture of them
    if share > MOST_ALIKE:
        what = "the numbers of a reference adapter that comes with the course, or a mixture of such"
        return Check("own", False, f"these are {what} ({share:.3f} of them)")
    return Check("own", True, f"not a copy of a reference adapter ({share:.3f} of it lies where these do)")


def _base(probe: bytes | None, reference: Path) -> Check:
    try:
        found = json.loads(probe or b"{}")["base_fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Check("base", False, f"{PROBE} is missing or damaged: it says which base model the adapter is for")
    good = found == _fingerprint(reference)
    return Check("base", good, "trained on the course's base model" if good else "trained on another base model")


def _fingerprint(reference: Path) -> str:
    return json.loads((reference / PROBE).read_text(encoding="utf-8"))["base_fingerprint"]


class Meter:
    """Measures adapters of one profile with the course's own `utils`: the base, reviews and judges are loaded once."""

    def __init__(self, profile: str = "mini") -> None:
        from study.comparison import Bench
        from utils.config import load_profile
        from utils.data import PROMPTS
        from utils.evaluation import held_out_loss, positivity
        from utils.generation import generate
        from utils.session import quiet

        quiet()
        self.bench = Bench(load_profile(profile))
        test, seen = (
            self.bench.blocks(part, "positive", limit=self.bench.profile.eval_blocks) for part in ("test", "validation")
        )

        def scores(model: object) -> tuple[float, float, float]:
            options = self.bench.profile.sampling
            losses = held_out_loss(model, seen).value, held_out_loss(model, test).value
            samples = generate(model, self.bench.tokenizer, PROMPTS, seed=self.bench.profile.seed, **options)
            return *losses, positivity(samples, self.bench.judges["words"]).value

        self.scores = scores
        self.base = scores(self.bench.base)

    def model(self, tensors: dict[str, np.ndarray]) -> object:
        """The base with these vectors."""
        import torch

        from utils.adapters import attach, load_base, set_scaling_vectors

        model = attach(load_base(self.bench.profile)[0], "ia3")
        vectors = {}
        for name, value in tensors.items():  # the model knows them as "3.attention", "3.feedforward"
            layer, role = name.split(".h.")[1].split(".")[0], "attention" if "attn.c_attn" in name else "feedforward"
            vectors[f"{layer}.{role}"] = torch.from_numpy(value.copy()).flatten()
        set_scaling_vectors(model, vectors)
        return model

    def logits(self, tensors: dict[str, np.ndarray], ids: list[int]) -> tuple[list[float], list[float]]:
        """What a probe keeps of the base, and of the adapter. Raises IndexError for an id that is no token."""
        from utils.saving import probe_logits

        if not all(0 <= n < self.bench.base.config.vocab_size for n in ids):
            raise IndexError
        return probe_logits(self.bench.base, ids), probe_logits(self.model(tensors), ids)

    def __call__(self, tensors: dict[str, np.ndarray]) -> dict[str, float]:
        """The gains of an adapter over the base, and the losses of both on validation reviews; always the same."""
        from utils.judges import EvaluationError

        model = self.model(tensors)
        try:
            seen, loss, positive = self.scores(model)
        except EvaluationError:  # it writes nothing at all: there is no share of anything
            return dict.fromkeys((*GAINS, "start_loss", "best_loss"), math.nan)
        gains = {"loss_gain": self.base[1] - loss, "positivity_gain": positive - self.base[2]}
        return gains | {"start_loss": self.base[0], "best_loss": seen}


def make_bands(pairs: Mapping[int, tuple[dict, dict]], fewest: int = FEWEST_SEEDS) -> dict:
    """Bands from the metrics of reference runs: `{seed: (of (IA)³, of the base)}`.

    From the worst seed minus the distance between worst and best (but no less than half of the worst), to the best plus
    three times that distance. Raises GradingError for fewer than `fewest` seeds, or a seed that gained nothing.
    """
    if len(pairs) < fewest:
        raise GradingError(f"{len(pairs)} seeds, {fewest} are needed: make more runs, or say --fewest {len(pairs)}")
    values: dict[str, list[float]] = {name: [] for name in GAINS}
    for ours, base in pairs.values():
        values["loss_gain"].append(ours["base_test_loss_positive"]["value"] - ours["test_loss_positive"]["value"])
        values["positivity_gain"].append(ours["positivity"]["value"] - base["positivity"]["value"])
    bands: dict = {"seeds": sorted(pairs)}
    for name, found in values.items():
        worst, best = min(found), max(found)
        if worst <= 0:
            raise GradingError(f"{name}: the worst seed gains {worst:+.4f}, a band would let an untrained adapter pass")
        low, high = max(worst - (best - worst), worst / 2), best + 3 * max(best - worst, worst / 2)
        bands[name] = [round(low, 6), round(high, 6)]
        bands[f"{name}_seeds"] = [round(value, 6) for value in found]
    return bands
