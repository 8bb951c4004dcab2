"""Writing text: many prompts and samples in one batch, and how fast.

The model reads every prompt once; then each step draws one token a row and reads only that, because the keys and
values of all tokens before it are kept. `write_tokens` is that loop, `draw` is nucleus sampling.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from utils.adapters import check_unmerged, plain_model

DRAWS = 8  # of a row, before its nucleus is found by a sort
most_probable = partial(torch.argmax, dim=-1, keepdim=True)  # greedy: (rows, vocabulary) -> (rows, 1)


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

    Works for a causal model of transformers and for a `PeftModel` around one (of peft's learned prompts, for prefix
    tuning). A continuation stops before the first end-of-text token and may be empty. `temperature` divides the logits,
    `top_p` is the nucleus's (see `draw`); without `do_sample` each token is the most probable one. The seed decides the
    texts together with `batch_size` (rows a step, one random stream for all of them); the caller's random state and
    the model's train/eval mode are left as they were. Raises `GenerationError` for unusable input.
    """
    encoded = _check_prompts(model, tokenizer, prompts, new_tokens)
    _check_settings(samples, new_tokens, temperature, top_p, batch_size)
    stream = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    rows = [index for index in range(len(prompts)) for _ in range(samples)]
    texts: list[str] = []

    def choose(logits: Tensor) -> Tensor:
        return draw((logits.float() / temperature).softmax(-1), top_p, stream) if do_sample else most_probable(logits)

    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        read = batch if hasattr(model, "row_adapters") else sorted(set(batch))  # an adapter changes what is read
        copies = range(len(batch)) if read is batch else [index - batch[0] for index in batch]
        ids = [encoded[index] for index in read]
        written = write_tokens(model, ids, copies, new_tokens, choose, tokenizer.eos_token_id)
        for row in written.tolist():
            length = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            texts.append(tokenizer.decode(row[:length], clean_up_tokenization_spaces=False))
    return [Sample(prompts[index], text, index) for index, text in zip(rows, texts, strict=True)]


def write_tokens(
    model: nn.Module,
    prompts: Sequence[list[int]],
    copies: Sequence[int],
    new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    end: int = -1,
) -> Tensor:
    """Token ids that go on after the prompts, (rows, up to `new_tokens`): row r continues `prompts[copies[r]]`.

    `choose` makes tokens (rows, 1) of logits (rows, vocabulary). What a row writes after `end` means nothing; the loop
    stops when every row has written it. Prompts are padded on the left, so that all rows write into the same column;
    the mask hides the padding and gives each row its own positions.
    """
    with evaluation_mode(model):
        plain, prefix = beneath(model, len(prompts))
        cache, virtual = (DynamicCache(), 0) if prefix is None else (prefix, prefix.get_seq_length())
        padding = [max(map(len, prompts)) - len(ids) for ids in prompts]
        ids = torch.tensor([[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)], device=plain.device)
        mask = torch.ones(len(ids), virtual + ids.shape[1], dtype=torch.long, device=plain.device)
        for row, pad in enumerate(padding):
            mask[row, virtual : virtual + pad] = 0
        counts_positions = "position_ids" in inspect.signature(type(plain).forward).parameters  # not every model does

        def read(ids: Tensor) -> Tensor:
            """Logits after the last of `ids`, (rows, vocabulary); what is read goes into the cache."""
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options = {"position_ids": positions} if counts_positions else {}
            options |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            return plain(input_ids=ids, attention_mask=mask, **options).logits[:, -1]

        logits = read(ids)  # each prompt once, however many rows continue it
        copies = torch.tensor(list(copies), device=plain.device)
        layers = [ReservedLayer(layer.keys[copies], layer.values[copies], new_tokens) for layer in cache.layers]
        cache, logits, mask = Cache(layers=layers), logits[copies], mask[copies]
        written = [choose(logits)]
        ended = written[0] == end
        while len(written) < new_tokens and not ended.all():
            mask = nn.functional.pad(mask, (0, 1), value=1)
            written.append(choose(read(written[-1])))
            ended |= written[-1] == end
        return torch.cat(written, 1)


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, tokens, width), with memory for `room` more tokens from the start.

    transformers' own layer copies everything at each token; its `StaticLayer` has the memory, and attends to all of it.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.memory = [nn.functional.pad(part, (0, 0, 0, room)) for part in (keys, values)]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the others; all keys and all values so far."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = new
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
        return self.keys, self.values


def draw(probabilities: Tensor, top_p: float, stream: torch.Generator, draws: int = DRAWS) -> Tensor:
    """One token a row, (rows, 1), from the nucleus of `probabilities` (rows, vocabulary), which sum to 1.

    The nucleus (Holtzman et al. 2020) is the smallest set of most probable tokens that hold `top_p` together. No sort
    is needed: a token drawn from the *whole* distribution is in it where the tokens ahead of it, which are more
    probable, hold less than `top_p`; a row whose token is not draws again. Of equal tokens the later is ahead, as in
    transformers' `TopPLogitsWarper`. Raises `GenerationError` where the probabilities are not numbers.
    """
    if draws == 0:  # a small nucleus may need many draws: find it, and draw from it alone
        ascending, tokens = probabilities.sort(stable=True)
        ahead = ascending.flip(-1).cumsum(-1).flip(-1) - ascending
        probabilities = torch.zeros_like(ascending).scatter(-1, tokens, ascending * (ahead < top_p))
        top_p = 1.0
    sums = probabilities.cumsum(-1)
    if not sums[:, -1].isfinite().all():
        raise GenerationError("the model's logits are not numbers: do its weights or its adapter hold NaN or infinity?")
    uniform = 1 - torch.rand(len(sums), 1, generator=stream, device=sums.device)  # above 0, at most 1
    token = torch.searchsorted(sums, uniform * sums[:, -1:])  # the inverse of the distribution function
    if top_p < 1:
        mine = probabilities.gather(-1, token)
        later = torch.arange(probabilities.shape[1], device=token.device) > token
        ahead = (probabilities > mine) | ((probabilities == mine) & later)
        outside = torch.where(ahead, probabilities, 0).sum(-1) >= top_p
        if outside.any():
            token[outside] = draw(probabilities[outside], top_p, stream, draws - 1)
    return token


def beneath(model: nn.Module, rows: int) -> tuple[PreTrainedModel, Cache | None]:
    """The transformers model inside `model`, and for prefix tuning its learned keys and values, for so many rows.

    All other adapters are layers inside that model.
    """
    return plain_model(model), model.get_prompt(rows) if virtual_tokens(model) else None


def virtual_tokens(model: nn.Module) -> int:
    """Positions of the context that prefix tuning takes for itself; 0 for every other model."""
    if not isinstance(model, PeftModel) or not model.has_active_enabled_adapter:
        return 0
    return getattr(model.active_peft_config, "num_virtual_tokens", None) or 0


def _check_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt; `GenerationError` names the first prompt that cannot be continued."""
    if isinstance(prompts, str) or len(prompts) == 0:
        raise GenerationError("prompts must be a list of at least one string, such as ['This movie was']")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise GenerationError(f"prompt {index} is empty or not a string ({prompt!r}): give it at least one word")
    context = getattr(model.config, "n_positions", math.inf) - virtual_tokens(model)  # some have no limit
    encoded = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    for index, ids in enumerate(encoded):
        if len(ids) + new_tokens > context:
            raise GenerationError(
                f"prompt {index} has {len(ids)} tokens and {new_tokens} new ones were asked for, but the context "
                f"is {context}: shorten the prompt, or set new_tokens to at most {max(0, context - len(ids))}"
            )
    return encoded


def _check_settings(samples: int, new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    """Raise `GenerationError` for a number outside its range."""
    if min(samples, new_tokens, batch_size) < 1:
        raise GenerationError(f"{samples=}, {new_tokens=} and {batch_size=} must each be at least 1")
    if not temperature > 0 or not 0 < top_p <= 1:
        raise GenerationError(f"{temperature=} must be above 0 (for greedy text: do_sample=False), {top_p=} in (0, 1]")


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


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the plain base inside `model`: peft writes adapters *into* the base, so `base(...)` would use them too."""
    plain = plain_model(model)
    check_unmerged(plain)
    layers = [m for m in plain.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    trainable = {parameter: parameter.requires_grad for parameter in plain.parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield plain
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable.items():  # enable_adapters() changes them
            parameter.requires_grad_(flag)


class Spread(NamedTuple):
    """A median with the lowest and the highest value."""

    median: float
    low: float
    high: float


def interleave(
    candidates: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """What each candidate returns when it is called, `rounds` times in turn; one more round before that warms up.

    Candidates take turns (A B A B ...), so that a slow minute of the machine hits all of them.
    """
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + warm_up):
        for name, run in candidates.items():
            values[name].append(run())
    return {name: found[int(warm_up) :] for name, found in values.items()}


def ratios(values: Sequence[float], yardstick: Sequence[float]) -> Spread:
    """`values` over `yardstick`, round by round. Raises ValueError for none, or where there are not as many of them."""
    found = [value / base for value, base in zip(values, yardstick, strict=True)]
    return Spread(median(found), min(found), max(found))


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by `clock`, to its end on the GPU where one computes."""
    started = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


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
    take turns, and the first round only warms up (see `interleave`).
    Rows: `name`, `ms_per_token_median` (milliseconds a decoding step of the whole batch), `tokens_per_second`
    (batch included), `ratio_to_first` (median of the ratios within a round; above 1 is slower than the first model),
    `ratio_low` and `ratio_high` (the lowest and the highest of them).
    """
    if not models:
        raise GenerationError("latency needs at least one model, such as {'base': model}")
    _check_settings(repeats, new_tokens, 1.0, 1.0, batch)
    start = [[tokenizer.eos_token_id]]

    def timed(model: nn.Module | Callable) -> float:
        with nullcontext(model) if isinstance(model, nn.Module) else model() as ready:
            return seconds(partial(write_tokens, ready, start, [0] * batch, new_tokens, most_probable))

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
