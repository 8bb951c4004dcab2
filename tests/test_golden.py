"""What must not change by accident: records, adapters and judges on disk are found and compared by these values.

They change on purpose together with the records, when the base model or the sampler does.
"""

from __future__ import annotations

import pytest
from conftest import ROOT

CONFIG_IDS = {
    "mini": "f6cfd03a739a",
    "gpt2": "c37f505be9a6",
    "bert-paraphrase-mini": "3a8d6fb21995",
    "bert-paraphrase-full": "b4f2cb2b8ae2",
    "mt0-sentiment-mini": "70ce1aa4ec0e",
    "mt0-sentiment-full": "221a945acdb5",
    "bloom-chinese-instructions-mini": "9026cb3b5861",
    "bloom-chinese-instructions-full": "7f7ad5cf8807",
}
FINGERPRINT = "f1689d4925410fac"
JUDGES = {"words": "words-04628095caa4", "characters": "characters-04628095caa4"}
BOOTSTRAP = {"value": 0.33486886982544806, "low": 0.2172667855214124, "high": 0.515998663065508, "n": 11}
METHODS = ["base", "ia3", "ia3_kv", "lora", "bitfit", "prefix", "bottleneck", "full"]
ABLATIONS = """
    vectors-ia3-keys-positive vectors-ia3-values-positive vectors-ia3-feedforward-positive
    vectors-ia3-keys+values-positive vectors-ia3-keys+feedforward-positive vectors-ia3-values+feedforward-positive
    layers-ia3-first_third-positive layers-ia3-middle_third-positive layers-ia3-last_third-positive
    few-shot-ia3-8_reviews-positive few-shot-lora-8_reviews-positive few-shot-full-8_reviews-positive
    few-shot-ia3-32_reviews-positive few-shot-lora-32_reviews-positive few-shot-full-32_reviews-positive
    few-shot-ia3-128_reviews-positive few-shot-lora-128_reviews-positive few-shot-full-128_reviews-positive
    few-shot-ia3-512_reviews-positive few-shot-lora-512_reviews-positive few-shot-full-512_reviews-positive
    gradient-ia3-chosen_by_gradient-positive
    together-ia3-with_LoRA-positive together-lora-with_LoRA_at_its_rate-positive
    granularity-ia3-one_per_head-positive granularity-ia3-one_per_head-negative
    granularity-ia3-one_per_vector-positive granularity-ia3-one_per_vector-negative
    low-rank-ia3-low-rank_mixing-positive
"""


def test_configurations_keep_their_ids():
    from extensions.recipes import RECIPES
    from utils.config import PROFILES

    recipes = [recipe for sizes in RECIPES.values() for recipe in sizes.values()]
    assert {p.name: p.config_id() for p in [*PROFILES.values(), *recipes]} == CONFIG_IDS


def test_the_embedded_model_keeps_its_fingerprint(embedded):
    from utils.adapters import base_fingerprint

    assert base_fingerprint(embedded()[0]) == FINGERPRINT


def test_the_judges_keep_their_folders(real_reviews):
    from utils.judges import Judge, judge_names

    texts, labels = zip(*((row["text"], row["label"]) for row in real_reviews["pretrain"]), strict=True)
    assert judge_names(texts, labels) == JUDGES
    shipped = ROOT / "assets" / "judges"
    assert sorted(path.name for path in shipped.iterdir()) == sorted(JUDGES.values())
    assert all(Judge.load(shipped / name).kind == kind for kind, name in JUDGES.items())


def test_the_bootstrap_draws_what_it_drew():
    from utils.metrics import bootstrap_interval

    estimate = bootstrap_interval([number**0.5 for number in range(1, 12)], range(12, 1, -1))
    assert estimate.to_dict() == pytest.approx(BOOTSTRAP, rel=1e-12)


def test_methods_and_ablations_keep_their_names_and_their_order():
    from study.ablations import ABLATIONS as ablations
    from utils.adapters import METHODS as methods

    assert list(methods) == METHODS
    assert [ablation.name for ablation in ablations] == ABLATIONS.split()
