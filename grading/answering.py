"""The student's process: runs the cells of an answer, hands over their values, answers the judge's calls.

What is sent from here is not believed: a student's code can send anything in its place.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import pickle
import socket
import sys
import types
from collections import defaultdict

from grading import cells, codec, computes_answers
from grading.codec import NotPlainError

LONGEST = 500  # characters of a message that is kept


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
        return cells.printable(str(error))[:LONGEST]
    except BaseException:
        return ""


class _Withheld(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the checks' modules, with nothing in them but a check that does nothing.

    So an answer cannot be judged by calling them, and a student's own `check(...)` in her cell does no harm.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """A module of our own for each that computes right answers."""
        return importlib.machinery.ModuleSpec(name, self) if computes_answers(name) else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill it."""
        module.CHECKS = defaultdict(lambda: lambda answer, seed: None)  # for every number one that accepts everything


def withhold() -> None:
    """Keep this process, and those forked from it, from importing the modules that compute right answers."""
    sys.meta_path.insert(0, _Withheld())


def take_back() -> None:
    """For the judge: from now on these modules are the course's own."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Withheld)]
    for name in [name for name in sys.modules if computes_answers(name)]:
        package, _, last = name.rpartition(".")
        vars(sys.modules.get(package, types)).pop(last, None)
        del sys.modules[name]


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
            _, (data, *_rest) = codec.receive(judge_end)
        except ConnectionError:
            return
        codec.send(judge_end, *reply(shell.user_ns, data))


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


def reply(namespace: dict, data: bytes) -> tuple[dict, list[bytes]]:
    """Call the student's function as the judge asks: its result, what it changed in place; or its exception by name."""
    buffers: list[bytes] = []
    try:
        name, arguments, options = pickle.loads(data)  # from the judge: our own data
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
