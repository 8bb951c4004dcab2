"""Training of (IA)³: the course's way beside the loop of document 002, and beside the machine's matrix products.

The document's loop is written from its idea: every review padded to `max_length` and cut there, float32, one batch
after the other with AdamW and a linear decay. The course: whole reviews packed into blocks, the Trainer with its own
arguments, bfloat16 where the processor multiplies it natively. Both train peft's (IA)³ on the same reviews.
Not for: quality.
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

from bench.rows import Row, Sizes, make_model, now, own_process, positive_reviews, row, seconds, tokenizer
from utils.adapters import attach
from utils.config import PROFILES
from utils.counts import inner_size
from utils.data import to_blocks
from utils.generation import interleave
from utils.gpu import fast_bf16, pick_device
from utils.training import training_arguments

DOCUMENT_BATCH, DOCUMENT_RATE, DOCUMENT_LENGTH = 8, 8e-3, 128  # as in document 002
WHOLE = {"mini": 256, "tiny": 256, "124M": 512}  # tokens: the context of the small ones; most whole reviews
PROFILE_OF = {"mini": PROFILES["mini"], "tiny": PROFILES["mini"], "124M": PROFILES["gpt2"]}


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
def course_trainer(model: str, bf16: bool, steps: int, reviews: int) -> tuple[Trainer, Clock]:
    """A Trainer as `utils.training.train` makes it, without the evaluations and checkpoints that the loop has not."""
    profile, clock = PROFILE_OF[model], Clock()
    peft_model = attach(make_model(model), "ia3").train()
    texts = Dataset.from_dict({"text": positive_reviews(reviews)})
    arguments = training_arguments(
        profile, Path(tempfile.gettempdir()), pick_device(), learning_rate=profile.learning_rates["ia3"], steps=steps,
        seed=0,
    )  # fmt: skip
    arguments = replace(arguments, bf16=bf16, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    blocks = to_blocks(texts, tokenizer(), profile.block_length)
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=blocks, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def course_rate(model: str, bf16: bool, steps: int, reviews: int) -> float:
    """Tokens a second of `steps` optimiser steps of the course's training; every token is a useful one."""
    trainer, clock = course_trainer(model, bf16, steps, reviews)
    trainer.train()
    profile = PROFILE_OF[model]
    return (len(clock.times) - 1) * profile.tokens_per_step / (clock.times[-1] - clock.times[0])


@cache
def document_parts(model: str, max_length: int, reviews: int) -> tuple:
    """Model, optimiser, schedule and an endless stream of padded batches."""
    tok = tokenizer()
    encoded = tok(positive_reviews(reviews), max_length=max_length, padding="max_length", truncation=True)
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
            loss = peft_model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            useful += int(batch["attention_mask"].sum())

    elapsed = seconds(loop)
    return useful / elapsed


@cache
def yardstick_size(dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    """The square product with this machine's highest rate; looked for once."""
    return best_size(dtype, pick_device(), sizes)


def product_rate(dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """FLOPs a second of the machine's best square product in `dtype`."""
    size = yardstick_size(dtype, sizes)
    return product_flops(size) / product_seconds(size, dtype, pick_device())


def training_rows(sizes: Sizes, model: str) -> list[Row]:
    """All lines on the training of one model, from one interleaved run; each way has a process of its own."""
    rounds, steps = sizes.turns(model)
    formats = {"bf16": torch.bfloat16} if fast_bf16(pick_device()) else {}
    formats["float32"] = torch.float32
    lengths = (DOCUMENT_LENGTH, WHOLE[model])
    with ExitStack() as stack:  # Accelerate knows one number format a process
        ours = {name: stack.enter_context(own_process(sizes.isolated)) for name in formats}
        theirs = stack.enter_context(own_process(sizes.isolated))
        measured = interleave(
            {
                **{f: partial(ours[f], course_rate, model, f == "bf16", steps, sizes.reviews) for f in formats},
                **{n: partial(theirs, document_rate, model, n, steps, sizes.reviews) for n in lengths},
                **{t: partial(theirs, product_rate, t, sizes.products) for t in formats.values()},
            },
            rounds,
        )
        length = PROFILE_OF[model].block_length
        flops = training_flops(theirs(model_config, model), length)
    batch = f"{PROFILE_OF[model].batch_size} x {length} packed"
    rows = []
    for name, dtype in formats.items():
        for n in lengths:
            rows.append(row(
                f"training-{model}-{name}-{n}", f"training (IA)³ on {model}, {name}, {batch}",
                f"loop of document 002, padded to {n}, float32", measured[name], measured[n],
                unit="useful tokens/s", reach=2.5 if name == "bf16" else None, batch=DOCUMENT_BATCH, max_length=n,
            ))  # fmt: skip
        rows.append(row(
            f"arithmetic-{model}-{name}", f"training (IA)³ on {model}, {name}: 4 FLOPs a weight and token, attention",
            f"square matrix products in {name}", [flops * rate for rate in measured[name]], measured[dtype],
            unit="FLOP/s", reach=0.6, flops_a_token=flops, size=ours_size(sizes, dtype),
        ))  # fmt: skip
    return rows


def ours_size(sizes: Sizes, dtype: torch.dtype) -> str:
    """The sizes the best product was chosen from, for the record."""
    return f"best of {', '.join(map(str, sizes.products))}, {str(dtype).removeprefix('torch.')}"


def model_config(model: str) -> GPT2Config:
    """The configuration of the model behind `course_trainer`."""
    return make_model(model).config


FROZEN, TRAINED = 4, 6  # FLOPs a weight and token: forward 2, gradient of the activations 2, of the weights 2


def weights_in_products(config: GPT2Config) -> int:
    """Entries of the matrices that a token is multiplied by: L (4 d² + 2 d m) in the blocks, V d in the tied head.

    Embeddings, norms and biases are looked up or added: they are not counted.
    """
    width, inner = config.n_embd, inner_size(config)
    return config.n_layer * (4 * width**2 + 2 * width * inner) + config.vocab_size * width


def training_flops(config: GPT2Config, length: int, per_weight: int = FROZEN) -> int:
    """FLOPs a token of a forward and backward pass on rows of `length` tokens.

    `per_weight` x weights + 12 L d `length`: PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) has
    6 a weight, of which 2 are the gradient of the weights themselves. Frozen weights need none, so 4 are left; the
    gradient of the activations must still pass through them. Attention's two products have no weights: 4 L d `length`
    forward, twice that backward; the causal half is not taken off, as in PaLM. The first layer's query, key and value
    projection needs no gradient of its input either, which is left in (under 1 % on GPT-2).
    """
    return per_weight * weights_in_products(config) + 12 * config.n_layer * config.n_embd * length


def product_flops(size: int) -> int:
    """FLOPs of one product of two square matrices."""
    return 2 * size**3


def product_seconds(size: int, dtype: torch.dtype, device: torch.device | str, repeats: int = 3) -> float:
    """Seconds of one product of two (size, size) matrices: the mean of `repeats` after one that warms up."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    return seconds(lambda: [torch.mm(left, right, out=out) for _ in range(repeats)]) / repeats


def best_size(dtype: torch.dtype, device: torch.device | str, sizes: tuple[int, ...]) -> int:
    """Which of `sizes` gives the highest rate of square products: the yardstick is the machine's best."""
    return max(sizes, key=lambda size: product_flops(size) / product_seconds(size, dtype, device))
