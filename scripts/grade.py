"""Grade a folder of submissions, as a learning platform exports it: one folder or zip per student.

    python scripts/grade.py SUBMISSIONS [--output build/grades] [--jobs 2] [--only NAME]

`docs/instructor.md` describes what it writes. A second start grades only what is new or changed. Where this system has
no namespaces a student's code can read and change files here: then it grades with `--unsafe` only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from grading import GradingError  # noqa: E402
from grading.adapter import Check, Meter, grade_adapter, grade_style  # noqa: E402
from grading.course import Course, profile_name  # noqa: E402
from grading.intake import Submission, collect  # noqa: E402
from grading.marks import NOT_COUNTED, read_table  # noqa: E402
from grading.release import references_of  # noqa: E402
from grading.report import Export, only_one, read_worksheet, write_reports  # noqa: E402
from grading.run import AdapterGrader, grade_class  # noqa: E402
from grading.sandbox import Limits, is_safe, probe  # noqa: E402

UNSAFE = (
    "this system allows no namespaces (Linux has them, some containers forbid them), so the code of students could "
    "read and change your files, and its own points. Grade in a virtual machine or container that holds nothing else "
    "and has no network, and add --unsafe (make grade GRADE=--unsafe)"
)


def adapter_grader(root: Path, profile: str) -> AdapterGrader | None:
    """What grades adapters: needs the reference adapters and `assets/grading-bands.json`; None where they are not."""
    references = references_of(root, profile)
    bands = root / "assets" / "grading-bands.json"
    if not references or not bands.is_file():
        return None
    limits, meters, lock = json.loads(bands.read_text(encoding="utf-8")), [], threading.Lock()

    def meter() -> Meter:  # loaded for the first adapter that is sound
        if not meters:
            meters.append(Meter(profile))
        return meters[0]

    def grader(files: Mapping[str, bytes], kind: str) -> tuple[float, list[Check]]:
        with lock:  # one at a time: there is one model
            if kind == "style":
                return grade_style(files, references, lambda *given: meter().logits(*given))
            return grade_adapter(files, references, limits, lambda tensors: meter()(tensors))

    return grader


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Grade a folder of submissions.")
    parser.add_argument("submissions", type=Path, help="folder with one folder or zip per student")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course, solved")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "grades", help="where to write")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="answers judged at once")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="processor time for one answer")
    parser.add_argument("--clock", type=float, default=Limits.clock, help="seconds by the clock for one answer")
    parser.add_argument("--memory", type=float, default=2.0, help="gigabytes for one answer")
    parser.add_argument("--only", help="grade again the student of this name, whatever is kept of her")
    parser.add_argument("--assignment", default=Export.assignment, help="the column's name in canvas.csv; Canvas only")
    parser.add_argument("--moodle", type=Path, metavar="WORKSHEET", help="Moodle's grading worksheet, to be filled in")
    parser.add_argument("--moodle-grade", default="Grade", metavar="NAME", help="its column for the grade")
    parser.add_argument("--moodle-comments", default="Feedback comments", metavar="NAME", help="and for the comments")
    parser.add_argument("--open-as-zero", action="store_true", help="export totals whose points are not all given yet")
    parser.add_argument("--unsafe", action="store_true", help="grade where students' code cannot be shut in")
    return parser.parse_args(arguments)


def forget(name: str, submissions: Sequence[Submission], state: Path) -> None:
    """Remove what is kept of the student of this name. Raises GradingError where there is none."""
    chosen = [one for one in submissions if one.student == name]
    if not chosen:
        raise GradingError(f"no submission of {name!r}: " + ", ".join(s.student for s in submissions[:20]))
    for one in chosen:
        (state / f"{one.key}.json").unlink(missing_ok=True)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar of answers, which begins with those that were kept, and what `grade_class` calls to move it."""
    bars: list[tqdm] = []

    def tick(what: str, count: int) -> None:
        if not bars:  # the first call says what was kept
            bars.append(tqdm(total=total, initial=count, desc="answers graded", unit="answer"))
            return
        bars[0].update(count)
        bars[0].set_postfix_str(what[:40] if count else f"preparing {what}", refresh=count != 1)

    try:
        yield tick
    finally:
        for bar in bars:
            bar.close()


def grade(options: argparse.Namespace) -> list[str]:
    """Grade and write the reports; returns the summary."""
    limits = Limits(seconds=options.seconds, clock=options.clock, memory=int(options.memory * 2**30))
    marks, root = options.output / "written.csv", options.root.resolve()
    if marks.is_file():
        read_table(marks)  # what is wrong with it is better said before the hours of grading
    worksheet = (
        read_worksheet(options.moodle, options.moodle_grade, options.moodle_comments) if options.moodle else None
    )
    course = Course.load(root)
    submissions, aside = collect(options.submissions)
    if options.only:
        forget(options.only, submissions, options.output / "state")
    with progress(len(submissions) * len(course.questions)) as tick:
        class_ = grade_class(
            course, submissions, options.output / "state", limits, jobs=options.jobs,
            hide=[options.submissions.resolve(), options.output.resolve()],
            adapter=adapter_grader(root, profile_name()), tick=tick,
        )  # fmt: skip
    how = Export(options.assignment, worksheet, options.open_as_zero)
    return write_reports(course, class_, options.output, aside, how)


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade, write the reports, print the summary; return the exit code."""
    options = parsed(arguments)
    sys.stdout.reconfigure(errors="replace")  # names hold letters that not every terminal has
    if not hasattr(os, "fork"):
        print("FAILED grading needs Linux or macOS; on Windows run it in WSL", file=sys.stderr)
        return 1
    if not options.unsafe and not is_safe(probe()):
        print(f"FAILED {UNSAFE}", file=sys.stderr)
        return 1
    try:
        with only_one(options.output):
            lines = grade(options)
    except GradingError as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What is graded is kept; the same command goes on.", file=sys.stderr)
        return 130
    print("\n".join(lines))
    lost = sum(line.startswith(NOT_COUNTED) for line in lines)
    note = f". Rows of written.csv that were NOT COUNTED, named above: {lost}" if lost else ""
    print(f"Written to {options.output}{note}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, which leaves nothing in /tmp
    raise SystemExit(main())
