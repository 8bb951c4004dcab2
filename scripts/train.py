"""Train one adapter from the command line, in one process or in several: the `train(...)` of notebook 02.

    python scripts/train.py --task negative --seed 1
    torchrun --nproc_per_node 2 scripts/train.py                                           # gloo on CPUs, NCCL on GPUs
    accelerate launch --config_file configs/ddp.yaml --num_processes 8 scripts/train.py    # or configs/fsdp.yaml

Record, checkpoints and adapter go to `artifacts/<profile>/train/<task>-<method>-seed<seed>` or to `--folder`; an
interrupted run goes on. LAB_PROFILE, LAB_OVERRIDE and LAB_DEVICE act as in the notebooks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.adapters import attach, load_base, load_trainable_state
from utils.config import artifacts_dir
from utils.data import load_reviews, review_blocks
from utils.gpu import pick_device
from utils.saving import save_adapter
from utils.session import setup_notebook
from utils.training import train


def main(arguments: Sequence[str]) -> None:
    """Command line, in each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="ia3")
    parser.add_argument("--task", default="positive", choices=("positive", "negative"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="keep no activations, compute them anew")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # what "cuda" means from here on
    processes = PartialState(cpu=pick_device().type == "cpu")

    profile = setup_notebook()
    name = f"{options.task}-{options.method}-seed{options.seed}"
    folder = (options.folder or artifacts_dir(profile) / "train" / name).expanduser().resolve()
    processes.print(profile, f"| processes {processes.num_processes}", flush=True)
    model, tokenizer = load_base(profile)
    model = attach(model, options.method, options.seed)
    with processes.main_process_first():  # which prepares them for all
        reviews = load_reviews(profile)
    length = {"tokenizer": tokenizer, "block_length": profile.block_length}
    blocks = review_blocks(reviews["adapter"], options.task, reviews=profile.train_reviews, **length)
    held_out = review_blocks(reviews["validation"], options.task, limit=profile.eval_blocks, **length)
    chosen = {"method": options.method, "task": options.task, "seed": options.seed, "folder": folder}
    record = train(model, blocks, profile, eval_blocks=held_out, checkpointing=options.checkpointing, **chosen)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # FSDP keeps a part in each process
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for n, p in trained.items()}
    if processes.is_main_process and hasattr(model, "peft_config"):
        model = attach(load_base(profile)[0], options.method, options.seed)
        load_trainable_state(model, whole)
        save_adapter(model, tokenizer, folder / "adapter", config_id=profile.config_id())
    best, step = record.metrics["best_loss"], record.metrics["best_step"]
    processes.print(f"held-out loss {best:.4f} at step {step}, {record.metrics['start_loss']:.4f} before training")
    processes.wait_for_everyone()
    processes.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
