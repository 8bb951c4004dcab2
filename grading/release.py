"""The student edition: a whitelist of files, the solved notebooks without solutions, hidden tests, outputs, and a zip.

`find_traces` proves that nothing of
a solution is left in any byte.
"""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from grading import PACKAGES, GradingError, cells

# What students get beside the notebooks; a folder stands for the files in it with one of these endings.
SHIPPED = (*PACKAGES, "assets", "requirements.txt", "constraints.txt", "LICENSE")
ENDINGS = {".py", ".json", ".safetensors", ".md", ".txt", ".png"}
HERE = Path(__file__).resolve().parent
# Training is deterministic: on a processor like ours, the course's seed leads to the very numbers of this adapter.
# Students must not have it, so that equal numbers are no sign of copying. The bands are the grader's alone.
KEPT_BACK = ("assets/adapters/*/positive-seed0/*", "assets/grading-bands.json")
OWN = {"student-README.md": "README.md", "submit.py": "submit.py"}  # files of this package that students get
# The first line of a notebook, in the solved edition and in the students'.
SOLVED = "*Solved edition: every exercise has its answer. `make student` writes the students' edition.*"
STUDENTS = "*Students' edition: you write the answers. Your instructor has the solved edition.*"
LABS = re.compile(r"\[([^\]]+)\]\(extensions/[^)]+\)")  # links to the optional labs, which students do not have
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
ZIP_DATE = (1981, 1, 1, 0, 0, 0)  # the same bytes whenever it is made; after 1980, where zips begin, in any time zone
DISTINCT = 12  # characters; a shorter line says nothing about where it comes from


def course_notebooks(root: Path) -> list[Path]:
    """The course's notebooks: `NN-Name.ipynb` in its root, in order. Raises GradingError where there are none."""
    found = sorted(path for path in root.glob("*.ipynb") if re.match(r"\d+-", path.name))
    if not found:
        raise GradingError(f"no notebook named like 01-Name.ipynb in {root.name}/")
    return found


def read_solved(path: Path) -> dict:
    """A notebook of the solved edition, its format checked. Raises GradingError."""
    try:
        notebook = cells.read_notebook(path.read_bytes())
    except GradingError as error:
        raise GradingError(f"{path.name}: {error}") from error
    cells.check_format(notebook, path.name)
    return notebook


def student_notebook(solved: Mapping) -> dict:
    """What a student gets: stubs, no hidden tests, no outputs, counts, widget state or metadata of an editor."""
    notebook = copy.deepcopy(solved)
    notebook["metadata"] = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook["cells"]:
        cell["source"] = LABS.sub(
            r"\1 (an optional lab: ask your instructor)", cell["source"].replace(SOLVED, STUDENTS)
        )
        if cells.is_solution(cell):
            cell["source"] = cells.stubbed(cell)
        elif cells.is_test(cell):
            cell["source"] = cells.without_hidden(cell["source"])
        kept = {key: cell["metadata"][key] for key in ("nbgrader", "tags") if key in cell["metadata"]}
        if cells.is_test(cell):  # Jupyter runs the cells after a failing one only where the tag allows it to fail
            kept |= {"editable": False, "deletable": False, "tags": [*kept.get("tags", []), "raises-exception"]}
            kept["jupyter"] = {"source_hidden": True}  # folded in JupyterLab; what it prints is seen
        cell["metadata"] = kept
        if cells.is_solution(cell):
            cell.pop("attachments", None)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return notebook


def stage(root: Path, target: Path, shipped: Iterable[str] = SHIPPED) -> list[Path]:
    """Write the student edition of the course in `root` to the new folder `target`; returns its files, sorted.

    Raises GradingError where the folder is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise GradingError(f"{target.name}/ is not empty: remove it first")
    target.mkdir(parents=True, exist_ok=True)
    for path in course_notebooks(root):
        (target / path.name).write_bytes(cells.write_notebook(student_notebook(read_solved(path))))
    for source, name in _shipped_files(root, shipped):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)
    for name, place in OWN.items():
        shutil.copyfile(HERE / name, target / place)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _shipped_files(root: Path, shipped: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """The whitelisted files of `root`, with their place in the student edition."""
    for name in shipped:
        found = [root / name] if (root / name).is_file() else sorted((root / name).rglob("*"))
        for path in found:
            relative = path.relative_to(root)
            hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
            wanted = path.suffix in ENDINGS or name == path.name
            hidden |= any(relative.match(pattern) for pattern in KEPT_BACK)
            if wanted and not hidden and path.is_file() and not path.is_symlink():
                yield path, relative


def references_of(root: Path, profile: str) -> list[Path]:
    """The folders of the adapters that students have, the positive ones first; none of these may be handed in."""
    found = [path for path, _ in _shipped_files(root, [f"assets/adapters/{profile}"]) if path.suffix == ".safetensors"]
    return sorted((path.parent for path in found), key=lambda path: (not path.name.startswith("positive"), path.name))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is at any moment either the old one or the new one, whole; whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_zip(folder: Path, archive: Path, top: str) -> None:
    """Pack `folder` under the name `top`: the same content gives the same bytes, on any day and machine."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(f"{top}/{path.relative_to(folder).as_posix()}", ZIP_DATE)
            entry.external_attr, entry.create_system = 0o644 << 16, 3
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, path.read_bytes())


# --- the proof ---


def secret_lines(solved: Mapping) -> set[str]:
    """Every line of a solution, a model answer, a hidden test, stripped, that is long enough to be recognised."""
    secrets: set[str] = set()
    for cell in solved["cells"]:
        for wanted, markers in ((cells.is_solution(cell), cells.SOLUTION), (cells.is_test(cell), cells.HIDDEN)):
            if not wanted:
                continue
            lines, regions = cells.split_regions(cell["source"], markers)
            whole = markers is cells.SOLUTION and not regions
            secrets |= {line.strip() for line, inside in lines if inside or whole}
    return {line for line in secrets if len(line) >= DISTINCT} | {"### BEGIN SOLUTION", "### BEGIN HIDDEN TESTS"}


def secrets_of(root: Path) -> tuple[set[str], set[str]]:
    """The lines that must not be in the student edition, and those of solutions that students see anyway."""
    solved = [read_solved(path) for path in course_notebooks(root)]
    shown = [path.read_bytes() for path, _ in _shipped_files(root, SHIPPED) if path.suffix in (".py", ".md")]
    shown += [_plain_sources(notebook) for notebook in solved]
    shown += [(HERE / name).read_bytes() for name in OWN]
    lines = {line for notebook in solved for line in secret_lines(notebook)}
    seen = {line for line in lines if any(line.encode() in text for text in shown)}
    return lines - seen, seen


def find_traces(root: Path, folder: Path, archive: Path | None = None) -> list[str]:
    """Where a line of a solution or hidden test of `root` stands in a file of `folder` or of `archive`; else empty.

    Looked for as plain text and as JSON writes it, in every byte of every file. A line that the course shows to
    students anyway, in a package or in a cell that is not a solution, is no secret.
    """
    secrets, _ = secrets_of(root)
    needles = [(line, {line.encode(), json.dumps(line)[1:-1].encode(), _escaped(line)}) for line in sorted(secrets)]
    places = [(p.relative_to(folder).as_posix(), p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()]
    if archive is not None:
        known = {data for _, data in places}
        places.append((archive.name, archive.read_bytes()))
        with zipfile.ZipFile(archive) as file:
            places.append((f"{archive.name}: names", "\n".join(file.namelist()).encode()))
            members = [(f"{archive.name}: {name}", file.read(name)) for name in file.namelist()]
        places += [(name, data) for name, data in members if data not in known]  # the same bytes are looked at once
    return [f"{name}: {line!r}" for name, data in places for line, forms in needles if any(f in data for f in forms)]


def _plain_sources(solved: Mapping) -> bytes:
    """What a student reads in a notebook: all sources, solutions and hidden tests taken out line by line."""
    lines = []
    for cell in solved["cells"]:
        if cells.is_solution(cell):
            kept = cells.split_regions(cell["source"], cells.SOLUTION)
            lines += [line for line, inside in kept[0] if not inside and kept[1]]
        else:
            lines += cells.without_hidden(cell["source"]).splitlines()
    return "\n".join(lines).encode()


def _escaped(line: str) -> bytes:
    return json.dumps(line, ensure_ascii=False)[1:-1].encode()


def make_student_edition(root: Path, build: Path) -> tuple[Path, Path]:
    """Write `build/student` and `build/student.zip` anew; returns both. Raises GradingError where a trace is left."""
    folder, archive = build / "student", build / "student.zip"
    scratch, packed = build / ".student.tmp", build / ".student.zip.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    archive.unlink(missing_ok=True)
    stage(root, scratch)
    write_zip(scratch, packed, "course")
    if traces := find_traces(root, scratch, packed):
        raise GradingError("the student edition would show " + "; ".join(traces[:5]))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    packed.replace(archive)
    return folder, archive
