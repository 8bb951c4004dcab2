"""Grade synthetic submissions of the course and print what it costs: minutes per 100 submissions, memory.

    python scripts/bench_grading.py [--students 10] [--jobs 2] [--notebooks 01] [--keep]

`--keep` writes `assets/runs/grading.json`, which docs/instructor.md quotes through `readme.py`.

Half of the synthetic students hand in our own solutions (the dearest case: every test runs to its end), the others the
unsolved edition with one answer changed. Adapters are left out: each takes as long as measuring one model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grading import cells  # noqa: E402
from grading.cells import FormatError  # noqa: E402
from grading.course import Course, CourseError  # noqa: E402
from grading.intake import Submission  # noqa: E402
from grading.plan import Plan  # noqa: E402
from grading.release import ReleaseError, student_notebook  # noqa: E402
from grading.run import grade_class  # noqa: E402
from grading.sandbox import Limits  # noqa: E402
from utils.runs import environment, write_json  # noqa: E402


def handed_in(plan: Plan, number: int) -> bytes:
    """A notebook of the synthetic student of this number."""
    notebook, solved = student_notebook(plan.notebook), plan.solved()
    names = list(solved)
    for cell in notebook["cells"]:
        name = cells.grade_id(cell)
        if name in solved and cells.is_solution(cell):
            if number % 2 == 0 and cell["cell_type"] == "code":
                cell["source"] = solved[name]
            elif names and name == names[number % len(names)]:
                cell["source"] += "\n# student" if cell["cell_type"] == "code" else " An answer."
    return cells.write_notebook(notebook)


class Memory(threading.Thread):
    """Watches the memory of this process and all below it, shared pages counted once, until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = 0, threading.Event()

    def run(self) -> None:
        """Look every half second."""
        while not self.stop.wait(0.5):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
                except psutil.Error:
                    continue
            self.most = max(self.most, total)


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade, print; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure what grading costs.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course, solved")
    parser.add_argument("--students", type=int, default=10, help="synthetic submissions")
    parser.add_argument("--jobs", type=int, default=2, help="answers judged at once")
    parser.add_argument("--notebooks", nargs="*", default=[], help="beginnings of names; unset: all")
    parser.add_argument("--keep", action="store_true", help="write the record that the instructor's page quotes")
    options = parser.parse_args(arguments)
    memory = Memory()
    try:
        course = Course.load(options.root.resolve())
        chosen = tuple(p for p in course.plans if not options.notebooks or p.name.startswith(tuple(options.notebooks)))
        course = replace(course, plans=chosen)
        students = [
            Submission(f"s{n}", "", f"s{n}", {plan.name: handed_in(plan, n) for plan in course.plans})
            for n in range(options.students)
        ]
        memory.start()
        ticks = [(time.monotonic(), "")]
        with tempfile.TemporaryDirectory() as folder:
            grade_class(
                course, students, Path(folder), Limits(), jobs=options.jobs,
                tick=lambda what, _: ticks.append((time.monotonic(), what)),
            )  # fmt: skip
    except (CourseError, FormatError, ReleaseError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    finally:
        memory.stop.set()
    names = {plan.name for plan in course.plans}
    fixed = sum(then - now for (now, what), (then, _) in pairwise(ticks) if what in names)
    each = (ticks[-1][0] - ticks[0][0] - fixed) / options.students
    print(f"{len(course.questions)} questions, {options.students} submissions, {options.jobs} at once")
    print(f"once a run, to bring the notebooks to their tests: {fixed / 60:.1f} minutes")
    print(f"each submission: {each:.2f} s; 100 submissions: {(fixed + 100 * each) / 60:.1f} minutes in all")
    print(f"memory at most: {memory.most / 2**30:.2f} GB")
    if options.keep:
        record = {
            "students": options.students, "jobs": options.jobs, "questions": len(course.questions),
            "fixed_seconds": fixed, "seconds_each": each, "memory_bytes": memory.most, "hardware": environment()[1],
        }  # fmt: skip
        write_json(ROOT / "assets" / "runs" / "grading.json", record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
