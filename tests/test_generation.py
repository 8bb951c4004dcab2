"""Left-padding, seeds, cuts at end-of-text, bad input, and latency, on a two-layer model."""

import random

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model

from utils.generation import GenerationError, Sample, generate, latency

PROMPTS = ["I saw this", "I", "The acting is superb and it was clear: a moving story", "a dull and empty film"]


def greedy_reference(model, tokenizer, prompt: str, new_tokens: int) -> str:
    """One token at a time, no cache, no padding, no batch."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(new_tokens):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(ids[start:-1])
    return tokenizer.decode(ids[start:])


def ia3(model):
    torch.manual_seed(1)
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
        init_ia3_weights=False,
    )
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_mixed_lengths_give_the_text_of_each_prompt_alone(tiny_model, tokenizer, adapted):
    model = ia3(tiny_model) if adapted else tiny_model
    batch = generate(model, tokenizer, PROMPTS, new_tokens=12, do_sample=False)
    assert [sample.text for sample in batch] == [greedy_reference(model, tokenizer, p, 12) for p in PROMPTS]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 2, "prompts of different lengths"


def test_samples_come_prompt_by_prompt_and_hold_the_continuation_only(tiny_model, tokenizer):
    samples = generate(tiny_model, tokenizer, PROMPTS, samples=3, new_tokens=5)
    assert [s.prompt_index for s in samples] == [i for i in range(len(PROMPTS)) for _ in range(3)]
    assert all(isinstance(s, Sample) and s.prompt == PROMPTS[s.prompt_index] for s in samples)
    assert not any(s.text.startswith(s.prompt) for s in samples if len(s.prompt) > 1)


def test_same_seed_same_texts_whatever_the_callers_random_state(tiny_model, tokenizer):
    torch.manual_seed(5)
    first = generate(tiny_model, tokenizer, PROMPTS, samples=4, new_tokens=8, seed=3)
    torch.manual_seed(6)
    assert generate(tiny_model, tokenizer, PROMPTS, samples=4, new_tokens=8, seed=3) == first
    assert generate(tiny_model, tokenizer, PROMPTS, samples=4, new_tokens=8, seed=4) != first


def test_callers_random_state_and_training_mode_are_untouched(tiny_model, tokenizer):
    tiny_model.train()
    tiny_model.transformer.ln_f.eval()
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    generate(tiny_model, tokenizer, PROMPTS, samples=2, new_tokens=4, seed=9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    assert tiny_model.training and tiny_model.transformer.h.training and not tiny_model.transformer.ln_f.training


def test_samples_follow_the_models_distribution(tiny_model, tokenizer):
    """All of the vocabulary is open to a sample (the library's default keeps the top 50 only)."""
    samples = generate(tiny_model, tokenizer, ["I saw"], samples=2000, new_tokens=1, batch_size=2000)
    assert len({sample.text for sample in samples}) > 100
    narrow = generate(tiny_model, tokenizer, ["I saw"], samples=500, new_tokens=1, top_p=0.05)
    assert len({sample.text for sample in narrow}) < 30
    cold = generate(tiny_model, tokenizer, ["I saw"], samples=8, new_tokens=3, temperature=1e-4)
    assert {sample.text for sample in cold} == {greedy_reference(tiny_model, tokenizer, "I saw", 3)}


def test_text_stops_before_end_of_text(tiny_model, tokenizer):
    eos = tokenizer.eos_token_id
    whole = generate(tiny_model, tokenizer, PROMPTS, samples=20, new_tokens=20, seed=2)
    assert not any(tokenizer.eos_token in sample.text for sample in whole)
    with torch.no_grad():  # make end-of-text the only choice: every continuation is empty
        tiny_model.transformer.ln_f.weight.zero_()
        tiny_model.transformer.ln_f.bias.copy_(100 * tiny_model.lm_head.weight[eos])
    assert [s.text for s in generate(tiny_model, tokenizer, PROMPTS, new_tokens=5, do_sample=False)] == [""] * 4


def test_full_context_can_be_used_and_not_one_token_more(tiny_model, tokenizer):
    prompt = "a" * 100
    length = len(tokenizer(prompt)["input_ids"])
    room = tiny_model.config.n_positions
    prompt = tokenizer.decode(tokenizer(prompt)["input_ids"][: min(length, room - 4)])
    used = len(tokenizer(prompt)["input_ids"])
    assert len(generate(tiny_model, tokenizer, [prompt], new_tokens=room - used)) == 1
    with pytest.raises(GenerationError, match=rf"prompt 1 has {used} tokens.*context is {room}.*at most {room - used}"):
        generate(tiny_model, tokenizer, ["I", prompt], new_tokens=room - used + 1)


@pytest.mark.parametrize("prompts", [[], "I saw this", ["I", ""], ["I", "  "], ["I", None]])
def test_unusable_prompts_are_named(tiny_model, tokenizer, prompts):
    expected = "prompt 1 is empty" if len(prompts) == 2 else "at least one string"
    with pytest.raises(GenerationError, match=expected):
        generate(tiny_model, tokenizer, prompts)


@pytest.mark.parametrize(
    "setting", [{"samples": 0}, {"new_tokens": 0}, {"batch_size": 0}, {"temperature": 0.0}, {"top_p": 0.0}]
)
def test_settings_out_of_range_are_refused(tiny_model, tokenizer, setting):
    with pytest.raises(GenerationError, match=next(iter(setting))):
        generate(tiny_model, tokenizer, ["I"], **setting)


def test_latency_takes_turns_and_drops_the_first_round(tiny_model, tokenizer):
    order = []

    class Loaned:
        def __enter__(self):
            order.append("loaned")
            return tiny_model

        def __exit__(self, *_):
            order.append("returned")

    rows = latency({"base": tiny_model, "loaned": Loaned}, tokenizer, new_tokens=4, batch=2, repeats=3)
    assert order == ["loaned", "returned"] * 4
    assert [row["name"] for row in rows] == ["base", "loaned"] and rows[0]["ratio_to_first"] == 1.0
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2 * 1000 / row["ms_per_token_median"])


def test_latency_of_nothing_is_refused(tokenizer):
    with pytest.raises(GenerationError, match="at least one model"):
        latency({}, tokenizer)
