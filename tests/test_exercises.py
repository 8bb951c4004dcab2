"""Every exercise: its check and its hidden test accept right answers, reject wrong ones, and say what is wrong.

Model answers are those of the notebooks' solution cells. Right and wrong answers of other kinds: `answers_*.py`.
"""

from __future__ import annotations

import contextlib
import io
import re
import socket
from importlib import import_module
from inspect import signature
from types import FunctionType

import answers_compare
import answers_inference
import answers_setup
import answers_train
import nbformat
import numpy as np
import pytest
import torch
from exercise_rules import exercise_cells, role
from replay import NOTEBOOKS, ROOT

import exercises
from exercises import EXERCISES, FAIL, PASS, TODO, check, scoreboard
from exercises import NOTEBOOKS as MODULE_NAMES
from exercises.answers import plain

MODULES = (answers_setup, answers_train, answers_inference, answers_compare)  # of 01 to 04
ANSWERS = {number: answers for module in MODULES for number, answers in module.ANSWERS.items()}
ALSO_RIGHT = {number: answers for module in MODULES for number, answers in module.ALSO_RIGHT.items()}
CODED = [number for number, exercise in EXERCISES.items() if not (exercise.written or exercise.files)]
FILES = [number for number, exercise in EXERCISES.items() if exercise.files]
STUB = "...  # YOUR CODE HERE"
CELLS = {
    cell.id: cell for name in NOTEBOOKS for cell in exercise_cells(nbformat.read(ROOT / name, as_version=4))
}  # fmt: skip


def cell_id(number: str, part: str = "") -> str:
    return f"ex-{number.replace('.', '-')}{part}"


def source(number: str, part: str = "") -> str:
    if cell_id(number, part) not in CELLS:
        pytest.fail(f"{cell_id(number, part)} is not in its notebook yet")
    return CELLS[cell_id(number, part)].source


def function_name(number: str) -> str:
    return re.search(r"^def (\w+)", source(number), re.MULTILINE)[1]


def model_answer(number: str) -> object:
    namespace = {}
    exec(compile(source(number), cell_id(number), "exec"), namespace)
    return namespace[function_name(number)]


def hidden_test(number: str, answer: object) -> None:
    """Run the hidden test of an exercise on `answer`; it fails by an exception."""
    hidden = source(number, "-test").split("### BEGIN HIDDEN TESTS")[1].split("### END HIDDEN TESTS")[0]
    exec(compile(hidden, cell_id(number, "-test"), "exec"), {function_name(number): answer})


def stubbed(text: str) -> str:
    """The cell as students get it: what nbgrader makes of a solution region."""
    return re.sub(r"^( *)### BEGIN SOLUTION.*?### END SOLUTION", rf"\g<1>{STUB}", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Checks and hidden tests need no network, and no test sees the states of another."""
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(exercises, "_LATEST", {})


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CODED)
def test_exercise_has_all_its_parts(number):
    """What a new exercise still lacks, by place; docs/instructor.md, *Add an exercise*, has the list."""
    notebook = EXERCISES[number].notebook
    cells = [name for name in (cell_id(number, part) for part in ("-card", "", "-test")) if name not in CELLS]
    missing = [f"the cell {name}, or `make refresh`, which gives it this id" for name in cells]
    if number not in import_module(f"exercises.{MODULE_NAMES[notebook]}").CHECKS:
        missing.append(f"a line in CHECKS of exercises/{MODULE_NAMES[notebook]}.py")
    if number not in ANSWERS or len(ANSWERS[number][1]) < 4:
        missing.append(f"a right answer and four wrong ones in tests/answers_{MODULE_NAMES[notebook]}.py")
    assert not missing, "\n".join([f"{number} lacks", *missing])


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CODED)
def test_right_answers_pass(number, capsys):
    """The notebook's, one made in another way, and others that only look odd."""
    answers = (model_answer(number), ANSWERS[number][0], *ALSO_RIGHT.get(number, []))
    for answer in answers:
        for seed in (0, 1, 2):
            verdict = check(number, answer, seed)
            assert verdict.state == PASS, verdict
        hidden_test(number, answer)
    assert capsys.readouterr().out == 3 * len(answers) * f"{number} pass  {EXERCISES[number].title}\n"


@pytest.mark.parametrize("number", CODED)
def test_wrong_answers_fail_with_their_cause_in_the_check_and_in_the_hidden_test(number):
    for wrong, said in ANSWERS[number][1]:
        verdict = check(number, wrong)
        assert verdict.state == FAIL and said in verdict.hint, verdict
        assert "\n" not in str(verdict) and len(str(verdict)) < 150
        assert check(number, wrong, seed=1).state == FAIL, said
        with pytest.raises(Exception) as caught:
            hidden_test(number, wrong)
        assert str(caught.value) or caught.type is not AssertionError, "an assert of the hidden test has no message"


@pytest.mark.parametrize("number", [number for number in CODED if number != "2.1"])
def test_hidden_test_has_inputs_of_its_own(number):
    """An answer that was right for the visible check's inputs, and knows no others, fails the hidden test.

    Exercise 2.1 has three inputs in all, and both tests use all of them.
    """
    seen, right = set(), model_answer(number)

    def parrot(*arguments):
        seen.add(key(arguments))
        return right(*arguments)

    assert check(number, parrot).passed
    with pytest.raises(Exception):  # noqa: B017
        hidden_test(number, lambda *arguments: right(*arguments) if key(arguments) in seen else None)


def key(value: object) -> object:
    """A text that equal inputs share: tensors by their numbers, models by their class."""
    if isinstance(value, (tuple, list)):
        return str([key(item) for item in value])
    if isinstance(value, dict):
        return str({name: key(item) for name, item in value.items()})
    if isinstance(value, torch.nn.Module):
        return str([float(parameter.double().sum()) for parameter in value.parameters()])
    return str(value.tolist()) if isinstance(value, torch.Tensor) else str(value)


FORMS = {
    "list": list, "tuple": tuple, "set": set, "float": float, "int": int, "text": str, "bool": bool,
    "array": np.array, "tensor": torch.tensor, "one tensor": torch.stack, "scalar": lambda value: np.array(value)[()],
    "elements": lambda value: [np.array(item)[()] for item in value], "tensors": lambda v: list(map(torch.tensor, v)),
    "single": lambda value: [value], "single array": lambda value: np.array([value]),
    "single tensor": lambda value: torch.tensor([value]), "parameter": torch.nn.Parameter,
}  # fmt: skip


@pytest.mark.parametrize("number", CODED)
def test_what_passes_in_one_form_passes_the_hidden_test_in_it(number):
    """Lists for tuples, NumPy's numbers for Python's: what the check takes, the hidden test takes."""
    right, passed = model_answer(number), 0
    for form, convert in FORMS.items():
        answer = lambda *arguments, convert=convert: convert(right(*arguments))  # noqa: E731
        if check(number, answer).passed:
            passed += 1
            try:
                hidden_test(number, answer)
            except Exception as error:
                pytest.fail(f"as {form} it passes the check, and in the hidden test: {error!r}")
    assert passed or number == "2.1"


@pytest.mark.parametrize("number", ["2.2", "2.6"])
def test_wrong_answers_fail_whatever_the_seed(number):
    """Where inputs are random and a mistake may lead to the right answer by chance."""
    for wrong, said in ANSWERS[number][1]:
        assert [said for seed in range(2, 8) if check(number, wrong, seed).state != FAIL] == [], said


def test_no_function_of_the_packages_is_an_answer():
    """What students can import and call in one line passes no check."""
    names = [
        f"{path.parent.name}.{path.stem}" for folder in ("utils", "study") for path in (ROOT / folder).glob("*.py")
    ]
    modules = [import_module(name) for name in names if not name.endswith("__")]
    found = {f for module in modules for f in vars(module).values() if isinstance(f, FunctionType)}
    for function in (f for f in found if f.__module__.split(".")[0] in ("utils", "study")):
        for number in CODED:
            with contextlib.suppress(TypeError), contextlib.redirect_stdout(io.StringIO()):
                signature(function).bind(*[0] * len(signature(model_answer(number)).parameters))
                assert not check(number, function).passed, f"{function.__qualname__} answers {number}"


# --- what an exception tells ---------------------------------------------------------------------------------------


class Speechless(Exception):
    def __str__(self):
        raise ValueError


class LongSpeech(Exception):
    def __str__(self):
        return "first line\n\x1b[31m" + "word " * 10_000 + "the end"


def raising(error: BaseException) -> object:
    """A function whose cell raises in its third line."""
    namespace = {"error": error}
    exec(compile("def answer(*_):\n    x = 1\n    raise error", "a cell", "exec"), namespace)
    return namespace["answer"]


def test_an_exception_is_told_with_its_line():
    assert check("1.1", raising(ValueError("so many"))).hint == "your code raises ValueError in line 3: so many"
    assert check("1.1", raising(KeyError(None))).hint == "your code raises KeyError in line 3: None"
    assert check("1.1", raising(Speechless())).hint == "your code raises Speechless in line 3"
    assert check("1.1", lambda: 1).hint.startswith("your code raises TypeError: ")  # none of its lines has run
    hint = check("1.1", raising(LongSpeech())).hint
    assert hint.startswith("your code raises LongSpeech in line 3: first line [31mword w ...") and hint.endswith(
        "the end"
    )
    assert len(str(check("1.1", raising(LongSpeech())))) < 150


# --- stubs and hostile objects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CODED)
def test_stub_is_todo_and_its_test_cell_fails(number, capsys):
    stub = stubbed(source(number))
    assert stub.count(STUB) == 1 and "SOLUTION" not in stub
    namespace = {}
    exec(stub, namespace)
    visible = source(number, "-test").split("### BEGIN HIDDEN TESTS")[0]
    line = f"{number} todo  {EXERCISES[number].title}: no answer yet: your function returns nothing"
    with pytest.raises(AssertionError, match=re.escape(line)):
        exec(visible, namespace)
    assert capsys.readouterr().out == f"{line}\n"


EqualsEverything = type(
    "EqualsEverything", (),
    {
        "__eq__": lambda self, other: True, "__ne__": lambda self, other: False, "__hash__": lambda self: 0,
        "__bool__": lambda self: True, "__float__": lambda self: 1.0, "__len__": lambda self: 3,
        "__iter__": lambda self: iter([self, self, self]), "__getitem__": lambda self, index: self,
        "__getattr__": lambda self, name: self, "__call__": lambda self, *arguments, **named: self,
    },
)  # fmt: skip


class LiarTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *arguments, **named):
        return True


LiarInt = type("LiarInt", (int,), {"__eq__": lambda self, other: True, "__hash__": lambda self: 0})
Odd = type("Odd", (BaseException,), {})


class RaisesOnSight(type):
    @property
    def __name__(cls):
        raise ValueError("no name")


class Nameless(metaclass=RaisesOnSight):
    pass


def deep():
    return deep()


def endless_list():
    items = []
    items.append(items)
    return items


HOSTILE = {
    "odd exception": raising(Odd()),
    "raises": lambda *_: 1 / 0,
    "exits": raising(SystemExit(0)),
    "generator exit": raising(GeneratorExit()),
    "recursion": lambda *_: deep(),
    "memory": lambda *_: [0] * 10**15,
    "NaN": lambda *_: float("nan"),
    "NaN tensor": lambda *_: torch.tensor(float("nan")),
    "infinity": lambda *_: float("inf"),
    "huge": lambda *_: 10**400,
    "complex": lambda *_: 1j,
    "text": lambda *_: "42",
    "bytes": lambda *_: b"42",
    "empty list": lambda *_: [],
    "endless list": lambda *_: endless_list(),
    "list of None": lambda *_: [None] * 3,
    "dictionary": lambda *_: {"a": {1: object()}},
    "generator": lambda *_: (i for i in range(3)),
    "function": lambda *_: deep,
    "class": lambda *_: Nameless,
    "nameless": lambda *_: Nameless(),
    "equals everything": lambda *_: EqualsEverything(),
    "three of these": lambda *_: (EqualsEverything(),) * 3,
    "lying tensor": lambda *_: torch.ones(2, 3).as_subclass(LiarTensor),
    "lying integer": lambda *_: LiarInt(5),
    "empty tensor": lambda *_: torch.empty(0),
    "complex tensor": lambda *_: torch.ones(2, dtype=torch.complex64),
    "meta tensor": lambda *_: torch.ones(2, device="meta"),
    "sparse tensor": lambda *_: torch.eye(3).to_sparse(),
    "its arguments": lambda *arguments: arguments,
    "no function": 5,
    "is everything": EqualsEverything(),
    "a class": Nameless,
    "no arguments": lambda: 1,
}


@pytest.mark.parametrize("number", CODED)
def test_no_check_raises_or_is_fooled(number):
    for name, hostile in HOSTILE.items():
        verdict = check(number, hostile)
        assert verdict.state == FAIL and verdict.hint, f"{name}: {verdict}"


@pytest.mark.parametrize("number", CODED)
def test_nothing_is_todo_and_none_later_is_wrong(number):
    for empty in (None, ..., lambda *_: None, lambda *_: ...):
        assert check(number, empty).state == TODO
    right, calls = model_answer(number), []

    def forgetful(*arguments):
        calls.append(1)
        return right(*arguments) if len(calls) == 1 else None

    verdict = check(number, forgetful)
    assert len(calls) == 1 or verdict.hint == "for some inputs nothing is returned"


def test_users_interrupt_passes_through_and_the_random_state_is_left_alone():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("1.1", interrupted)
    for number in CODED:
        before = torch.get_rng_state()
        check(number, ANSWERS[number][0])
        assert torch.equal(torch.get_rng_state(), before), number


# --- the notebooks and the board ----------------------------------------------------------------------------------


def test_points_are_a_hundred_and_the_notebooks_have_no_other_exercise():
    points = sum(exercise.points for exercise in EXERCISES.values())
    assert points == 100, f"all points of EXERCISES together are {points}: give the difference to another exercise"
    assert len(CODED) >= 15 and sum(exercise.written for exercise in EXERCISES.values()) >= 4
    cards = [re.search(r"^\*(\d+) minutes, (\w+)", source(number, "-card"), re.MULTILINE) for number in EXERCISES]
    assert [card[2] for card in cards].count("hard") == 2 and sum(int(card[1]) for card in cards) <= 300  # minutes
    known = {cell_id(number, part) for number in EXERCISES for part in ("", "-card", "-test")}
    others = set(CELLS) - known - {"scoreboard", "scoreboard-card"}
    assert not others, f"{sorted(others)}: no exercise in EXERCISES of exercises/__init__.py has this number"
    assert ANSWERS.keys() == set(CODED)


@pytest.mark.parametrize("number", EXERCISES)
def test_notebook_agrees_with_the_list(number):
    exercise, card = EXERCISES[number], source(number, "-card")
    assert card.find(f"### Exercise {number} · {exercise.title}\n") >= 0
    line = rf"^\*\d+ minutes, (easy|medium|hard), {exercise.points} points, "
    assert re.search(line, card, re.MULTILINE), f"the card of {number} does not say {exercise.points} points"
    graded = CELLS[cell_id(number, "" if exercise.written else "-test")]
    assert graded.metadata["nbgrader"]["points"] == exercise.points, f"points in the metadata of {graded.id}"
    assert role(graded) == ("written" if exercise.written else "test")
    if not exercise.written:
        answer = "artifacts_dir(profile)" if exercise.files else function_name(number)
        assert f'checked = check("{number}", {answer})\nassert checked.passed, checked\n' in f"{graded.source}\n"
        assert f"`{number} pass  {exercise.title}`" in card


@pytest.mark.parametrize("number", CODED)
def test_card_quotes_what_is_said(number):
    """Each error on the card, set in italics, is one that some wrong answer leads to."""
    said = [check(number, wrong).hint for wrong, _ in ANSWERS[number][1]]
    errors = source(number, "-card").split("<summary>I see this error</summary>")[1].split("</details>")[0]
    quotes = [re.split(r"\*,? or \*", line[3:].partition("*:")[0].partition("*,")[0])
              for line in errors.splitlines() if line.startswith("* *")]  # fmt: skip
    assert quotes and [quote for line in quotes for quote in line if not any(quote in hint for hint in said)] == []


@pytest.mark.parametrize("number", CODED)
def test_example_calls_of_the_card_are_right(number):
    """Every call on the card runs, those apart that use a name of the lesson; where it says what comes out, it does."""
    name, card = function_name(number), source(number, "-card")
    names, calls = {name: model_answer(number), "torch": torch}, 0
    for code, due, digits in re.findall(r"`([^`\n]+)`(?:\s+is\s+(?:`([^`\n]+)`|(\d[\d.,]*)))?", card):
        if code.startswith("one = "):
            exec(code, names)
        if f"{name}(" not in code:
            continue
        calls += 1
        if re.search(r"\b(model|vectors|positive)\b", code):
            continue
        found = eval(code, names)
        if due:
            assert plain(found) == plain(eval(due)), code
        if digits:
            assert plain(found) == pytest.approx(float(digits.strip(".,").replace(",", "")), abs=5e-3), code
    assert calls


def test_scoreboard_shows_states_and_sum():
    here = [exercise for exercise in EXERCISES.values() if exercise.notebook == "01"]
    numbers = [exercise.number for exercise in here if not exercise.written]
    points, most = EXERCISES["1.1"].points, sum(exercise.points for exercise in here if not exercise.written)
    empty, words = scoreboard("01").splitlines(), here.index(EXERCISES["1.5"])
    assert empty[0] == f"1.1  Keys and values by hand            {points} points  todo"
    assert empty[words].endswith("read by a person") and empty[-1] == f"checked here: 0 of {most} points"
    assert empty[-2].startswith(f"not checked in this kernel: {', '.join(numbers)}. Choose Run > Run All Above")
    check("1.1", ANSWERS["1.1"][0])
    check("1.4", lambda *_: 3)
    rows, left = scoreboard("01").splitlines(), [number for number in numbers if number not in ("1.1", "1.4")]
    assert rows[-2].startswith(f"not checked in this kernel: {', '.join(left)}. ")
    assert rows[0].endswith("pass") and rows[3].endswith("fail")
    assert rows[-1] == f"checked here: {points} of {most} points"


def test_unknown_numbers_are_named_and_a_verdict_is_one_line():
    for number in ("9.9", "1.5", None):
        with pytest.raises(ValueError, match="there is one for 1.1"):
            check(number, print)
    with pytest.raises(ValueError, match="choose from 01"):
        scoreboard("05")
    with contextlib.redirect_stdout(io.StringIO()) as written:
        verdict = check("1.1", lambda *_: 5)
    assert written.getvalue() == f"{verdict}\n"
