"""One notebook of the course, run once and kept at every test, where any number of answers can be tried.

    python -m grading.worker <notebook> <folder for sockets> <descriptor for events>

started by `course.py` in the staged student edition. The notebook runs with stubs; at each test cell the process forks,
and that copy waits behind a socket. For each answer it forks twice more:

- the **student's process**, shut in (`sandbox.py`): runs the student's cells, then answers calls;
- the **judge**: a clean copy, in which every name of the exercise is a value that crossed as plain data, or a function
  that calls over. It runs our test cell, hidden tests included, which the student's process never sees.

So nothing that the student's code patches, defines or writes can reach the verdict. A test that needs live objects is
run *inside* the student's process; `course.py` finds out which these are, and the report names them.
"""

from __future__ import annotations

import builtins
import contextlib
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

from grading import cells, codec, sandbox
from grading.answering import failure, serve, short
from grading.judge import judge_apart, judge_inside
from grading.watch import TreeWatch

# --- the notebook ---


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
    return shell


def run_notebook(path: Path, sockets: Path, events: int) -> None:
    """Run the cells in order; at each test cell leave a copy of this process behind that takes answers."""
    shell = make_shell()

    def tell(**values: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits for the cells after the last test
            os.write(events, (json.dumps(values) + "\n").encode())

    for number, cell in enumerate(cells.read_notebook(path.read_bytes())["cells"], 1):
        if cell["cell_type"] != "code" or cells.is_manual(cell):
            continue
        if cells.is_test(cell):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(sockets / cells.grade_id(cell)))
            listener.listen(64)
            if os.fork() == 0:
                sandbox.die_with_parent()
                os.close(events)
                take_answers(shell, listener)
            listener.close()
            tell(ready=cells.grade_id(cell))
            failure(shell, cells.imports_of(cell["source"]))  # a student who runs the test has them from here on
        elif problem := failure(shell, cell["source"]):
            tell(cell=number, **problem)
    tell(done=True)
    signal.pause()  # the copies end with this process, and this one with the grader


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
        student = sandbox.spawn(
            lambda facts: serve(shell, theirs, job, facts), scratch, hide, limits, keep_fd=theirs.fileno()
        )
        theirs.close()
        codec.send(connection, {"started": True})
        test, _ = codec.receive(connection)
        verdict = judge(shell, ours, job, test, TreeWatch(student, limits))
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
            verdict = (judge_inside if job["inside"] else judge_apart)(shell, student, job, test)
            os.write(writer, json.dumps(verdict).encode())
        finally:
            os._exit(0)
    os.close(writer)
    student.close()
    watch.spared.add(pid)
    stopped, data = None, b""
    while True:
        if select.select([reader], [], [], 0.03)[0]:
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
        verdict = {"passed": False, "name": "StudentError", "message": "the test came to no end", "line": None}
    if stopped:
        verdict |= {"passed": False, "stopped": stopped}
    return verdict


def main() -> None:
    """Run the notebook named on the command line; copies of this process stay until its group is killed."""
    sandbox.die_with_parent()
    path, sockets, events = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    sys.path[:] = [str(path.parent), *(p for p in sys.path if p not in ("", os.environ["GRADING_ROOT"]))]
    run_notebook(path, sockets, events)


if __name__ == "__main__":
    from grading import worker  # under its own name: `__main__` becomes the notebook's

    worker.main()
