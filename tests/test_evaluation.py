"""Judges kept as data, scores against slow references."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import moved
from datasets import Dataset, DatasetDict
from sklearn.linear_model import LogisticRegression

from utils import evaluation
from utils import judges as judges_module
from utils.adapters import AdapterError, attach
from utils.config import PROFILES
from utils.evaluation import (
    continuation_nats,
    diversity,
    evaluate_samples,
    fluency,
    held_out_loss,
    positivity,
    relevance,
)
from utils.generation import Sample, adapters_off, generate
from utils.judges import EvaluationError, Judge, cut_pieces, load_judges
from utils.metrics import Estimate, wilson_interval


@pytest.fixture(scope="session")
def corpus(reviews) -> tuple[list[str], list[int]]:
    return [row["text"] for row in reviews], [row["label"] for row in reviews]


@pytest.fixture
def samples(tiny_model, tokenizer) -> list[Sample]:
    """Texts of different lengths, one of them empty."""
    written = generate(tiny_model, tokenizer, ["I saw", "A dull and empty film is"], samples=4, new_tokens=12)
    return [replace(s, text=s.text[: 3 + 5 * i]) for i, s in enumerate(written)] + [Sample("I saw", "", 0)]


# Judges


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_judge_learns_and_reloads_bit_for_bit(corpus, kind, tmp_path):
    judge = Judge.fit(*corpus, kind)
    assert judge.accuracy(*corpus).value == 1.0
    judge.save(tmp_path / "kept")
    again = Judge.load(tmp_path / "kept")
    assert again.kind == kind and np.array_equal(again.probability(corpus[0]), judge.probability(corpus[0]))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["judge.safetensors"]


def test_probability_is_scikit_learns(corpus, judge):
    """The stored form (idf, weights, bias) gives what an estimator fitted in one go gives."""
    vectorizer = judges_module._vectorizer("words", min_df=3)
    model = LogisticRegression(C=judges_module.REGULARISATION, max_iter=300)
    model.fit(vectorizer.fit_transform(corpus[0]), corpus[1])
    unseen = ["a superb and funny film", "wooden and dull", "nothing known here: qwerty", ""]
    expected = model.predict_proba(vectorizer.transform(unseen))[:, 1]
    assert judge.probability(unseen) == pytest.approx(expected, abs=1e-5)
    assert judge.is_positive(unseen[:2]).tolist() == [True, False] and len(judge.probability([])) == 0


def test_accuracy_on_the_first_words(judge):
    assert judge.accuracy(["dull film but superb superb superb"], [0], first_words=2).value == 1
    assert judge.accuracy(["dull film but superb superb superb"], [0]).value == 0


def test_pieces_cover_the_text_except_a_short_rest():
    words = [str(i) for i in range(145)]
    pieces = cut_pieces(" ".join(words), 60)
    assert [len(piece.split()) for piece in pieces] == [60, 60]
    assert [len(piece.split()) for piece in cut_pieces(" ".join([*words, *words[:10]]), 60)] == [60, 60, 35]
    assert cut_pieces("too short") == ["too short"] and cut_pieces("") == [""]


def test_a_judge_needs_two_labels_and_a_known_kind(corpus):
    with pytest.raises(EvaluationError, match="both labels"):
        Judge.fit(["good", "fine"], [1, 1])
    with pytest.raises(EvaluationError, match="'sentences': choose from words, characters"):
        Judge.fit(*corpus, "sentences")


def broken(path, how: str) -> None:
    """Damage a stored judge."""
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "nan":
        path.write_bytes(whole[:-8] + np.array([np.nan], "<f4").tobytes() * 2)
    else:
        path.write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"not a judge" * 9}[how])


@pytest.mark.parametrize("how", ["missing", "cut off", "empty", "text", "nan"])
def test_unusable_files_are_named(judge, tmp_path, how):
    judge.save(tmp_path)
    broken(tmp_path / "judge.safetensors", how)
    with pytest.raises(EvaluationError, match=r"no usable judge at .*judge\.safetensors"):
        Judge.load(tmp_path)


def test_judges_are_fitted_once_per_data_and_again_when_damaged(reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path))
    fits = []
    fit = Judge.fit.__func__
    monkeypatch.setattr(Judge, "fit", classmethod(lambda cls, *a: fits.append(a[2]) or fit(cls, *a)))
    other = [{"text": "never read", "label": 1}]
    data = DatasetDict(pretrain=Dataset.from_list(reviews), adapter=Dataset.from_list(other))
    first = load_judges(PROFILES["mini"], data)
    assert list(first) == fits == ["words", "characters"]
    load_judges(PROFILES["mini"], data)
    assert len(fits) == 2, "cached"
    data["adapter"] = Dataset.from_list(other * 2)
    load_judges(PROFILES["mini"], data)
    assert len(fits) == 2, "no other part matters"
    path = next(tmp_path.rglob("words-*/judge.safetensors"))
    broken(path, "cut off")
    with pytest.warns(UserWarning, match="is damaged"):
        again = load_judges(PROFILES["mini"], data)
    assert fits[2:] == ["words"] and np.array_equal(again["words"].weights, first["words"].weights)
    data["pretrain"] = Dataset.from_list(reviews[1:])
    load_judges(PROFILES["mini"], data)
    assert fits[3:] == ["words", "characters"], "other reviews, other judges"


# Scores of samples


def slow_nats(model, tokenizer, context: list[int], text: str) -> tuple[float, int]:
    """-log p(text | context) one token and one forward pass at a time."""
    ids, nats = list(context), 0.0
    continuation = tokenizer(text)["input_ids"]
    for token in continuation:
        nats -= torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)[token].item()
        ids.append(token)
    return nats, len(continuation)


def test_fluency_and_relevance_equal_a_slow_reference(tiny_model, tokenizer, samples):
    told = [slow_nats(tiny_model, tokenizer, tokenizer(s.prompt)["input_ids"], s.text) for s in samples if s.text]
    alone = [slow_nats(tiny_model, tokenizer, [tokenizer.eos_token_id], s.text) for s in samples if s.text]
    tokens = sum(n for _, n in told)
    perplexity = math.exp(sum(nats for nats, _ in told) / tokens)
    information = (sum(nats for nats, _ in alone) - sum(nats for nats, _ in told)) / tokens
    assert fluency(samples, tiny_model, tokenizer).value == pytest.approx(perplexity, rel=1e-5)
    assert relevance(samples, tiny_model, tokenizer).value == pytest.approx(information, abs=1e-5)
    nats, counts = continuation_nats(samples, tiny_model, tokenizer, batch_size=3)
    assert nats == pytest.approx([value for value, _ in told], abs=1e-4) and counts.tolist() == [n for _, n in told]


def test_the_scores_do_not_depend_on_how_many_positions_the_head_sees_at_a_time(
    tiny_model, tokenizer, samples, monkeypatch
):
    whole = continuation_nats(samples, tiny_model, tokenizer)[0]
    monkeypatch.setattr(evaluation, "POSITIONS", 7)
    assert continuation_nats(samples, tiny_model, tokenizer)[0] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("pass_the", ["wrapper", "base"])
def test_the_base_is_scored_without_its_adapters(tiny_model, tokenizer, samples, pass_the):
    """peft writes into the model it is given, so that `base` itself carries the adapter afterwards."""
    bare = fluency(samples, tiny_model, tokenizer)
    adapted = moved(attach(tiny_model, "ia3"))
    flags = [p.requires_grad for p in adapted.parameters()]
    ids = torch.tensor([[5, 6, 7]])
    logits = adapted(ids).logits
    scored = adapted if pass_the == "wrapper" else tiny_model
    assert fluency(samples, scored, tokenizer) == bare
    assert torch.equal(adapted(ids).logits, logits), "adapter on again"
    assert [p.requires_grad for p in adapted.parameters()] == flags
    with adapters_off(adapted), adapters_off(tiny_model):
        assert not torch.equal(tiny_model(ids).logits, logits)


def test_a_base_with_a_merged_adapter_is_refused(tiny_model, tokenizer, samples):
    moved(attach(tiny_model, "ia3")).merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        fluency(samples, tiny_model, tokenizer)


def test_too_long_or_without_context_is_named(tiny_model, tokenizer):
    with pytest.raises(EvaluationError, match=r"context and \d+ of text in 'I saw.*at most 64"):
        fluency([Sample("I saw", " qx" * 80, 0)], tiny_model, tokenizer)
    with pytest.raises(EvaluationError, match="0 tokens of context"):
        fluency([Sample("", "this film", 0)], tiny_model, tokenizer)


def test_positivity_counts_what_can_be_judged(judge):
    texts = [" a superb and funny film", " wooden acting, dull", " superb", "", "  "]
    found = positivity([Sample("I saw", text, 0) for text in texts], judge)
    assert found == wilson_interval(2, 3)
    with pytest.raises(EvaluationError, match="all 2 continuations are empty"):
        positivity([Sample("I saw", text, 0) for text in texts[3:]], judge)


def test_diversity_equals_a_slow_reference():
    """Loops and counters; the third text repeats itself and its 4-gram "so so so so" twice."""
    texts = {0: ["a dull film, a Dull end", "the end"], 1: ["so so so so so so", "it's a film it's a film"]}
    samples = [Sample("p", text, index) for index, group in texts.items() for text in group]

    def grams(text, n):
        words = text.lower().replace(",", "").split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    found = diversity(samples)
    for n in (1, 2):
        shares = []
        for group in texts.values():
            every = [gram for text in group for gram in grams(text, n)]
            shares.append(len(Counter(every)) / len(every))
        assert found[f"distinct_{n}"].value == pytest.approx(sum(shares) / 2) and found[f"distinct_{n}"].n == 2
    repeats = total = 0
    for sample in samples:
        seen = set()
        for gram in grams(sample.text, 4):
            repeats, total = repeats + (gram in seen), total + 1
            seen.add(gram)
    assert repeats == 2 and found["repeated_4grams"].value == pytest.approx(repeats / total)


def test_texts_too_short_for_ngrams_repeat_nothing():
    found = diversity([Sample("p", " film", 0), Sample("p", " ...", 1)])
    assert found["distinct_1"].value == 1 and found["distinct_1"].n == 1
    assert found["distinct_2"] == Estimate(1.0, 0.0, 1.0, 0) and found["repeated_4grams"] == Estimate(0.0, 0.0, 1.0, 0)


def test_everything_in_one_call(tiny_model, tokenizer, samples, judge, corpus):
    judges = {"words": judge, "characters": Judge.fit(*corpus, "characters")}
    scores = evaluate_samples(samples, judges, tiny_model, tokenizer)
    assert scores["positivity"] == positivity(samples, judge)
    assert scores["positivity_chars"] == positivity(samples, judges["characters"])
    assert scores["perplexity"] == fluency(samples, tiny_model, tokenizer)
    assert scores["relevance"] == relevance(samples, tiny_model, tokenizer)
    assert scores["empty"] == wilson_interval(1, 9)
    assert all(scores[name] == value for name, value in diversity(samples).items())
    assert all(score.low <= score.value <= score.high for score in scores.values())


# Held-out loss


def test_held_out_loss_is_the_mean_over_predicted_tokens(tiny_model):
    ids = torch.randint(0, 300, (7, 16), generator=torch.Generator().manual_seed(0))
    blocks = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")
    tiny_model.train()
    found = held_out_loss(tiny_model, blocks, batch_size=3)
    assert tiny_model.training and found.n == 7 and found.low < found.value < found.high
    tiny_model.eval()
    expected = tiny_model(input_ids=ids, labels=ids).loss.item()
    assert found.value == pytest.approx(expected, rel=1e-5)


def test_held_out_loss_skips_masked_labels(tiny_model):
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :12] = -100
    blocks = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")
    assert held_out_loss(tiny_model, blocks).value == pytest.approx(
        tiny_model(input_ids=ids, labels=labels).loss.item(), rel=1e-5
    )
    with pytest.raises(ValueError, match="nothing to average"):
        held_out_loss(tiny_model, blocks.select([]))


def test_a_shipped_judge_is_taken_before_one_is_fitted(monkeypatch, tmp_path, reviews):
    part = {"pretrain": Dataset.from_list(reviews)}
    texts, labels = part["pretrain"]["text"], part["pretrain"]["label"]
    monkeypatch.setattr(judges_module, "ASSETS", tmp_path / "assets")
    monkeypatch.setenv("LAB_ARTIFACTS", str(tmp_path / "artifacts"))
    for kind, name in judges_module.judge_names(texts, labels).items():
        Judge.fit(texts, labels, kind).save(tmp_path / "assets" / "judges" / name)
    monkeypatch.setattr(Judge, "fit", lambda *_: pytest.fail("fitted"))
    assert set(load_judges(PROFILES["mini"], part)) == set(judges_module.VECTORIZERS)
