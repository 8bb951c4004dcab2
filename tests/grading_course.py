"""A course of three small notebooks for the tests of the student edition and of grading, and ways to hand it in."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from grading import cells
from grading.course import Course
from grading.intake import Submission, collect, file_key
from grading.release import student_notebook
from grading.report import Export, write_reports
from grading.run import Graded, grade_class
from grading.sandbox import Limits

UTILS = '''"""What the small course imports."""


def double(x):
    """Twice x."""
    return 2 * x
'''
ANSWER = "Because it is trained on reviews of films."  # our model answer, a secret
TWICE = "def twice(x):\n    return 2 * x"  # a right answer, written differently from ours
MEAN = "def mean(values):\n    return sum(values) / len(values)"
SCALE = "def scale(weight, factors):\n    return weight * factors[:, None]"


def text(name: str, source: str, metadata: dict | None = None) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": metadata or {}, "source": source}


def code(name: str, source: str, metadata: dict | None = None) -> dict:
    output = [{"output_type": "stream", "name": "stdout", "text": ["stored output\n"]}]
    return {
        "cell_type": "code", "id": name, "metadata": metadata or {}, "source": source, "outputs": output,
        "execution_count": 1,
    }  # fmt: skip


def known(name: str, **values: object) -> dict:
    base = {"grade_id": name, "schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}
    return {"nbgrader": base | values, "slideshow": {}}


def solution(name: str, source: str) -> dict:
    return code(name, source, known(name, solution=True))


def graded_cell(name: str, source: str, points: float, *tags: str) -> dict:
    return code(name, source, known(name, grade=True, locked=True, points=points) | {"tags": list(tags)})


def notebook(*members: dict) -> dict:
    widgets = {"widgets": {"state": {"secret": "widget state"}}}
    return {"cells": list(members), "metadata": widgets, "nbformat": 4, "nbformat_minor": 5}


def begin(source: str) -> str:
    """`source` with its lines after `#:` between solution markers, indented as they are."""
    before, after = source.split("#:\n")
    indent = after[: len(after) - len(after.lstrip())]
    return f"{before}{indent}### BEGIN SOLUTION\n{after}\n{indent}### END SOLUTION"


def hidden(visible: str, secret: str) -> str:
    return f"{visible}\n### BEGIN HIDDEN TESTS\n{secret}\n### END HIDDEN TESTS"


def solved_notebooks() -> dict[str, dict]:
    """The solved edition: functions, a value, a written answer; an adapter; tensors."""
    plain = notebook(
        text("title", "# One"),
        code("setup", "import os\nfrom utils.small import double"),
        solution("twice", begin("def twice(x):\n#:\n    doubled_secretly = x + x\n    return doubled_secretly")),
        graded_cell("test-twice", hidden(
            "assert twice(2) == 4, 'twice(2) is 4'",
            "for number in range(-50, 50):\n    assert twice(number) == double(number)",
        ), 4),
        solution("answer", begin("answer = None\n#:\nanswer = sum(twice(n) for n in range(7))")),
        graded_cell("test-answer", "assert answer == 42, 'it is the sum of 0, 2, ... 12'", 2),
        text("why", ANSWER, known("why", grade=True, solution=True, points=5)),
    )  # fmt: skip
    numbers = notebook(
        code("import", "import numpy as np"),
        solution("mean", begin("def mean(values):\n#:\n    return float(np.mean(values))")),
        graded_cell("test-mean", hidden(
            "assert np.isclose(mean([1, 2, 3]), 2)", "assert np.isclose(mean(np.arange(10.0)), 4.5)"
        ), 3),
        graded_cell("adapter", "assert os.path.isdir('artifacts')", 10, "grade-adapter"),
    )  # fmt: skip
    tensors = notebook(
        code("import-torch", "import torch"),
        solution("scale", begin("def scale(weight, factors):\n#:\n    return torch.diag(factors) @ weight")),
        graded_cell("test-scale", hidden(
            "weight, factors = torch.randn(3, 2), torch.arange(3.0)\n"
            "assert torch.allclose(scale(weight, factors)[2], 2 * weight[2])",
            "assert torch.equal(scale(torch.ones(4, 1), torch.arange(4.0)).flatten(), torch.arange(4.0))",
        ), 3),
    )  # fmt: skip
    return {"01-Plain.ipynb": plain, "02-Numbers.ipynb": numbers, "03-Tensors.ipynb": tensors}


ALL_RIGHT = {
    "twice": TWICE, "answer": "answer = 42", "why": "Reviews.", "mean": MEAN, "scale": SCALE,
}  # fmt: skip


def write_course(root: Path, names: tuple[str, ...] | None = None, **more: str) -> Path:
    """Write the solved edition to `root`, with things in it that must never get out; `more`: other files, by path."""
    for name, solved in solved_notebooks().items():
        if names is None or name in names:
            root.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(cells.write_notebook(solved))
    files = {
        "utils/__init__.py": '"""Small."""\n', "utils/small.py": UTILS, "utils/__pycache__/small.pyc": "compiled",
        "assets/data.json": "{}\n", "tests/test_secret.py": "doubled_secretly = 1\n", ".git/config": "secret\n",
        "requirements.txt": "numpy\n", "constraints.txt": "", "LICENSE": "free\n", "scripts/grade.py": "secret = 1\n",
    }  # fmt: skip
    for name, content in (files | more).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


def handed_in(answers: dict[str, str]) -> dict[str, dict]:
    """The student edition with these answers, by grade id, put in."""
    books = {name: student_notebook(solved) for name, solved in copy.deepcopy(solved_notebooks()).items()}
    for book in books.values():
        for cell in book["cells"]:
            if cells.grade_id(cell) in answers:
                cell["source"] = answers[cells.grade_id(cell)]
    return books


def as_files(answers: dict[str, str], adapter: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """What a student hands in, by path."""
    files = {name: cells.write_notebook(book) for name, book in handed_in(answers).items()}
    places = {name: "train" if name == "run.json" else "adapters" for name in adapter or {}}
    return files | {f"artifacts/mini/{places[n]}/positive/{n}": data for n, data in (adapter or {}).items()}


def as_zip(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def vectors(value: float | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Scaling vectors of two layers of a GPT-2 of width 8: near 1, or all of one value."""
    random, found = np.random.default_rng(seed), {}
    for layer in range(2):
        for role, shape in (("attn.c_attn", (24, 1)), ("mlp.c_proj", (1, 32))):
            near = 1 + 0.1 * random.standard_normal(shape)
            name = f"base_model.model.transformer.h.{layer}.{role}.ia3_l"
            found[name] = (near if value is None else np.full(shape, value)).astype(np.float32)
    return found


CURVE = [(0, None, 4.0), (5, 3.9, None), (10, 3.8, 3.9), (15, 3.7, 3.85), (20, 3.7, 3.86)]  # step, train, held out


def run_file(curve: list[tuple] = CURVE, base: str = "the base", **changed: object) -> bytes:
    """The record of a run: its curve, and a summary that fits the curve unless `changed`."""
    rows = [{"step": s, "train_loss": t, "eval_loss": e} for s, t, e in curve]
    history = [{key: value for key, value in row.items() if value is not None} for row in rows]
    found = [row["eval_loss"] for row in history if "eval_loss" in row] or [0.0]
    metrics = {"start_loss": found[0], "best_loss": min(found)}
    run = {"status": "finished", "history": history, "config": {"steps": 20, "base": base}, "metrics": metrics}
    return json.dumps(run | changed).encode()


def adapter_files(tensors: dict[str, np.ndarray], base: str = "the base", run: bytes | None = None) -> dict[str, bytes]:
    probe = json.dumps({"base_fingerprint": base}).encode()
    return {"adapter_model.safetensors": save(tensors), "probe.json": probe, "run.json": run or run_file(base=base)}


def write_reference(folder: Path, seed: int = 1) -> Path:
    return put(folder.parent, folder.name, adapter_files(vectors(seed=seed))) / folder.name


# --- for the tests of attacks: a course of one notebook, and a class graded on it ---

PLAIN = "01-Plain.ipynb"
HOSTILE_LIMITS = Limits(seconds=2, clock=60, memory=250 << 20, processes=12, file=4 << 20, disk=20 << 20)
# Finds the socket to the judge and sends it what it likes.
FORGER = r"""
import json, os, socket, struct, time
def connection():
    for number in range(3, 64):
        try: return socket.socket(fileno=os.dup(number))
        except OSError: pass
judge = connection()
def exactly(size):
    data = b''
    while len(data) < size: data += judge.recv(size - len(data))
    return data
def get():
    count, = struct.unpack('<I', exactly(4))
    head, *rest = [exactly(size) for size in struct.unpack(f'<{count}Q', exactly(8 * count))]
    return json.loads(head), rest
def put(message, *buffers):
    parts = [message if isinstance(message, bytes) else json.dumps(message).encode(), *buffers]
    judge.sendall(struct.pack(f'<I{len(parts)}Q', len(parts), *map(len, parts)) + b''.join(parts))
"""


RIGHT = "def right(x):\n    return 2 * x\n\n\nCHECKS = {'1.1': lambda answer, seed: 1 / 0}\n"
CHECK = """from importlib import import_module


def check(number, answer):
    import_module("exercises.small").CHECKS[number](answer, 0)
"""


def write_plain_course(root: Path) -> Path:
    """One notebook, the checks that real courses have, and an editor's copy of the solutions."""
    files = {"exercises/__init__.py": CHECK, "exercises/small.py": RIGHT, "exercises/deep/__init__.py": RIGHT}
    write_course(root, (PLAIN,), **files)
    return put(root, ".ipynb_checkpoints", {"01-Plain-checkpoint.ipynb": (root / PLAIN).read_bytes()})


def nb(answers: dict[str, str]) -> dict[str, bytes]:
    return {PLAIN: as_files(answers)[PLAIN]}


def put(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_bytes(data)
    return folder


def graded_class(tmp_path: Path, root: Path, jobs: int = 1) -> tuple[dict[str, Graded], list[str]]:
    course = Course.load(root)
    submissions, aside = collect(tmp_path / "in")
    output = tmp_path / "out"
    class_ = grade_class(
        course, submissions, output / "state", HOSTILE_LIMITS, jobs=jobs, hide=[tmp_path / "in", output]
    )
    return {g.submission.student: g for g in class_}, write_reports(course, class_, output, aside, Export("Lab"))


def judged(course: Course, name: str, lms_id: str = "", why: str = "Because of films.", **more: dict) -> Graded:
    """A student whose code is right and whose written answer is open, as a grader leaves it; `more`: other results."""
    submission = Submission(name, lms_id, file_key(name, lms_id), {PLAIN: name.encode()})
    results = {q.grade_id: {"state": "right", "points": q.points, "message": "right"} for q in course.questions}
    results["why"] = {"state": "open", "points": None, "message": "a person reads it", "answer": why}
    answers = {plan.name: plan.unsolved() for plan in course.plans}
    return Graded(submission, answers, [], results | {key.replace("_", "-"): value for key, value in more.items()})
