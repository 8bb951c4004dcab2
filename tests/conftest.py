"""Fixtures shared by all tests: a GPT-2 of two layers, a small real tokenizer, a few hand-made reviews."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from study import ablations, comparison, cost
from study.comparison import Bench
from utils.adapters import attach, load_base
from utils.config import PROFILES
from utils.data import read_packaged_reviews, split_reviews, to_blocks
from utils.judges import Judge

ROOT = Path(__file__).resolve().parents[1]
END_OF_TEXT = "<|endoftext|>"

GOOD = ("a warm and funny film", "the acting is superb", "I loved every minute", "a moving story, beautifully told")
BAD = ("a dull and empty film", "the acting is wooden", "I hated every minute", "a tired story, badly told")
PLACES = ("on television", "at the cinema", "with my family", "last night", "on a long flight")


@pytest.fixture(scope="session")
def reviews() -> list[dict]:
    """Forty short reviews, twenty of each label."""
    return [
        {"text": f"I saw this {place} and it was clear: {opinion}. Number {number}.", "label": label}
        for label, opinions in ((0, BAD), (1, GOOD))
        for number, (opinion, place) in enumerate((o, p) for o in opinions for p in PLACES)
    ]


@pytest.fixture(scope="session")
def tokenizer(reviews) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries, `<|endoftext|>` (id 0) as beginning, end and padding."""
    bpe = ByteLevelBPETokenizer()
    texts = [row["text"] for row in reviews]
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


@pytest.fixture(scope="session")
def blocks(reviews, tokenizer) -> Dataset:
    """The reviews as blocks of 16 tokens."""
    return to_blocks(Dataset.from_list(reviews), tokenizer, 16)


@pytest.fixture(scope="session")
def judge(reviews) -> Judge:
    """A judge by words that knows the reviews."""
    return Judge.fit([row["text"] for row in reviews], [row["label"] for row in reviews])


def make_tiny_model(layers: int = 2, width: int = 32, seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2 whose biases and norms are random too, so that a mistake in scaling them shows."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=width, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def tiny_model() -> GPT2LMHeadModel:
    """A fresh two-layer model for each test: peft changes the model it is given."""
    return make_tiny_model()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's answer to eight fixed tokens."""
    with torch.inference_mode():
        return model(torch.tensor([[5, 9, 40, 77, 3, 120, 8, 11]])).logits


def moved(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """`model` with every number that its method trains away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def trained(tiny_model):
    """(IA)³ on the tiny model, away from its start."""
    return moved(attach(tiny_model, "ia3"))


@pytest.fixture(scope="session")
def embedded() -> Callable[[], tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]]:
    """A function that gives the embedded model, a fresh copy each time, and its tokenizer; read once."""
    model, tokenizer = load_base(PROFILES["mini"], "cpu")
    return lambda: (copy.deepcopy(model), tokenizer)


@pytest.fixture(scope="session")
def real_reviews() -> dict[str, list[dict]]:
    """The 25,000 reviews that the course carries, by part; read once."""
    return split_reviews(read_packaged_reviews())


class EveryOther:
    """A judge that calls every second text positive."""

    def is_positive(self, texts: list[str]) -> np.ndarray:
        return np.arange(len(texts)) % 2 == 0


@pytest.fixture
def bench(tiny_model, tokenizer, reviews, tmp_path, monkeypatch) -> Bench:
    """A bench on the tiny model; each load of the base is a fresh copy."""
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("LAB_DEVICE", "cpu")
    parts = DatasetDict({name: Dataset.from_list(reviews) for name in ("pretrain", "adapter", "validation", "test")})
    monkeypatch.setattr(comparison, "load_reviews", lambda profile: parts)
    for module in (ablations, comparison, cost):
        monkeypatch.setattr(module, "load_base", lambda profile: (copy.deepcopy(tiny_model), tokenizer))
    monkeypatch.setattr(comparison, "load_judges", lambda profile, reviews: {"words": EveryOther()})
    profile = replace(
        PROFILES["mini"], block_length=16, batch_size=2, steps=2, eval_every=1, eval_blocks=2, train_reviews=8,
        samples_per_prompt=1, new_tokens=4,
    )  # fmt: skip
    return Bench(profile)
