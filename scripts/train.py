"""Train one adapter in one process or in several: the `train(...)` of notebook 02 or of an optional lab.

    python scripts/train.py                                              # (IA)³ on positive reviews, one process
    python scripts/train.py --processes 2                                # two: gloo on CPUs, NCCL on GPUs
    python scripts/train.py --lab bert-paraphrase --method full --seed 1
    accelerate launch --config_file configs/ddp.yaml --num_processes 8 scripts/train.py --processes 8

Outside a launcher `--processes 2` starts them with `torchrun`; inside one there must be as many as it says, or the run
does not start. The record, the checkpoints and the adapter go to `artifacts/<profile>/train/<task>-<method>-seed<seed>`
or to `--folder`; an interrupted run goes on, on any number of processes. LAB_PROFILE, LAB_OVERRIDE and LAB_DEVICE act
as in the notebooks. Not for: runs that are compared (`compare.py`, `labs.py`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.processes import (  # noqa: E402
    ProcessError,
    join,
    leave,
    process_index,
    require_processes,
    use_own_gpu,
    wait_for_all,
    was_launched,
)

STARTS = 8  # how often processes are started anew with smaller batches, at most


def start(processes: int, arguments: Sequence[str]) -> int:
    """Run this script in `processes` processes; the exit code. Again where one ran out of memory and noted so."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}  # torchrun's own choice is 1
    for _ in range(STARTS):
        before = note_of(arguments)
        code = subprocess.call([*command, str(Path(__file__).resolve()), *arguments], env=threads | os.environ)
        if code == 0 or note_of(arguments) == before:
            break
        print("starting again with smaller batches", flush=True)
    return code


def note_of(arguments: Sequence[str]) -> dict:
    """What the run with these arguments has noted about the batches that fit into memory."""
    from utils.batches import SMALLER
    from utils.runs import read_json

    return read_json(folder_of(parse(arguments)) / SMALLER)


def folder_of(options: argparse.Namespace) -> Path:
    """Where the run's record, checkpoints and adapter go."""
    from extensions.recipes import load_recipe
    from utils.config import artifacts_dir, load_profile

    if options.folder:
        return options.folder.expanduser().resolve()
    profile = load_recipe(options.lab) if options.lab else load_profile()
    return artifacts_dir(profile) / "train" / f"{options.lab or options.task}-{options.method}-seed{options.seed}"


def train_course(options: argparse.Namespace, folder: Path) -> None:
    """What notebook 02 trains, on the reviews of `options.task`."""
    from accelerate import PartialState

    from utils.adapters import attach, load_base
    from utils.config import describe, setup_notebook
    from utils.data import load_reviews, review_blocks
    from utils.rivals import load_trainable_state, trainable_state
    from utils.storage import save_adapter
    from utils.training import train

    profile = setup_notebook()
    say(describe(profile))
    model, tokenizer = load_base(profile)
    model = attach(model, options.method, options.seed)
    with PartialState().main_process_first():  # which prepares them for all
        reviews = load_reviews(profile)
    length = {"tokenizer": tokenizer, "block_length": profile.block_length}
    record = train(
        model,
        review_blocks(reviews["adapter"], options.task, reviews=profile.train_reviews, **length),
        profile,
        method=options.method,
        task=options.task,
        eval_blocks=review_blocks(reviews["validation"], options.task, limit=profile.eval_blocks, **length),
        folder=folder,
        seed=options.seed,
        checkpointing=options.checkpointing,
    )
    state = trainable_state(model)  # whole tensors, where FSDP keeps parts of them in each process
    if options.method in ("ia3", "ia3_kv", "lora", "prefix") and process_index() == 0:
        model = attach(load_base(profile)[0], options.method, options.seed)
        load_trainable_state(model, state)
        save_adapter(model, tokenizer, folder / "adapter", config_id=profile.config_id())
    say_result(record)


def train_recipe(options: argparse.Namespace, folder: Path) -> None:
    """A run of an optional lab, as `labs.py` makes it, without its scores on test rows."""
    from accelerate import PartialState

    from extensions.recipes import describe_recipe, setup_lab
    from extensions.runs import LabBench, train_lab

    recipe = setup_lab(options.lab)
    say(describe_recipe(recipe))
    with PartialState().main_process_first():
        bench = LabBench(recipe)
    _, record = train_lab(bench, options.method, options.seed, folder, checkpointing=options.checkpointing)
    say_result(record)


def say(text: str) -> None:
    """Print in process 0 alone."""
    if process_index() == 0:
        print(text, flush=True)


def say_result(record: object) -> None:
    """The run in one line."""
    best, step = record.metrics["best_loss"], record.metrics["best_step"]
    processes = record.hardware.get("processes", 1)
    say(f"held-out loss {best:.4f} at step {step}, before training {record.metrics['start_loss']:.4f}; "
        f"{record.config['steps']} steps on {processes} process{'es' * (processes > 1)}")  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="how many there must be, of all machines together")
    parser.add_argument("--lab", help="an optional lab's recipe in the place of the course's profile")
    parser.add_argument("--method", default="ia3")
    parser.add_argument("--task", default="positive", choices=("positive", "negative"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="keep no activations, compute them anew")
    parser.add_argument("--folder", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Command line; the exit code."""
    options = parse(arguments)
    if options.processes > 1 and not was_launched():
        return start(options.processes, arguments)
    try:
        require_processes(options.processes)
    except ProcessError as error:
        sys.exit(str(error))
    from utils.gpu import pick_device

    use_own_gpu()
    join(pick_device())
    (train_recipe if options.lab else train_course)(options, folder_of(options))
    wait_for_all()
    leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
