"""Judges of positivity: is a text positive or negative, by words or by character n-grams.

Fitted on reviews that no adapter trains on, cut into pieces about as long as generated texts, and stored as data.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import DatasetDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from utils.config import ASSETS, Profile, artifacts_dir
from utils.metrics import Estimate, wilson_interval
from utils.runs import write_atomic

if TYPE_CHECKING:  # scikit-learn takes a second to import: it is loaded where a judge is made
    from sklearn.feature_extraction.text import TfidfVectorizer

PIECE_WORDS = 60  # reviews are cut into pieces about as long as the texts to be judged
REGULARISATION = 4.0  # scikit-learn's C
VECTORIZERS = {
    "words": {"analyzer": "word", "ngram_range": (1, 2), "max_features": 50_000},
    "characters": {"analyzer": "char_wb", "ngram_range": (4, 4), "max_features": 50_000},
}


class EvaluationError(ValueError):
    """The texts, the model or a stored judge cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Judge:
    """TF-IDF and logistic regression: P(positive) = sigmoid(tfidf(text) . weights + bias).

    kind: "words" (1-2 word n-grams) or "characters" (4-grams of characters inside words); terms: (features,) n-grams;
    idf, weights: (features,) float32; bias: log-odds of an empty text.
    """

    kind: str
    terms: tuple[str, ...]
    idf: np.ndarray
    weights: np.ndarray
    bias: float

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[int], kind: str = "words") -> Judge:
        """Fit on labelled reviews (label 1 is positive), cut into pieces of `PIECE_WORDS` words."""
        from sklearn.linear_model import LogisticRegression

        if len(set(labels)) != 2:
            raise EvaluationError("a judge needs reviews of both labels, 0 and 1")
        pieces = [(piece, label) for text, label in zip(texts, labels, strict=True) for piece in cut_pieces(text)]
        vectorizer = _vectorizer(kind, min_df=3)
        features = vectorizer.fit_transform([piece for piece, _ in pieces])
        model = LogisticRegression(C=REGULARISATION, max_iter=300).fit(features, [label for _, label in pieces])
        idf, weights = vectorizer.idf_.astype(np.float32), model.coef_[0].astype(np.float32)
        return cls(kind, tuple(vectorizer.get_feature_names_out().tolist()), idf, weights, float(model.intercept_[0]))

    def __post_init__(self) -> None:
        vectorizer = _vectorizer(self.kind, vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        object.__setattr__(self, "_transform", vectorizer.transform)

    def probability(self, texts: Sequence[str]) -> np.ndarray:
        """P(positive) of each text, (n,) in [0, 1]."""
        if len(texts) == 0:
            return np.zeros(0)
        return 1 / (1 + np.exp(-(self._transform(texts) @ self.weights + self.bias)))

    def is_positive(self, texts: Sequence[str]) -> np.ndarray:
        """True where P(positive) is above one half, (n,) bool."""
        return self.probability(texts) > 0.5

    def accuracy(self, texts: Sequence[str], labels: Sequence[int], first_words: int | None = None) -> Estimate:
        """Share judged as labelled, on whole texts or on the first `first_words` words of each."""
        texts = [" ".join(text.split()[:first_words]) for text in texts]
        return wilson_interval(int((self.is_positive(texts) == np.asarray(labels, bool)).sum()), len(texts))

    def save(self, folder: Path) -> None:
        """Write `folder/judge.safetensors` (numbers, and the n-grams as JSON in its header), replaced atomically."""
        tensors = {"idf": self.idf, "weights": self.weights, "bias": np.array([self.bias])}
        header = {"kind": self.kind, "terms": json.dumps(self.terms)}
        write_atomic(folder / "judge.safetensors", to_safetensors(tensors, metadata=header))

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read what `save` wrote. Raises `EvaluationError` when the file is missing, cut off or not a judge."""
        path = folder / "judge.safetensors"
        try:
            with safe_open(path, "numpy") as file:
                header = file.metadata()
                idf, weights, bias = (file.get_tensor(name) for name in ("idf", "weights", "bias"))
            kind, terms = header["kind"], tuple(json.loads(header["terms"]))
            if not (idf.shape == weights.shape == (len(terms),) and np.isfinite([*idf, *weights, *bias]).all()):
                raise ValueError("its numbers do not fit its n-grams")
            return cls(kind, terms, idf, weights, float(bias[0]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise EvaluationError(f"no usable judge at {path}: {error}. Fit it again.") from error


def cut_pieces(text: str, words: int = PIECE_WORDS) -> list[str]:
    """Consecutive pieces of `words` words; a rest of less than half a piece is dropped (a short text is kept)."""
    split = text.split()
    starts = range(0, max(1, len(split) - words // 2), words)
    return [" ".join(split[start : start + words]) for start in starts]


def load_judges(profile: Profile, reviews: DatasetDict) -> dict[str, Judge]:
    """Both judges, `{"words": ..., "characters": ...}`, fitted on `reviews["pretrain"]` alone.

    Taken from `assets/judges`, where those of the 25,000 IMDB reviews are, or from `artifacts_dir(profile)/judges`;
    else fitted (a minute) and kept there. Both go by a fingerprint of the reviews and the settings, so a judge of
    other data is never used; one that cannot be read is fitted again, with a warning.
    """
    texts, labels = list(reviews["pretrain"]["text"]), list(reviews["pretrain"]["label"])
    judges = {}
    for kind, name in judge_names(texts, labels).items():
        own = artifacts_dir(profile) / "judges" / name
        judges[kind] = _stored_judge([ASSETS / "judges" / name, own])
        if judges[kind] is None:
            judges[kind] = Judge.fit(texts, labels, kind)
            judges[kind].save(own)
    return judges


def _stored_judge(folders: Sequence[Path]) -> Judge | None:
    """The first judge that can be read; a folder that is there and cannot be read is warned of by its name."""
    for folder in folders:
        if folder.exists():
            try:
                return Judge.load(folder)
            except EvaluationError:
                warnings.warn(f"the judge in {folder.parent.parent.name}/judges/{folder.name} is damaged", stacklevel=3)
    return None


def judge_names(texts: Sequence[str], labels: Sequence[int]) -> dict[str, str]:
    """The folder name of each kind of judge for these reviews: the kind and a fingerprint of data and settings."""
    settings = [PIECE_WORDS, REGULARISATION, VECTORIZERS, list(texts), list(labels)]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    return {kind: f"{kind}-{digest}" for kind in VECTORIZERS}


def _vectorizer(kind: str, **options) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    if kind not in VECTORIZERS:
        raise EvaluationError(f"unknown kind of judge {kind!r}: choose from {', '.join(VECTORIZERS)}")
    return TfidfVectorizer(lowercase=True, sublinear_tf=True, dtype=np.float32, **VECTORIZERS[kind], **options)
