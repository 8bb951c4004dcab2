"""Pretrain the embedded base model, `assets/mini-gpt2`, on the `pretrain` part of the reviews.

    python scripts/pretrain.py --epochs 3                 # one run; start it again to resume
    python scripts/pretrain.py --epochs 12 --width 320 --layers 6 --dropout 0.1   # for a GPU
    python scripts/pretrain.py --init assets/mini-gpt2 --more reviews --epochs 1  # go on from exported weights
    python scripts/pretrain.py --measure assets/mini-gpt2                         # bits a byte of exported weights

Makes the byte-level BPE tokenizer and a small `GPT2LMHeadModel` (Muon for the block matrices, AdamW
for the rest, linear warm-up and decay), checkpoints every few minutes under `build/pretrain`, and
resumes exactly: data order depends on seed and step alone, optimizer and RNG state are stored as
safetensors. `--export` writes the model of the last checkpoint. `--init` starts another run, perhaps on
another machine, from exported weights and their tokenizer; the record of the new run keeps that of the old.
`--more` adds text that only pretraining reads (`more_reviews.py` downloads the official test reviews).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
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

from more_reviews import official_test_reviews, split_by_film  # noqa: E402
from pretrain_card import model_card  # noqa: E402

from utils.data import CSV_PACKAGE, PROMPTS, pack, read_packaged_reviews, split_reviews, text_key  # noqa: E402
from utils.generation import generate  # noqa: E402
from utils.gpu import autocast, fast_bf16  # noqa: E402
from utils.session import reuse_freed_memory  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
HISTORY_EVERY = 50  # steps a row of the history
EVALUATE_EVERY = 250  # steps; on the first 128 blocks of "validation" and "unseen"


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
    pretrain_share: float = 1.0  # of the `pretrain` part: its first reviews (they are shuffled)
    more: str = ""  # what else is read: "reviews" (official test), "sentences" (Rotten Tomatoes), with a comma between
    init: str = ""  # what `--init` starts from: the first 12 digits of the weights' SHA-256


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


def start_from(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe of a run that goes on from the exported model in `folder`: sizes and vocabulary are the model's."""
    config = GPT2Config.from_pretrained(folder)
    return replace(
        recipe,
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        context=config.n_positions,
        vocabulary=config.vocab_size,
        init=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12],
    )


def build_optimizers(model: GPT2LMHeadModel, recipe: Recipe, bf16: bool) -> list[torch.optim.Optimizer]:
    """Muon for the 2-D matrices of the blocks, AdamW for embeddings, biases and norms."""
    if not bf16:
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


def precision(device: str, bf16: bool) -> contextlib.AbstractContextManager:
    """bfloat16 autocast, or float32."""
    return autocast(device) if bf16 else contextlib.nullcontext()


@torch.no_grad()
def bits_per_byte(
    model: GPT2LMHeadModel, blocks: torch.Tensor, bytes_of: torch.Tensor, device: str, bf16: bool
) -> float:
    """Sum of -log2 p over all predicted tokens, divided by the bytes they stand for (end-of-text: 0 bytes)."""
    model.eval()
    nats = 0.0
    for batch in blocks.split(32):
        batch = batch.to(device)
        with precision(device, bf16):
            logits = model(batch).logits[:, :-1]
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return nats / math.log(2) / bytes_of[blocks[:, 1:]].sum().item()


Optimizers = list[torch.optim.Optimizer]


def save_checkpoint(
    folder: Path,
    step: int,
    model: GPT2LMHeadModel,
    optimizers: Optimizers,
    history: list[dict],
    recent: list[float],
    recipe: Recipe,
) -> None:
    """Model, optimizer and RNG state to safetensors, step and losses to its JSON header; replaced atomically."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}/{name}": value for name, value in state.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    header = {"step": str(step), "recipe": json.dumps(asdict(recipe))}
    header |= {"history": json.dumps(history), "recent": json.dumps(recent)}
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
) -> tuple[int, list[dict], list[float]]:
    """Step, history and losses since its last row, as `save_checkpoint` stored them; (0, [], []) without one."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, [], []
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
    return int(header["step"]), json.loads(header["history"]), json.loads(header["recent"])


def read_texts(recipe: Recipe) -> dict[str, list[str]]:
    """Texts by part: "pretrain" (all that is trained on), "validation", "test", and "unseen" where `more` has reviews.

    "validation" and "test" are about films that are in "pretrain" too; "unseen" are official test reviews.
    """
    parts = {name: [row["text"] for row in rows] for name, rows in split_reviews(read_packaged_reviews()).items()}
    texts = {name: parts[name] for name in ("pretrain", "validation", "test")}
    extra = []
    if "reviews" in recipe.more:
        course = {text for part in parts.values() for text in part}
        extra, texts["unseen"] = split_by_film(official_test_reviews(), course)
    if "sentences" in recipe.more:
        extra = extra + [row["text"] for row in read_packaged_reviews(source="rotten_tomatoes")]
    texts["pretrain"] = texts["pretrain"][: round(recipe.pretrain_share * len(texts["pretrain"]))]
    if extra:
        texts["pretrain"] = sorted(texts["pretrain"] + extra, key=text_key)
    return texts


def prepare(
    recipe: Recipe, folder: Path, init: Path | None = None
) -> tuple[PreTrainedTokenizerFast, dict[str, torch.Tensor]]:
    """Tokenizer (that of `init`, if given; made once and kept in `folder`) and blocks (n, context) of each part."""
    texts = read_texts(recipe)
    if not (folder / "tokenizer.json").exists():
        if init is not None:
            PreTrainedTokenizerFast.from_pretrained(init).save_pretrained(folder)
        else:
            train_tokenizer(texts["pretrain"], recipe.vocabulary, recipe.context).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = {part: tokenizer(members, verbose=False)["input_ids"] for part, members in texts.items()}
    return tokenizer, {part: torch.tensor(pack(i, recipe.context, tokenizer.eos_token_id)) for part, i in ids.items()}


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(vocabulary,) UTF-8 bytes each token stands for; in byte-level BPE one symbol is one byte."""
    symbols = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if s == END_OF_TEXT else len(s) for s in symbols])


def load_exported(folder: Path) -> GPT2LMHeadModel:
    """The model in `folder` in float32, as it was exported."""
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)


def measure(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, blocks: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Bits per byte of every part that nothing trains on, in float32."""
    bytes_of, held_out = token_bytes(tokenizer), [part for part in blocks if part != "pretrain"]
    device = str(model.device)
    return {part: round(bits_per_byte(model, blocks[part], bytes_of, device, bf16=False), 4) for part in held_out}


def train(
    recipe: Recipe,
    folder: Path,
    save_every: float,
    compile_model: bool,
    init: Path | None = None,
    trial: int = 0,
) -> None:
    """Run or resume the pretraining; prints one line an evaluation, stops when all steps are done.

    With `trial` a run of that many steps, from warm-up to a rate of 0, that keeps no
    checkpoint and adds one line to `trials.jsonl` in `folder`, which `export` puts into the record; its bits per byte
    are those of the first 128 blocks of each part, before and after.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = fast_bf16(device)
    reuse_freed_memory()
    tokenizer, blocks = prepare(recipe, folder, init)
    bytes_of = token_bytes(tokenizer)
    per_epoch = len(blocks["pretrain"]) // recipe.batch
    total = trial or int(recipe.epochs * per_epoch)
    model = build_model(recipe, len(tokenizer)).to(device).train()
    if init is not None:
        model.load_state_dict(load_exported(init).state_dict())
    optimizers = build_optimizers(model, recipe, bf16)
    start, history, recent = (0, [], []) if trial else load_checkpoint(folder, model, optimizers, recipe, per_epoch)
    run = torch.compile(model) if compile_model else model
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    parameters, tokens = sum(p.numel() for p in model.parameters()), recipe.batch * recipe.context
    print(
        f"{parameters:,} parameters, {total:,} steps of {tokens:,} tokens ({per_epoch:,} an epoch) on {device}, "
        f"{'bfloat16' if bf16 else 'float32'}, from step {start:,}",
        flush=True,
    )

    def held_out(whole: bool) -> dict[str, float]:
        """Bits per byte of the validation part and of the unseen films: of all their blocks, or of the first 128."""
        parts = {
            part: blocks[part] if whole else blocks[part][:128] for part in ("validation", "unseen") if part in blocks
        }
        return {
            f"{part}_bits_per_byte": round(bits_per_byte(model, some, bytes_of, device, bf16), 4)
            for part, some in parts.items()
        }

    before = held_out(whole=False) if trial else {}
    saved = time.monotonic()
    for step in (bar := tqdm(range(start, total), initial=start, total=total, mininterval=10)):
        batch = batch_at(blocks["pretrain"], step, recipe).to(device)
        with precision(device, bf16):
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
                row |= held_out(whole=last and not trial)
                tqdm.write(json.dumps(row))
            history.append(row)
            bar.set_postfix(loss=row["loss"])
            recent = []
        if not trial and (last or time.monotonic() - saved > save_every):
            save_checkpoint(folder, step + 1, model, optimizers, history, recent, recipe)
            saved = time.monotonic()
    if trial:
        line = {"steps": trial, "recipe": asdict(recipe), "before": before, "after": history[-1]}
        with (folder / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def export(folder: Path, target: Path, init: Path | None = None) -> None:
    """Write the checkpoint in `folder` as float16 safetensors with tokenizer, run record and model card to `target`.

    What the run started from, `init`, gives its record and the samples that stand beside the new ones.
    """
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        header = file.metadata()
        made_with = Recipe(**{"muon_weight_decay": 0.0} | json.loads(header["recipe"]))  # older ones had none
        if made_with.init != (start_from(init, made_with).init if init is not None else ""):
            sys.exit(f"this run did not start from {init}: pass its own --init")
        tokenizer, blocks = prepare(made_with, folder, init)
        model = build_model(made_with, len(tokenizer))
        model.load_state_dict(
            {name: file.get_tensor(f"model/{name}") for name, _ in model.named_parameters()}, strict=False
        )
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    stored = load_exported(target)
    steps, tokens_per_step = int(header["step"]), made_with.batch * made_with.context
    record = {
        "recipe": asdict(made_with),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "epochs": round(steps * made_with.batch / len(blocks["pretrain"]), 3),
        "bits_per_byte": measure(stored, tokenizer, blocks),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", CSV_PACKAGE)},
        "history": json.loads(header["history"]),
    }
    trials = folder / "trials.jsonl"
    if trials.exists():
        record["trials"] = [json.loads(line) for line in trials.read_text(encoding="utf-8").splitlines()]
    after = write_samples(stored, tokenizer)
    samples = {"text": after}
    if init is not None:
        before, shown = load_exported(init), f"{init.parent.name}/{init.name}"
        earlier = json.loads((init / "pretraining.json").read_text(encoding="utf-8"))
        record["before"] = {
            "name": shown,
            "sha256": made_with.init,
            "bits_per_byte": measure(before, tokenizer, blocks),
        }
        samples = {"before": write_samples(before, tokenizer), "now": after}
        record["earlier_runs"] = [*earlier.pop("earlier_runs", []), earlier]  # the oldest first
    (target / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(model_card(record, samples, target.name, asdict(Recipe())), encoding="utf-8")
    print(f"{target.name}: {record['parameters']:,} parameters, bits per byte {record['bits_per_byte']}")


def write_samples(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Ten texts as they come, one for each of the first ten prompts of the course, with its sampling and seed 0."""
    prompts, new = PROMPTS[:10], min(60, model.config.n_positions // 4)
    written = generate(model, tokenizer, prompts, new_tokens=new, seed=0, temperature=0.8, top_p=0.95)
    return [f"**{sample.prompt}**{sample.text}" for sample in written]


def parse() -> tuple[Recipe, argparse.Namespace]:
    """One option for each field of `Recipe`, and those that do not change the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [field.name for field in fields(Recipe) if field.name != "init"]
    for name in names:
        usual = getattr(Recipe(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(usual), default=usual)
    parser.add_argument("--init", type=Path, help="start from the exported model in this folder, with its tokenizer")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pretrain", help="checkpoints go here")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints, at least")
    parser.add_argument("--export", action="store_true", help="write the last checkpoint to assets/mini-gpt2 and stop")
    parser.add_argument("--target", type=Path, default=ROOT / "assets" / "mini-gpt2", help="where --export writes")
    parser.add_argument("--measure", type=Path, help="print the bits a byte of the exported model in this folder")
    parser.add_argument("--trial", type=int, default=0, help="run this many steps, keep a line in trials.jsonl alone")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster after a minute, needs a compiler")
    options = parser.parse_args()
    recipe = Recipe(**{name: getattr(options, name) for name in names})
    return (recipe if options.init is None else start_from(options.init, recipe)), options


def main() -> None:
    """Command line: train (or resume), export what was trained, or measure what was exported."""
    recipe, options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.export:
        return export(options.work, options.target, options.init)
    if options.measure:
        wanted = replace(start_from(options.measure, recipe), more="reviews")
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer, blocks = prepare(wanted, Path(scratch), options.measure)
        return print(json.dumps(measure(load_exported(options.measure), tokenizer, blocks)))
    train(recipe, options.work, options.save_every, options.compile, options.init, options.trial)


if __name__ == "__main__":
    main()
