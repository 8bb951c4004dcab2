"""How well a model does a lab's task: classes predicted, label texts and answers written, each with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from extensions.encoding import IGNORED, instruction_prompt, make_collator
from extensions.recipes import Recipe
from utils.generation import evaluation_mode, generate
from utils.judges import EvaluationError
from utils.metrics import Estimate, bootstrap_interval, wilson_interval


def accuracy(predicted: Sequence, actual: Sequence) -> Estimate:
    """Share of equal entries, with Wilson's interval. Raises EvaluationError for none, or for unequal numbers."""
    pairs = _pairs(predicted, actual)
    return wilson_interval(sum(bool(p == a) for p, a in pairs), len(pairs))


def f1(predicted: Sequence, actual: Sequence, positive: object = 1) -> Estimate:
    """F1 of the class `positive`, 2 TP / (2 TP + FP + FN), with the percentile bootstrap over examples (seeded).

    Raises EvaluationError where the class is neither predicted nor present: then it has no value.
    """
    pairs = _pairs(predicted, actual)
    both = np.array([(p == positive) and (a == positive) for p, a in pairs], float)
    either = np.array([float(p == positive) + float(a == positive) for p, a in pairs])  # 2 TP + FP + FN
    if either.sum() == 0:
        raise EvaluationError(f"F1 of {positive!r} has no value: it is neither predicted nor present")
    return bootstrap_interval(2 * both, either)


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> Estimate:
    """Share of texts that are the wanted ones but for case, spaces and a final full stop, with Wilson's interval."""
    return accuracy([normal(text) for text in written], [normal(text) for text in wanted])


def confusion(written: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(labels, labels + 1) counts: wanted label by written one; the last column counts texts that are no label.

    Texts are compared as in `exact_match`. Raises EvaluationError for none, for unequal numbers, or where a wanted text
    is no label.
    """
    names = [normal(label) for label in labels]
    counts = np.zeros((len(names), len(names) + 1), int)
    for text, label in _pairs([normal(t) for t in written], [normal(t) for t in wanted]):
        if label not in names:
            raise EvaluationError(f"{label!r} is wanted and is no label: labels are {', '.join(labels)}")
        counts[names.index(label), names.index(text) if text in names else len(names)] += 1
    return counts


def label_scores(written: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> dict[str, Estimate]:
    """What `confusion` says as shares with Wilson's intervals: "exact_match"; "no_label", of the texts that are none;
    "found_<label>", of the texts of that label that are written as it (no entry where there is no such text)."""
    counts = confusion(written, wanted, labels)
    found = {f"found_{labels[i]}": (row[i], row.sum()) for i, row in enumerate(counts) if row.sum()}
    shares = {"exact_match": (counts.trace(), counts.sum()), "no_label": (counts[:, -1].sum(), counts.sum())} | found
    return {name: wilson_interval(int(part), int(whole)) for name, (part, whole) in shares.items()}


def majority(train: Sequence, actual: Sequence) -> Estimate:
    """Accuracy of always answering what is commonest in `train`: what a score has to beat."""
    return accuracy([commonest(train)] * len(actual), actual)


def commonest(values: Sequence) -> str | int:
    """The value that occurs most often; of several the first in order."""
    values = list(values)
    return max(sorted(set(values)), key=values.count)


def normal(text: str) -> str:
    """Lower case, single spaces, no full stop (English or Chinese) at the end."""
    return " ".join(text.lower().split()).rstrip(".。").rstrip()


def _pairs(predicted: Sequence, actual: Sequence) -> list[tuple]:
    if len(predicted) != len(actual) or len(actual) == 0:
        raise EvaluationError(f"{len(predicted)} predictions for {len(actual)} examples: give one for each, and some")
    return list(zip(predicted, actual, strict=True))


def class_logits(
    model: nn.Module, recipe: Recipe, examples: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> np.ndarray:
    """Logits of a classifier, (examples, classes); its prediction is `.argmax(1)`."""
    rows = []
    for batch, _ in _batches(model, make_collator(recipe, tokenizer), examples, batch_size):
        with evaluation_mode(model):
            rows.append(model(**batch).logits.float().cpu().numpy())
    return np.concatenate(rows)


def write_texts(
    model: nn.Module,
    recipe: Recipe,
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int | None = None,
    batch_size: int = 64,
) -> list[str]:
    """What an encoder-decoder writes for each encoded example, greedily, at most `new_tokens` tokens.

    `new_tokens` None: as many as the recipe's label texts may have, and three more, so that a longer text is seen as
    one. For instructions see `generation.generate`, with `encoding.instruction_prompt`.
    """
    limit = new_tokens or recipe.label_length + 3
    texts: list[tuple[int, str]] = []
    for batch, indices in _batches(model, make_collator(recipe, tokenizer), examples, batch_size):
        batch.pop("labels")
        with evaluation_mode(model):
            written = model.generate(**batch, max_new_tokens=limit, do_sample=False, num_beams=1)
        texts += zip(indices, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True)
    return [text for _, text in sorted(texts)]


def label_loss(
    model: nn.Module, recipe: Recipe, examples: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> Estimate:
    """Mean -log p per label in nats, as `train` has it (a label is a token, or the class); bootstrap over examples."""
    sums, counts = [], []
    for batch, _ in _batches(model, make_collator(recipe, tokenizer), examples, batch_size):
        labels = batch["labels"].reshape(len(batch["labels"]), -1)
        with evaluation_mode(model):
            logits = model(**batch).logits.float().reshape(*labels.shape, -1)
        if recipe.task_type == "CAUSAL_LM":  # a position predicts the next one
            logits, labels = logits[:, :-1], labels[:, 1:]
        nats = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        sums.append(nats.sum(1).double().cpu().numpy())
        counts.append((labels != IGNORED).sum(1).cpu().numpy())
    return bootstrap_interval(np.concatenate(sums), np.concatenate(counts))


def task_scores(
    model: nn.Module, recipe: Recipe, rows: Dataset, examples: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Estimate]:
    """What a run record of a lab holds about `rows`, of which `examples` are the encoded form, in the same order.

    "label_loss", and "accuracy" and "f1" of a classifier, "exact_match" of what another model writes: the label text
    (with the rest of `label_scores`), or the whole answer to an instruction (at most 64 tokens of it).
    """
    scores = {"label_loss": label_loss(model, recipe, examples, tokenizer)}
    if recipe.task_type == "SEQ_CLS":
        predicted = class_logits(model, recipe, examples, tokenizer).argmax(1)
        return scores | {"accuracy": accuracy(predicted, rows["label"]), "f1": f1(predicted, rows["label"])}
    if recipe.task_type == "SEQ_2_SEQ_LM":
        written = write_texts(model, recipe, examples, tokenizer)
        return scores | label_scores(written, rows["target"], recipe.labels)
    prompts = [instruction_prompt(recipe, row) for row in rows]
    written = [sample.text for sample in generate(model, tokenizer, prompts, new_tokens=64, do_sample=False)]
    return scores | {"exact_match": exact_match(written, rows["output"])}


def _batches(model: nn.Module, collator: Callable, examples: Dataset, size: int):
    """Padded batches on the model's device, and the numbers of their examples."""
    device = next(model.parameters()).device
    for start in range(0, len(examples), size):
        indices = range(start, min(start + size, len(examples)))
        batch = collator([examples[i] for i in indices])
        yield {name: torch.as_tensor(tensor, device=device) for name, tensor in batch.items()}, indices
