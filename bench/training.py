"""Training of (IA)³: the course's way beside the loop of document 002, and beside the machine's matrix products.

The document's loop is written from its idea: every review padded to `max_length` and cut there, float32, one batch
after the other with AdamW and a linear decay. The course: whole reviews packed into blocks, the Trainer with its own
arguments, bfloat16 where the processor multiplies it natively. Both train peft's (IA)³ on the same reviews.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from datasets import Dataset
from peft import IA3Config, get_peft_model
from torch.utils.data import DataLoader
from transformers import GPT2Config, Trainer, TrainerCallback, default_data_collator, get_linear_schedule_with_warmup
from transformers.trainer_callback import PrinterCallback

from bench.rows import PROFILE_OF, Row, Sizes, make_model, now, own_process, row, seconds, tokenizer
from utils.adapters import attach
from utils.config import PROFILES
from utils.data import load_reviews, select_reviews, to_blocks
from utils.generation import interleave
from utils.gpu import fast_bf16, pick_device
from utils.sizes import inner_size
from utils.training import training_arguments

DOCUMENT_BATCH, DOCUMENT_RATE, DOCUMENT_LENGTH = 8, 8e-3, 128  # as in document 002
WHOLE = {"mini": 256, "tiny": 256, "124M": 512}  # tokens: the context of the small ones; most whole reviews
GAIN = {"bf16": 2.5, "float32": 1.0}  # aims: over the document's loop,
MATRIX_RATE = {"mini": 0.45, "tiny": 0.45, "124M": 0.6}  # and of the machine's matrix products
PROFILE_SECONDS = 60.0  # aim for the training of the whole gpt2 profile on one H200


class Clock(TrainerCallback):
    """When training began and each optimiser step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        """A new run."""
        self.times = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """The first step's batch is there."""
        if not self.times:
            self.times.append(now())

    def on_step_end(self, *_: object, **__: object) -> None:
        """A step is done, and with the next one its batch is fetched: that counts."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(now())


@cache
def positive_reviews(count: int) -> list[str]:
    """The first `count` positive reviews that adapters train on."""
    return list(select_reviews(load_reviews(PROFILES["mini"])["adapter"], "positive", count)["text"])


@cache
def course_trainer(model: str, bf16: bool, steps: int, reviews: int) -> tuple[Trainer, Clock]:
    """A Trainer as `utils.training.train` makes it, without the evaluations and checkpoints that the loop has not."""
    profile, clock = PROFILE_OF[model], Clock()
    peft_model = attach(make_model(model), "ia3").train()
    arguments = training_arguments(
        profile, Path(tempfile.gettempdir()), pick_device(), learning_rate=profile.learning_rates["ia3"], steps=steps,
        seed=0,
    )  # fmt: skip
    arguments = replace(arguments, bf16=bf16, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    blocks = to_blocks(Dataset.from_dict({"text": positive_reviews(reviews)}), tokenizer(), profile.block_length)
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=blocks, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def course_rate(model: str, bf16: bool, steps: int, reviews: int) -> float:
    """Tokens a second of `steps` optimiser steps of the course's training; every token is a useful one."""
    trainer, clock = course_trainer(model, bf16, steps, reviews)
    trainer.train()
    return (len(clock.times) - 1) * PROFILE_OF[model].tokens_per_step / (clock.times[-1] - clock.times[0])


@cache
def document_parts(model: str, max_length: int, reviews: int) -> tuple:
    """Model, optimiser, schedule and an endless stream of padded batches."""
    encoded = tokenizer()(positive_reviews(reviews), max_length=max_length, padding="max_length", truncation=True)
    labels = [
        [i if kept else -100 for i, kept in zip(ids, mask, strict=True)]
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    rows = Dataset.from_dict(dict(encoded) | {"labels": labels})
    peft_model = get_peft_model(make_model(model), IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)).train()
    optimizer = torch.optim.AdamW(peft_model.parameters(), lr=DOCUMENT_RATE)
    loader = DataLoader(rows, shuffle=True, collate_fn=default_data_collator, batch_size=DOCUMENT_BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 3 * len(loader))
    return peft_model, optimizer, schedule, chain.from_iterable(repeat(loader))


def document_rate(model: str, max_length: int, steps: int, reviews: int) -> float:
    """Useful tokens (padding not counted) a second of `steps` batches of document 002's loop, in float32."""
    peft_model, optimizer, schedule, stream = document_parts(model, max_length, reviews)
    useful = 0

    def loop() -> None:
        nonlocal useful
        for batch in islice(stream, steps):
            batch = {name: tensor.to(peft_model.device) for name, tensor in batch.items()}
            peft_model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            useful += int(batch["attention_mask"].sum())

    elapsed = seconds(loop)
    return useful / elapsed


def product_rate(size: int, dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOPs a second of the product of two (size, size) matrices: `repeats` of them, after one that warms up."""
    left, right = (torch.randn(size, size, device=pick_device()).to(dtype) for _ in range(2))
    out = left @ right
    return 2 * size**3 * repeats / seconds(lambda: [torch.mm(left, right, out=out) for _ in range(repeats)])


@cache
def best_size(dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    """Which of `sizes` gives the highest rate of square products; looked for once."""
    return max(sizes, key=lambda size: product_rate(size, dtype))


def best_rate(dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """FLOPs a second of the machine's best square product: the yardstick."""
    return product_rate(best_size(dtype, sizes), dtype)


def training_flops(config: GPT2Config, length: int) -> int:
    """FLOPs a token of a forward and backward pass of (IA)³ on rows of `length` tokens: 4 a weight + 12 L d `length`.

    Weights: L (4 d² + 2 d m) in the blocks, V d in the tied head; embeddings, norms and biases are looked up or added.
    PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) has 6 a weight, of which 2 are the gradient of
    the weights themselves; frozen ones need none, but the gradient of the activations must still pass through them.
    Attention's two products have no weights: 4 L d `length` forward, twice that backward; the causal half is not taken
    off, as in PaLM. The first layer's gradient of its input, which is not needed, is left in (under 1 % on GPT-2).
    """
    layers, width = config.n_layer, config.n_embd
    weights = layers * (4 * width**2 + 2 * width * inner_size(config)) + config.vocab_size * width
    return 4 * weights + 12 * layers * width * length


def training_rows(sizes: Sizes, model: str) -> list[Row]:
    """All lines on the training of one model, from one interleaved run; each way has a process of its own."""
    profile, lengths = PROFILE_OF[model], (DOCUMENT_LENGTH, WHOLE[model])
    formats = {"bf16": torch.bfloat16} if fast_bf16(pick_device()) else {}
    formats["float32"] = torch.float32
    with ExitStack() as stack:  # Accelerate knows one number format a process
        ours = {name: stack.enter_context(own_process(sizes.isolated)) for name in formats}
        theirs = stack.enter_context(own_process(sizes.isolated))
        ways = {
            **{f: partial(ours[f], course_rate, model, f == "bf16", sizes.steps, sizes.reviews) for f in formats},
            **{n: partial(theirs, document_rate, model, n, sizes.steps, sizes.reviews) for n in lengths},
            **{dtype: partial(theirs, best_rate, dtype, sizes.products) for dtype in formats.values()},
        }
        measured = interleave(ways, sizes.rounds)
    flops = training_flops(make_model(model).config, profile.block_length)
    batch = f"{profile.batch_size} x {profile.block_length} packed"
    rows = []
    for name, dtype in formats.items():
        rows += [
            row(f"training-{model}-{name}-{n}", f"training (IA)³ on {model}, {name}, {batch}",
                f"loop of document 002, padded to {n}, float32", measured[name], measured[n], unit="useful tokens/s",
                reach=GAIN[name], batch=DOCUMENT_BATCH, max_length=n)
            for n in lengths
        ]  # fmt: skip
        rows.append(row(
            f"arithmetic-{model}-{name}", f"training (IA)³ on {model}, {name}: 4 FLOPs a weight and token, attention",
            f"square matrix products in {name}", [flops * rate for rate in measured[name]], measured[dtype],
            unit="FLOP/s", reach=MATRIX_RATE[model], flops_a_token=flops, products=list(sizes.products),
        ))  # fmt: skip
    return rows


def profile_rows(sizes: Sizes, model: str) -> list[Row]:
    """The training of the whole profile of `model` in bfloat16: its seconds against the aim. For a GPU."""
    profile = PROFILE_OF[model]
    steps = profile.steps if sizes.isolated else sizes.steps
    with own_process(sizes.isolated) as call:
        rates = [call(course_rate, model, True, steps, sizes.reviews) for _ in range(min(sizes.rounds, 3))]
    took = [steps * profile.tokens_per_step / rate for rate in rates]
    return [row(
        f"profile-{model}", f"training of the profile {profile.name}, {steps} steps on {model}",
        f"the aim, {PROFILE_SECONDS:.0f} s", took, [PROFILE_SECONDS] * len(took), unit="s", better="lower", reach=1.0,
    )]  # fmt: skip
