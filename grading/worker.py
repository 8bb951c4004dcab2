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
import pickle
import secrets
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

LONGEST = 500  # characters of a message that is kept


class StudentError(RuntimeError):
    """An exception in the student's process of a class that is not Python's own."""


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


def failure(shell: object, source: str) -> dict | None:
    """Run a cell; None where it ran through, else the error's `name`, `message`, and `line` in the cell."""
    result = shell.run_cell(source, store_history=False, silent=False)
    error = result.error_before_exec or result.error_in_exec
    if error is None:
        return None
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>" and trace.tb_frame.f_globals is shell.user_ns:
            line = trace.tb_lineno
            break
        trace = trace.tb_next
    return {"name": type(error).__name__, "message": short(error), "line": line}


def short(error: BaseException) -> str:
    """The message of an error, cut; an error whose message cannot be had has none."""
    try:
        return str(error)[:LONGEST]
    except BaseException:
        return ""


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
                os.close(events)
                take_answers(shell, listener)
            listener.close()
            tell(ready=cells.grade_id(cell))
        elif problem := failure(shell, cell["source"]):
            tell(cell=number, **problem)
    tell(done=True)


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
    scratch = Path(tempfile.mkdtemp(prefix="answer-"))
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
        watch = sandbox.TreeWatch(student, limits)
        verdict = judge(shell, ours, job, test, watch)
        codec.send(connection, verdict)
    finally:
        ours.close()
        shutil.rmtree(scratch, ignore_errors=True)


def judge(shell: object, student: socket.socket, job: dict, test: dict, watch: sandbox.TreeWatch) -> dict:
    """Fork the judge, keep the student's process inside its limits, and return the verdict."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
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


# --- the student's process ---


def serve(shell: object, judge_end: socket.socket, job: dict, facts: dict) -> None:
    """Run the student's cells, hand over their values, then answer calls until the judge hangs up."""
    codec.send(judge_end, {"sandbox": facts})
    problems = []
    for name, source in job["cells"]:
        if problem := failure(shell, source):
            problems.append({"cell": name, **problem})
    values, buffers = {}, []
    for name in job["exports"]:
        values[name] = export(shell.user_ns, name, buffers)
    codec.send(judge_end, {"problems": problems, "values": values}, buffers)
    while True:
        try:
            message, (data, *_) = codec.receive(judge_end)
        except codec.ClosedError:
            return
        if "token" in message:
            problem = failure(shell, data.decode())
            codec.send(judge_end, {"token": message["token"], "problem": problem})
        else:
            codec.send(judge_end, *reply(shell.user_ns, data))


def export(namespace: dict, name: str, buffers: list[bytes]) -> dict:
    """How the value of `name` goes over: as data, as a function to be called, or the reason why not."""
    if name not in namespace:
        return {"missing": True}
    value = namespace[name]
    try:
        return {"data": codec.encode(value, buffers)}
    except codec.NotPlainError as error:
        return {"function": True} if callable(value) else {"strange": str(error)}
    except BaseException as error:
        return {"strange": f"it cannot be read ({type(error).__name__})"}


def reply(namespace: dict, data: bytes) -> tuple[dict, list[bytes]]:
    """Call the student's function as the judge asks; its result, or its exception by name."""
    buffers: list[bytes] = []
    try:
        name, arguments, options = pickle.loads(data)  # from the judge: our own data
        return {"result": codec.encode(namespace[name](*arguments, **options), buffers)}, buffers
    except codec.NotPlainError as error:
        return {"strange": str(error)}, []
    except BaseException as error:
        lineage = [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__]
        return {"raised": lineage, "message": short(error)}, []


# --- the judge ---


class Remote:
    """A student's function, called in the student's process; arguments and result are copies."""

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.__name__, self._channel = name, channel

    def __call__(self, *arguments: object, **options: object) -> object:
        """Call over. Raises what the student's code raised, or NotPlainError for a result that is not plain data."""
        data = pickle.dumps((self.__name__, arguments, options), 5)
        try:
            codec.send(self._channel, {}, [data])
            message, buffers = codec.receive(self._channel)
        except (codec.ClosedError, OSError):
            raise StudentError("the process that ran the answer ended") from None
        if not isinstance(message, dict):
            raise StudentError("the answer is damaged")
        if "strange" in message:
            raise codec.NotPlainError(f"what {self.__name__} returns cannot be judged: {str(message['strange'])[:200]}")
        if "raised" in message:
            raise rebuild(message["raised"], str(message.get("message", "")))
        return codec.decode(message.get("result"), buffers)

    def __reduce__(self) -> tuple:
        return _local, (self.__name__,)


def _local(name: str) -> object:
    """The student's own function, where a test hands it back as an argument."""
    return sys.modules["__main__"].__dict__[name]


def rebuild(lineage: object, message: str) -> Exception:
    """An exception of the first class in `lineage` that is Python's or `utils`' own, else a StudentError."""
    for module, name in lineage if isinstance(lineage, list) else []:
        kind = getattr(builtins, name, None) if module == "builtins" else None
        if module != "builtins":
            try:
                kind = codec.trusted_class(module, name)
            except (ValueError, ImportError, AttributeError):
                continue
        if isinstance(kind, type) and issubclass(kind, Exception):
            if kind is Exception:
                break
            try:
                return kind(message)
            except Exception:
                continue
    name = lineage[0][1] if isinstance(lineage, list) and lineage else "error"
    return StudentError(f"{name}: {message}")


def judge_apart(shell: object, student: socket.socket, job: dict, test: dict) -> dict:
    """Run the test here, on values that crossed as data."""
    verdict: dict = {"passed": False, "problems": [], "line": None}
    try:
        facts, _ = codec.receive(student)
        verdict["sandbox"] = facts["sandbox"]
        answer_, buffers = codec.receive(student)
        verdict["problems"] = answer_["problems"]
        values = {name: bind(name, answer_["values"][name], buffers, student) for name in job["exports"]}
    except (codec.ClosedError, OSError):
        return verdict | {"name": "StudentError", "message": "the process that ran the answer ended"}
    except (codec.NotPlainError, KeyError, TypeError) as error:
        return verdict | {"name": "NotPlainError", "message": short(error)}
    for name, value in values.items():
        if value is MISSING:
            shell.user_ns.pop(name, None)  # a stub's value must not stand in
        else:
            shell.user_ns[name] = value
    problem = failure(shell, test["source"])
    return verdict | {"passed": problem is None, **(problem or {})}


MISSING = object()


def bind(name: str, form: dict, buffers: list[bytes], channel: socket.socket) -> object:
    """The value of `name` in the judge's namespace. Raises NotPlainError for what cannot cross."""
    if "data" in form:
        return codec.decode(form["data"], buffers)
    if "function" in form:
        return Remote(name, channel)
    if "strange" in form:
        raise codec.NotPlainError(f"{name} cannot be judged: {str(form['strange'])[:200]}")
    return MISSING


def judge_inside(shell: object, student: socket.socket, job: dict, test: dict) -> dict:
    """Let the student's process run the test; what it says is checked for form only. For tests of live objects."""
    verdict: dict = {"passed": False, "problems": [], "line": None}
    token = secrets.token_hex(16)
    try:
        facts, _ = codec.receive(student)
        verdict["sandbox"] = facts["sandbox"]
        ready, _ = codec.receive(student)
        verdict["problems"] = ready["problems"]
        codec.send(student, {"token": token}, [test["source"].encode()])
        said, _ = codec.receive(student)
        problem = said["problem"]
        if said["token"] != token or not (problem is None or isinstance(problem, dict)):
            raise KeyError("token")
    except (codec.ClosedError, OSError):
        return verdict | {"name": "StudentError", "message": "the process that ran the answer ended"}
    except (KeyError, TypeError):
        return verdict | {"name": "StudentError", "message": "the answer is damaged"}
    return verdict | {"passed": problem is None, **(problem or {})}


def main() -> None:
    """Run the notebook named on the command line; copies of this process stay until its group is killed."""
    path, sockets, events = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    sys.path[:] = [str(path.parent), *(p for p in sys.path if p not in ("", os.environ["GRADING_ROOT"]))]
    run_notebook(path, sockets, events)


if __name__ == "__main__":
    from grading import worker  # under its own name: `__main__` becomes the notebook's

    worker.main()
