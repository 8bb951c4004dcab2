"""Fixtures shared by all tests: a GPT-2 of two layers, a small real tokenizer, a few hand-made reviews."""

from __future__ import annotations

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

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
