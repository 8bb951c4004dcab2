"""The pretraining script on a few reviews: exact resume, the recipe guarded, an export that loads."""

import json
from dataclasses import replace

import more_reviews
import pretrain
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

RECIPE = pretrain.Recipe(
    layers=1, width=16, heads=2, context=32, vocabulary=300, dropout=0.1, epochs=2.0, batch=4, warmup_steps=2
)


@pytest.fixture(autouse=True)
def few_reviews(monkeypatch, reviews):
    monkeypatch.setattr(pretrain, "read_packaged_reviews", lambda source="imdb": iter(reviews))
    parts = ("pretrain", "adapter", "validation", "test")
    monkeypatch.setattr(pretrain, "split_reviews", lambda rows: dict.fromkeys(parts, list(rows)))
    monkeypatch.setattr(pretrain, "official_test_reviews", lambda: MORE)
    yield
    torch.optim._muon._zeropower_via_newtonschulz = ORIGINAL


MORE = [f"A film about Number{n} Street, on a long flight. {'It was clear. ' * 20}" for n in range(400)]
ORIGINAL = torch.optim._muon._zeropower_via_newtonschulz


def weights(folder):
    return {name: t for name, t in load_file(folder / "checkpoint.safetensors").items() if not name.startswith("rng")}


def losses(folder):
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["history"])


def run(folder, recipe=RECIPE, save_every=0.0):
    folder.mkdir(exist_ok=True)
    pretrain.train(recipe, folder, save_every, compile_model=False)
    return weights(folder)


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    original = pretrain.batch_at

    def killer(blocks, at, recipe):
        if at == step:
            raise Killed
        return original(blocks, at, recipe)

    monkeypatch.setattr(pretrain, "batch_at", killer)
    return original


def test_resume_is_exact_with_dropout(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "HISTORY_EVERY", 5)
    whole = run(tmp_path / "whole")
    original = kill_at(monkeypatch, 13)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.setattr(pretrain, "batch_at", original)
    resumed = run(tmp_path / "cut")
    assert whole.keys() == resumed.keys() and len(whole) > 10
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_another_recipe_is_refused_but_a_longer_hold_is_the_same_path(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "HISTORY_EVERY", 5)
    kill_at(monkeypatch, 7)
    with pytest.raises(Killed):
        run(tmp_path)
    with pytest.raises(SystemExit, match="another recipe"):
        run(tmp_path, replace(RECIPE, seed=1))
    with pytest.raises(Killed):
        run(tmp_path, replace(RECIPE, epochs=3.0))  # step 7 lies before either decay
    with pytest.raises(SystemExit, match="another recipe"):
        run(tmp_path, replace(RECIPE, epochs=0.2))  # step 7 would lie in its decay


def test_rate_warms_up_holds_and_decays():
    recipe = replace(RECIPE, warmup_steps=10, decay_share=0.5)
    rates = [pretrain.rate_at(step, 100, recipe) for step in range(100)]
    assert rates[0] == 0.1 and rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5) and 0 < rates[-1] <= 0.02
    assert rates[:50] == [pretrain.rate_at(step, 200, recipe) for step in range(50)]


def test_each_epoch_sees_every_block_once():
    blocks = torch.arange(24).view(12, 2)
    epochs = [torch.cat([pretrain.batch_at(blocks, 3 * e + i, RECIPE) for i in range(3)]) for e in range(2)]
    assert [sorted(e[:, 0].tolist()) for e in epochs] == [list(range(0, 24, 2))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()


def test_float32_newton_schulz_is_muons_own_to_bf16_accuracy():
    grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    coefficients = (3.4445, -4.7750, 2.0315)
    ours, theirs = (f(grad, coefficients, 5, 1e-7).float() for f in (pretrain.newton_schulz_float32, ORIGINAL))
    assert torch.allclose(ours, theirs, atol=0.05)
    assert ours.shape == grad.shape and ours.svd().S.min() > 0.3


def test_bits_per_byte_of_a_uniform_model():
    """A model with equal logits spends log2(V) bits a token, whatever the text."""
    model = pretrain.build_model(RECIPE, 256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    blocks = torch.randint(1, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    assert pretrain.bits_per_byte(model, blocks, torch.full((256,), 2), "cpu", bf16=False) == pytest.approx(8 / 2)


def test_token_bytes_add_up_to_the_text(tmp_path, reviews):
    tokenizer, _ = pretrain.prepare(RECIPE, tmp_path)
    text = "It’s a naïve café – 3 < 5"
    ids = tokenizer(text)["input_ids"]
    assert pretrain.token_bytes(tokenizer)[ids].sum() == len(text.encode("utf-8"))
    assert pretrain.token_bytes(tokenizer)[tokenizer.eos_token_id] == 0


def test_export_loads_and_its_card_tells_the_record(tmp_path):
    run(tmp_path / "work")
    target = tmp_path / "mini"
    pretrain.export(tmp_path / "work", target)
    model = GPT2LMHeadModel.from_pretrained(target, dtype=torch.float32)
    trained = weights(tmp_path / "work")["model/transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, trained.half().float())
    assert AutoTokenizer.from_pretrained(target)("a")["input_ids"]
    record = json.loads((target / "pretraining.json").read_text(encoding="utf-8"))
    card = (target / "README.md").read_text(encoding="utf-8")
    assert f"{record['parameters']:,} parameters" in card and str(record["bits_per_byte"]["test"]) in card
    assert (target / "model.safetensors").stat().st_size < 25e6
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in target.iterdir())


def test_goes_on_from_exported_weights_with_more_text_and_keeps_the_record(monkeypatch, tmp_path):
    run(tmp_path / "first")
    old, new = tmp_path / "old", tmp_path / "new"
    pretrain.export(tmp_path / "first", old)
    recipe = replace(pretrain.start_from(old, pretrain.Recipe(epochs=0.1, batch=4)), more="reviews", pretrain_share=0.5)
    assert (recipe.layers, recipe.width, recipe.context) == (RECIPE.layers, RECIPE.width, RECIPE.context)
    work = tmp_path / "second"
    work.mkdir()
    monkeypatch.setattr(pretrain, "HISTORY_EVERY", 1)
    pretrain.train(recipe, work, 0.0, compile_model=False, init=old, trial=3)
    pretrain.train(recipe, work, 0.0, compile_model=False, init=old)
    with pytest.raises(SystemExit, match="did not start from"):
        pretrain.export(work, new)
    pretrain.export(work, new, old)
    record = json.loads((new / "pretraining.json").read_text(encoding="utf-8"))
    first_loss = record["history"][0]["loss"]
    assert first_loss < 5.0 < record["earlier_runs"][0]["history"][0]["loss"]  # 5.7 nats: a random model
    assert [line["steps"] for line in record["trials"]] == [3] and record["trials"][0]["recipe"]["init"] == recipe.init
    trial = record["trials"][0]
    assert {"validation_bits_per_byte", "unseen_bits_per_byte"} == trial["before"].keys() < trial["after"].keys()
    assert all(trial["before"][part] != trial["after"][part] for part in trial["before"])
    assert (
        record["before"]["bits_per_byte"].keys() == {"validation", "test", "unseen"} == record["bits_per_byte"].keys()
    )
    assert (old / "tokenizer.json").read_bytes() == (new / "tokenizer.json").read_bytes()
    card = (new / "README.md").read_text(encoding="utf-8")
    assert (
        f"{record['bits_per_byte']['unseen']} bits per byte ({record['before']['bits_per_byte']['unseen']} bef" in card
    )
    assert card.count("- before: **") == card.count("- now: **") == 10
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in new.iterdir())


def test_films_told_by_names_are_held_out_whole():
    texts = [f"A film that number {n} of the audience saw." for n in range(600)]
    by_half = {half: [t for t in texts if more_reviews.review_hash(t)[0] % 2 == half] for half in (0, 1)}
    held_out = [t for t in by_half[0] if more_reviews.review_hash(t)[1] < more_reviews.HELD_OUT]
    assert held_out
    # The names are put into the text after the hash chose it, so that the same reviews are held out.
    names = {held_out[0]: {"Zorba Quill"}, by_half[0][0]: {"Zorba Quill"}, by_half[0][1]: {"New York"}}
    names |= {t: {"New York"} for t in by_half[0] if t not in names}
    names[held_out[0]] = {"Zorba Quill", "New York"}
    original, more_reviews.names_in = more_reviews.names_in, lambda text: names[text]
    try:
        train, unseen = more_reviews.split_by_film(texts, course={by_half[0][2]})
    finally:
        more_reviews.names_in = original
    assert set(unseen) == set(held_out) - {by_half[0][2]} and not set(train + unseen) & set(by_half[1])
    gone = {by_half[0][0], by_half[0][2]} - set(held_out)
    assert set(train) == set(by_half[0]) - set(held_out) - gone


def test_names_in_a_review():
    text = "Set in New York, The Lord of the Rings has Jean-Claude Van Damme and no Plot."
    assert {"New York", "The Lord", "Jean-Claude Van", "Van Damme"} <= more_reviews.names_in(text)
    assert not any("Plot" in name for name in more_reviews.names_in(text))


def test_a_text_in_both_parts_of_imdb_stays_once():
    assert more_reviews.without(["a", "b"], ["a", "c", "a", "b"]) == ["c", "a"]


def test_the_wheel_gives_the_official_test_reviews(tmp_path):
    wheel = more_reviews.ROOT / "build" / "wheels" / more_reviews.WHEEL
    if not wheel.exists():
        pytest.skip("the wheel is not in build/wheels: scripts/more_reviews.py downloads it")
    assert len(more_reviews.official_test_reviews()) == 25_000
    (tmp_path / more_reviews.WHEEL).write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="is not the"):
        more_reviews.official_test_reviews(tmp_path)
