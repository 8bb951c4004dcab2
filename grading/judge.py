"""The two processes that one answer needs: the student's, which runs cells and answers calls, and the judge's.

For: `serve` (the student's side) and `judge_apart`, `judge_inside` (ours); `worker.py` forks and watches them. A
function of the student's is a `Remote` on our side: arguments go over as copies, what it did to them in place comes
back as numbers, a function that we pass it runs on our side. Not for: limits (`sandbox.py`), files.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import pickle
import secrets
import socket
import sys
import types

from grading import codec
from grading.codec import ClosedError, NotPlainError

LONGEST = 500  # characters of a message that is kept
MISSING = object()


class StudentError(RuntimeError):
    """An exception in the student's process of a class that is not Python's own."""


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


def run_test(shell: object, source: str) -> dict | None:
    """As `failure`; an assertion without a message of its own gets what the visible part of the test has printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        problem = failure(shell, source)
    if problem and problem["name"] == "AssertionError" and not problem["message"]:
        text = printed.getvalue().partition("-----")[0].strip()  # before IPython's traceback
        problem["message"] = text[-LONGEST:]
    return problem


# --- the student's side ---


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
        except ClosedError:
            return
        if "token" in message:
            problem = run_test(shell, data.decode())
            codec.send(judge_end, {"token": message["token"], "problem": problem})
        else:
            codec.send(judge_end, *reply(shell.user_ns, data, judge_end))


def export(namespace: dict, name: str, buffers: list[bytes]) -> dict:
    """How the value of `name` goes over: as data, as a function to be called, or the reason why not."""
    if name not in namespace:
        return {"missing": True}
    value = namespace[name]
    try:
        return {"data": codec.encode(value, buffers)}
    except NotPlainError as error:
        return {"function": True} if callable(value) else {"strange": str(error)}
    except BaseException as error:
        return {"strange": f"it cannot be read ({type(error).__name__})"}


def reply(namespace: dict, data: bytes, judge_end: socket.socket) -> tuple[dict, list[bytes]]:
    """Call the student's function as the judge asks: its result, what it changed in place; or its exception by name."""
    buffers: list[bytes] = []
    try:
        name, arguments, options = _Unpickler(io.BytesIO(data), judge_end).load()  # from the judge: our own data
        handed = [*arguments, *options.values()]
        before = [frozen(value) for value in handed]
        result = codec.encode(namespace[name](*arguments, **options), buffers)
        changed = []
        for place, (old, value) in enumerate(zip(before, handed, strict=True)):
            if old is not None and frozen(value) != old:
                changed.append([place, codec.encode(state_of(value), buffers)])
        return {"result": result, "changed": changed}, buffers
    except NotPlainError as error:
        return {"strange": str(error)}, []
    except BaseException as error:
        lineage = [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__]
        return {"raised": lineage, "message": short(error)}, []


def state_of(value: object) -> object:
    """What can be changed in place in an argument: a module's tensors, else the value itself."""
    return dict(value.state_dict()) if hasattr(value, "state_dict") else value


def frozen(value: object) -> tuple | None:
    """A copy that tells whether an argument was changed; None for what cannot be told."""
    buffers: list[bytes] = []
    try:
        return codec.encode(state_of(value), buffers), buffers
    except NotPlainError:
        return None


class _Unpickler(pickle.Unpickler):
    """Reads what the judge sent; its functions become calls back to it."""

    def __init__(self, file: io.BytesIO, judge_end: socket.socket) -> None:
        super().__init__(file)
        self._judge_end = judge_end

    def persistent_load(self, number: int) -> object:
        """A stand-in for the judge's function of this number."""

        def call_back(*arguments: object, **options: object) -> object:
            buffers: list[bytes] = []
            tree = codec.encode([list(arguments), options], buffers)
            codec.send(self._judge_end, {"call": number, "with": tree}, buffers)
            _, (data, *_rest) = codec.receive(self._judge_end)
            return pickle.loads(data)

        return call_back


# --- the judge's side ---


class _Pickler(pickle.Pickler):
    """Writes arguments for the student's side; functions of ours that have no importable name stay here."""

    def __init__(self, file: io.BytesIO, functions: list) -> None:
        super().__init__(file, 5)
        self._functions = functions

    def persistent_id(self, value: object) -> int | None:
        """The number of a function that is called back; None for everything else."""
        if isinstance(value, types.FunctionType) and ("<" in value.__qualname__ or value.__module__ == "__main__"):
            self._functions.append(value)
            return len(self._functions) - 1
        return None


class Remote:
    """A student's function, called in the student's process; arguments and result are copies."""

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.__name__, self._channel = name, channel

    def __call__(self, *arguments: object, **options: object) -> object:
        """Call over. Raises what the student's code raised, or NotPlainError for a result that is not plain data."""
        functions: list = []
        data = io.BytesIO()
        _Pickler(data, functions).dump((self.__name__, arguments, options))
        try:
            codec.send(self._channel, {}, [data.getvalue()])
            message, buffers = codec.receive(self._channel)
            while isinstance(message, dict) and "call" in message:
                given, named = codec.decode(message.get("with"), buffers)
                result = functions[message["call"]](*given, **named)
                codec.send(self._channel, {}, [pickle.dumps(result, 5)])
                message, buffers = codec.receive(self._channel)
        except (ClosedError, OSError):
            raise StudentError("the process that ran the answer ended") from None
        if not isinstance(message, dict):
            raise StudentError("the answer is damaged")
        if "strange" in message:
            raise NotPlainError(f"what {self.__name__} returns cannot be judged: {str(message['strange'])[:200]}")
        if "raised" in message:
            raise rebuild(message["raised"], str(message.get("message", "")))
        handed = [*arguments, *options.values()]
        for place, tree in message.get("changed") or []:
            write_back(handed[place], codec.decode(tree, buffers))
        return codec.decode(message.get("result"), buffers)

    def __reduce__(self) -> tuple:
        return _local, (self.__name__,)


def _local(name: str) -> object:
    """The student's own function, where a test hands it back as an argument."""
    return sys.modules["__main__"].__dict__[name]


def write_back(target: object, value: object) -> None:
    """Change our argument as the student's function has changed its copy."""
    torch = sys.modules.get("torch")
    if hasattr(target, "state_dict") and isinstance(value, dict):
        for name, tensor in target.state_dict().items():
            tensor.copy_(value[name])
    elif torch is not None and isinstance(target, torch.Tensor):
        with torch.no_grad():
            target.copy_(value)
    elif isinstance(target, list) and isinstance(value, list):
        if len(target) == len(value) and all(hasattr(item, "shape") for item in target):
            for item, new in zip(target, value, strict=True):
                write_back(item, new)
        else:
            target[:] = value
    elif isinstance(target, dict) and isinstance(value, dict):
        target.clear()
        target.update(value)
    elif hasattr(target, "shape"):
        target[...] = value


def rebuild(lineage: object, message: str) -> Exception:
    """An exception of the first class in `lineage` that is Python's or `utils`' own, else a StudentError."""
    pairs = [p for p in lineage if isinstance(p, list) and len(p) == 2] if isinstance(lineage, list) else []
    for module, name in pairs:
        try:
            kind = getattr(builtins, name) if module == "builtins" else codec.trusted_class(module, name)
            if kind is not Exception and issubclass(kind, Exception):
                return kind(message)
        except Exception:
            continue
    return StudentError(f"{pairs[0][1] if pairs else 'error'}: {message}")


def judge_apart(shell: object, student: socket.socket, job: dict, test: dict) -> dict:
    """Run the test here, on values that crossed as data."""
    verdict: dict = {"passed": False, "problems": [], "line": None}
    try:
        facts, _ = codec.receive(student)
        verdict["sandbox"] = facts["sandbox"]
        said, buffers = codec.receive(student)
        verdict["problems"] = said["problems"]
        values = {name: bind(name, said["values"][name], buffers, student) for name in job["exports"]}
    except (ClosedError, OSError):
        return verdict | {"name": "StudentError", "message": "the process that ran the answer ended"}
    except (NotPlainError, KeyError, TypeError) as error:
        return verdict | {"name": "NotPlainError", "message": short(error)}
    failure(shell, test["imports"])
    for name, value in values.items():
        if value is MISSING:
            shell.user_ns.pop(name, None)  # a stub's value must not stand in
        else:
            shell.user_ns[name] = value
    problem = run_test(shell, test["source"])
    return verdict | {"passed": problem is None, **(problem or {})}


def bind(name: str, form: dict, buffers: list[bytes], channel: socket.socket) -> object:
    """The value of `name` in the judge's namespace. Raises NotPlainError for what cannot cross."""
    if "data" in form:
        return codec.decode(form["data"], buffers)
    if "function" in form:
        return Remote(name, channel)
    if "strange" in form:
        raise NotPlainError(f"{name} cannot be judged: {str(form['strange'])[:200]}")
    return MISSING


def judge_inside(shell: object, student: socket.socket, job: dict, test: dict) -> dict:
    """Let the student's process run the test; what it says is checked for form only. For tests of live objects."""
    verdict: dict = {"passed": False, "problems": [], "line": None}
    token, source = secrets.token_hex(16), test["source"]
    try:
        facts, _ = codec.receive(student)
        verdict["sandbox"] = facts["sandbox"]
        ready, _ = codec.receive(student)
        verdict["problems"] = ready["problems"]
        codec.send(student, {"token": token}, [source.encode()])
        said, _ = codec.receive(student)
        problem = said["problem"]
        if said["token"] != token or not (problem is None or isinstance(problem, dict)):
            raise KeyError("token")
    except (ClosedError, OSError):
        return verdict | {"name": "StudentError", "message": "the process that ran the answer ended"}
    except (KeyError, TypeError):
        return verdict | {"name": "StudentError", "message": "the answer is damaged"}
    return verdict | {"passed": problem is None, **(problem or {})}
