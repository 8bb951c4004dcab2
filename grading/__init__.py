"""Hand the course out, collect it, grade it: what an instructor runs, through `make student` and `make grade`.

In reading order: `cells` (nbgrader's format), `release` (the student edition), `intake` and `match` (what came back),
`codec`, `sandbox`, `worker` (how an answer is run and judged), `course` and `run` (a class), `adapter` (a trained
adapter, from data alone), `report` (tables and feedback). `docs/instructor.md` says what is defended and what is not.
Not for: students; nothing of this package is in the student edition. Linux or macOS (it forks); on Windows use WSL.
"""
