"""Hand the course out, collect it, grade it: what an instructor runs, through `make student` and `make grade`.

In reading order: `cells` (nbgrader's format), `release` (the student edition), `plan` (questions), `intake` and `match`
(what came back), `codec`, `answering`, `judge` (an answer and its test, each in a process), `sandbox`, `mounts`,
`watch` (what shuts them in), `worker`, `course` and `run` (a class), `adapter` (a trained adapter, from data alone),
`marks`, `summary`, `pages`, `platforms`, `report` (what is left behind). `docs/instructor.md` says what is defended and
what is not.
Not for: students; nothing of this package is in the student edition. Linux or macOS (it forks); on Windows use WSL.
"""
