"""The strength dial: turn a trained (IA)³ adapter up, down, past its end and backwards, without training again.

The vectors start at 1 and training moves them to l, so 1 + a (l - 1) is the base at a = 0, the adapter at a = 1, and
anything else in between or beyond (the idea of task arithmetic, Ilharco et al. 2023, applied to scaling vectors).
Not for: training, or drawing the curve (`plots.dial_figure`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils.adapters import scaling_vectors, set_scaling_vectors
from utils.evaluation import SCORE_OF_JUDGE, fluency, held_out_loss, positivity
from utils.generation import generate
from utils.judges import Judge
from utils.metrics import Estimate

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
    before, rows = scaling_vectors(model), []
    try:
        for strength in tqdm(strengths, disable=not progress, leave=False, desc="strength"):
            set_scaling_vectors(model, vectors_at(strength))
            texts = generate(model, tokenizer, prompts, seed=seed, **sampling)
            row = {SCORE_OF_JUDGE[name]: positivity(texts, judge) for name, judge in judges.items()}
            row |= {"perplexity": fluency(texts, model, tokenizer), "held_out_loss": held_out_loss(model, blocks)}
            rows.append({"strength": float(strength)} | row)
    finally:
        set_scaling_vectors(model, before)
    return rows
