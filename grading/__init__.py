"""Hand the course out, collect it, grade it: what an instructor runs, through `make student` and `make grade`.

In reading order: `cells` (nbgrader's format), `release` (the student edition), `plan` (questions), `intake` and `match`
(what came back), `codec`, `answering`, `judge` (an answer and its test, each in a process), `sandbox`, `mounts`,
`watch` (what shuts them in), `worker`, `course` and `run` (a class), `adapter` (a trained adapter, from data alone),
`marks`, `summary`, `pages`, `platforms`, `report` (what is left behind). `docs/instructor.md` says what is defended and
what is not.
Not for: students; nothing of this package is in the student edition. Linux or macOS (it forks); on Windows use WSL.

Which packages students get, and which of their modules compute right answers, stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

PACKAGES = ("utils", "exercises", "study")  # what the notebooks import
# Their modules that compute right answers, as patterns: no answer may be judged by calling them. The judge keeps them.
CHECKS = ("exercises.*", "utils.exercises_*", "utils.answers")


def computes_answers(module: str) -> bool:
    """Whether the module of this full name computes right answers."""
    return any(fnmatchcase(module, pattern) for pattern in CHECKS)


def check_modules(root: Path) -> Iterator[tuple[str, Path]]:
    """The modules of the course in `root` that compute right answers: full name and file."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if computes_answers(name):
                yield name, path
