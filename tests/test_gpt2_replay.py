"""The `gpt2` profile without the Hub: all four notebooks against a folder with a full-size GPT-2 of random weights.

Random weights write nonsense, so this proves the plumbing (sizes, real tokenizer, no profile-dependent code), not the
text. Never in CI, where it would take longer than all other tests together: set LAB_SLOW_TESTS=1 to run it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizers" / "gpt2" / "tokenizer.json"
FEW = (
    "steps=2,eval_every=1,train_reviews=40,eval_blocks=4,batch_size=2,block_length=64,samples_per_prompt=1,new_tokens=8"
)


def make_gpt2_folder(folder: Path) -> Path:
    """GPT-2 small with random weights (float16, 249 MB) and the real tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).half().save_pretrained(folder)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), **special).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not TOKENIZER.is_file(), reason="GPT-2's tokenizer is not beside this checkout")
@pytest.mark.skipif(not os.environ.get("LAB_SLOW_TESTS"), reason="many minutes: set LAB_SLOW_TESTS=1")
@pytest.mark.timeout(3600)
def test_all_notebooks_run_on_a_full_size_gpt2(tmp_path):
    environment = os.environ | {
        "LAB_PROFILE": "gpt2",
        "LAB_GPT2_DIR": str(make_gpt2_folder(tmp_path / "gpt2")),
        "LAB_ARTIFACTS": str(tmp_path / "artifacts"),
        "LAB_OVERRIDE": FEW,
    }
    command = [sys.executable, str(ROOT / "scripts" / "replay.py"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list((tmp_path / "out").glob("*.ipynb"))) == 4
