"""Rows of the optional labs in, token ids and labels out: pairs, text to text, instructions; and the batches of them.

Labels are -100 where nothing is to be predicted: at padding, and at the prompt of an instruction. Each way of getting
that wrong trains without an error: padding that is not masked teaches to write padding, a prompt that is not masked
spends the loss on the question, a missing end token teaches never to stop.
"""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from extensions.recipes import Recipe
from utils.data import DataError

IGNORED = -100
LEAST_ANSWER = 8  # tokens: an instruction that leaves its answer less room than this is left out


def encode(recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Columns input_ids, attention_mask and labels (and token_type_ids for pairs), one example a row, not padded.

    Prints one line where texts were shortened or left out. Raises DataError, naming the row, for an unknown label, a
    label text that is too long, an empty text, instruction or answer; and where no row is left.
    """
    one = ENCODERS[recipe.task_type]
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(one(recipe, row, tokenizer))
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
    kept = [example for example in examples if example["labels"] is not None]
    shortened = sum(example.pop("shortened") for example in kept)
    if shortened:
        print(f"{shortened:,} of {len(rows):,} examples shortened to {recipe.max_length} tokens")
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept):,} of {len(rows):,} left out: their prompt leaves no room for an answer")
    if not kept:
        raise DataError(f"none of {len(rows)} examples fits into {recipe.max_length} tokens: raise max_length")
    return Dataset.from_list(kept)


def encode_pair(recipe: Recipe, row: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Two sentences as one input, the longer one shortened first; the label is the number of a class."""
    first, second = _filled(row["sentence1"], "sentence1"), _filled(row["sentence2"], "sentence2")
    if row["label"] not in range(len(recipe.labels)):
        raise DataError(f"unknown label {row['label']!r}: labels are 0 to {len(recipe.labels) - 1}")
    whole = len(tokenizer(first, second, verbose=False)["input_ids"])
    encoded = tokenizer(first, second, truncation=True, max_length=recipe.max_length)
    return {**encoded, "labels": row["label"], "shortened": whole > recipe.max_length}


def encode_text_to_text(recipe: Recipe, row: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The text in the recipe's prompt, and the label's text; both end with the end token.

    A text that is too long loses its end, the prompt around it never does.
    """
    text, target = _filled(row["text"], "text"), row["target"]
    if recipe.labels and target not in recipe.labels:
        raise DataError(f"unknown label {target!r}: choose from {', '.join(recipe.labels)}")
    labels = ended(tokenizer, target)
    if len(labels) > recipe.label_length:
        raise DataError(
            f"the label text {target!r} has {len(labels)} tokens with its end, more than label_length="
            f"{recipe.label_length}: cut, it would teach another text. Raise label_length"
        )
    ids, shortened = prompt_ids(recipe, text, tokenizer)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "shortened": shortened}


def encode_instruction(recipe: Recipe, row: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Prompt, answer and end token in one row; what is trained on is the answer and its end.

    Too long a row is cut on the right: the answer loses its end, and the end token with it, so that the cut is not
    learned as an end. One whose answer would keep less than `LEAST_ANSWER` tokens has the labels None.
    """
    prompt = tokenizer(instruction_prompt(recipe, row), add_special_tokens=False, verbose=False)["input_ids"]
    answer = ended(tokenizer, _filled(row["output"], "output"))
    room = recipe.max_length - len(prompt)
    if room < min(LEAST_ANSWER, len(answer)):
        return {"labels": None}
    ids = prompt + answer[:room]
    labels = [IGNORED] * len(prompt) + answer[:room]
    return {
        "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "shortened": len(answer) > room,
    }  # fmt: skip


def instruction_prompt(recipe: Recipe, row: dict) -> str:
    """The recipe's prompt around the instruction and, on a line of its own, its input. Raises DataError for an empty
    instruction."""
    lines = [_filled(row["instruction"], "instruction").strip(), (row.get("input") or "").strip()]
    return recipe.prompt.replace("{text}", "\n".join(filter(None, lines)))


def prompt_ids(recipe: Recipe, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """Ids of the prompt around `text`, at most `max_length` with the end token, and whether the text was shortened."""
    ids = ended(tokenizer, recipe.prompt.replace("{text}", text))
    if len(ids) <= recipe.max_length:
        return ids, False
    pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    room = len(pieces) - (len(ids) - recipe.max_length)
    if room < 1:
        raise DataError(f"the prompt alone fills max_length={recipe.max_length} tokens: raise max_length")
    return prompt_ids(recipe, text[: pieces[room - 1][1]].rstrip(), tokenizer)[0], True


def ended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text` with one end token behind them, whether or not the tokenizer appends it itself."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _filled(text: object, column: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"the {column} is empty: leave the row out, or mend it")
    return text


def make_collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict]], dict]:
    """What pads a list of examples to a batch: transformers' own, which pads labels with -100."""
    if recipe.task_type == "SEQ_CLS":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)


ENCODERS: dict[str, Callable[..., dict]] = {
    "SEQ_CLS": encode_pair, "SEQ_2_SEQ_LM": encode_text_to_text, "CAUSAL_LM": encode_instruction,
}  # fmt: skip
