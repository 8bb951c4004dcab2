"""What the tests of the optional labs share: small models of the three architectures, real data where it is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extensions.models import build_model
from extensions.recipes import DATA_FOLDERS, RECIPES, Recipe, with_data
from utils.settings import ROOT

DATA = ROOT.parent / "shared" / "data"
SHAPES = {
    "bert-paraphrase": {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "mt0-sentiment": {
        "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    },
    "bloom-chinese-instructions": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def tiny(lab: str, **changes: object) -> Recipe:
    """The lab's mini recipe on a model of two layers, with a few steps to train."""
    small = {
        "shape": SHAPES[lab], "model": f"tiny-{lab}", "batch_size": 4, "accumulation": 1, "epochs": 2,
        "evals_per_epoch": 1,
    }  # fmt: skip
    return replace(RECIPES[lab]["mini"], **(small | changes))


def tiny_model(recipe: Recipe) -> torch.nn.Module:
    """Its model, with weights wide enough apart that factors show."""
    model = build_model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def real(lab: str) -> Recipe:
    """The lab's mini recipe on its real data; skips the test where they are not on this computer."""
    folder = DATA / DATA_FOLDERS[lab]
    if not folder.is_dir():
        pytest.skip(f"no real data for {lab}: {folder.relative_to(ROOT.parent)} is not there")
    return with_data(RECIPES[lab]["mini"], Path(folder))
