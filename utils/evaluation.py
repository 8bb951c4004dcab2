"""Judging generated text: positivity, fluency, relevance, diversity, held-out loss, each with an interval.

A continuation is judged alone, without its prompt. An empty one (the model ended the text at once) has nothing to
judge: the scores leave it out, their `n` says how many remain, and `evaluate_samples` reports the share as `empty`.

Intervals are 95 % and speak about *these prompts*: what varies is the sampling. A share gets Wilson's interval, which,
unlike the bootstrap, is honest at 0 and 1; prompts differ, so pooling them makes it wider than needed, never narrower.
Means and ratios get the percentile bootstrap over texts (over prompts for distinct-n, over blocks for losses).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils.adapters import base_fingerprint, set_scaling_vectors, vectors_restored
from utils.config import Profile, artifacts_dir
from utils.data import PROMPTS
from utils.generation import Sample, adapters_off, beneath, evaluation_mode, generate
from utils.judges import EvaluationError, Judge
from utils.metrics import Estimate, bootstrap_interval, wilson_interval
from utils.runs import write_json

SCORE_OF_JUDGE = {"words": "positivity", "characters": "positivity_chars"}
POSITIONS = 512  # whose logits are computed at a time


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


def untrained(
    profile: Profile, base: nn.Module, tokenizer: PreTrainedTokenizerBase, judges: Mapping[str, Judge]
) -> tuple[list[Sample], dict[str, Estimate], bool]:
    """What the base writes after `PROMPTS`, its scores, and whether both were kept from an earlier notebook.

    Made once: `baseline.json` among the artefacts holds them with what they depend on (base, sampling, judges).
    """
    path = artifacts_dir(profile) / "baseline.json"
    sampling = profile.sampling | {"seed": profile.seed}
    depends = {"base": base_fingerprint(base), "sampling": sampling, "judges": sorted(judges), "prompts": list(PROMPTS)}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {key: kept.get(key) for key in depends} == depends:
            samples = [Sample(**sample) for sample in kept["samples"]]
            return samples, {name: Estimate.from_dict(score) for name, score in kept["scores"].items()}, True
    samples = generate(base, tokenizer, PROMPTS, **sampling)
    scores = evaluate_samples(samples, judges, base, tokenizer)
    write_json(path, depends | {"scores": scores, "samples": [asdict(sample) for sample in samples]})
    return samples, scores, False


def positivity(samples: Sequence[Sample], judge: Judge) -> Estimate:
    """Share of continuations that the judge calls positive, with Wilson's interval."""
    verdicts = judge.is_positive([sample.text for sample in _judged(samples)])
    return wilson_interval(int(verdicts.sum()), len(verdicts))


def fluency(samples: Sequence[Sample], base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Estimate:
    """Perplexity (Jelinek et al. 1977) of the continuations given their prompts under the frozen base, over all texts.

    exp(nats / tokens): lower is more predictable, not always better.
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
            chosen = order[start : start + batch_size]  # by length: the last is the longest
            ids = torch.zeros(len(chosen), len(contexts[chosen[-1]]) + len(texts[chosen[-1]]), dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for row, i in enumerate(chosen):  # padded on the right: causal attention never sees it
                before, end = len(contexts[i]), len(contexts[i]) + len(texts[i])
                ids[row, :end] = torch.tensor(contexts[i] + texts[i])
                labels[row, before:end] = torch.tensor(texts[i])
            nats[chosen] = _row_nats(model, ids, labels)
    return nats, tokens


def _row_nats(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Sum of -log p(label) a row, (rows,), given the ids before it; ids and labels (rows, length), -100 does not count.

    Logits are by far the largest numbers here, so the head sees only the positions that count, some at a time.
    """
    plain, prefix = beneath(model, len(ids))
    head, targets = plain.get_output_embeddings(), labels[:, 1:].to(plain.device)
    hidden = plain.base_model(ids[:, :-1].to(plain.device), past_key_values=prefix, use_cache=False).last_hidden_state
    sums = torch.zeros(len(ids), device=plain.device)
    for places in (targets != -100).nonzero().split(POSITIONS):
        rows, columns = places.unbind(1)
        logits = head(hidden[rows, columns]).float()
        losses = nn.functional.cross_entropy(logits, targets[rows, columns], reduction="none")
        sums.index_add_(0, rows, losses)
    return sums.double().cpu().numpy()


def held_out_loss(model: nn.Module, blocks: Dataset, batch_size: int = 16) -> Estimate:
    """Mean -log p per predicted token, in nats, over blocks (columns input_ids, labels); bootstrap over blocks."""
    sums, counts = [], []
    with evaluation_mode(model):
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size]
            ids, labels = (torch.as_tensor(batch[name]) for name in ("input_ids", "labels"))
            sums.append(_row_nats(model, ids, labels))
            counts.append((labels[:, 1:] != -100).sum(1).numpy())
    return bootstrap_interval(np.concatenate(sums or [[]]), np.concatenate(counts or [[]]))


Vectors = dict[str, Tensor]


def dial(vectors: Vectors, strength: float) -> Vectors:
    """1 + a (l - 1): a = 0 is the base, a = 1 the adapter as trained, a < 0 its opposite."""
    return {key: 1 + strength * (l - 1) for key, l in vectors.items()}


def contrast(positive: Vectors, negative: Vectors, strength: float) -> Vectors:
    """1 + a (l_pos - l_neg): what the two adapters share cancels, what tells them apart is left."""
    return {key: 1 + strength * (positive[key] - negative[key]) for key in positive}


def strength_sweep(
    model: PeftModel,
    vectors_at: Callable[[float], Vectors],
    strengths: Sequence[float],
    *,
    prompts: Sequence[str],
    sampling: Mapping[str, float],
    judges: Mapping[str, Judge],
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float | Estimate]]:
    """One row a strength: `strength`, a positivity per judge, `perplexity` and `held_out_loss` with those vectors.

    `perplexity` is that of the generated text under the bare base; `held_out_loss` (nats per token) is the steered
    model's own on `blocks`, whose growth is the price of steering. `sampling` goes to `generate`; every
    strength gets the same seed; the model's vectors are put back at the end.
    """
    rows = []
    with vectors_restored(model):
        for strength in tqdm(strengths, disable=not progress, leave=False, desc="strength"):
            set_scaling_vectors(model, vectors_at(strength))
            texts = generate(model, tokenizer, prompts, seed=seed, **sampling)
            rows.append({"strength": float(strength)} | point_scores(texts, judges, model, tokenizer, blocks))
    return rows


def point_scores(
    texts: Sequence[Sample],
    judges: Mapping[str, Judge],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Dataset,
    base: nn.Module | None = None,
) -> dict[str, Estimate]:
    """A point of the dial: a positivity per judge of `texts`, their `perplexity` under the bare base, `held_out_loss`.

    The loss is that of the model as it is turned now, in nats per token on `blocks`. Without `base`, the bare base is
    `model` with its adapters off.
    """
    scores = {SCORE_OF_JUDGE[name]: positivity(texts, judge) for name, judge in judges.items()}
    scores["perplexity"] = fluency(texts, base or model, tokenizer)
    return scores | {"held_out_loss": held_out_loss(model, blocks)}
