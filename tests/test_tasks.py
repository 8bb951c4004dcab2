"""The labs' data, their encoding and their scores, on made rows and on the real files where they are there."""

import collections
import importlib.metadata
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from labs import made_tokenizer, real, tiny, tiny_model
from sklearn.metrics import f1_score

from extensions import tasks
from extensions.encoding import IGNORED, encode, instruction_prompt, make_collator
from extensions.instructions import made_instructions
from extensions.recipes import RECIPES, with_data
from extensions.scoring import accuracy, class_logits, confusion, exact_match, f1, label_scores, normal, write_texts
from extensions.tasks import load_task, scored_pairs, split_rows
from utils.config import HubError
from utils.data import DataError
from utils.judges import EvaluationError

LABS = tuple(RECIPES)
BERT, MT0, BLOOM = (RECIPES[lab]["mini"] for lab in LABS)


@pytest.fixture(scope="module")
def t5():
    return made_tokenizer("t5")


@pytest.fixture(scope="module")
def bloom():
    return made_tokenizer("bloom")


def texts(parts: DatasetDict, columns: tuple[str, ...]) -> dict[str, set]:
    return {name: set(zip(*(rows[column] for column in columns), strict=True)) for name, rows in parts.items()}


# --- real data ----------------------------------------------------------------------------------------------------


def test_mrpc_keeps_glues_own_split():
    parts = load_task(real("bert-paraphrase"))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 3668, "validation": 408}
    assert sum(parts["validation"]["label"]) == 279 and set(parts["train"]["label"]) == {0, 1}


def test_phrasebank_is_split_by_sentence_and_each_label_alike():
    parts = load_task(real("mt0-sentiment"))
    rows = [row for part in parts.values() for row in part]
    assert len(rows) == 2264
    assert collections.Counter(row["target"] for row in rows) == {"neutral": 1391, "positive": 570, "negative": 303}
    where = {}
    for name, part in parts.items():
        for row in part:
            assert where.setdefault(row["text"], name) == name
    assert len(where) == 2259  # five repeats, each on one side
    for name, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert len(parts[name]) / 2264 == pytest.approx(share, abs=0.01)
        assert parts[name]["target"].count("neutral") / len(parts[name]) == pytest.approx(1391 / 2264, abs=0.02)


def test_chinese_instructions_are_read_whole_and_no_question_is_on_two_sides(bloom):
    recipe = real("bloom-chinese-instructions")
    parts = load_task(replace(recipe, eval_examples=0))
    assert sum(map(len, parts.values())) == 2515
    sides = texts(parts, ("instruction", "input"))
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"]
    encoded = encode(recipe, parts["validation"].select(range(50)), bloom)
    assert all(any(label != IGNORED for label in labels) for labels in encoded["labels"])
    assert max(map(len, encoded["input_ids"])) <= recipe.max_length


def test_real_sentences_fit_their_encoders(t5):
    encoded = encode(replace(real("mt0-sentiment"), max_length=200), load_task(real("mt0-sentiment"))["test"], t5)
    assert all(ids[-1] == t5.eos_token_id for ids in encoded["input_ids"])
    pairs = encode(real("bert-paraphrase"), load_task(real("bert-paraphrase"))["validation"], made_tokenizer("bert"))
    assert set(pairs["labels"]) == {0, 1} and max(map(len, pairs["input_ids"])) <= 128


# --- mini data ----------------------------------------------------------------------------------------------------


def test_sentence_pairs_of_the_benchmark_without_mrpc():
    try:
        importlib.metadata.version(tasks.STS.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{tasks.STS.package} is not installed: make env-extensions")
    parts = load_task(replace(BERT, train_examples=0, eval_examples=0))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 3630, "validation": 1016, "test": 925}
    assert all(0.15 < np.mean(rows["label"]) < 0.35 for rows in parts.values())
    assert all(row["sentence1"] and row["sentence2"] for rows in parts.values() for row in rows)


def test_scores_become_classes_and_mrpcs_sentences_stay_out():
    line = "main-news\t{}\t2012test\t0001\t{}\tA plane takes off.\tAn air plane takes off."
    text = "\n".join(line.format(*given) for given in (("MSRvid", 4), ("MSRvid", 3.9), ("MSRvid", 2.9), ("MSRpar", 5)))
    assert [row["label"] for row in scored_pairs(text)] == [1, 0]


def test_rotten_tomatoes_sentences_and_the_limits_of_a_recipe():
    parts = load_task(MT0)
    assert (len(parts["train"]), len(parts["validation"])) == (MT0.train_examples, MT0.eval_examples)
    whole = load_task(replace(MT0, train_examples=0, eval_examples=0))
    assert sum(map(len, whole.values())) == 8530
    assert whole["test"]["target"].count("positive") == pytest.approx(len(whole["test"]) / 2, abs=1)
    assert parts["train"].to_list() == whole["train"].to_list()[: MT0.train_examples]
    assert load_task(replace(MT0, seed=1))["train"].to_list() != parts["train"].to_list()


def test_instructions_of_our_own_making_are_right_and_in_two_manners():
    plain, sentence = made_instructions("plain"), made_instructions("sentence")
    assert len(plain) == len({(row["instruction"], row["input"]) for row in plain}) > 400
    assert len(json.dumps(plain, ensure_ascii=False).encode()) < 100_000
    for row, other in zip(plain, sentence, strict=True):
        assert other == row | {"output": f"答案是{row['output']}。"}
    answers = {(row["instruction"], row["input"]): row["output"] for row in plain}
    assert answers["计算下面的加法。", "7+9"] == "16" and answers["写出“大”的反义词。", ""] == "小"
    assert answers["星期日的后一天是星期几？", ""] == "星期一" and answers["把下面的词翻译成英语。", "苹果"] == "apple"
    for (instruction, given), answer in answers.items():
        if instruction == "把下面的数字从小到大排列。":
            assert answer.split() == sorted(given.split())
    parts = load_task(BLOOM)
    assert len(parts["base"]) == 2 * len(plain) and not any("答案" in text for text in parts["train"]["output"])
    with pytest.raises(KeyError):
        made_instructions("rude")


def test_a_split_depends_on_the_seed_and_the_rows_alone():
    rows = [{"text": f"Sentence {i // 2}", "target": "ab"[i % 3 == 0]} for i in range(200)]
    options = {"key": lambda row: row["text"], "stratum": lambda row: row["target"]}
    parts = split_rows(rows, **options, seed=0)
    assert parts == split_rows(rows[::-1], **options, seed=0) != split_rows(rows, **options, seed=1)
    assert sum(map(len, parts.values())) == 200
    spaced = [{"text": "One  two", "target": "a"}, {"text": "one TWO", "target": "b"}] * 10
    assert sorted(map(len, split_rows(spaced, **options, seed=0).values())) == [0, 0, 20]


# --- reading what is broken ---------------------------------------------------------------------------------------


def test_a_broken_json_line_is_named_with_its_file(tmp_path):
    good = '{"sentence1": "a", "sentence2": "b", "label": 1}\n'
    (tmp_path / "validation.jsonl").write_text(good, encoding="utf-8")
    recipe = with_data(BERT, tmp_path)
    for line, words in (
        ('{"sentence1": "a", ', r"train\.jsonl, line 3: not valid JSON"),
        ("[1, 2]\n", r"train\.jsonl, line 3: an object is due"),
        ('{"sentence1": "a", "label": 1}', r"train, row 3: no sentence2 in it; it has sentence1, label"),
    ):
        (tmp_path / "train.jsonl").write_text(good + good + line, encoding="utf-8")
        with pytest.raises(DataError, match=words):
            load_task(recipe)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl is missing.*LAB_DATA_DIR"):
        load_task(recipe)


def test_broken_instruction_files(tmp_path):
    recipe = with_data(BLOOM, tmp_path)
    with pytest.raises(DataError, match="no .json or .jsonl file"):
        load_task(recipe)
    path = tmp_path / "alpaca.json"
    for text, words in (
        ('[{"instruction": "x"', r"alpaca\.json: not valid JSON.*line 1"),
        ('{"instruction": "x"}', r"alpaca\.json: a list of objects is due"),
        ('[{"instruction": "x", "input": ""}]', r"alpaca\.json, row 1: no output"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=words):
            load_task(recipe)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not in UTF-8"):
        load_task(recipe)


def test_phrasebank_in_either_encoding_as_text_or_archive(tmp_path):
    recipe = with_data(MT0, tmp_path)
    with pytest.raises(DataError, match=r"Sentences_AllAgree\.txt is missing"):
        load_task(recipe)
    lines = "Säles rose @ 5 %@positive\nIt is in Oulu .@neutral\n"
    for encoding in ("utf-8", "latin-1"):
        (tmp_path / "Sentences_AllAgree.txt").write_bytes(lines.encode(encoding))
        rows = [row for part in load_task(recipe).values() for row in part]
        assert {"text": "Säles rose @ 5 %", "target": "positive"} in rows
    with zipfile.ZipFile(tmp_path / "bank.zip", "w") as archive:
        archive.writestr("FinancialPhraseBank-v1.0/Sentences_AllAgree.txt", lines.encode("latin-1"))
    assert tasks.read_phrases(tmp_path / "bank.zip")[0]["text"] == "Säles rose @ 5 %"
    (tmp_path / "bank.zip").write_bytes(b"PK no archive")
    with pytest.raises(DataError, match=r"bank\.zip is damaged"):
        tasks.read_phrases(tmp_path / "bank.zip")
    (tmp_path / "Sentences_AllAgree.txt").write_text("no label here\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: sentence@label is due"):
        load_task(recipe)


@pytest.mark.parametrize("lab", LABS)
def test_without_a_network_the_full_data_say_how_to_get_them(lab, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"(?s){lab}-full.*HF_HOME.*LAB_DATA_DIR"):
        load_task(RECIPES[lab]["full"])


@pytest.mark.parametrize("lab", LABS)
def test_the_hubs_files_give_the_same_rows(lab, monkeypatch, tmp_path):
    """What `recipe_files` hands over, in the layout of each repository."""
    recipe, files = RECIPES[lab]["full"], []
    if lab == "bert-paraphrase":
        rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(4)]
        for part in ("train", "validation"):
            files.append(tmp_path / f"{part}-00000-of-00001.parquet")
            Dataset.from_list(rows).to_parquet(files[-1])
    elif lab == "mt0-sentiment":
        files.append(tmp_path / "bank.zip")
        with zipfile.ZipFile(files[-1], "w") as archive:
            archive.writestr("v1/Sentences_AllAgree.txt", "Sales rose .@positive\nSales fell .@negative\n")
    else:
        files.append(tmp_path / "alpaca_data_zh_51k.json")
        files[-1].write_text(json.dumps([{"instruction": "问", "input": "", "output": "答"}] * 3), encoding="utf-8")
    monkeypatch.setattr(tasks, "recipe_files", lambda recipe, *patterns: files)
    parts = load_task(recipe)
    assert sum(map(len, parts.values())) == {"bert-paraphrase": 8, "mt0-sentiment": 2}.get(lab, 3)


# --- encoding -----------------------------------------------------------------------------------------------------


def test_instructions_learn_the_answer_and_its_end_and_nothing_else(bloom):
    row = {"instruction": "计算下面的加法。", "input": "3+4", "output": "答案是7。"}
    example = encode(BLOOM, Dataset.from_list([row]), bloom)[0]
    assert bloom.decode(example["input_ids"]) == "Human: 计算下面的加法。\n3+4\n\nAssistant: 答案是7。</s>"
    learned = [label for label in example["labels"] if label != IGNORED]
    assert bloom.decode(learned) == "答案是7。</s>"
    assert example["labels"][-len(learned) :] == example["input_ids"][-len(learned) :]
    assert instruction_prompt(BLOOM, {"instruction": " 你好。 ", "input": ""}) == "Human: 你好。\n\nAssistant: "
    batch = make_collator(BLOOM, bloom)([example, {**example, **{k: v[-5:] for k, v in example.items()}}])
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_a_long_answer_loses_its_end_and_says_so_a_long_prompt_is_left_out(bloom, capsys):
    rows = [
        {"instruction": "写", "input": "", "output": "龘" * 60},
        {"instruction": "写" * 90, "input": "", "output": "苹果"},
        {"instruction": "写", "input": "", "output": "好"},
    ]
    encoded = encode(BLOOM, Dataset.from_list(rows), bloom)
    assert [len(ids) for ids in encoded["input_ids"]][0] == BLOOM.max_length and len(encoded) == 2
    assert encoded[0]["input_ids"][-1] != bloom.eos_token_id  # a cut is no end
    assert encoded[1]["input_ids"][-1] == bloom.eos_token_id
    out = capsys.readouterr().out
    assert "1 of 3 examples shortened to 96 tokens" in out and "1 of 3 left out" in out
    with pytest.raises(DataError, match="none of 1 examples fits"):
        encode(BLOOM, Dataset.from_list(rows[1:2]), bloom)


def test_text_to_text_ends_both_sides_and_never_cuts_the_prompt(t5, capsys):
    rows = [{"text": "a dull film", "target": "negative"}, {"text": "a warm film " * 60, "target": "positive"}]
    encoded = encode(MT0, Dataset.from_list(rows), t5)
    assert all(ids[-1] == t5.eos_token_id for column in ("input_ids", "labels") for ids in encoded[column])
    assert t5.decode(encoded[0]["labels"], skip_special_tokens=True) == "negative"
    long = encoded[1]["input_ids"]
    assert MT0.max_length - 3 <= len(long) <= MT0.max_length and "1 of 2 examples shortened" in capsys.readouterr().out
    assert long[-8:] == encoded[0]["input_ids"][-8:]  # the end of the question
    batch = make_collator(MT0, t5)(list(encoded))
    assert (batch["input_ids"][0][batch["attention_mask"][0] == 0] == t5.pad_token_id).all()
    uneven = [{**encoded[0], "labels": encoded[0]["labels"][-1:]}, encoded[1]]
    assert make_collator(MT0, t5)(uneven)["labels"][0, 1:].eq(IGNORED).all()


def test_pairs_carry_both_sentences_and_their_class():
    tokenizer = made_tokenizer("bert")
    rows = Dataset.from_list([{"sentence1": "a film", "sentence2": "the film", "label": 1}])
    example = encode(BERT, rows, tokenizer)[0]
    assert tokenizer.decode(example["input_ids"]) == "[CLS] a film [SEP] the film [SEP]" and example["labels"] == 1
    assert example["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert make_collator(BERT, tokenizer)([example])["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("lab", "row", "words"),
    [
        ("mt0-sentiment", {"text": "a film", "target": "mixed"}, "row 0: unknown label 'mixed': choose from negative"),
        ("mt0-sentiment", {"text": " ", "target": "negative"}, "row 0: the text is empty"),
        ("bert-paraphrase", {"sentence1": "a", "sentence2": "b", "label": 2}, "unknown label 2: labels are 0 to 1"),
        ("bert-paraphrase", {"sentence1": "a", "sentence2": "", "label": 1}, "the sentence2 is empty"),
        ("bloom-chinese-instructions", {"instruction": "\n", "input": "x", "output": "y"}, "the instruction is empty"),
        ("bloom-chinese-instructions", {"instruction": "x", "input": "", "output": ""}, "the output is empty"),
    ],
)
def test_bad_rows_are_named(lab, row, words):
    recipe = RECIPES[lab]["mini"]
    with pytest.raises(DataError, match=words):
        encode(recipe, Dataset.from_list([row]), made_tokenizer(recipe.model_type))


def test_label_texts_and_prompts_that_are_too_long(t5):
    rows = Dataset.from_list([{"text": "a film", "target": "negative"}])
    with pytest.raises(DataError, match=r"'negative' has \d tokens with its end, more than label_length=1"):
        encode(replace(MT0, label_length=1), rows, t5)
    with pytest.raises(DataError, match="the prompt alone fills max_length=5"):
        encode(replace(MT0, max_length=5), rows, t5)


# --- scores -------------------------------------------------------------------------------------------------------


def test_f1_is_scikit_learns_and_exact_match_forgives_case_spaces_and_a_full_stop():
    rng = np.random.default_rng(0)
    actual, predicted = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    found = f1(predicted, actual)
    assert found.value == pytest.approx(f1_score(actual, predicted)) and found == f1(predicted, actual)
    assert found.low < found.value < found.high and found.n == 200
    assert f1(["a", "b"], ["a", "b"], positive="b").value == 1
    assert accuracy([1, 0, 1, 1], [1, 0, 0, 1]).value == 0.75
    with pytest.raises(EvaluationError, match="no value"):
        f1([0, 0], [0, 0])
    for wrong in (([1], [1, 0]), ([], [])):
        with pytest.raises(EvaluationError, match="give one for each"):
            accuracy(*wrong)
    assert normal(" Positive . ") == "positive" and normal("答案是7。") == "答案是7"
    assert exact_match(["Positive.", "negative", "pos"], ["positive", "positive", "positive"]).value == pytest.approx(
        1 / 3
    )


def test_a_classifier_and_a_writer_are_batched_without_changing_what_they_say(t5, tokenizer):
    recipe = tiny("bert-paraphrase")
    rows = [{"input_ids": list(range(5, 8 + i)), "attention_mask": [1] * (3 + i), "labels": 0} for i in range(5)]
    model, examples = tiny_model(recipe), Dataset.from_list(rows)
    together = class_logits(model, recipe, examples, tokenizer, batch_size=3)
    assert np.allclose(together, class_logits(model, recipe, examples, tokenizer, batch_size=1), atol=1e-5)
    recipe = tiny("mt0-sentiment")
    model, examples = tiny_model(recipe), examples.map(lambda row: {"labels": [5, 1]}, remove_columns="labels")
    written = write_texts(model, recipe, examples, t5, batch_size=2)
    assert written == write_texts(model, recipe, examples, t5, batch_size=5) and len(written) == 5


def test_the_confusion_table_counts_what_is_no_label_apart_and_its_shares_are_scores():
    written, wanted = ["Positive.", "pos", "negative", "neutral"], ["positive", "positive", "positive", "neutral"]
    labels = ("negative", "neutral", "positive")
    assert confusion(written, wanted, labels).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1]]
    with pytest.raises(EvaluationError, match="'mixed' is wanted and is no label"):
        confusion(["positive"], ["mixed"], labels)
    with pytest.raises(EvaluationError, match="give one for each"):
        confusion(["positive"], [], labels)
    scores = label_scores(written, wanted, labels)
    assert list(scores) == ["exact_match", "no_label", "found_neutral", "found_positive"]
    assert scores["exact_match"] == exact_match(written, wanted)
    shares = [(0.5, 4), (0.25, 4), (1, 1), (pytest.approx(1 / 3), 3)]
    assert [(score.value, score.n) for score in scores.values()] == shares
