"""A fork server: the course, prepared once and kept at every test, where any number of answers can be tried.

    python -m grading.worker        started by `course.py`, which says through standard input what to prepare

The libraries are loaded once. Of a lesson only imports, functions and classes are run: no exercise and no test reads
anything else of it. Each notebook is a fork, and at each test cell that one forks again: this copy waits behind a
socket. For each answer it forks twice more:

- the **student's process**, shut in (`sandbox.py`): runs the student's cells, then answers calls;
- the **judge**: a clean copy, in which every name of the exercise is a value that crossed as plain data, or a function
  that calls over. It runs our test cell, hidden tests included, which the student's process never sees.

So nothing that the student's code patches, defines or writes can reach the verdict. No module that computes right
answers is ever loaded here but by a judge, so no student's process has one in its memory.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
from pathlib import Path

from grading import cells, check_modules, codec, release, sandbox
from grading.answering import failure, serve, short, take_back, withhold
from grading.judge import run_judge
from grading.sandbox import TreeWatch

# What torch and peft load at the first call of a function: once here, and not in each fork.
LAZY = ("torch._dynamo", "torch.profiler._cupti_monitor", "peft.utils.transformers_weight_conversion")
LOOK_EVERY = 0.1  # seconds between two looks at the limits


def main() -> None:
    """Prepare the staged course; copies of this process stay until its group is killed."""
    sandbox.die_with_parent()
    told = json.loads(sys.stdin.readline())
    course, sockets = Path(told["course"]), Path(told["sockets"])
    os.chdir(course)
    sys.path[:] = [str(course), *(path for path in sys.path if path not in ("", told["grader"]))]
    withhold()
    notebooks = [cells.read_notebook(path.read_bytes())["cells"] for path in release.course_notebooks(course)]
    load_libraries(course, notebooks)
    shell = make_shell()
    gc.collect()
    gc.freeze()  # no fork looks at these objects again, which would copy their pages
    for path, notebook in zip(release.course_notebooks(course), notebooks, strict=True):
        if os.fork() == 0:
            sandbox.die_with_parent()
            prepare(shell, path.name, notebook, sockets, told["events"])
    os.close(told["events"])
    signal.pause()  # the copies end with this process, and this one with the grader


# --- the notebooks ---


def load_libraries(course: Path, notebooks: list[list[dict]]) -> None:
    """Import what the lessons and the checks import, so that no fork has to; of the checks the libraries only."""
    for cell in (cell for notebook in notebooks for cell in notebook if cell["cell_type"] == "code"):
        for source in cells.definitions(cell["source"], cells.IMPORTS):
            with contextlib.suppress(Exception):  # told where the notebook is prepared
                exec(source, {})
    reader, writer = os.pipe()
    if os.fork() == 0:  # a copy that loads the checks and tells what else came with them
        before = set(sys.modules)
        take_back()
        for name, _ in check_modules(course):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        ours = {name.partition(".")[0] for name, _ in check_modules(course)}
        more = [name for name in sys.modules if name not in before and name.partition(".")[0] not in ours]
        os.write(writer, json.dumps(more).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        more = json.loads(told.read() or "[]")
    os.wait()
    for name in (*more, *(LAZY if "torch" in sys.modules else ())):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def make_shell() -> object:
    """An IPython shell without history file or threads, whose namespace is a new `__main__`."""
    from IPython.core.history import HistoryManager
    from IPython.core.interactiveshell import InteractiveShell

    HistoryManager.enabled = False
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    shell = InteractiveShell.instance(user_module=module, user_ns=module.__dict__, colors="NoColor")
    shell.history_manager.enabled = False
    # As in a kernel, which has a window system or takes none: these two show nothing here.
    shell.register_magic_function(lambda line: None, "line", "matplotlib")
    shell.enable_gui = lambda gui=None: None
    shell.showtraceback = shell.showsyntaxerror = lambda *_, **__: None  # nobody reads it
    return shell


def prepare(shell: object, name: str, notebook: list[dict], sockets: Path, events: int) -> None:
    """Run what a notebook defines, cell by cell; at each test leave a copy of this process that takes answers."""

    def tell(**values: object) -> None:
        os.write(events, (json.dumps(values) + "\n").encode())

    for number, cell in enumerate(notebook, 1):
        if cell["cell_type"] != "code" or cells.is_manual(cell):
            continue
        if cells.is_test(cell) and not cells.ADAPTER_TAGS.keys() & set(cells.tags(cell)):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(sockets / cells.grade_id(cell)))
            listener.listen(64)
            if os.fork() == 0:
                sandbox.die_with_parent()
                os.close(events)
                take_answers(shell, listener)
            listener.close()
            tell(ready=cells.grade_id(cell))
        if cells.is_solution(cell):
            sources = [cell["source"]]  # a stub, whole
        else:  # a student who has run a test has its imports from there on
            sources = cells.definitions(cell["source"], *([cells.IMPORTS] if cells.is_test(cell) else []))
        for source in sources:
            problem = failure(shell, source)
            if problem and problem["name"] != "NameError":  # a function's default that a lesson's run would make
                tell(cell=number, notebook=name, **problem)
    os.close(events)
    signal.pause()


def take_answers(shell: object, listener: socket.socket) -> None:
    """Serve one connection after the other, each in a fork of its own; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                answer(shell, connection)
            except BaseException as error:  # never fall back into the loop above
                codec.send(connection, {"passed": False, "broken": f"{type(error).__name__}: {short(error)}"})
            finally:
                os._exit(0)
        connection.close()


# --- one answer ---


def answer(shell: object, connection: socket.socket) -> None:
    """Judge one answer. In: the student's cells, then, once the student's process exists, the test."""
    job, _ = codec.receive(connection)
    limits = sandbox.Limits(**job["limits"])
    scratch = Path(tempfile.mkdtemp(dir=job["scratch"]))
    ours, theirs = socket.socketpair()
    sandbox.adopt_orphans()
    try:
        hide = [Path(path) for path in job["hide"]]
        sandbox.spawn(lambda facts: serve(shell, theirs, job, facts), scratch, hide, limits, keep_fd=theirs.fileno())
        theirs.close()
        codec.send(connection, {"started": True})
        test, _ = codec.receive(connection)
        verdict = judge(shell, ours, job, test, TreeWatch(limits))
    finally:
        ours.close()
        with contextlib.suppress(RecursionError):
            shutil.rmtree(scratch, ignore_errors=True)  # before the verdict goes out and another answer begins
    codec.send(connection, verdict)


def judge(shell: object, student: socket.socket, job: dict, test: dict, watch: TreeWatch) -> dict:
    """Fork the judge, keep the student's process inside its limits, and return the verdict."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.restrain(watch.limits)
            take_back()
            os.write(writer, json.dumps(run_judge(shell, student, job, test)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    student.close()
    watch.spared.add(pid)
    stopped, data = None, b""
    while True:
        if select.select([reader], [], [], LOOK_EVERY)[0]:
            piece = os.read(reader, 1 << 16)
            if not piece:
                break
            data += piece
        elif stopped is None:
            if stopped := watch.check():
                watch.stop()
        elif time.monotonic() - watch.stopped > 20:  # the judge itself hangs: a test that waits for ever
            os.kill(pid, signal.SIGKILL)
    watch.stop()
    os.waitpid(pid, 0)
    try:
        verdict = json.loads(data)
    except ValueError:
        verdict = {"passed": False, "message": "the test came to no end", "line": None}
    if stopped:
        verdict |= {"passed": False, "stopped": stopped}
    return verdict


if __name__ == "__main__":
    from grading import worker  # under its own name: `__main__` becomes the notebook's

    worker.main()
