"""The runner, the refresher and strict nbval, on notebooks of a few cells: what they catch, keep, and leave alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import notebook_rules as rules
import pytest
import refresh
import replay
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns

SANITIZE = Path(__file__).parent / "nbval_sanitize.cfg"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
FIGURE = f"display({{'image/png': '{PNG}'}}, raw=True, metadata={{'image/png': {{'alt': 'A rising line'}}}})"
STREAM = "import sys, time\nfor n in range(3):\n    print(n, end=' ', flush=True)\n    time.sleep(0.02)"
PATIENCE = 240  # seconds a subprocess may take on a busy machine; far below the cell timeout of 900


def write(path: Path, *sources: str, tagged: str | None = None) -> Path:
    """Write a notebook with one code cell a source, and one tagged nbval-ignore-output where given."""
    cells = [new_markdown_cell("# Title"), *map(new_code_cell, sources)]
    if tagged:
        cells.append(new_code_cell(tagged, metadata={"tags": ["nbval-ignore-output"]}))
    kernel = {"name": "venv", "display_name": "somebody's"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def code(path: Path) -> list[NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_replay_keeps_whole_and_partial_notebooks_and_says_why_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = "import os\nprint(os.getcwd() == os.environ['EXPECTED'], os.environ['LAB_PROFILE'])"
    good = write(tmp_path / "good.ipynb", where, FIGURE)
    bad = write(tmp_path / "bad.ipynb", "print('before')", "raise ValueError('too\\nmany')", "print('after')")
    later = write(tmp_path / "later.ipynb", "print('never')")
    out = tmp_path / "out"
    monkeypatch.setenv("EXPECTED", str(tmp_path))
    monkeypatch.setenv("LAB_PROFILE", "tiny")
    assert replay.main([*map(str, (good, bad, later)), "--output", str(out)]) == 1
    said = capsys.readouterr()
    assert "FAILED bad.ipynb, code cell [2] (cell 3 of the notebook): ValueError: too" in said.err
    assert "Traceback" not in said.err
    assert len(re.findall(r"^  \[ ?\d+/\d+\] .* s$", said.out, re.MULTILINE)) == 4  # one line a cell that ran
    assert code(out / "good.ipynb")[0].outputs[0].text == "True tiny\n"
    assert 'alt="A rising line"' in (out / "good.html").read_text(encoding="utf-8")
    first, failed, after = code(out / "bad.ipynb")
    assert first.outputs[0].text == "before\n" and failed.outputs[0].ename == "ValueError"
    assert after.execution_count is None
    assert "before" in (out / "bad.html").read_text(encoding="utf-8")
    assert not (out / "later.ipynb").exists()


def test_the_index_names_each_notebook_its_goal_and_its_state(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, source in (("01-Setup.ipynb", "1"), ("02-Train.ipynb", "1 / 0")):
        replay.main([str(write(tmp_path / name, source)), "--output", str(out)])
    page = (out / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="([^"]+)"', page) == ["01-Setup.html", "02-Train.html"]  # and nothing from elsewhere
    assert re.findall(r"<small>(.*?)</small>", page) == [
        "ran in 0.0 minutes",
        "stopped at an error",
        *["not run yet"] * 2,
    ]
    assert "learns to write more positive movie reviews" in page and "You will be able to" not in page


def test_streams_are_joined_as_a_terminal_shows_them() -> None:
    def stream(text: str, name: str = "stdout") -> NotebookNode:
        return new_output("stream", name=name, text=text)

    parts = [stream("10 %\r"), stream("100 %\r\nend"), stream("x" * 300_000), stream("no", "stderr"), stream("!")]
    joined = replay.join_streams(parts)
    assert [(output.name, output.text) for output in joined] == [
        ("stdout", "100 %\nend" + "x" * 300_000), ("stderr", "no"), ("stdout", "!"),
    ]  # fmt: skip


def test_dead_kernel_is_reported_long_before_the_cell_timeout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "dead.ipynb", "print('alive')", "import os\nos._exit(1)", "1")
    assert replay.main([str(path), "--output", str(tmp_path / "out"), "--timeout", "900"]) == 1
    assert "FAILED dead.ipynb, code cell [2] (cell 3 of the notebook): the kernel died" in capsys.readouterr().err
    assert code(tmp_path / "out" / "dead.ipynb")[0].outputs[0].text == "alive\n"
    assert (tmp_path / "out" / "dead.html").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
@pytest.mark.slow
def test_interrupt_ends_the_kernel_and_keeps_what_ran(tmp_path: Path) -> None:
    path = write(tmp_path / "slow.ipynb", "import os\nprint(os.getpid())", "import time\ntime.sleep(800)")
    out = tmp_path / "out"
    command = [sys.executable, "scripts/replay.py", str(path), "--output", str(out)]
    process = subprocess.Popen(command, cwd=replay.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not re.match(r"  \[ *1/2\] .* s\n", line := process.stdout.readline()):
        assert line, process.stderr.read()
    time.sleep(1)  # the second cell is under way
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Interrupted" in errors
    kernel = int(code(out / "slow.ipynb")[0].outputs[0].text)
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_limit_for_a_cell_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "slow.ipynb", "import time\ntime.sleep(800)")
    with pytest.raises(replay.ReplayError, match=r"slow.ipynb, code cell \[1\] .* longer than the limit of 1 s"):
        replay.execute(replay.read_notebook(path), path, timeout=1)


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A notebook that was refreshed: exact output, output in pieces, a figure, and a time in a tagged cell."""
    folder = tmp_path_factory.mktemp("refreshed")
    path = write(folder / "small.ipynb", "6 * 7", STREAM, FIGURE, "object()", tagged="import time\ntime.time_ns()")
    assert refresh.main([str(path)]) == 0
    return path


def test_refresh_twice_gives_the_same_bytes(refreshed: Path, tmp_path: Path) -> None:
    again = tmp_path / refreshed.name
    again.write_bytes(refreshed.read_bytes())
    assert refresh.main([str(again)]) == 0
    texts = []
    for path in (refreshed, again):
        text = re.sub(r"0x[0-9a-f]+", "ADDRESS", path.read_text(encoding="utf-8"))
        texts.append(text.replace(code(path)[-1].outputs[0].data["text/plain"], "TIME"))
    assert texts[0] == texts[1]
    notebook = nbformat.read(again, as_version=4)
    assert notebook.metadata == {"kernelspec": refresh.KERNEL, "language_info": {"name": "python"}}
    assert [cell.execution_count for cell in code(again)] == [1, 2, 3, 4, 5]
    assert [output.text for output in code(again)[1].outputs] == ["0 1 2 "]


@pytest.mark.slow
def test_strict_nbval_compares_what_is_not_tagged_and_has_a_count(refreshed: Path, tmp_path: Path) -> None:
    def variant(name: str, cell: int, count: int | None, text: str) -> Path:
        notebook = nbformat.read(refreshed, as_version=4)
        changed = notebook.cells[cell]
        changed.execution_count = count
        changed.outputs = [new_output("execute_result", {"text/plain": text}, execution_count=count)] if text else []
        nbformat.write(notebook, tmp_path / name)
        return tmp_path / name

    paths = [
        variant("changed.ipynb", 1, 1, "43"),
        variant("tagged.ipynb", 5, 5, "7"),
        variant("uncounted.ipynb", 1, None, ""),  # what nbval lets pass: the static gate must catch it
    ]
    settings = ["-c", "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider", "-rA", "--color=no"]
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=120", "--nbval-sanitize-with", SANITIZE]
    command = [sys.executable, "-m", "pytest", *map(str, (*settings, *options, *paths))]
    done = subprocess.run(command, cwd=replay.ROOT, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert re.findall(r"^FAILED .*?(\w+\.ipynb::Cell \d+)", done.stdout, re.MULTILINE) == ["changed.ipynb::Cell 0"], (
        done.stdout
    )
    assert "Cell outputs differ" in done.stdout and "1 failed, 14 passed" in done.stdout
    assert rules.counts_from_one(nbformat.read(paths[2], as_version=4))


def test_every_sanitize_pair_is_read() -> None:
    text = SANITIZE.read_text(encoding="ascii")
    pairs = get_sanitize_patterns(text)
    assert len(pairs) == len(re.findall(r"^\s*regex:", text, re.MULTILINE)) > 0
    for pattern, replacement in pairs:
        assert re.compile(pattern) and replacement


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_unreadable_notebook_is_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.ipynb"
    path.write_text(text)
    assert replay.main([str(path), "--output", str(tmp_path / "out")]) == 1
    assert "broken.ipynb is not a readable notebook" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["09-None.ipynb", "09", "../*"])
def test_unknown_notebook_is_refused_before_anything_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([name]) == 1
    assert f"FAILED {name}: no such notebook" in capsys.readouterr().err


@pytest.mark.parametrize("error", [replay.ReplayError("stopped"), KeyboardInterrupt()])
def test_refresh_leaves_a_notebook_that_did_not_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stop(notebook: NotebookNode, path: Path, timeout: int) -> None:
        notebook.cells[1].outputs = [new_output("stream", name="stdout", text="half")]
        raise error

    path = write(tmp_path / "small.ipynb", "6 * 7")
    before = path.read_bytes()
    monkeypatch.setattr(refresh, "execute", stop)
    monkeypatch.setattr(refresh, "ROOT", tmp_path)
    assert refresh.main([str(path)]) in (1, 130)
    assert path.read_bytes() == before
    assert code(tmp_path / "build" / "refresh" / "small.ipynb")[0].outputs[0].text == "half"


def test_normalise_drops_widgets_and_editor_metadata_and_gives_exercises_their_grade_id() -> None:
    widget = new_output("display_data", {refresh.WIDGET: {"model_id": "1"}, "text/plain": "IntSlider()"})
    kept = {"tags": ["nbval-ignore-output"], "nbgrader": {"grade": True}}
    noise = {"execution": {"iopub.execute_input": "2030"}, "scrolled": True}
    cell = new_code_cell("1", id="mine", execution_count=1, metadata=kept | noise, outputs=[widget])
    notebook = refresh.normalise(new_notebook(cells=[cell], metadata={"widgets": {"state": {}}, "course": "IA3"}))
    assert notebook.cells[0].metadata == kept | {"jupyter": {"source_hidden": True}}  # a test is folded
    assert notebook.cells[0].outputs == []
    assert notebook.cells[0].id == "mine" and notebook.cells[0].execution_count == 1
    assert "widgets" not in notebook.metadata and notebook.metadata["course"] == "IA3"
    nbformat.validate(notebook)
    pasted = [new_code_cell("1", id="9d2f", metadata={"nbgrader": {"grade_id": "ex-1-7"}}), new_code_cell("2", id="b")]
    assert [cell.id for cell in refresh.normalise(new_notebook(cells=pasted)).cells] == ["ex-1-7", "b"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": ["x"]}'])
def test_damaged_times_of_the_last_replay_are_no_reason_to_stop(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    assert replay.past_times(path) == {}
    path.write_text('{"a": [1, 2.5]}')
    assert replay.past_times(path) == {"a": [1.0, 2.5]}
