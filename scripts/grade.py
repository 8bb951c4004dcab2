"""Grade a folder of submissions, as a learning platform exports it: one folder or zip per student.

    python scripts/grade.py SUBMISSIONS [--output build/grades] [--jobs 2] [--only NAME]

`docs/instructor.md` describes what it writes. A second start grades only what is new or changed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from grading.adapter import Check, Meter, grade_adapter  # noqa: E402
from grading.cells import FormatError  # noqa: E402
from grading.course import Course, CourseError  # noqa: E402
from grading.intake import IntakeError, collect  # noqa: E402
from grading.release import ReleaseError, references_of  # noqa: E402
from grading.report import write_reports  # noqa: E402
from grading.run import grade_class  # noqa: E402
from grading.sandbox import Limits  # noqa: E402


def adapter_grader(root: Path, profile: str) -> Callable[[Mapping[str, bytes]], tuple[float, list[Check]]] | None:
    """What grades adapters: needs the reference adapters and `assets/grading-bands.json`; None where they are not."""
    references = references_of(root, profile)
    bands = root / "assets" / "grading-bands.json"
    if not references or not bands.is_file():
        return None
    limits, meters, lock = json.loads(bands.read_text(encoding="utf-8")), [], threading.Lock()

    def measure(tensors: dict) -> Mapping[str, float]:
        with lock:  # one at a time: there is one model
            if not meters:  # loaded for the first adapter that is sound
                meters.append(Meter(profile))
            return meters[0](tensors)

    return lambda files: grade_adapter(files, references, limits, measure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade, write the reports, print the summary; return the exit code."""
    parser = argparse.ArgumentParser(description="Grade a folder of submissions.")
    parser.add_argument("submissions", type=Path, help="folder with one folder or zip per student")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course, solved")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "grades", help="where to write")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="answers judged at once")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="processor time for one answer")
    parser.add_argument("--clock", type=float, default=Limits.clock, help="seconds by the clock for one answer")
    parser.add_argument("--memory", type=float, default=2.0, help="gigabytes for one answer")
    parser.add_argument("--only", help="grade again the student of this name, whatever is kept of her")
    parser.add_argument("--assignment", default="IA3 lab", help="the column's name in the platform's gradebook")
    options = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        print("FAILED grading needs Linux or macOS; on Windows run it in WSL", file=sys.stderr)
        return 1
    limits = Limits(seconds=options.seconds, clock=options.clock, memory=int(options.memory * 2**30))
    state = options.output / "state"
    try:
        course = Course.load(options.root.resolve())
        submissions, aside = collect(options.submissions)
        if options.only:
            chosen = [one for one in submissions if one.student == options.only]
            if not chosen:
                raise IntakeError(
                    f"no submission of {options.only!r}: " + ", ".join(s.student for s in submissions[:20])
                )
            for one in chosen:
                (state / f"{one.key}.json").unlink(missing_ok=True)
        hide = [options.submissions.resolve(), options.output.resolve()]
        profile = os.environ.get("LAB_PROFILE") or "mini"
        with tqdm(total=len(submissions) * len(course.questions), unit="question") as bar:

            def tick(what: str, count: int) -> None:
                bar.set_description(what[:40], refresh=False)
                bar.update(count)

            class_ = grade_class(
                course, submissions, state, limits, jobs=options.jobs, hide=hide,
                adapter=adapter_grader(options.root.resolve(), profile), tick=tick,
            )  # fmt: skip
    except (CourseError, FormatError, IntakeError, ReleaseError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What is graded is kept; the same command goes on.", file=sys.stderr)
        return 130
    print("\n".join(write_reports(course, class_, options.output, aside, options.assignment)))
    print(f"Written to {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
