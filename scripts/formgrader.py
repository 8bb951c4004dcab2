"""Lay out a class for nbgrader's formgrader, in which written answers can be read and marked one by one.

    python scripts/formgrader.py SUBMISSIONS [--output build/formgrader]
    python scripts/formgrader.py --collect build/grades/written.csv

The first writes `source/`, `submitted/` and a configuration; with nbgrader installed (requirements-formgrader.txt) it
also fills the database *without running any student's code*, and opens the formgrader. Tests are plain cells there:
their points are `make grade`'s. The second takes points and comments out of the formgrader into the table that
`make grade` reads. Neither is needed: `build/grades/written.html` and `written.csv` serve the same end.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grading import cells  # noqa: E402
from grading.course import Course  # noqa: E402
from grading.intake import IntakeError, collect  # noqa: E402
from grading.marks import MarksError, number, read_table  # noqa: E402
from grading.match import match  # noqa: E402
from grading.plan import Plan  # noqa: E402
from grading.release import student_notebook  # noqa: E402
from grading.report import write_atomic, write_table  # noqa: E402

ASSIGNMENT = "course"
CONFIGURATION = """c = get_config()
c.CourseDirectory.root = "."
c.ClearSolutions.code_stub = {"python": "...  # YOUR CODE HERE"}
c.Autograde.autograde_preprocessors = [  # no Execute: a student's code runs in `make grade` only
    "nbgrader.preprocessors.SaveAutoGrades", "nbgrader.preprocessors.CheckCellMetadata",
]
"""


def assembled(plan: Plan, answers: dict[str, str]) -> dict:
    """Our notebook, as students get it, with the answers put in and its tests no tests; everything else is ours.

    Written answers are shown letter by letter: rendered, they could run scripts in the instructor's Jupyter.
    """
    notebook = copy.deepcopy(student_notebook(plan.notebook))
    for cell in notebook["cells"]:
        if cells.is_solution(cell) and cells.grade_id(cell) in answers:
            answer = answers[cells.grade_id(cell)]
            as_it_is = cell["cell_type"] == "code" or cells.same_source(answer, cell["source"])
            cell["source"] = answer if as_it_is else fenced(answer)
    return without_tests(notebook)


def fenced(text: str) -> str:
    """Markdown that shows `text` as it is: between fences longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{cells.printable(text)}\n{fence}"


def without_tests(notebook: dict) -> dict:
    """The notebook with its tests as plain cells: nbgrader gives full points for a test that nobody has run."""
    for cell in notebook["cells"]:
        if cells.is_test(cell):
            del cell["metadata"]["nbgrader"]
            cell["source"] = cells.without_hidden(cell["source"])
    return notebook


def lay_out(course: Course, submissions: Path, output: Path) -> int:
    """Write the folders anew, the database aside; returns the number of students."""
    found, _ = collect(submissions)
    for name in ("source", "submitted"):
        shutil.rmtree(output / name, ignore_errors=True)
    for plan in course.plans:
        _write(output / "source" / ASSIGNMENT / plan.name, without_tests(copy.deepcopy(plan.notebook)))
    for submission in found:
        try:
            answers, _ = match(course, submission.files)
        except Exception as error:  # one that nobody thought of stops one student, not the class
            answers = {}
            print(f"{submission.student}: could not be read ({type(error).__name__})", file=sys.stderr)
        for plan in course.plans:
            notebook = assembled(plan, answers.get(plan.name, {}))
            _write(output / "submitted" / submission.key / ASSIGNMENT / plan.name, notebook)
    (output / "nbgrader_config.py").write_text(CONFIGURATION, encoding="utf-8")
    return len(found)


def _write(path: Path, notebook: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cells.write_notebook(notebook))


def collect_marks(output: Path, table: Path) -> int:
    """Put the points and comments given in the formgrader into `written.csv`; returns how many. Needs nbgrader."""
    from nbgrader.api import Gradebook

    marks = {}
    with Gradebook(f"sqlite:///{(output / 'gradebook.db').resolve()}") as book:
        for submission in book.assignment_submissions(ASSIGNMENT):
            for notebook in submission.notebooks:
                comments = {comment.name: comment.manual_comment for comment in notebook.comments}
                for grade in notebook.grades:
                    if grade.manual_score is not None:
                        mark = (number(grade.manual_score), comments.get(grade.name) or "")
                        marks[submission.student.id, grade.name] = mark
    rows = read_table(table)
    for row in rows:
        if (row["key"], row["question"]) in marks:
            row["points"], row["comment"] = marks[row["key"], row["question"]]
    if not rows:
        return 0
    head = list(rows[0])
    write_atomic(table.with_name(f"{table.name}.bak"), table.read_bytes())
    write_table(table, [head, *([row.get(name, "") for name in head] for row in rows)])
    return len(marks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Lay out, fill the database and open it where nbgrader is there; return the exit code."""
    parser = argparse.ArgumentParser(description="Lay out a class for nbgrader's formgrader.")
    parser.add_argument("submissions", type=Path, nargs="?", help="folder with one folder or zip per student")
    parser.add_argument("--collect", type=Path, metavar="TABLE", help="written.csv: take the marks over into it")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course, solved")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "formgrader", help="where to write")
    parser.add_argument("--no-browser", action="store_true", help="fill the database, do not open JupyterLab")
    options = parser.parse_args(arguments)
    if options.collect:
        try:
            print(f"{collect_marks(options.output, options.collect)} marks taken over; now run make grade again")
        except (MarksError, OSError) as error:
            print(f"FAILED {error}", file=sys.stderr)
            return 1
        return 0
    if options.submissions is None:
        parser.error("say which folder of submissions")
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
    # nbgrader starts alembic by its name, so the folder of this Python's commands must be on the path.
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))}
    commands = [["nbgrader", *step] for step in steps]
    commands += [] if options.no_browser else [["jupyter", "lab", "--ServerApp.root_dir=."]]
    for command in commands:
        done = subprocess.run([sys.executable, "-m", *command], cwd=options.output, env=environment)
        if done.returncode:
            print(f"FAILED {' '.join(command)}: see above", file=sys.stderr)
            return done.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
