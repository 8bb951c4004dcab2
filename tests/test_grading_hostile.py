"""Attacks of an answer's code on the grader that were tried: out of the sandbox, into the judge, into other pages."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from grading_course import (
    HOSTILE_LIMITS,
    TWICE,
    begin,
    code,
    graded_cell,
    graded_class,
    hidden,
    nb,
    notebook,
    put,
    solution,
    write_course,
    write_plain_course,
)

from grading import PACKAGES, cells, check_modules, codec
from grading.course import Course, Runner
from grading.sandbox import is_safe, probe
from scripts import grade

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="grading forks")

SAFE = sys.platform != "win32" and is_safe(probe())
namespaces = pytest.mark.skipif(not SAFE, reason="this system allows no namespaces: the summary says so")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_course(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def judge(root):
    """Judges one answer to the first question."""
    course = Course.load(root)
    with Runner(course, HOSTILE_LIMITS, []) as runner:
        yield lambda source: runner.judge(course.plans[0].questions[0], {"twice": source})


def said(verdict: dict) -> str:
    """What a cell raised, or what the verdict is."""
    problems = verdict.get("problems") or [verdict]
    return str(problems[0].get("message")) if not verdict["passed"] else "passed"


# --- out of the sandbox ---


@namespaces
@pytest.mark.parametrize(
    "source",
    [
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({socket!r})",
        "open({root!r} + '/.ipynb_checkpoints/01-Plain-checkpoint.ipynb')",
        "open({grader!r} + '/course.py')",
        "open('/proc/sys/kernel/core_pattern', 'w')",
        "open('/dev/kmsg', 'w')",
        "import glob\n[open(f).read() for f in glob.glob('/tmp/grading-*/output.txt')][0]",
        "import os\nos.environ['PYTHONPATH']",
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\n"
        "assert libc.umount2({root!r}.encode(), 2) == 0 or libc.umount2(b'/tmp', 2) == 0",
        "import os\nfor n in range(100): open(os.environ['HOME'] + f'/{{n}}', 'wb').write(bytes(1 << 20))",
        "import os\nos.open('exercises/small.py', 0) and open('exercises/small.py').read()[3]",
        "from exercises.small import right as twice",
        "from pathlib import Path\nassert Path('/tmp').stat().st_uid == 0 and list(Path('/run').iterdir())",
    ],
)
def test_no_way_out_of_the_sandbox(judge, root, tmp_path, source):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    grader = str(Path(cells.__file__).parent)
    verdict = judge(source.format(socket=str(tmp_path / "s"), root=str(root), grader=grader) + f"\n{TWICE}")
    assert verdict["problems"], verdict  # the cell failed; what is defined below it is not there
    assert not verdict["passed"]


@namespaces
def test_what_an_honest_answer_needs_is_there(judge):
    source = (
        "import os, subprocess, sys, tempfile\nopen('/dev/null', 'w').write('x')\nos.urandom(4)\n"
        "tempfile.NamedTemporaryFile().write(b'x')\nopen('note.txt', 'w').write('x')\nopen('utils/mine.py', 'w')\n"
        "from multiprocessing import shared_memory\nimport numpy, sqlite3, decimal\n"
        "assert subprocess.run([sys.executable, '-c', 'import numpy'], check=True)\n!echo hello\nimport utils.small\n"
    )
    verdict = judge(source + TWICE)
    assert verdict["passed"], verdict


# Ways to the module that computes right answers; each binds `m` to it, or `right` to what is in it.
WAYS = [
    "from {package} import {last} as m",
    "import {name} as m",
    "import {name}\nm = {name}",
    "from {name} import right",
    "from {name} import *\nright",
    "import importlib\nm = importlib.import_module('{name}')",
    "import importlib\nimport {name} as m\nimportlib.reload(m)",
    "import sys\nm = sys.modules['{name}']",
    "import sys\nsys.meta_path[:] = sys.meta_path[1:]\nimport {name} as m",
    "import sys\nsys.meta_path[:] = sys.meta_path[1:]\nsys.modules.pop('{name}', 0)\nimport {name} as m",
    "import gc\nright = [f for f in gc.get_objects() if getattr(f, '__module__', '') == '{name}' and callable(f)][0]",
    "import importlib.util as u\ns = u.spec_from_file_location('mine', '{file}')\n"
    "m = u.module_from_spec(s)\ns.loader.exec_module(m)",
    "import runpy\nright = runpy.run_path('{file}')['right']",
    "import pkgutil\nm = pkgutil.resolve_name('{name}')",
    "import subprocess, sys\nprint(subprocess.check_output([sys.executable, '-c', 'import {name} as m; m.right']))\n"
    "right = lambda x: 2 * x",
]


@namespaces
@pytest.mark.parametrize("name", ["exercises.small", "exercises.deep"])
def test_no_way_leads_to_the_modules_that_compute_right_answers(judge, name):
    package, last = name.split(".")
    file = f"{package}/{last}/__init__.py" if last == "deep" else f"{package}/{last}.py"
    for way in WAYS if name == "exercises.small" else WAYS[1:12:5]:
        source = way.format(name=name, package=package, last=last, file=file)
        source += "\ntwice = right" if "right" in way else "\ntwice = m.right"
        verdict = judge(source)
        assert not verdict["passed"] and verdict["problems"], source


def test_the_checks_of_the_course_do_no_work_for_an_answer(judge, root, tmp_path):
    refused = judge("from exercises.small import right as twice")
    assert not refused["passed"] and "cannot import name" in said(refused)
    assert judge(f"from exercises.small import CHECKS\nCHECKS['1.1'](1, 0)\n{TWICE}")["passed"]
    assert judge(f"from exercises import check\ncheck('1.1', 0)\n{TWICE}")["passed"]
    named = (
        "from exercises import small",
        "import exercises.small as s",
        "from os import path\nfrom exercises import check, deep",
        "'exercises.deep'",
    )
    for number, line in enumerate((*named, "from exercises import check", "# from utils import " * 5000)):
        put(tmp_path / "in", f"E{number}", nb({"twice": f"{line}\n{TWICE}"}))
    found = [line for line in graded_class(tmp_path, root)[1] if line.startswith("answers that name the modules")]
    assert found == [f"answers that name the modules of the checks: E{n}: twice" for n in range(len(named))]


def test_every_module_of_the_course_that_computes_right_answers_is_withheld():
    """Whatever package it lies in, it is one with checks, or one that the checks are made with."""
    root = Path(__file__).resolve().parents[1]
    found = {name for name, _ in check_modules(root)}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if re.search(r"^def check_\w+\(answer", path.read_text(encoding="utf-8"), re.MULTILINE):
                assert name in found, name
    assert len(found) >= 6 and not {"exercises", "utils.data"} & found


CHILDREN = """
import os, time
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        end = time.process_time() + 0.3
        while time.process_time() < end: pass
        os._exit(0)
    os.waitpid(pid, 0)
"""
FILES_IN_MEMORY = """
import os, time
kept = []
for _ in range(80):
    kept.append(os.memfd_create('m'))
    os.write(kept[-1], b'x' * (4 << 20))
time.sleep(5)
"""


def test_processor_time_of_children_that_have_ended_counts(judge):
    assert "computed for more" in judge(CHILDREN + TWICE)["stopped"]


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")
def test_files_in_memory_count(judge):
    assert "memory" in judge(FILES_IN_MEMORY + TWICE)["stopped"]


def test_a_buffer_is_used_once():
    tree = ["list", [["array", "|u1", [8], 0]] * 2]
    with pytest.raises(codec.NotPlainError):
        codec.decode(tree, [bytes(8)])
    with pytest.raises(codec.NotPlainError):
        codec.decode(["array", ",".join(["f8"] * 1000), [1], 0], [bytes(8)])


@pytest.mark.parametrize("name", ["PromptTuningConfig", "LoraConfig"])
def test_no_configuration_crosses_but_the_one_that_is_asked_for(name):
    import peft

    options = {"num_virtual_tokens": 5} if "Prompt" in name else {}
    with pytest.raises(codec.NotPlainError):
        codec.encode(getattr(peft, name)(**options), [])
    kind = getattr(peft, name)
    with pytest.raises(codec.NotPlainError):
        codec.decode(["dataclass", kind.__module__, name, []], [])
    tree = json.loads(json.dumps(codec.encode(peft.IA3Config(target_modules=["a"]), [])))
    assert codec.decode(tree, []).target_modules == {"a"}


def test_an_exception_makes_nobody_import_a_module(tmp_path, monkeypatch):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("utils.evil", "utils..x", "peft.__main__", "os", 3, None):
        with pytest.raises(ValueError, match=r"may not cross|no class"):
            codec.trusted_error(module, "error")
    assert "utils.evil" not in sys.modules


# --- hidden tests, other students ---


def test_a_warning_in_a_hidden_test_shows_it_to_nobody(tmp_path):
    """The judge prints the line into the worker's output, which the next answer would read."""
    book = notebook(
        code("i", "import numpy as np"),
        solution("half", begin("def half(x):\n#:\n    return x / 2")),
        graded_cell("test-half", hidden("assert half(4) == 2", "assert abs(half(862) - 431) < 1e-6, 'SECRET-862'"), 2),
    )
    root = write_course(tmp_path / "course", ())
    (root / "01-A.ipynb").write_bytes(cells.write_notebook(book))
    course = Course.load(root)
    with Runner(course, HOSTILE_LIMITS, []) as runner:
        source = "import numpy as np\ndef half(x): return np.int64(-2**63) if x > 100 else x / 2"
        assert not runner.judge(course.plans[0].questions[0], {"half": source})["passed"]
        assert "SECRET" not in (runner.folder / "output.txt").read_text()
        assert not any(runner.scratch.iterdir())  # nothing stays behind
    assert not runner.folder.exists()


@namespaces
def test_nobody_reads_what_another_one_prints(root, tmp_path):
    ann = "print('my mail is ann@example.org', flush=True)\nimport time\ntime.sleep(3)\n1 / 0"
    bob = (
        "import time\nfrom pathlib import Path\ntime.sleep(1)\nhere = Path.home().parent\n"
        "raise ValueError([t[:99] for p in here.glob('*/output.txt')"
        " if 'ann@' in (t := p.read_text())])"
    )
    put(put(tmp_path / "in", "Ann", nb({"twice": ann})), "Bob", nb({"twice": bob}))
    found, _ = graded_class(tmp_path, root, jobs=2)
    assert "ann@" not in found["Bob"].results["test-twice"]["message"]


# --- without namespaces ---


def test_without_namespaces_nothing_is_graded_unless_asked_for_and_the_summary_says_so_first(
    root, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("GRADING_NO_NAMESPACES", "1")
    probe.cache_clear()
    try:
        put(tmp_path / "in", "Kim", nb({"twice": "import os\nos.kill(os.getppid(), 9)"}))
        put(tmp_path / "in", "Zed", nb({"twice": TWICE}))
        arguments = [str(tmp_path / "in"), "--root", str(root), "--output", str(tmp_path / "out")]
        assert grade.main(arguments) == 1 and "--unsafe" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert grade.main([*arguments, "--unsafe"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("UNSAFE") and any(
            "Kim, test-twice: test-twice: the grader itself failed" in line for line in lines
        )
        assert grade.main([*arguments, "--unsafe"]) == 0 and capsys.readouterr().out.startswith("UNSAFE")
    finally:
        probe.cache_clear()
