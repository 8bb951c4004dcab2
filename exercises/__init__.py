"""The exercises: which there are, `check()` for one, `scoreboard()` for a notebook.

What a right answer is stands in `setup.py`, `train.py`, `inference.py` and `compare.py`, one for each notebook. A check
runs in the student's own process and can be fooled there: grades are made in `grading/`.
"""

from __future__ import annotations

import types
import warnings
from dataclasses import dataclass
from importlib import import_module

from utils.session import RUN_ABOVE

TODO, PASS, FAIL = "todo", "pass", "fail"
LONGEST_HINT = 135  # characters, so that a verdict is one line
NOTEBOOKS = {"01": "setup", "02": "train", "03": "inference", "04": "compare"}  # and the module with their checks


@dataclass(frozen=True)
class Exercise:
    """One exercise: its number ("1.2" is the second of notebook 01), title and points.

    `written`: a person reads it, there is no check. `files`: not a function is checked but what a notebook has saved.
    """

    number: str
    title: str
    points: int
    written: bool = False
    files: bool = False

    @property
    def notebook(self) -> str:
        """The notebook it stands in: "01" to "04"."""
        return f"0{self.number[0]}"


EXERCISES = {
    exercise.number: exercise
    for exercise in (
        Exercise("1.1", "Keys and values by hand", 4),
        Exercise("1.2", "The feed-forward layer by hand", 3),
        Exercise("1.3", "The count for a model never seen", 6),
        Exercise("1.4", "Perplexity of many texts", 3),
        Exercise("1.5", "One number is not enough", 2, written=True),
        Exercise("2.1", "Three configurations", 4),
        Exercise("2.2", "Exactly the base, or nearly", 3),
        Exercise("2.3", "Labels that teach to stop", 3),
        Exercise("2.4", "Where weight decay leads", 3),
        Exercise("2.5", "Overfit one batch", 4),
        Exercise("2.6", "Read the heat map", 3),
        Exercise("2.7", "The unit that carries the tone", 9),
        Exercise("2.8", "Two settings, one reason", 2, written=True),
        Exercise("2.9", "Your adapter and its curve", 5, files=True),
        Exercise("3.1", "Load the file without peft", 9),
        Exercise("3.2", "Merge one layer by hand", 5),
        Exercise("3.3", "An adapter for each row", 5),
        Exercise("3.4", "Blend adapters", 4),
        Exercise("3.5", "How far would you turn it?", 3, written=True),
        Exercise("3.6", "A style of your own, trained", 3, files=True),
        Exercise("3.7", "A style of your own, shown", 6, written=True),
        Exercise("4.1", "LoRA's numbers", 4),
        Exercise("4.2", "Find the fair pairs", 5),
        Exercise("4.3", "What the table does not say", 2, written=True),
    )
}


class Wrong(Exception):
    """An answer is wrong; the text is the likely cause, in words for the student."""


class NotYet(Exception):
    """There is no answer yet; the text, where there is one, says what is missing."""


class Answer:
    """The student's function. A call gives what it returns, or raises `NotYet` or `Wrong`, and nothing else."""

    def __init__(self, function: object) -> None:
        self.function, self.answered = function, False

    def __call__(self, *arguments: object) -> object:
        """What the student's function returns for `arguments`."""
        if self.function is None or self.function is ...:
            raise NotYet
        if not callable(self.function):
            raise Wrong("the name no longer stands for a function: run the cell above again")
        try:
            result = self.function(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise Wrong(f"your code raises {_in_words(error, self.function)}") from None
        if result is None or result is ...:
            nothing = NotYet("no answer yet: your function returns nothing")
            raise Wrong("for some inputs nothing is returned") if self.answered else nothing
        self.answered = True
        return result


def _in_words(error: BaseException, function: object) -> str:
    """An exception: its class, its line in the cell of `function` where that is known, its message."""
    try:
        message = str(error)
    except Exception:  # it cannot even say what it is
        message = ""
    line = _last_line(error, function.__code__.co_filename) if type(function) is types.FunctionType else None
    return type(error).__name__ + (f" in line {line}" if line else "") + (f": {message}" if message else "")


def _last_line(error: BaseException, file: str) -> int | None:
    """The line of `file` (a notebook's cell is one) that ran last when `error` was raised."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@dataclass(frozen=True)
class Verdict:
    """What became of one check. Prints as one line: number, state, and the title or what to do."""

    exercise: Exercise
    state: str
    hint: str = ""

    @property
    def passed(self) -> bool:
        """Whether the answer is right."""
        return self.state == PASS

    def __str__(self) -> str:
        todo = f"{self.exercise.title}: {self.hint or 'no answer yet'}"
        said = {TODO: todo, PASS: self.exercise.title, FAIL: self.hint}
        return f"{self.exercise.number} {self.state}  {said[self.state]}"


_LATEST: dict[str, Verdict] = {}  # of this kernel, for the scoreboard


def check(number: str, answer: object, seed: int = 0) -> Verdict:
    """Check `answer`, the student's function for exercise `number`, on inputs drawn from `seed`; print the verdict.

    For an exercise of files `answer` is the folder of the profile's artefacts. Whatever the answer does, this returns
    (only the user's own interrupt passes through). Raises ValueError for a number that has no check.
    """
    exercise = EXERCISES.get(number)
    if exercise is None or exercise.written:
        known = ", ".join(e.number for e in EXERCISES.values() if not e.written)
        raise ValueError(f"no check for exercise {number!r}: there is one for {known}")
    verdict = Verdict(exercise, *_judge(exercise, answer, seed))
    _LATEST[number] = verdict
    print(verdict)
    return verdict


def _judge(exercise: Exercise, answer: object, seed: int) -> tuple[str, str]:
    """State and hint of an answer; the checks raise `Wrong` or `NotYet`."""
    examine = import_module(f"exercises.{NOTEBOOKS[exercise.notebook]}").CHECKS[exercise.number]
    from torch.random import fork_rng  # imported above already; this module does without it until a check is made

    try:
        with warnings.catch_warnings(), fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            examine(Answer(answer), seed)
    except NotYet as missing:
        return TODO, str(missing)
    except Wrong as wrong:
        return FAIL, _one_line(str(wrong))
    except KeyboardInterrupt:
        raise
    except BaseException:  # an object that cannot even be looked at
        return FAIL, "the answer cannot be read: return plain numbers, lists, dictionaries or tensors"
    return PASS, ""


def _one_line(text: str) -> str:
    """`text` without line breaks and control characters; of a long one both ends, as much as fits into a verdict."""
    line = "".join(sign for sign in " ".join(text.split()) if sign.isprintable())
    return line if len(line) <= LONGEST_HINT else f"{line[:60]} ... {line[-70:]}"


def scoreboard(notebook: str) -> str:
    """The exercises of one notebook ("01" to "04") with their states in this kernel, as text: a line each, and a sum.

    The sum counts points of coded exercises only. Where a check has not run (after a restart, say) a line says what to
    do. Raises ValueError for another notebook.
    """
    if notebook not in NOTEBOOKS:
        raise ValueError(f"no notebook {notebook!r}: choose from {', '.join(NOTEBOOKS)}")
    here = [exercise for exercise in EXERCISES.values() if exercise.notebook == notebook]
    states = {e.number: "read by a person" if e.written else _state(e.number) for e in here}
    lines = [f"{e.number}  {e.title:<34}{e.points:>2} points  {states[e.number]}" for e in here]
    if unchecked := [e.number for e in here if not e.written and e.number not in _LATEST]:
        lines.append(f"not checked in this kernel: {', '.join(unchecked)}. {RUN_ABOVE}")
    reached = sum(e.points for e in here if states[e.number] == PASS)
    return "\n".join([*lines, f"checked here: {reached} of {sum(e.points for e in here if not e.written)} points"])


def _state(number: str) -> str:
    return _LATEST[number].state if number in _LATEST else TODO
