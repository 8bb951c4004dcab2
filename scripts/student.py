"""Write the student edition of the course, as a folder and as a zip, and prove that no solution is left in it.

python scripts/student.py [--output build]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grading import GradingError  # noqa: E402
from grading.course import Course, Runner, calibrate  # noqa: E402
from grading.release import make_student_edition, secrets_of  # noqa: E402
from grading.sandbox import Limits  # noqa: E402
from scripts.replay import ReplayError, execute, read_notebook  # noqa: E402

LONGEST_CELL = 900  # seconds


def check(root: Path, folder: Path) -> list[str]:
    """What is wrong when the student edition runs: our cells that fail, solutions without points, tests of nothing."""
    course, problems = Course.load(root), []
    with tempfile.TemporaryDirectory() as scratch:
        copied = shutil.copytree(folder, Path(scratch) / "course")
        for plan in course.plans:
            try:
                execute(read_notebook(copied / plan.name), copied / plan.name, LONGEST_CELL)
            except ReplayError as error:
                problems.append(str(error))
    with Runner(course, Limits(), []) as runner:
        return [*problems, *runner.troubles, *calibrate(runner)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make it; return the exit code."""
    parser = argparse.ArgumentParser(description="Write build/student and build/student.zip.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course, solved")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="where to write")
    parser.add_argument("--check", action="store_true", help="run it and grade our own solutions (minutes)")
    options = parser.parse_args(arguments)
    try:
        folder, archive = make_student_edition(options.root.resolve(), options.output)
        _, seen = secrets_of(options.root.resolve())
        problems = check(options.root.resolve(), folder) if options.check else []
    except GradingError as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    files, size = [path for path in folder.rglob("*") if path.is_file()], archive.stat().st_size
    print(f"{os.path.relpath(folder)}/: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB")
    print(f"{os.path.relpath(archive)}: {size / 1e6:.1f} MB; no line of a solution or hidden test is in it")
    if seen:
        shared = f"{len(seen)} lines that students see anyway, in utils/ or in other cells"
        print(f"not counted as secret: {shared}, such as {min(seen, key=len)!r}")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, which leaves nothing in /tmp
    raise SystemExit(main())
