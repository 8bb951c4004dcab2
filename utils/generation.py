"""Sampling and latency: many prompts x samples in one batched call, and time per token of several models.

Not for: judging what was written (`evaluation.py`), or choosing an adapter (`adapters.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.timing import interleave, ratios, seconds


class GenerationError(ValueError):
    """The prompts or settings cannot be used; the message names which one and what to change."""


@dataclass(frozen=True)
class Sample:
    """One generated text. `text` is the continuation alone: `prompt + text` is what a reader sees."""

    prompt: str
    text: str
    prompt_index: int


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    new_tokens: int = 60,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    do_sample: bool = True,
    batch_size: int = 256,
) -> list[Sample]:
    """Continue every prompt `samples` times by up to `new_tokens` tokens; prompt by prompt in the result.

    Works for a `GPT2LMHeadModel`, a BLOOM, and a `PeftModel`. Prompts are padded on the left, so all rows of a
    batch end at the same column, and the attention mask gives each row its own positions. A continuation
    stops before the first end-of-text token and may be empty. The seed decides the texts together with
    `batch_size` (rows a forward pass, one random stream for all of them); the caller's random state and the
    model's train/eval mode are left as they were. `top_p` keeps the smallest set of tokens with that much
    probability (nucleus sampling, Holtzman et al. 2020). Raises `GenerationError` for unusable input.
    """
    lengths = _check_prompts(model, tokenizer, prompts, new_tokens)
    _check_settings(samples, new_tokens, temperature, top_p, batch_size)
    rows = [index for index in range(len(prompts)) for _ in range(samples)]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = {"max_new_tokens": new_tokens, **(sampling if do_sample else {"do_sample": False})}
    texts: list[str] = []
    with _own_randomness(seed), evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = _left_pad(model, tokenizer, [lengths[index] for index in rows[start : start + batch_size]])
            written = model.generate(**batch, pad_token_id=tokenizer.eos_token_id, **settings)
            texts += [_decode(tokenizer, ids) for ids in written[:, batch["input_ids"].shape[1] :].tolist()]
    return [Sample(prompts[index], text, index) for index, text in zip(rows, texts, strict=True)]


def _check_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt; `GenerationError` names the first prompt that cannot be continued."""
    if isinstance(prompts, str) or len(prompts) == 0:
        raise GenerationError("prompts must be a list of at least one string, such as ['This movie was']")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise GenerationError(f"prompt {index} is empty or not a string ({prompt!r}): give it at least one word")
    context = getattr(model.config, "n_positions", math.inf) - virtual_tokens(model)  # BLOOM has no limit
    encoded = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    for index, ids in enumerate(encoded):
        if len(ids) + new_tokens > context:
            raise GenerationError(
                f"prompt {index} has {len(ids)} tokens and {new_tokens} new ones were asked for, but the context "
                f"is {context}: shorten the prompt, or set new_tokens to at most {max(0, context - len(ids))}"
            )
    return encoded


def virtual_tokens(model: nn.Module) -> int:
    """Positions of the context that prefix tuning takes for itself; 0 for every other model."""
    return sum(getattr(config, "num_virtual_tokens", 0) for config in getattr(model, "peft_config", {}).values())


def _check_settings(samples: int, new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    """Raise `GenerationError` for a number outside its range."""
    if min(samples, new_tokens, batch_size) < 1:
        raise GenerationError(f"{samples=}, {new_tokens=} and {batch_size=} must each be at least 1")
    if not temperature > 0 or not 0 < top_p <= 1:
        raise GenerationError(f"{temperature=} must be above 0 (for greedy text: do_sample=False), {top_p=} in (0, 1]")


def _left_pad(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (rows, longest), padded on the left, on the model's device."""
    longest = max(map(len, rows))
    ids = [[tokenizer.eos_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    device = next(model.parameters()).device
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of the new tokens up to the first end-of-text token."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """A random stream that starts at `seed` and leaves the caller's (CPU and every GPU) untouched."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; each module gets its own train/eval mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def latency(
    models: Mapping[str, nn.Module | Callable],
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 7,
) -> list[dict[str, str | float]]:
    """Greedy decoding time of several models from one interleaved run, the first of which is the yardstick.

    A value is a model, or a function without arguments that returns a context manager which yields one
    (`lambda: library.use("positive")`). Every model writes exactly `new_tokens` tokens from one start token; they
    take turns, so that a slow minute of the machine hits all of them, and the first round only warms up.
    Rows: `name`, `ms_per_token_median` (milliseconds a decoding step of the whole batch), `tokens_per_second`
    (batch included), `ratio_to_first` (median of the ratios within a round; above 1 is slower than the first model),
    `ratio_low` and `ratio_high` (the lowest and the highest of them).
    """
    if not models:
        raise GenerationError("latency needs at least one model, such as {'base': model}")
    _check_settings(repeats, new_tokens, 1.0, 1.0, batch)

    def timed(model: nn.Module | Callable) -> float:
        with nullcontext(model) if isinstance(model, nn.Module) else model() as ready:
            return _decoding_seconds(ready, tokenizer, new_tokens, batch)

    times = interleave({name: partial(timed, model) for name, model in models.items()}, repeats)
    first = next(iter(times.values()))
    rows = []
    for name, values in times.items():
        ratio = ratios(values, first)
        rows.append({
            "name": name, "ms_per_token_median": 1000 * median(values) / new_tokens,
            "tokens_per_second": batch * new_tokens / median(values),
            "ratio_to_first": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
        })  # fmt: skip
    return rows


def _decoding_seconds(model: nn.Module, tokenizer: PreTrainedTokenizerBase, new_tokens: int, batch: int) -> float:
    """Wall-clock seconds of one greedy call that writes exactly `new_tokens` tokens in each of `batch` rows."""
    inputs = _left_pad(model, tokenizer, [[tokenizer.eos_token_id]] * batch)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    with evaluation_mode(model):
        return seconds(lambda: model.generate(**inputs, **length, do_sample=False, pad_token_id=tokenizer.eos_token_id))
