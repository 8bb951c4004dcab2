"""Lay out a class for nbgrader's formgrader, in which written answers can be read and marked one by one.

    python scripts/formgrader.py SUBMISSIONS [--output build/formgrader]

Writes `source/`, `submitted/` and a configuration; with nbgrader installed (requirements-formgrader.txt) it also fills
the database *without running any student's code*, and opens the formgrader. Without nbgrader it says what to do;
`make grade` needs none of this: `build/grades/written.html` and `written.csv` serve the same end.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grading import cells  # noqa: E402
from grading.course import Course, Plan  # noqa: E402
from grading.intake import IntakeError, collect  # noqa: E402
from grading.match import match  # noqa: E402
from grading.release import student_notebook  # noqa: E402

ASSIGNMENT = "course"
CONFIGURATION = """c = get_config()
c.CourseDirectory.root = "."
c.ClearSolutions.code_stub = {"python": "...  # YOUR CODE HERE"}
c.Autograde.autograde_preprocessors = [  # no Execute: a student's code runs in `make grade` only
    "nbgrader.preprocessors.SaveAutoGrades", "nbgrader.preprocessors.CheckCellMetadata",
]
"""


def assembled(plan: Plan, answers: dict[str, str]) -> dict:
    """Our notebook, as students get it, with the answers put in; everything else in it is ours."""
    notebook = copy.deepcopy(student_notebook(plan.notebook))
    for cell in notebook["cells"]:
        if cells.is_solution(cell) and cells.grade_id(cell) in answers:
            cell["source"] = answers[cells.grade_id(cell)]
    return notebook


def lay_out(course: Course, submissions: Path, output: Path) -> int:
    """Write the folders anew, the database aside; returns the number of students."""
    found, _ = collect(submissions)
    for name in ("source", "submitted"):
        shutil.rmtree(output / name, ignore_errors=True)
    for plan in course.plans:
        _write(output / "source" / ASSIGNMENT / plan.name, plan.notebook)
    for submission in found:
        answers, _ = match(course, submission.files)
        for plan in course.plans:
            notebook = assembled(plan, answers.get(plan.name, {}))
            _write(output / "submitted" / submission.key / ASSIGNMENT / plan.name, notebook)
    (output / "nbgrader_config.py").write_text(CONFIGURATION, encoding="utf-8")
    return len(found)


def _write(path: Path, notebook: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cells.write_notebook(notebook))


def main(arguments: Sequence[str] | None = None) -> int:
    """Lay out, fill the database and open it where nbgrader is there; return the exit code."""
    parser = argparse.ArgumentParser(description="Lay out a class for nbgrader's formgrader.")
    parser.add_argument("submissions", type=Path, help="folder with one folder or zip per student")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course, solved")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "formgrader", help="where to write")
    options = parser.parse_args(arguments)
    try:
        count = lay_out(Course.load(options.root.resolve()), options.submissions, options.output)
    except (IntakeError, ValueError, RuntimeError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    print(f"{count} students laid out in {options.output}")
    steps = ["generate_assignment", ASSIGNMENT, "--force"], ["autograde", ASSIGNMENT, "--force"]
    if find_spec("nbgrader") is None:
        print(
            "nbgrader is not installed here: install requirements-formgrader.txt in an environment of its own; there,"
        )
        print("in that folder, run:", *(f"\n  nbgrader {' '.join(step)}" for step in steps), "\n  jupyter lab")
        return 0
    for step in steps:
        subprocess.run([sys.executable, "-m", "nbgrader", *step], cwd=options.output, check=True)
    return subprocess.run([sys.executable, "-m", "jupyter", "lab"], cwd=options.output).returncode


if __name__ == "__main__":
    raise SystemExit(main())
