"""The judge's process: our test, run on values that crossed as plain data and on functions that call over.

`worker.py` forks this process and watches it. A function of the student's is a `Remote` here: arguments go over as
copies, what it did to them in place comes back as numbers.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import pickle
import re
import socket
import sys

from grading import cells, codec
from grading.answering import LONGEST, failure, short
from grading.codec import NotPlainError

MISSING = object()
MOST_PROBLEMS = 20  # of a student's cells that are kept
ENDED = "the process that ran the answer ended"
DAMAGED = "the answer is damaged"
PLAIN = "Numbers, text, lists, dictionaries, arrays and tensors can be"


def said_problem(problem: object) -> dict:
    """`name`, `message`, `line`, `cell` of a failure as the student's process tells it; all else is left out."""
    known = problem if isinstance(problem, dict) else {}
    texts = {key: known[key] for key in ("name", "message", "cell") if isinstance(known.get(key), str)}
    line = known.get("line")
    kept = {"line": line if type(line) is int and 0 < line < 1_000_000 else None}
    return kept | {key: cells.printable(text[:LONGEST]) for key, text in texts.items()}


def said_problems(message: object) -> list[dict]:
    """The failures of the student's cells. Raises TypeError where there is no list of them."""
    problems = message["problems"]
    if not isinstance(problems, list):
        raise TypeError(DAMAGED)
    return [said_problem(problem) for problem in problems[:MOST_PROBLEMS]]


class Remote:
    """A student's function, called in the student's process; arguments and result are copies."""

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.__name__, self._channel = name, channel

    def __call__(self, *arguments: object, **options: object) -> object:
        """Call over. Raises what the student's code raised, or TypeError for a result that is not plain data."""
        try:
            codec.send(self._channel, {}, [pickle.dumps((self.__name__, arguments, options), 5)])
            message, buffers = codec.receive(self._channel)
        except (ConnectionError, OSError):
            raise RuntimeError(ENDED) from None
        if not isinstance(message, dict):
            raise RuntimeError(DAMAGED)
        if "strange" in message:
            raise TypeError(f"what {self.__name__} returns cannot be judged: {str(message['strange'])[:200]}. {PLAIN}")
        if "raised" in message:
            raise rebuild(message["raised"], str(message.get("message", "")))
        handed = [*arguments, *options.values()]
        for place, tree in message.get("changed") or []:
            write_back(handed[codec.index(place)], codec.decode(tree, buffers))
        return codec.decode(message.get("result"), buffers)


def write_back(target: object, value: object) -> None:
    """Change our argument as the student's function has changed its copy."""
    torch = sys.modules.get("torch")
    if hasattr(target, "state_dict") and isinstance(value, dict):
        if target.state_dict().keys() != value.keys():
            raise TypeError("the answer has put other modules into the model that it was given: work on a copy")
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
    """An exception of the first class in `lineage` that is Python's or the course's own, else one of that name."""
    pairs = [p for p in lineage if isinstance(p, list) and len(p) == 2] if isinstance(lineage, list) else []
    message = cells.printable(message[:LONGEST])
    for module, name in pairs:
        try:
            kind = getattr(builtins, name) if module == "builtins" else codec.trusted_error(module, name)
            if kind is not Exception and issubclass(kind, Exception):
                return kind(message)
        except Exception:
            continue
    name = re.sub(r"\W", "", str(pairs[0][1]).rpartition(".")[2])[:80] if pairs else ""
    return type(name or "Exception", (Exception,), {})(message)


def run_test(shell: object, source: str) -> dict | None:
    """As `failure`; an assertion without a message of its own gets what the visible part of the test has printed.

    Warnings go nowhere: they quote the line that they come from, which may be one of a hidden test.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        problem = failure(shell, source)
    if problem and problem["name"] == "AssertionError" and not problem["message"]:
        problem["message"] = printed.getvalue().strip()[-LONGEST:]
    return problem


def run_judge(shell: object, student: socket.socket, job: dict, test: dict) -> dict:
    """Run the test on values that crossed as data; what the student's process says is checked for form only."""
    verdict: dict = {"passed": False, "problems": [], "line": None}
    try:
        facts, _ = codec.receive(student)
        verdict["sandbox"] = facts["sandbox"]
        said, buffers = codec.receive(student)
        verdict["problems"] = said_problems(said)
        values = {name: bind(name, said["values"][name], buffers, student) for name in job["exports"]}
    except (ConnectionError, OSError):
        return verdict | {"message": ENDED}
    except NotPlainError as error:
        return verdict | {"message": short(error)}
    except (KeyError, TypeError):
        return verdict | {"message": DAMAGED}
    failure(shell, test["imports"])
    for name, value in values.items():
        if value is MISSING:
            shell.user_ns.pop(name, None)  # a stub's value must not stand in
        else:
            shell.user_ns[name] = value
    problem = run_test(shell, test["source"])
    return {**verdict, **(problem or {}), "passed": problem is None}


def bind(name: str, form: dict, buffers: list[bytes], channel: socket.socket) -> object:
    """The value of `name` in the judge's namespace. Raises NotPlainError for what cannot cross."""
    if "data" in form:
        return codec.decode(form["data"], buffers)
    if "function" in form:
        return Remote(name, channel)
    if "strange" in form:
        raise NotPlainError(f"{name} cannot be judged: {str(form['strange'])[:200]}. {PLAIN}")
    return MISSING
