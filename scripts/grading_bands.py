"""Write `assets/grading-bands.json`: between which gains a trained adapter lies, from reference runs of several seeds.

python -m study --only bands              # the runs with more seeds, once
python scripts/grading_bands.py [--fewest 5]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grading import GradingError  # noqa: E402
from grading.adapter import FEWEST_SEEDS, make_bands  # noqa: E402
from grading.release import write_atomic  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the records, write the bands; return the exit code."""
    parser = argparse.ArgumentParser(description="Write assets/grading-bands.json from the reference runs.")
    parser.add_argument("--runs", type=Path, default=ROOT / "assets" / "runs" / "mini", help="folder of run records")
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "grading-bands.json", help="file to write")
    parser.add_argument("--fewest", type=int, default=FEWEST_SEEDS, help="seeds that are needed at least")
    options = parser.parse_args(arguments)
    pairs = {}
    for path in sorted([*options.runs.glob("positive-ia3-seed*.json"), *options.runs.glob("bands/*-ia3-seed*.json")]):
        seed = int(re.search(r"seed(\d+)", path.name)[1])
        base = path.with_name(f"positive-base-seed{seed}.json")
        if base.is_file():
            pairs[seed] = tuple(json.loads(p.read_text(encoding="utf-8"))["metrics"] for p in (path, base))
    try:
        bands = make_bands(pairs, options.fewest)
    except GradingError as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    write_atomic(options.output, (json.dumps(bands, indent=1) + "\n").encode())
    print(f"{options.output.name}: {len(pairs)} seeds, {bands}")
    if len(pairs) < FEWEST_SEEDS:
        print(f"Note: fewer than {FEWEST_SEEDS} seeds; a band of so few may fail an honest adapter.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
