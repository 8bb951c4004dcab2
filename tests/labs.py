"""What the tests of the optional labs share: small models of the three architectures, real data where it is there."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import BertWordPieceTokenizer, SentencePieceBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from extensions.models import bloom_tokenizer, build_model
from extensions.recipes import DATA_FOLDERS, RECIPES, Recipe, with_data
from utils.config import ROOT
from utils.data import read_packaged_reviews

DATA = ROOT.parent / "shared" / "data"
SHAPES = {
    "bert-paraphrase": {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "mt0-sentiment": {
        "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    },
    "bloom-chinese-instructions": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def tiny(lab: str, **changes: object) -> Recipe:
    """The lab's mini recipe on a model of two layers, with a few steps to train."""
    small = {
        "shape": SHAPES[lab], "model": f"tiny-{lab}", "batch_size": 4, "accumulation": 1, "epochs": 2,
        "evals_per_epoch": 1,
    }  # fmt: skip
    return replace(RECIPES[lab]["mini"], **(small | changes))


def tiny_model(recipe: Recipe) -> torch.nn.Module:
    """Its model, with weights wide enough apart that factors show."""
    model = build_model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def real(lab: str) -> Recipe:
    """The lab's mini recipe on its real data; skips the test where they are not on this computer."""
    folder = DATA / DATA_FOLDERS[lab]
    if not folder.is_dir():
        pytest.skip(f"no real data for {lab}: {folder.relative_to(ROOT.parent)} is not there")
    return with_data(RECIPES[lab]["mini"], Path(folder))


ENTRIES = 1024


def made_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the rules of "bert", "t5", "mt5" or "bloom", trained on the course's own texts."""
    return {"bert": _bert, "t5": _t5, "mt5": _t5, "bloom": bloom_tokenizer}[model_type]()


@cache
def _sentences() -> list[str]:
    return [row["text"] for row in read_packaged_reviews(source="rotten_tomatoes")]


def _bert() -> PreTrainedTokenizerFast:
    """Word pieces, lower case: every character, alone and inside a word, and the most frequent words. [CLS] a [SEP] b
    [SEP]. (The library's own training of word pieces gives other ones each time.)"""
    text = " ".join(_sentences()).lower()
    characters = sorted(set(text) - {" "})
    words = Counter(re.findall(r"\w+", text))
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *frequent]
    pieces = BertWordPieceTokenizer({entry: number for number, entry in enumerate(entries[:ENTRIES])})
    ends = {name: pieces.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    pieces.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ends.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _t5() -> PreTrainedTokenizerFast:
    """Pieces of words with a mark for the space before them; a text ends with </s>. Ids as T5's: pad 0, end 1."""
    pieces = SentencePieceBPETokenizer()
    special = ["<pad>", "</s>", "<unk>"]
    texts = _sentences() + ["negative neutral positive"] * 1000  # short label texts, as in a real vocabulary
    pieces.train_from_iterator(texts, vocab_size=ENTRIES, special_tokens=special, show_progress=False)
    pieces.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
