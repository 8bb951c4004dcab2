"""scripts/train.py on the tests' tiny model: `torchrun --nproc_per_node 2 tests/launched.py --folder FOLDER`."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "scripts", "tests")]

import conftest  # noqa: E402
import torch  # noqa: E402
import train as script  # noqa: E402
from datasets import Dataset  # noqa: E402

from utils import training  # noqa: E402
from utils.config import PROFILES  # noqa: E402

PROFILE = replace(
    PROFILES["mini"], block_length=16, batch_size=4, steps=6, eval_every=2, eval_blocks=4, train_reviews=20
)


def main(arguments: list[str]) -> None:
    """What the script does, in float32: rounding to bfloat16 would hide what is compared."""
    torch.set_num_threads(1)
    reviews = conftest.reviews.__wrapped__()
    tokenizer, parts = conftest.tokenizer.__wrapped__(reviews), Dataset.from_list(reviews)
    script.setup_notebook = lambda: PROFILE
    script.load_base = lambda _profile: (conftest.make_tiny_model(), tokenizer)
    script.load_reviews = lambda _profile: {"adapter": parts, "validation": parts}
    training.fast_bf16 = lambda _device: False
    script.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
