"""One batch, an adapter for each row: to the bit what each adapter gives alone, on GPT-2, BERT, T5 and BLOOM."""

import pytest
import torch
from conftest import make_tiny_model, moved
from peft import PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from extensions.mixed import mixed_adapters, repeated
from extensions.recipes import RECIPES
from extensions.training import recipe_config
from utils.adapters import AdapterError, attach, ia3_config
from utils.generation import generate
from utils.saving import AdapterLibrary, save_adapter

NAMES = ["up", None, "down", "up"]
IDS = torch.randint(5, 90, (4, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4}


def tiny_bert():
    config = BertConfig(num_hidden_layers=2, intermediate_size=64, **SIZES)
    return BertForSequenceClassification(config), recipe_config(RECIPES["bert-paraphrase"]["mini"])


def tiny_t5():
    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), recipe_config(RECIPES["mt0-sentiment"]["mini"])


def tiny_bloom():
    config = BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)
    return BloomForCausalLM(config), recipe_config(RECIPES["bloom-chinese-instructions"]["mini"])


def tiny_gpt2():
    return make_tiny_model(), ia3_config()


MODELS = {"gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5, "bloom": tiny_bloom}


def two_adapters(kind: str) -> PeftModel:
    """Random weights, two adapters away from their start, heads of their own where the model has one."""
    torch.manual_seed(0)
    base, config = MODELS[kind]()
    model = get_peft_model(base, config, adapter_name="up")
    model.add_adapter("down", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_" in name or "modules_to_save" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(kind: str) -> dict:
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0  # rows of different lengths
    extra = {"decoder_input_ids": torch.tensor([[0, 9], [0, 8], [0, 7], [0, 6]])} if kind == "t5" else {}
    return {"input_ids": IDS, "attention_mask": mask, **extra}


@torch.no_grad()
def one_by_one(model: PeftModel, run) -> torch.Tensor:
    """`run()` on the whole batch under each adapter, then the row that asked for it."""
    results = {}
    for name in set(NAMES):
        if name is None:
            with model.disable_adapter():
                results[name] = run()
        else:
            model.set_adapter(name)
            results[name] = run()
    return [results[name][row] for row, name in enumerate(NAMES)]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_row_is_to_the_bit_what_its_adapter_gives_alone(kind):
    model = two_adapters(kind)
    alone = one_by_one(model, lambda: model(**inputs(kind)).logits)
    with mixed_adapters(model, NAMES):
        mixed = model(**inputs(kind)).logits
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))
    assert (mixed[0] - mixed[3]).abs().max() > 1e-4  # other inputs
    with mixed_adapters(model, ["up"] * 4):
        assert (model(**inputs(kind)).logits[2] - mixed[2]).abs().max() > 1e-3  # the adapters do differ


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "t5", "bloom"])
def test_generate_writes_for_each_row_what_its_adapter_writes_alone(kind, beams):
    model = two_adapters(kind)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}

    def written():
        return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)

    alone = one_by_one(model, written)
    with mixed_adapters(model, NAMES):
        mixed = written()
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))
    assert len({tuple(row.tolist()) for row in mixed}) > 1


def test_the_courses_generate_gives_each_row_its_own_adapter(tokenizer):
    """Names for prompts, whose samples share them, or for every row; to a prompt that several rows go on from, too."""
    model, options = two_adapters("gpt2"), {"new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_" in name:
                parameter.mul_(3)  # so that the adapters' texts differ
    prompts = ["I saw", "A dull film", "I saw", "The acting is"]
    alone = {}
    for name in ("up", "down"):
        model.set_adapter(name)
        alone[name] = [sample.text for sample in generate(model, tokenizer, prompts, **options)]
    with model.disable_adapter():
        alone[None] = [sample.text for sample in generate(model, tokenizer, prompts, **options)]
    expected = [alone[name][row] for row, name in enumerate(NAMES)]
    with mixed_adapters(model, NAMES):
        assert [sample.text for sample in generate(model, tokenizer, prompts, **options)] == expected
        repeated_texts = [sample.text for sample in generate(model, tokenizer, prompts, samples=2, **options)]
        rows = [sample.text for sample in generate(model, tokenizer, ["I saw"], samples=4, **options)]
    assert repeated_texts == [text for text in expected for _ in range(2)]
    assert rows == [alone[name][0] for name in NAMES] and len(set(rows)) == 3


@torch.no_grad()
def test_a_row_in_a_batch_of_its_own_differs_by_rounding_only():
    model = two_adapters("t5")
    with mixed_adapters(model, NAMES):
        mixed = model(**inputs("t5")).logits
    for row, name in enumerate(NAMES):
        single = {key: value[row : row + 1] for key, value in inputs("t5").items()}
        with mixed_adapters(model, [name]):
            assert torch.allclose(model(**single).logits[0], mixed[row], atol=1e-5)


@torch.no_grad()
def test_peft_alone_ignores_adapter_names_which_is_why_this_exists():
    model = two_adapters("gpt2")
    model.set_adapter("up")
    named = model(input_ids=IDS, adapter_names=["up", "__base__", "down", "up"]).logits
    assert torch.equal(named, model(input_ids=IDS).logits)


@torch.no_grad()
def test_afterwards_the_model_is_as_before_even_after_an_error():
    model = two_adapters("bert")
    model.set_adapter("down")
    before = model(**inputs("bert")).logits
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match="3 adapter names for a batch of 4 rows"), mixed_adapters(model, NAMES[:3]):
        model(**inputs("bert"))
    assert torch.equal(model(**inputs("bert")).logits, before) and model.active_adapter == "down"
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "row_adapters")


def test_refusals():
    model = two_adapters("gpt2")
    with (
        pytest.raises(AdapterError, match="no adapter named left: loaded are up, down"),
        mixed_adapters(model, ["left"]),
    ):
        pass
    with pytest.raises(AdapterError, match="no row"), mixed_adapters(model, []):
        pass
    for other in (make_tiny_model(), attach(make_tiny_model(), "lora")):
        with pytest.raises(AdapterError, match=r"needs a PeftModel with \(IA\)³"), mixed_adapters(other, ["up"]):
            pass
    with pytest.raises(AdapterError, match="2 adapter names for a batch of 5 rows"):
        repeated(torch.ones(2, 3), 5)


@torch.no_grad()
def test_the_library_of_the_main_course_serves_mixed_batches_too(tokenizer, tmp_path):
    library = AdapterLibrary(make_tiny_model(), tokenizer)
    for seed, task in enumerate(("positive", "negative")):
        save_adapter(moved(attach(make_tiny_model(), "ia3"), seed), tokenizer, tmp_path / task)
        library.load(task, tmp_path / task)
    with mixed_adapters(library.model, ["negative", None]) as model:
        mixed = model(input_ids=IDS[:2]).logits
    with library.use("negative") as model:
        assert torch.equal(model(input_ids=IDS[:2]).logits[0], mixed[0])
    with library.use(None) as model:
        assert torch.equal(model(input_ids=IDS[:2]).logits[1], mixed[1])
