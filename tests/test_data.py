"""The split, the cleaning and the packing, on made-up text and on the 25,000 real reviews."""

import random

import pytest
from datasets import Dataset

import utils.data as data
from utils.config import PROFILES


def test_the_25000_reviews_split_into_disjoint_parts_without_html(real_reviews):
    rows = [row for part in real_reviews.values() for row in part]
    assert len(rows) == 25_000 and sum(row["label"] for row in rows) == 12_500
    seen: dict[str, str] = {}
    for part, found in real_reviews.items():
        assert len(found) / 25_000 == pytest.approx(data.PARTS[part], abs=0.01)
        assert all(seen.setdefault(row["text"], part) == part for row in found)
    assert len(rows) - len(seen) > 50  # there are duplicates in IMDB, so the line above did check something
    adapter = real_reviews["adapter"]
    assert min(sum(row["label"] == label for row in adapter) for label in (0, 1)) >= 3000
    text = " ".join(row["text"] for row in adapter)
    assert "<br" not in text and "&#" not in text and "\n" not in text
    stray = {character for character in text if "\x80" <= character <= "\x9f"}
    assert stray <= set("\x81\x8d\x8f\x90\x9d")  # the five bytes that Windows-1252 leaves undefined


def test_split_does_not_depend_on_order_or_label():
    rows = [{"text": f"review {i}", "label": i % 2} for i in range(500)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert data.split_reviews(rows) == data.split_reviews(shuffled)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Good.<br /><br />Bad.", "Good. Bad."),
        ("a &quot;b&quot; &amp; c", 'a "b" & c'),
        ("it\x92s \x96 fine\x85", "it’s – fine…"),
        ("<i>Alien</i>  and\n\tAliens", "Alien and Aliens"),
        ("3 < 5 and <3 stay", "3 < 5 and <3 stay"),
        ("", ""),
    ],
)
def test_clean_review(raw, clean):
    assert data.clean_review(raw) == clean


def test_a_wrong_or_missing_file_is_an_error_with_the_remedy(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label,source\ngood,1,imdb\n", encoding="utf-8")
    with pytest.raises(data.DataError, match=r"SHA-256.*pip install --force-reinstall"):
        list(data.read_packaged_reviews(path))
    with pytest.raises(data.DataError, match="pip install"):
        list(data.read_packaged_reviews(tmp_path / "none.csv"))


def test_pack_loses_only_the_tail_and_keeps_every_end_of_text():
    rng = random.Random(0)
    for _ in range(50):
        documents = [[rng.randint(1, 99) for _ in range(rng.randint(0, 30))] for _ in range(rng.randint(1, 20))]
        length = rng.randint(1, 40)
        blocks = data.pack(documents, length, eos_id=0)
        stream = [token for document in documents for token in [*document, 0]]
        assert [token for block in blocks for token in block] == stream[: len(blocks) * length]
        assert all(len(block) == length for block in blocks) and len(stream) - len(blocks) * length < length


def test_blocks_train_on_end_of_text_and_may_be_half_of_each_label(reviews, tokenizer):
    blocks = data.to_blocks(Dataset.from_list(reviews), tokenizer, 16)
    ids = blocks["input_ids"][:]
    labels = blocks["labels"][:]
    assert (ids[:, 1:] == labels[:, 1:]).all() and (labels[:, 0] == -100).all()
    ends = int((ids == tokenizer.eos_token_id).sum())
    assert len(reviews) - 1 <= ends <= len(reviews)  # one after each review; the last may be in the dropped tail
    text = tokenizer.decode([int(i) for i in ids.flatten()])
    assert text.startswith(reviews[0]["text"] + tokenizer.eos_token + reviews[1]["text"])
    with pytest.raises(data.DataError, match="do not fill one block"):
        data.to_blocks(Dataset.from_list(reviews[:1]), tokenizer, 64)
    blocks = data.balanced_blocks(Dataset.from_list(reviews), tokenizer, 16, limit=8)
    halves = [data.review_blocks(Dataset.from_list(reviews), label, tokenizer, 16, limit=4) for label in data.LABELS]
    assert len(blocks) == 8 and blocks["input_ids"][:].tolist() == [
        row for half in halves for row in half["input_ids"][:].tolist()
    ]


def test_select_reviews(reviews):
    chosen = data.select_reviews(Dataset.from_list(reviews), "positive", 5)
    assert chosen["label"] == [1] * 5
    assert data.select_reviews(chosen, "positive")["text"] == chosen["text"]
    with pytest.raises(data.DataError, match="unknown label"):
        data.select_reviews(chosen, "good", 1)
    with pytest.raises(data.DataError, match="has 5"):
        data.select_reviews(chosen, "positive", 6)


def test_load_reviews_keeps_a_copy_and_datasets_cache_works(monkeypatch, tmp_path, reviews, tokenizer):
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(data, "read_packaged_reviews", lambda: iter(reviews * 5))
    first = data.load_reviews(PROFILES["mini"])
    monkeypatch.setattr(data, "read_packaged_reviews", lambda: pytest.fail("read again"))
    second = data.load_reviews(PROFILES["mini"])
    assert {p: len(d) for p, d in first.items()} == {p: len(d) for p, d in second.items()}
    data.to_blocks(second["pretrain"], tokenizer, 16)
    folder = next(path for path in (tmp_path / "mini" / "reviews").iterdir() if path.is_dir())
    assert list((folder / "pretrain").glob("cache-*.arrow"))


def test_hub_parquet_gives_the_same_split(monkeypatch, tmp_path, reviews):
    file = tmp_path / "train-00000-of-00001.parquet"
    Dataset.from_list(reviews).to_parquet(file)
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(data, "hub_files", lambda *_: [file])
    parts = data.load_reviews(PROFILES["gpt2"])
    assert {part: rows.to_list() for part, rows in parts.items() if len(rows)} == {
        part: rows for part, rows in data.split_reviews(reviews).items() if rows
    }


def test_prompts_are_distinct_and_neutral():
    assert len(set(data.PROMPTS)) == 16
    assert not set(" ".join(data.PROMPTS).lower().split()) & {"good", "bad", "great", "love", "hate", "awful", "best"}
