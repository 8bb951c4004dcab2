"""What only a GPU shows: bfloat16, SDPA, `torch.compile` with its warm-up, padding-free batches, a static cache.

The functions run on any device (the tests run them on a CPU); `bench.py` asks for them where there is CUDA.
Random weights of GPT-2's shape. Not for: what a CPU shows as well (`bench_training.py`, `bench_use.py`).
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorForSeq2Seq, DataCollatorWithFlattening

from bench.rows import Row, Sizes, make_model, positive_reviews, row, seconds, tokenizer
from bench.training import PROFILE_OF, course_rate, product_rate, training_flops
from bench.use import endless, prompts
from utils.adapters import attach
from utils.generation import evaluation_mode, interleave
from utils.gpu import autocast, pick_device
from utils.step_times import idle_optimizer

AIM_SECONDS = 60.0  # of training, for the gpt2 profile on one H200
LONGEST = 512  # tokens of a review in the comparison of padded and flattened batches


def review_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each review of a row that holds many: `query` (1, heads, tokens, size) of all of them.

    `cu_seq_lens_q`: where each begins, and the end. On a GPU PyTorch's variable-length kernel, elsewhere one by one.
    """
    if query.is_cuda:
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        ends, longest = cu_seq_lens_q.int(), int(max_length_q)
        out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), scale=scaling)
        return out[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    reviews = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outs = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in reviews]
    return torch.cat(outs, dim=2).transpose(1, 2), None


AttentionInterface.register("reviews", review_attention)
AttentionMaskInterface.register("reviews", lambda *_, **__: None)


class Stepper:
    """Training steps of (IA)³ on one model, at rate 0: `run(batch, times)`."""

    def __init__(self, model: str, *, bf16: bool = True, attention: str = "sdpa", compiled: str | None = None) -> None:
        self.bf16, self.model = bf16, attach(make_model(model, attention=attention), "ia3").train()
        self.optimizer = idle_optimizer(self.model)
        self.forward = torch.compile(self.model, backend=compiled) if compiled else self.model

    def run(self, batch: dict[str, Tensor], times: int) -> None:
        """`times` steps on the same batch, on the model's device."""
        for _ in range(times):
            with autocast(self.model.device) if self.bf16 else contextlib.nullcontext():
                loss = self.forward(**batch, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def random_batch(model: str, device: torch.device) -> dict[str, Tensor]:
    """One batch of the profile's size."""
    profile = PROFILE_OF[model]
    ids = torch.randint(0, 8192, (profile.batch_size, profile.block_length), device=device)
    return {"input_ids": ids, "labels": ids}


def format_rows(sizes: Sizes, model: str) -> list[Row]:
    """bfloat16 against float32, and SDPA against plain attention: tokens a second of training."""
    profile, batch = PROFILE_OF[model], random_batch(model, pick_device())
    steppers = {
        "bf16": Stepper(model), "float32": Stepper(model, bf16=False), "eager": Stepper(model, attention="eager")
    }  # fmt: skip
    times = interleave(
        {name: partial(seconds, partial(one.run, batch, sizes.steps)) for name, one in steppers.items()}, sizes.rounds
    )
    rates = {name: [sizes.steps * profile.tokens_per_step / v for v in values] for name, values in times.items()}
    unit = "useful tokens/s"
    return [
        row(f"cuda-bf16-{model}", f"training {model} in bfloat16", "float32", rates["bf16"], rates["float32"],
            unit=unit),
        row(f"cuda-sdpa-{model}", f"training {model} with SDPA", "eager attention", rates["bf16"], rates["eager"],
            unit=unit),
    ]  # fmt: skip


def compile_rows(sizes: Sizes, model: str, backend: str = "inductor") -> list[Row]:
    """A whole run with `torch.compile`, its warm-up counted, against one without; and where it begins to pay."""
    profile, batch = PROFILE_OF[model], random_batch(model, pick_device())
    plain, compiled = Stepper(model), Stepper(model, compiled=backend)
    warm_up = seconds(partial(compiled.run, batch, 2))
    times = interleave(
        {
            n: partial(seconds, partial(one.run, batch, sizes.steps))
            for n, one in (("plain", plain), ("fast", compiled))
        },
        sizes.rounds,
    )
    step = {name: [value / sizes.steps for value in values] for name, values in times.items()}
    whole = [warm_up + profile.steps * value for value in step["fast"]]
    saved = [a - b for a, b in zip(step["plain"], step["fast"], strict=True)]
    gain = sorted(saved)[len(saved) // 2]
    return [row(
        f"cuda-compile-{model}", f"{profile.steps} steps on {model} with torch.compile, warm-up counted", "without",
        whole, [profile.steps * value for value in step["plain"]], unit="s", better="lower", reach=1.0,
        warm_up_seconds=warm_up, pays_after_steps=round(warm_up / gain) if gain > 0 else None,
    )]  # fmt: skip


def flattened_batches(model: str, reviews: int, device: torch.device) -> tuple[dict, dict, int]:
    """The same whole reviews as one padded batch and as one row without padding, and how many tokens they have."""
    tok = tokenizer()
    encoded = tok(positive_reviews(reviews), truncation=True, max_length=LONGEST)["input_ids"]
    features = [{"input_ids": ids, "labels": list(ids)} for ids in encoded]
    padded = DataCollatorForSeq2Seq(tok, padding=True)([dict(one) for one in features])
    flat = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(features)
    keep = ("input_ids", "labels", "position_ids", "cu_seq_lens_q")
    flat = {name: flat[name].to(device) for name in keep} | {"max_length_q": flat["max_length_q"]}
    return {name: tensor.to(device) for name, tensor in padded.items()}, flat, sum(map(len, encoded))


def flattened_rows(sizes: Sizes, model: str) -> list[Row]:
    """Whole reviews behind each other, each attending to itself only, against the same reviews padded."""
    reviews = 4 if sizes.reviews < 100 else 32
    padded, flat, tokens = flattened_batches(model, reviews, pick_device())
    runs = {
        "flat": partial(Stepper(model, attention="reviews").run, flat, sizes.steps),
        "padded": partial(Stepper(model).run, padded, sizes.steps),
    }
    times = interleave({name: partial(seconds, run) for name, run in runs.items()}, sizes.rounds)
    rates = {name: [sizes.steps * tokens / value for value in values] for name, values in times.items()}
    return [row(
        f"cuda-flattened-{model}", f"training {model} on {reviews} whole reviews, unpadded, variable-length attention",
        "the same reviews padded", rates["flat"], rates["padded"], unit="useful tokens/s", longest=LONGEST,
    )]  # fmt: skip


def static_rows(sizes: Sizes, model: str) -> list[Row]:
    """Writing with a static cache, which transformers compiles on a GPU, against the dynamic one."""
    base, texts = endless(make_model(model)), prompts(sizes.prompts)
    batch = tokenizer()(texts, return_tensors="pt", padding=True, padding_side="left").to(base.device)

    def write(cache: str) -> None:
        with evaluation_mode(base):
            base.generate(
                **batch, max_new_tokens=sizes.new_tokens, do_sample=False, pad_token_id=0, cache_implementation=cache
            )

    times = interleave({c: partial(seconds, partial(write, c)) for c in ("static", "dynamic")}, sizes.rounds)
    tokens = sizes.prompts * sizes.new_tokens
    static, dynamic = ([tokens / value for value in times[name]] for name in ("static", "dynamic"))
    return [row(
        f"cuda-static-cache-{model}", f"writing {sizes.prompts} x {sizes.new_tokens} tokens on {model}, static cache",
        "dynamic cache", static, dynamic, unit="tokens/s",
    )]  # fmt: skip


def profile_rows(sizes: Sizes, model: str) -> list[Row]:
    """The training of the whole profile: seconds against the aim, FLOPs against the card's matrix products."""
    profile, dtype = PROFILE_OF[model], torch.bfloat16
    steps = profile.steps if sizes.isolated else sizes.steps
    measured = interleave(
        {
            "training": partial(course_rate, model, True, steps, sizes.reviews),
            "products": partial(product_rate, dtype, sizes.products),
        },
        min(sizes.rounds, 3),
    )
    flops = training_flops(make_model(model).config, profile.block_length)
    took = [steps * profile.tokens_per_step / rate for rate in measured["training"]]
    title = f"{steps} steps of the profile {profile.name} on {model}"
    return [
        row(f"cuda-profile-{model}", title, f"the aim, {AIM_SECONDS:.0f} s", took, [AIM_SECONDS] * len(took), unit="s",
            better="lower", reach=1.0),
        row(f"cuda-profile-arithmetic-{model}", f"{title}: 4 FLOPs a weight and token, attention",
            "square matrix products in bfloat16", [flops * rate for rate in measured["training"]], measured["products"],
            unit="FLOP/s", reach=0.6),
    ]  # fmt: skip
