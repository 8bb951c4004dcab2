"""Hand the course out, collect it, grade it: what an instructor runs, through `make student` and `make grade`.

In reading order: `cells` (nbgrader's format), `release` (the student edition), `intake` (what came back), `codec`,
`answering`, `judge` (an answer and its test, each in a process), `sandbox`, `mounts` (what shuts them in), `worker`,
`course` (questions, and a runner for answers), `match` (which cell answers what), `adapter` (a trained adapter, from
data alone), `run` (a class), `marks`, `pages`, `report` (what is left behind). `docs/instructor.md` says what is
defended and what is not. Nothing of this package is in the student edition.

Which packages students get, and which of their modules compute right answers, stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

PACKAGES = ("utils", "exercises", "study")  # what the notebooks import
# Their modules that compute right answers, as patterns: no answer may be judged by calling them. The judge keeps them.
CHECKS = ("exercises.*",)


class GradingError(ValueError):
    """What an instructor has to mend, or what is wrong with a file that was handed in; the message says it."""


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
