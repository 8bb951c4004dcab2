"""Small tokenizers with the rules of BERT, T5 and BLOOM, trained on text that comes with the course.

For: a model without a tokenizer of its own (`standins.py`): BLOOM's small stand-in, and the random models that stand in
where a package is not installed. Always the same one for the same text. Not for: a pretrained model, which has its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache

from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, SentencePieceBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from extensions.instructions import made_instructions
from utils.data import read_packaged_reviews

ENTRIES = 1024


def made_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `ENTRIES` entries for "bert", "t5" or "mt5" (on film reviews), "bloom" (on the made instructions).

    Raises KeyError for another type.
    """
    return MADE[model_type]()


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


def _bloom() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, Chinese characters that are not in the vocabulary as their bytes."""
    texts = [" ".join(row.values()) for row in made_instructions("sentence")]
    pieces = ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces.train_from_iterator(texts, vocab_size=ENTRIES, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


MADE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {"bert": _bert, "t5": _t5, "mt5": _t5, "bloom": _bloom}
