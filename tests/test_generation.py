"""Sampling against transformers' own, greedy text against `model.generate`, padding, seeds, bad input, and times."""

import random

import numpy as np
import pytest
import torch
from conftest import make_tiny_model, moved
from transformers import BloomConfig, BloomForCausalLM, TemperatureLogitsWarper, TopPLogitsWarper

from utils.adapters import attach, load_base, merge
from utils.config import PROFILES
from utils.data import PROMPTS as COURSE_PROMPTS
from utils.generation import (
    DRAWS,
    GenerationError,
    Sample,
    Spread,
    draw,
    generate,
    interleave,
    latency,
    most_probable,
    ratios,
    seconds,
    write_tokens,
)

PROMPTS = ["I saw this", "I", "The acting is superb and it was clear: a moving story", "a dull and empty film"]


def librarys_greedy(model, tokenizer, prompts, new_tokens: int) -> list[list[int]]:
    """What `model.generate` writes, up to and with the first end of text."""
    end = tokenizer.eos_token_id
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    written = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=end)
    return [up_to_end(row, end) for row in written[:, batch["input_ids"].shape[1] :].tolist()]


def up_to_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


def greedy(model, tokenizer, prompts, new_tokens: int) -> list[list[int]]:
    ids = tokenizer(list(prompts))["input_ids"]
    written = write_tokens(model, ids, range(len(ids)), new_tokens, most_probable, tokenizer.eos_token_id)
    return [up_to_end(row, tokenizer.eos_token_id) for row in written.tolist()]


@pytest.mark.parametrize("method", ["base", "ia3", "lora", "bitfit", "bottleneck", "prefix"])
def test_greedy_text_is_the_librarys_token_for_token(tokenizer, method):
    model = moved(attach(make_tiny_model(), method))
    expected = librarys_greedy(model, tokenizer, PROMPTS, 12)
    assert greedy(model, tokenizer, PROMPTS, 12) == expected
    if method in ("ia3", "lora", "prefix"):
        with model.disable_adapter():
            bare = greedy(model, tokenizer, PROMPTS, 12)
            assert bare == librarys_greedy(model, tokenizer, PROMPTS, 12) != expected
    if method in ("ia3", "lora"):
        assert greedy(merge(model), tokenizer, PROMPTS, 12) == expected


def test_a_model_without_positions_is_served_too(tokenizer):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=0)
    model = BloomForCausalLM(config).eval()
    assert greedy(model, tokenizer, PROMPTS, 12) == librarys_greedy(model, tokenizer, PROMPTS, 12)


@pytest.mark.parametrize("method", ["ia3", "lora", "prefix"])
def test_greedy_text_of_the_embedded_model_is_the_librarys(method):
    base, tokenizer = load_base(PROFILES["mini"], "cpu")
    model = moved(attach(base, method))
    assert greedy(model, tokenizer, COURSE_PROMPTS, 24) == librarys_greedy(model, tokenizer, COURSE_PROMPTS, 24)


def test_a_prompt_is_read_once_for_all_its_samples_and_ended_batches_stop(tiny_model, tokenizer):
    shapes = []
    hook = tiny_model.register_forward_pre_hook(
        lambda _module, _args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    generate(tiny_model, tokenizer, PROMPTS, samples=3, new_tokens=4, batch_size=5)
    assert [rows for rows, _ in shapes] == [2, 5, 5, 5, 3, 5, 5, 5, 1, 2, 2, 2] and shapes[1][1] == 1
    only_end_of_text(tiny_model, tokenizer.eos_token_id)
    shapes.clear()
    assert {s.text for s in generate(tiny_model, tokenizer, PROMPTS, samples=3, new_tokens=9)} == {""}
    assert shapes == [(len(PROMPTS), longest)]
    hook.remove()


# Sampling

SHAPES = {
    "long tail": -1.2 * torch.arange(1, 400).log(),
    "almost flat": 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(0)),
    "peaked": torch.tensor([0.0, 6.0, 1.0, 2.0, -30.0]),
    "normal": 2.5 * torch.randn(300, generator=torch.Generator().manual_seed(1)),
    "ties": torch.tensor([2.0, 1, 1, 2, 1, 1, 1, 1, 0, 0, 0, 0]) * torch.log(torch.tensor(2.0)),
    "all equal": torch.zeros(64),
    "one possible": torch.tensor([-torch.inf, 0.0, -torch.inf]),
}


@pytest.mark.parametrize("draws", [DRAWS, 1, 0])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_have_the_distribution_of_transformers_warpers(shape, top_p, draws):
    rows, temperature = 20_000, 0.8
    logits = SHAPES[shape][None]
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(-1)[0].double()
    for value in logits.unique():  # which of equal tokens are in its nucleus depends on its sort: take the later ones
        equal = logits[0] == value
        expected[equal] = expected[equal].sort().values
    stream = torch.Generator().manual_seed(7)
    probabilities = (logits / temperature).softmax(-1).expand(rows, -1)
    counts = draw(probabilities, top_p, stream, draws)[:, 0].bincount(minlength=len(expected)).double()
    assert not counts[expected == 0].any(), "outside the nucleus"
    assert counts.sum() == rows
    often = rows * expected >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([rows * expected[often], rows * expected[~often].sum()[None]])
    wanted, seen = wanted[wanted > 0], seen[wanted > 0]
    surplus = ((seen - wanted) ** 2 / wanted).sum() - (len(wanted) - 1)  # chi-square less its degrees of freedom
    assert surplus < 4 * (2 * max(1, len(wanted) - 1)) ** 0.5


@pytest.mark.parametrize("draws", [DRAWS, 0])
def test_of_equal_tokens_the_later_ones_are_in_the_nucleus(draws):
    probabilities = torch.tensor([[0.25, 0.25, 0.125, 0.125, 0.125, 0.125]]).expand(4000, -1)
    for top_p, inside in ((0.25, {1}), (0.3, {0, 1}), (0.5, {0, 1}), (0.7, {0, 1, 4, 5}), (0.75, {0, 1, 4, 5})):
        kept = TopPLogitsWarper(top_p)(None, probabilities[:1].log()).isfinite().sum()
        found = draw(probabilities, top_p, torch.Generator().manual_seed(0), draws)
        assert set(found[:, 0].tolist()) == inside and len(inside) == kept


def test_rows_are_drawn_on_their_own():
    probabilities = torch.eye(50)[torch.arange(200) % 50]
    assert draw(probabilities, 0.9, torch.Generator().manual_seed(0))[:, 0].tolist() == [i % 50 for i in range(200)]


def test_generate_samples_with_temperature_and_nucleus_of_the_models_logits(tiny_model, tokenizer):
    rows, warpers = 6000, (TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.8))
    logits = tiny_model(torch.tensor([tokenizer("I saw")["input_ids"]])).logits[:, -1].detach()
    for warp in warpers:
        logits = warp(None, logits)
    expected: dict[str, float] = {}
    for token, probability in enumerate(logits.softmax(-1)[0].tolist()):
        text = "" if token == tokenizer.eos_token_id else tokenizer.decode([token])
        expected[text] = expected.get(text, 0.0) + probability
    samples = generate(
        tiny_model, tokenizer, ["I saw"], samples=rows, new_tokens=1, temperature=0.7, top_p=0.8, batch_size=rows
    )
    found = dict.fromkeys(expected, 0.0)
    for sample in samples:
        found[sample.text] += 1 / rows
    assert all(expected[text] > 0 for text, share in found.items() if share)
    distance = sum(abs(found[text] - expected[text]) for text in expected) / 2  # total variation
    kept = sum(probability > 0 for probability in expected.values())
    assert 20 < kept < 300 and distance < 0.5 * (kept / rows) ** 0.5


def test_numbers_that_are_none_are_named(tiny_model, tokenizer):
    with torch.no_grad():
        tiny_model.transformer.ln_f.bias[0] = torch.nan
    with pytest.raises(GenerationError, match="NaN or infinity"):
        generate(tiny_model, tokenizer, PROMPTS, new_tokens=4)


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
    cold = generate(tiny_model, tokenizer, ["I saw"], samples=8, new_tokens=3, temperature=1e-4)
    greedy_text = generate(tiny_model, tokenizer, ["I saw"], new_tokens=3, do_sample=False)[0].text
    assert {sample.text for sample in cold} == {greedy_text}


def only_end_of_text(model, end: int) -> None:
    """Make end-of-text the only choice."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(100 * model.lm_head.weight[end])


def test_text_stops_before_end_of_text(tiny_model, tokenizer):
    whole = generate(tiny_model, tokenizer, PROMPTS, samples=20, new_tokens=20, seed=2)
    assert not any(tokenizer.eos_token in sample.text for sample in whole)
    only_end_of_text(tiny_model, tokenizer.eos_token_id)
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


# Times


def test_candidates_take_turns_and_the_first_round_warms_up():
    order = []

    def candidate(name):
        def run():
            order.append(name)
            return float(len(order))

        return run

    values = interleave({"a": candidate("a"), "b": candidate("b")}, 2)
    assert order == ["a", "b"] * 3 and values == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert interleave({"a": candidate("a")}, 2, warm_up=False) == {"a": [7.0, 8.0]}


def test_ratios_are_taken_round_by_round():
    assert ratios([2.0, 30.0, 400.0], [1.0, 10.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="shorter|longer"):
        ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no median"):
        ratios([], [])


def test_seconds_are_those_of_the_call():
    ran = []
    assert seconds(lambda: ran.append(1), clock=iter([3.0, 5.0]).__next__) == 2.0 and ran == [1]


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
    with pytest.raises(GenerationError, match="at least one model"):
        latency({}, tokenizer)
