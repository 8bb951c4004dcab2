"""Run the course's notebooks in order, show every cell as it runs, and keep what they show as notebooks and HTML.

For students (`make course`, or on Windows `python scripts/replay.py`) and for CI. Not for comparing outputs (nbval does
that) and not for rewriting the committed notebooks (scripts/refresh.py does that).

Every notebook runs in a fresh kernel of this Python, in the notebook's own folder, as it does in JupyterLab. A notebook
that fails is kept up to the failing cell, with its HTML, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

try:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}: run `pip install -r requirements.txt -c constraints.txt` first") from None

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.runs import read_json, write_atomic  # noqa: E402

NOTEBOOKS = ("01-Setup.ipynb", "02-Train.ipynb", "03-Inference.ipynb", "04-Compare.ipynb")
EXTENSIONS = tuple(sorted(f"extensions/{path.name}" for path in ROOT.glob("extensions/*.ipynb")))  # optional labs
COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


class ReplayError(RuntimeError):
    """A notebook could not be found, read, or run to its end; the message is one line."""


def find_notebook(name: str) -> Path:
    """Return the notebook for a path, or for the start of a notebook's name such as `02` or, in extensions/, `bert`.

    Raises ReplayError where there is none, or more than one.
    """
    if Path(name).is_file():
        return Path(name).resolve()
    places = (ROOT, ROOT / "extensions") if re.fullmatch(r"[\w.-]+", name) else ()
    found = [path for place in places for path in sorted(place.glob(f"{name}*.ipynb"))]
    if len(found) == 1:
        return found[0]
    raise ReplayError(f"{name}: {'no such notebook' if not found else 'more than one notebook begins like this'}")


def read_notebook(path: Path) -> NotebookNode:
    """Return the notebook at `path` in format 4; ReplayError where the file is not a notebook."""
    try:
        return nbformat.read(path, as_version=4)
    except (
        nbformat.reader.NotJSONError,
        nbformat.ValidationError,
        AttributeError,
        KeyError,
        UnicodeDecodeError,
    ) as error:
        raise ReplayError(f"{path.name} is not a readable notebook: {first_line(error)}") from error


def first_line(error: object) -> str:
    """Return the first non-empty line of a text or an error, without terminal colours."""
    lines = [line.strip() for line in COLOUR_CODES.sub("", str(error)).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


class Progress:
    """Prints one line a code cell: its number and first line when it starts, its seconds when it ends."""

    def __init__(self, notebook: NotebookNode) -> None:
        self.order = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        self.cell: int | None = None  # index in the notebook of the cell that runs now
        self.started = 0.0
        self.seconds: list[float] = []

    def start(self, cell: NotebookNode, cell_index: int) -> None:
        """Announce the cell; nbclient calls this right before it sends the cell to the kernel."""
        self.cell, self.started = cell_index, time.monotonic()
        code = [line.strip() for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
        label = (code or ["(comment)"])[0]
        label = label if len(label) <= 70 else label[:67] + "..."
        print(f"  [{self.order.index(cell_index) + 1:2d}/{len(self.order)}] {label:70s} ", end="", flush=True)

    def end(self, **_: object) -> None:
        """Print how long the cell took; nbclient calls this when the kernel has answered."""
        self.seconds.append(round(time.monotonic() - self.started, 2))
        print(f"{self.seconds[-1]:7.1f} s", flush=True)

    def where(self) -> str:
        """Return the current cell as a reader of the notebook counts: code cell and position among all cells."""
        if self.cell is None:
            return "before its first cell"
        return f"code cell [{self.order.index(self.cell) + 1}] (cell {self.cell + 1} of the notebook)"


def take_signals_back(**_: object) -> None:
    """Undo nbclient's signal handlers, under which Ctrl-C can leave the runner waiting for a kernel that is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if sys.platform != "win32":
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)


def reason_of(error: Exception, timeout: int) -> str:
    """Return one line that says what stopped a notebook."""
    if isinstance(error, CellExecutionError):
        return f"{error.ename}: {first_line(error.evalue)}"
    if isinstance(error, CellTimeoutError):
        return f"ran longer than the limit of {timeout} s for a cell (--timeout)"
    if isinstance(error, DeadKernelError):
        return "the kernel died (out of memory, or the process was ended from inside)"
    return f"{type(error).__name__}: {first_line(error)}"


def execute(notebook: NotebookNode, path: Path, timeout: int) -> Progress:
    """Run every code cell of `notebook` (changed in place) in a fresh kernel whose folder is the one of `path`.

    `timeout` is in seconds a cell. Returns the progress with the seconds of each cell. Raises ReplayError naming
    notebook, cell and cause; a dead kernel is noticed within about a second. What ran stays in `notebook`.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a cell that is not reached must not look as if it had run
            cell.outputs, cell.execution_count = [], None
    progress = Progress(notebook)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # the kernel's own notes would stand between the cells
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        on_notebook_start=take_signals_back,
        on_cell_execute=progress.start,
        on_cell_executed=progress.end,
    )
    client.log.disabled = True  # the one-line reason replaces nbclient's own messages
    try:
        # zmq needs a selector loop, which is not the default on Windows
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(client.async_execute())
    except Exception as error:
        raise ReplayError(f"{path.name}, {progress.where()}: {reason_of(error, timeout)}") from error
    finally:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = join_streams(cell.outputs)
    return progress


def join_streams(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """`outputs` with neighbouring texts of one stream as one, each line as a terminal shows it after carriage returns.

    What nbclient's `coalesce_streams` does, in linear time: its pattern takes minutes for a line of 100,000 signs.
    """
    joined: list[NotebookNode] = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if output.output_type == "stream" == before.get("output_type") and output.name == before.name:
            before.text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
    return joined


def keep(notebook: NotebookNode, name: str, output: Path) -> None:
    """Write `notebook` as `output`/`name` and, beside it, as HTML with the figures' alt texts."""
    write_atomic(output / name, (nbformat.writes(notebook) + "\n").encode("utf-8"))
    exporter = HTMLExporter(template_name="classic")  # the default template drops alt texts
    exporter.log.disabled = True
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": Path(name).stem}})
    write_atomic(output / Path(name).with_suffix(".html"), page.encode("utf-8"))


def past_times(path: Path) -> dict[str, list[float]]:
    """Seconds of each cell by notebook, as the last replay left them; empty where nothing usable is there."""
    try:
        times = read_json(path)
        return {name: [float(second) for second in seconds] for name, seconds in times.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def replay(path: Path, output: Path, timeout: int) -> None:
    """Run one notebook and keep it, whole or partial, with its HTML and times (seconds) under `output`."""
    times_file = output / "times.json"
    times = past_times(times_file)
    last = f", {sum(times[path.name]):.0f} s last time" if path.name in times else ""
    notebook = read_notebook(path)
    print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} code cells{last}", flush=True)
    try:
        times[path.name] = execute(notebook, path, timeout).seconds
    finally:
        keep(notebook, path.name, output)
    write_atomic(times_file, json.dumps(times, indent=1).encode("utf-8"))


INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fine-tuning GPT-2 with (IA)³</title>
<style>body {{ font: 1.1em/1.5 sans-serif; max-width: 42em; margin: 2em auto; padding: 0 1em; }}
li {{ margin: 0 0 1.2em; }} small {{ color: #555; }}</style></head>
<body><h1>Fine-tuning GPT-2 with (IA)³</h1><p>Read the pages in this order.</p><ol>
{items}
</ol></body></html>
"""


def write_index(output: Path) -> None:
    """Write `output`/index.html: each notebook of the course with its goal, the minutes it took, and its state."""
    times, items = past_times(output / "times.json"), []
    for name in NOTEBOOKS:
        page = (output / name).with_suffix(".html")
        _edition, title, goal = read_notebook(ROOT / name).cells[0].source.split("\n\n")[:3]
        title, goal = html.escape(title.lstrip("# ")), goal.replace("\n", " ").removesuffix("You will be able to")
        if not page.exists():
            link, state = title, "not run yet"
        else:
            link = f'<a href="{page.name}">{title}</a>'
            cells = read_notebook(output / name).cells
            failed = any(out.output_type == "error" for cell in cells for out in cell.get("outputs", ()))
            state = "stopped at an error" if failed else f"ran in {sum(times.get(name, ())) / 60:.1f} minutes"
        items.append(f"<li>{link}<br>{html.escape(goal)}<br><small>{state}</small></li>")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "index.html", INDEX.format(items="\n".join(items)).encode("utf-8"))


def start_console() -> None:
    """Use UTF-8 for this process's output and in the kernels, whatever the system's code page is."""
    os.environ.setdefault("PYTHONUTF8", "1")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay the notebooks named on the command line, or all four; return the exit code."""
    parser = argparse.ArgumentParser(description="Run the course's notebooks in order, in the given order if named.")
    parser.add_argument("notebooks", nargs="*", default=NOTEBOOKS, help="paths, or beginnings of names such as 02")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "course", help="folder for notebooks and HTML")
    parser.add_argument("--timeout", type=int, default=900, help="limit for one cell, in seconds")
    options = parser.parse_args(arguments)
    start_console()
    started = time.monotonic()
    try:
        for path in [find_notebook(name) for name in options.notebooks]:
            replay(path, options.output, options.timeout)
    except ReplayError as error:
        print(f"\nFAILED {error}\nWhat ran until then is in {options.output}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. What ran until then is in {options.output}", file=sys.stderr)
        return 130
    finally:
        write_index(options.output)
    print(f"Done in {time.monotonic() - started:.0f} s. Open {options.output / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
