"""Judging generated text: positivity, fluency, relevance, diversity, held-out loss, each with an interval.

A continuation is judged alone, without its prompt. An empty one (the model ended the text at once) has nothing to
judge: the scores leave it out, their `n` says how many remain, and `evaluate_samples` reports the share as `empty`.

Intervals are 95 % and speak about *these prompts*: what varies is the sampling. A share gets Wilson's interval, which,
unlike the bootstrap, is honest at 0 and 1; prompts differ, so pooling them makes it wider than needed, never narrower.
Means and ratios get the percentile bootstrap over texts (over prompts for distinct-n, over blocks for losses).

Not for: generating (`generation.py`), tables and figures (`runs.py`, `plots.py`); nothing here prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.generation import Sample, evaluation_mode
from utils.judges import EvaluationError, Judge
from utils.metrics import Estimate, bootstrap_interval, wilson_interval

SCORE_OF_JUDGE = {"words": "positivity", "characters": "positivity_chars"}


def evaluate_samples(
    samples: Sequence[Sample], judges: Mapping[str, Judge], base: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Estimate]:
    """Every score of a set of samples: one positivity a judge, perplexity, relevance, diversity, share empty."""
    scores = {SCORE_OF_JUDGE.get(name, f"positivity_{name}"): positivity(samples, j) for name, j in judges.items()}
    prompted, tokens = continuation_nats(samples, base, tokenizer)
    alone, _ = continuation_nats(samples, base, tokenizer, prompted=False)
    scores["perplexity"] = bootstrap_interval(prompted, tokens, transform=np.exp)
    scores["relevance"] = bootstrap_interval(alone - prompted, tokens)
    empty = wilson_interval(len(samples) - len(_judged(samples)), len(samples))
    return {**scores, **diversity(samples), "empty": empty}


def positivity(samples: Sequence[Sample], judge: Judge) -> Estimate:
    """Share of continuations that the judge calls positive, with Wilson's interval."""
    verdicts = judge.is_positive([sample.text for sample in _judged(samples)])
    return wilson_interval(int(verdicts.sum()), len(verdicts))


def fluency(samples: Sequence[Sample], base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Estimate:
    """Perplexity of the continuations given their prompts under the frozen base: exp(nats / tokens) over all texts.

    Perplexity is that of Jelinek et al. (1977). Lower is more predictable, not always better.
    """
    nats, tokens = continuation_nats(samples, base, tokenizer)
    return bootstrap_interval(nats, tokens, transform=np.exp)


def relevance(samples: Sequence[Sample], base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Estimate:
    """What the prompt tells about the continuation: log p(text | prompt) - log p(text), nats per token.

    This is their pointwise mutual information under the base (the measure Li et al. 2016 train for). Without a
    prompt, the text follows the end-of-text token, as the first words of a review do.
    """
    prompted, tokens = continuation_nats(samples, base, tokenizer)
    alone, _ = continuation_nats(samples, base, tokenizer, prompted=False)
    return bootstrap_interval(alone - prompted, tokens)


def diversity(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """How varied the texts are, in lower-case words.

    distinct_1, distinct_2: different n-grams / n-grams over all texts of a prompt (Li et al. 2016), mean over prompts;
    they fall with the number and length of the texts, so compare equal sets only. repeated_4grams: share of 4-grams
    that occurred before in the same text. Texts too short for any n-gram repeat nothing: n = 0, interval [0, 1].
    """
    texts = [(sample.prompt_index, _words(sample.text)) for sample in _judged(samples)]
    scores = {}
    for n in (1, 2):
        groups: dict[int, list[tuple]] = {}
        for index, words in texts:
            groups.setdefault(index, []).extend(_ngrams(words, n))
        shares = [len(set(grams)) / len(grams) for grams in groups.values() if grams]
        scores[f"distinct_{n}"] = bootstrap_interval(shares) if shares else Estimate(1.0, 0.0, 1.0, 0)
    found = [grams for _, words in texts if (grams := _ngrams(words, 4))]
    repeated = [len(grams) - len(set(grams)) for grams in found]
    counts = [len(grams) for grams in found]
    scores["repeated_4grams"] = bootstrap_interval(repeated, counts) if found else Estimate(0.0, 0.0, 1.0, 0)
    return scores


def _judged(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with something to judge; `EvaluationError` where there is none."""
    kept = [sample for sample in samples if sample.text.strip()]
    if not kept:
        raise EvaluationError(f"all {len(samples)} continuations are empty: there is nothing to judge")
    return kept


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def _ngrams(words: list[str], n: int) -> list[tuple]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def continuation_nats(
    samples: Sequence[Sample],
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompted: bool = True,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each continuation under the frozen base, and its tokens: two arrays (non-empty samples,).

    Conditioned on the prompt, or on the end-of-text token alone with `prompted=False`. Adapters attached to `base` are
    switched off meanwhile. Raises `EvaluationError` for a text longer than the context.
    """
    kept = _judged(samples)
    texts = tokenizer([s.text for s in kept], add_special_tokens=False, verbose=False)["input_ids"]
    contexts = [[tokenizer.eos_token_id]] * len(kept)
    if prompted:
        contexts = tokenizer([s.prompt for s in kept], add_special_tokens=False, verbose=False)["input_ids"]
    limit = base.config.n_positions
    for context, text, sample in zip(contexts, texts, kept, strict=True):
        if not context or len(context) + len(text) > limit:
            raise EvaluationError(
                f"{len(context)} tokens of context and {len(text)} of text in {(sample.prompt + sample.text)[:40]!r}: "
                f"the base needs at least one token of context and reads at most {limit} in all"
            )
    nats, tokens = np.zeros(len(kept)), np.array([len(text) for text in texts])
    order = sorted(range(len(kept)), key=lambda i: len(contexts[i]) + len(texts[i]))
    with adapters_off(base) as model, evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            nats[chosen] = _batch_nats(model, [contexts[i] for i in chosen], [texts[i] for i in chosen])
    return nats, tokens


def _batch_nats(model: nn.Module, contexts: list[list[int]], texts: list[list[int]]) -> np.ndarray:
    """Sum of -log p over the tokens of each text, (rows,). Padded on the right: causal attention never sees it."""
    longest = max(len(context) + len(text) for context, text in zip(contexts, texts, strict=True))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        end = len(context) + len(text)
        ids[row, :end] = torch.tensor(context + text)
        labels[row, len(context) : end] = torch.tensor(text)
    device = next(model.parameters()).device
    return _row_nats(model(input_ids=ids.to(device)).logits, labels.to(device))


def _row_nats(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Sum of -log p(label) a row, (rows,); logits (rows, length, vocabulary) at t predict labels (rows, length) at
    t + 1, and labels of -100 do not count."""
    targets = labels[:, 1:]
    counted = targets != -100
    losses = nn.functional.cross_entropy(logits[:, :-1][counted].float(), targets[counted], reduction="none")
    sums = torch.zeros(len(labels), device=losses.device).index_add_(0, counted.nonzero()[:, 0], losses)
    return sums.double().cpu().numpy()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the plain base inside `model`: peft writes adapters *into* the base, so `base(...)` would use them too."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [m for m in plain.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    if any(layer.merged for layer in layers):
        raise EvaluationError("an adapter is merged into this base: score with a freshly loaded one")
    trainable = {parameter: parameter.requires_grad for parameter in plain.parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield plain
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable.items():  # enable_adapters() changes them
            parameter.requires_grad_(flag)


def held_out_loss(model: nn.Module, blocks: Dataset, batch_size: int = 16) -> Estimate:
    """Mean -log p per predicted token, in nats, over blocks (columns input_ids, labels); bootstrap over blocks."""
    sums, counts = [], []
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size]
            ids, labels = (torch.as_tensor(batch[name], device=device) for name in ("input_ids", "labels"))
            sums.append(_row_nats(model(input_ids=ids).logits, labels))
            counts.append((labels[:, 1:] != -100).sum(1).cpu().numpy())
    return bootstrap_interval(np.concatenate(sums or [[]]), np.concatenate(counts or [[]]))
