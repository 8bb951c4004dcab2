"""A class of submissions, honest and hostile, graded on a course of three notebooks; who gets what is one table."""

from __future__ import annotations

import csv
import json
import re
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from grading_course import (
    ALL_RIGHT,
    MEAN,
    TWICE,
    adapter_files,
    as_files,
    as_zip,
    begin,
    code,
    graded_cell,
    handed_in,
    nb,
    notebook,
    put,
    run_file,
    solution,
    vectors,
    write_course,
    write_reference,
)

from grading import GradingError, cells, codec
from grading.adapter import grade_adapter
from grading.course import Course, Runner, calibrate
from grading.intake import collect, read_name
from grading.report import Export, write_reports, write_table
from grading.run import grade_class
from grading.sandbox import Limits

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="grading forks")

LIMITS = Limits(seconds=2, clock=90, memory=400 << 20, processes=12, file=4 << 20)
BANDS = {"loss_gain": (0.01, 0.5), "positivity_gain": (0.05, 0.9)}
GOOD = adapter_files(vectors())
QUESTIONS = ("test-twice", "test-answer", "why", "test-mean", "adapter", "test-scale")
OPEN = None


def measure(tensors: dict) -> dict[str, float]:
    """Stands in for the model: what a file gains grows with its distance from 1."""
    moved = float(np.mean([np.abs(value - 1).mean() for value in tensors.values()]))
    return {"loss_gain": moved, "positivity_gain": 3 * moved, "start_loss": 4.0, "best_loss": 3.85}


NAN = vectors() | {next(iter(vectors())): np.full((24, 1), np.nan, np.float32)}
HALF = dict(list(vectors().items())[:2])
OTHER_CURVE = run_file([(0, None, 4.0), (10, 3.8, 3.5), (20, 3.7, 3.4)])
EQUAL = """
class Equal(int):
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda self, other: True
    __hash__ = None
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
answer = twice = mean = scale = Equal(0)
"""
ANY = "class Any:\n    __eq__ = lambda self, other: True\n    __bool__ = lambda self: True\ndef twice(x): return Any()"
MEMORY = "kept = [b'x' * (32 << 20) for _ in range(40)]"  # 1.3 GB at most, should no limit hold
FORKS = "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        time.sleep(200)\ntime.sleep(200)"
PATCHED = """
import builtins
import numpy as np
np.mean = lambda *a, **k: 0.0
np.isclose = np.allclose = lambda *a, **k: True
builtins.abs = builtins.all = lambda *a: True
get_ipython().run_cell = lambda *a, **k: None
def mean(values): return 0.0
"""
PATCHED_TORCH = """
torch.allclose = torch.equal = lambda *a, **k: True
torch.Tensor.__eq__ = lambda self, other: True
def scale(weight, factors): return torch.zeros(weight.shape)
"""
FORGED = """
import gc, json, os
from pathlib import Path
for place in Path('.').resolve().rglob('*'):
    try: place.write_text('{"passed": true}')
    except OSError: pass
for number in range(3, 64):
    try: os.write(number, b'{"passed": true}')
    except OSError: pass
from utils import small
small.double = lambda x: 0
def twice(x): return 0
"""


def stolen(root: Path) -> str:
    """Reads our solution from the grader's disk and uses it."""
    return (
        f"import json\nbook = json.load(open({str(root / '01-Plain.ipynb')!r}))\n"
        "for cell in book['cells']:\n    if 'def twice' in ''.join(cell['source']): exec(''.join(cell['source']))"
    )


def caller(port: int) -> str:
    return f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).close()\n{TWICE}"


def edited() -> dict[str, bytes]:
    """Tests that test nothing, worth a hundred points each."""
    books = handed_in({})
    for book in books.values():
        for cell in book["cells"]:
            if cells.is_test(cell):
                cell["source"] = "pass"
                cell["metadata"]["nbgrader"]["points"] = 100
    return {name: cells.write_notebook(book) for name, book in books.items()}


def stripped(ids: bool) -> dict[str, bytes]:
    """All metadata lost, as some editors do; the cells' ids too where `ids`."""
    books = handed_in(ALL_RIGHT)
    for book in books.values():
        for cell in book["cells"]:
            cell["metadata"] = {}
            if ids:
                del cell["id"]
    return {name: cells.write_notebook(book) for name, book in books.items()}


def in_encoding(encoding: str) -> dict[str, bytes]:
    books = handed_in(ALL_RIGHT | {"why": "Parce que c'est appris: é ü ñ."})
    return {name: cells.write_notebook(book).decode().encode(encoding) for name, book in books.items()}


RIGHT = as_files(ALL_RIGHT, GOOD)
ONE = nb({"twice": TWICE})


def only(**answers: str) -> dict[str, bytes]:
    return as_files(answers)


# student -> (what is handed in, points for each of QUESTIONS, a pattern that the feedback has)
def table(root: Path, port: int) -> dict[str, tuple[dict[str, bytes], tuple, str]]:
    return {
        "right": (RIGHT, (4, 2, OPEN, 3, 10, 3), "right"),
        "empty": (only(), (0, 0, 0, 0, 0, 0), "not attempted"),
        "nothing": ({}, (0, 0, 0, 0, 0, 0), "01-Plain.ipynb was not found"),
        "hard-coded": (only(twice="def twice(x): return 4"), (0,) * 6, "wrong for other inputs"),
        "syntax": (only(twice="def twice(x:", answer="answer = 42"), (0, 2, 0, 0, 0, 0), "SyntaxError"),
        "crash": (only(twice="import os\nos._exit(0)", answer="answer = 42"), (0, 2, 0, 0, 0, 0), "process that"),
        "exit": (only(twice="raise SystemExit(0)", mean=MEAN), (0, 0, 0, 3, 0, 0), "SystemExit"),
        "late crash": (only(twice="def twice(x):\n    import os\n    os._exit(0)"), (0,) * 6, "process that ran"),
        "hang": (only(twice="while True: pass", answer="answer = 42"), (0, 2, 0, 0, 0, 0), "stopped: it "),
        "memory": (only(twice=MEMORY), (0,) * 6, "MemoryError|memory|did not end"),
        "flood": (only(twice=f"for _ in range(100): print('x' * 100_000)\n{TWICE}"), (0,) * 6, "File too large"),
        "forks": (only(twice=FORKS), (0,) * 6, "processes|did not end|Resource temporarily"),
        "numpy": (only(mean=PATCHED), (0,) * 6, "a test fails"),
        "torch": (only(scale=PATCHED_TORCH), (0,) * 6, ""),
        "equal": (only(twice=EQUAL, answer=EQUAL, mean=EQUAL, scale=EQUAL), (0,) * 6, ""),
        "any": (only(twice=ANY), (0,) * 6, "cannot be judged"),
        "edited": (edited(), (0,) * 6, "not attempted"),
        "utils": (only(twice=FORGED) | {"utils/small.py": b"double = int"}, (0,) * 6, "process that|damaged"),
        "thief": (only(twice=stolen(root)), (0,) * 6, "fails"),
        "caller": (only(twice=caller(port)), (0,) * 6, "your cell twice fails"),
        "copied adapter": (as_files({}, adapter_files(vectors(seed=1))), (0,) * 6, "reference adapter"),
        "ones": (as_files({}, adapter_files(vectors(1.0))), (0,) * 6, "has not been trained"),
        "nan": (as_files({}, adapter_files(NAN)), (0,) * 6, "NaN"),
        "half": (as_files({}, adapter_files(HALF)), (0,) * 6, "2 of 4 vectors are missing"),
        "weak": (as_files({}, adapter_files(vectors(1.005))), (0,) * 6, "too little was learned"),
        "no curve": (as_files({}, GOOD | {"run.json": b"[]"}), (0, 0, 0, 0, 8, 0), "missing or damaged"),
        "other curve": (as_files({}, GOOD | {"run.json": OTHER_CURVE}), (0, 0, 0, 0, 8, 0), "this adapter has 3.85"),
        "other base": (as_files({}, adapter_files(vectors(), "another")), (0,) * 6, "another base model"),
        "pickle": (as_files({}, {"adapter_model.safetensors": b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."}), (0,) * 6,
                   "not a safetensors file"),
        "renamed": ({"my work.ipynb": RIGHT["01-Plain.ipynb"]}, (4, 2, OPEN, 0, 0, 0), "my work.ipynb was graded"),
        "twice there": (only() | {"01-Plain (1).ipynb": RIGHT["01-Plain.ipynb"]}, (4, 2, OPEN, 0, 0, 0), "a second"),
        "no metadata": (stripped(ids=False), (4, 2, OPEN, 3, 0, 3), "right"),
        "no ids": (stripped(ids=True), (4, 2, 0, 3, 0, 3), "no cell for why"),
        "utf-16": (in_encoding("utf-16"), (4, 2, OPEN, 3, 0, 3), "right"),
        "cp1252": (in_encoding("cp1252"), (4, 2, OPEN, 3, 0, 3), "right"),
        "broken file": ({"01-Plain.ipynb": b"{", **only(mean=MEAN)} | {"01-Plain.ipynb": b"{"}, (0, 0, 0, 3, 0, 0),
                        "not a notebook"),
    }  # fmt: skip


NAMES = tuple(table(Path("x"), 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_course(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory) -> tuple[Path, dict]:
    """The class as a platform exports it: a folder or a zip each."""
    folder = tmp_path_factory.mktemp("submissions")
    server = socket.create_server(("127.0.0.1", 0))
    cases = table(root, server.getsockname()[1])
    for number, (name, (files, _, _)) in enumerate(cases.items()):
        if number % 2 or not files:
            (put(folder, name, files) / name).mkdir(exist_ok=True)
        else:
            (folder / f"{name}.zip").write_bytes(as_zip(files))
    return folder, cases


@pytest.fixture(scope="module")
def graded(root, exported, tmp_path_factory) -> dict:
    """Everything graded once, two at a time."""
    output, course = tmp_path_factory.mktemp("grades"), Course.load(root)
    reference = write_reference(tmp_path_factory.mktemp("reference") / "positive-seed0")
    submissions, aside = collect(exported[0])
    class_ = grade_class(
        course, submissions, output / "state", LIMITS, jobs=2, hide=[exported[0], output],
        adapter=lambda files, _kind: grade_adapter(files, [reference], BANDS, measure),
    )  # fmt: skip
    lines = write_reports(course, class_, output, aside, Export("Lab"))
    return {"course": course, "class": {g.submission.student: g for g in class_}, "output": output, "lines": lines}


def namespaced(graded: dict) -> bool:
    return next(g.sandbox for g in graded["class"].values() if g.sandbox)["network"] == "namespace"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_points_and_feedback_of(name, graded, exported):
    if name in ("thief", "caller") and not namespaced(graded):
        pytest.skip("this system allows no namespaces: the report says so")
    one, (_, points, said) = graded["class"][name], exported[1][name]
    found = tuple(one.results[question]["points"] for question in QUESTIONS)
    messages = " ".join([*one.remarks, *(result["message"] for result in one.results.values())])
    assert found == points, messages
    assert re.search(said, messages), messages


@pytest.mark.slow
def test_nobody_is_missing(graded, exported):
    assert set(graded["class"]) == set(exported[1]) == set(NAMES)


@pytest.mark.slow
def test_feedback_shows_no_hidden_test_no_solution_and_no_other_student(graded):
    for name, one in graded["class"].items():
        page = (graded["output"] / "feedback" / f"{one.submission.key}.html").read_text(encoding="utf-8")
        assert name in page and "range(-50, 50)" not in page and "doubled_secretly" not in page
        assert "<td>One<br>01-Plain.ipynb</td>" in page  # the heading above a question names it
        assert not [
            other for other in ("hard-coded", "late crash", "copied adapter") if other != name and other in page
        ]


@pytest.mark.slow
def test_tables(graded):
    def rows(name: str) -> list[dict]:
        with (graded["output"] / name).open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))

    right = next(row for row in rows("grades.csv") if row["student"] == "right")
    assert (right["points"], right["of"], right["open"]) == ("22", "27", "5")
    assert len(rows("questions.csv")) == len(NAMES) * len(QUESTIONS)
    totals = {row["Student"]: row["Lab"] for row in rows("canvas.csv")}
    assert totals["no ids"] == "12" and "right" not in totals  # with open points there is no total yet
    assert {row["question"] for row in rows("written.csv")} == {"why"}


@pytest.mark.slow
def test_a_second_start_runs_nothing_and_gives_the_same(graded, exported, monkeypatch):
    monkeypatch.setattr(Runner, "__enter__", lambda self: pytest.fail("something was graded twice"))
    submissions, _ = collect(exported[0])
    again = grade_class(graded["course"], submissions, graded["output"] / "state", LIMITS)
    assert {g.submission.student: g.results for g in again} == {n: g.results for n, g in graded["class"].items()}


@pytest.mark.slow
def test_marks_of_a_person_are_taken_in(graded):
    path = graded["output"] / "written.csv"
    text = path.read_text(encoding="utf-8-sig")
    key = graded["class"]["right"].submission.key
    path.write_text(text.replace(f"{key},why,5,,", f'{key},why,5,"3,5",Good'), encoding="utf-8-sig")
    class_ = list(graded["class"].values())
    write_reports(graded["course"], class_, graded["output"], [], Export("Lab"))
    assert graded["class"]["right"].score() == 25.5
    assert "right,,,,,25.5" in (graded["output"] / "canvas.csv").read_text(encoding="utf-8-sig")
    assert "Good" in (graded["output"] / "feedback" / f"{key}.html").read_text(encoding="utf-8")
    graded["class"]["right"].results["why"] |= {"points": None, "by_hand": False}  # as it was, for the other tests


def test_an_interrupted_run_goes_on_where_it_stopped_and_gives_the_same(tmp_path):
    course = Course.load(write_course(tmp_path / "course", ("01-Plain.ipynb",)))
    for name in "abc":
        put(tmp_path / "in", name, ONE)
    submissions, _ = collect(tmp_path / "in")
    seen: list[str] = []

    def stop(what: str, count: int) -> None:
        seen.append(what)
        if what == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade_class(course, submissions, tmp_path / "state", LIMITS, tick=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()}
    assert any(name.startswith("a-") for name in kept) and not any(name.startswith("b-") for name in kept)
    seen.clear()
    class_ = grade_class(course, submissions, tmp_path / "state", LIMITS, tick=lambda what, _: seen.append(what))
    assert "a" not in seen
    assert [g.score() for g in class_] == [4, 4, 4]
    assert all((tmp_path / "state" / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_a_course_whose_own_solution_fails_or_whose_test_tests_nothing_is_not_graded(tmp_path):
    root = write_course(tmp_path, ("01-Plain.ipynb",))
    book = cells.read_notebook((root / "01-Plain.ipynb").read_bytes())
    tests = [cell for cell in book["cells"] if cells.is_test(cell)]
    tests[0]["source"], tests[1]["source"] = "assert twice(2) == 5", "answer"
    live = (solution("live", begin("live = None\n#:\nlive = object()")), graded_cell("test-live", "assert live", 1))
    book["cells"] += live
    (root / "01-Plain.ipynb").write_bytes(cells.write_notebook(book))
    course = Course.load(root)
    with Runner(course, LIMITS, []) as runner:
        faults = calibrate(runner)
    assert "test-twice: our own solution does not pass" in faults[0]
    assert "test-answer: the unsolved edition passes" in faults[1]
    assert "test-live: our own solution does not pass" in faults[2] and "live cannot be judged" in faults[2]
    (tmp_path / "in" / "a").mkdir(parents=True)
    with pytest.raises(GradingError, match="does not pass"):
        grade_class(course, collect(tmp_path / "in")[0], tmp_path / "state", LIMITS)


def test_the_limits_hold_without_namespaces(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADING_NO_NAMESPACES", "1")
    course = Course.load(write_course(tmp_path, ("01-Plain.ipynb",)))
    question = course.plans[0].questions[0]
    with Runner(course, Limits(seconds=4, clock=90, processes=12), []) as runner:
        right = runner.judge(question, {"twice": TWICE})
        escape = (
            "import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(200)"
        )
        stopped = runner.judge(question, {"twice": f"{escape}\ntime.sleep(200)"})
    assert right["passed"] and right["sandbox"]["network"] == "limits"
    why = stopped.get("stopped") or stopped["problems"][0]["message"]  # an ordinary user's kernel may be the first
    assert not stopped["passed"] and re.search("processes|did not end|Resource temporarily", why)


# --- intake ---


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("José Núñez_123456_assignsubmission_file_", ("José Núñez", "123456", 0)),
        ("王小明", ("王小明", "", 0)),
        ("Ann Lee (2)", ("Ann Lee", "", 2)),
        ("doejane_4711_99_work.zip", ("doejane", "4711", 0)),
        ("doejane_LATE_4711_99_work.zip", ("doejane", "4711", 0)),
        ("group-2", ("group-2", "", 0)),
    ],
)
def test_names_as_platforms_write_them(name, found):
    assert read_name(Path(name)) == found


def test_a_hostile_export_is_read_safely(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    outside = tmp_path / "outside.ipynb"
    outside.write_bytes(ONE["01-Plain.ipynb"])
    with zipfile.ZipFile(folder / "slip.zip", "w") as archive:
        for name in ("../outside.ipynb", "/etc/x.ipynb", "C:\\x.ipynb", "good/01-Plain.ipynb", "a/../../b.json"):
            archive.writestr(name, ONE["01-Plain.ipynb"])
        link = zipfile.ZipInfo("link.ipynb")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.ipynb", bytes(80 << 20))
    (folder / "nested.zip").write_bytes(as_zip({"in.zip": as_zip(ONE)}))
    (folder / "cut.zip").write_bytes(as_zip(ONE)[:-30])
    (folder / "linked").mkdir()
    (folder / "linked" / "01-Plain.ipynb").symlink_to(outside)
    (folder / "link-to-folder").symlink_to(tmp_path)
    (folder / "Ann.zip").write_bytes(as_zip(only()))
    (folder / "Ann (1).zip").write_bytes(as_zip(ONE))
    (folder / "readme.txt").write_text("x")
    found, aside = collect(folder)
    by_name = {one.student: one for one in found}
    assert set(by_name["slip"].files) == {"good/01-Plain.ipynb"} and len(by_name["slip"].problems) == 5
    assert by_name["bomb"].files == {} and "too large" in by_name["bomb"].problems[0]
    assert list(by_name["nested"].files) == ["in.zip/01-Plain.ipynb"]
    assert "damaged" in by_name["cut"].problems[0]
    assert by_name["linked"].files == {}
    assert by_name["Ann"].files.keys() == ONE.keys()
    assert aside == ["link-to-folder: a link, not followed", "readme.txt: neither a folder nor a zip nor a notebook",
                     "Ann.zip: an earlier copy, not graded"]  # fmt: skip
    assert len({one.key for one in found}) == len(found)


def test_an_empty_export_is_said(tmp_path):
    with pytest.raises(GradingError, match="nothing to grade"):
        collect(tmp_path)


def test_a_name_is_no_formula_no_markup_and_a_safe_file(tmp_path):
    (tmp_path / "=1+1 <b>x").mkdir()
    (submission,), _ = collect(tmp_path)
    assert re.fullmatch(r"1-1-b-x-[0-9a-f]{16}", submission.key)
    write_table(tmp_path / "t.csv", [(submission.student, -1)])
    assert (tmp_path / "t.csv").read_text(encoding="utf-8-sig") == "'=1+1 <b>x,-1\n"


# --- what crosses between the processes ---


class Odd:
    """Nothing that may cross."""


def crossed(value: object) -> object:
    buffers: list[bytes] = []
    return codec.decode(json.loads(json.dumps(codec.encode(value, buffers))), buffers)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        2.5,
        "é",
        [1, [2]],
        (1, "a"),
        {1: [2]},
        {3, 4},
        ...,
        np.float32(2),
        np.int64(3),
    ],
    ids=repr,
)
def test_plain_data_crosses_unchanged(value):
    found = crossed(value)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "array", [np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T, np.array(True), np.array([1 + 2j])]
)
def test_arrays_cross_with_type_and_shape(array):
    found = crossed(array)
    assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


@pytest.mark.parametrize(
    "value", [Odd(), [Odd()], print, iter([]), range(3), 1j, b"x", np.array([Odd()], dtype=object)], ids=str
)
def test_objects_do_not_cross(value):
    with pytest.raises(codec.NotPlainError):
        codec.encode(value, [])


@pytest.mark.parametrize(
    "tree",
    [["dataclass", "os", "system", []], ["dataclass", "utils.config", "ROOT", []], ["array", "O", [1], 0], ["no"], {},
     ["array", "<f8", [9], 0], ["array", "<f8", [-1], 0], ["tensor", "qint8", [1], 0], ["list", 3], ["bytes", 7]],
    ids=str,
)  # fmt: skip
def test_damaged_or_hostile_data_is_refused(tree):
    with pytest.raises(codec.NotPlainError):
        codec.decode(tree, [b"12345678"])


def test_what_a_function_does_to_its_arguments_comes_back(tmp_path):
    """A course whose test passes a list, an array and a library's function."""
    test = (
        "import numpy as np\nvalues, array = [1, 2], np.zeros(2)\n"
        "assert change(values, array, np.sqrt) == 3\n"
        "assert values == [1, 2, 3] and array.tolist() == [5, 0]\n"
        "try:\n    change(1, 2, 3)\nexcept AttributeError:\n    pass"
    )
    solved = begin("def change(v, a, f):\n#:\n    v.append(3)\n    a[0] = 5\n    return float(f(9))")
    book = notebook(code("import", "import numpy"), solution("change", solved), graded_cell("test-change", test, 1))
    root = write_course(tmp_path, ())
    (root / "01-A.ipynb").write_bytes(cells.write_notebook(book))
    course = Course.load(root)
    with Runner(course, LIMITS, []) as runner:
        assert calibrate(runner) == []
