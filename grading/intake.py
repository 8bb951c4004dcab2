"""What a learning platform exported, read safely: one `Submission` a student, from a folder, a zip, or loose files.

For: names, duplicates, zips that lie. Only bytes with the endings of `KEPT` come in; nothing is ever executed, written
or followed here. Not for: what is in a notebook (`match.py`).

Known forms of a name: Moodle's `Name_123456_assignsubmission_file_`, Canvas's `namefirst_12345_678_file.ipynb`, or the
student's name alone; a browser's " (1)" is a later copy of the same.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

KEPT = {".ipynb", ".json", ".safetensors"}
MOST_FILES = 2000  # entries of one submission
MOST_BYTES = 64 << 20  # of one file
MOST_IN_ALL = 256 << 20  # of one submission
DEEPEST = 2  # zips inside zips
SKIPPED = ("__MACOSX", ".ipynb_checkpoints", ".git", ".venv", "venv", "node_modules", "__pycache__")
MOODLE = re.compile(r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_\w*")
CANVAS = re.compile(r"(?P<name>[^_]+)_(?:LATE_)?(?P<id>\d+)_\d+(?:_.*)?")
COPY = re.compile(r"\s*(?:\((\d+)\)|[-_ ][Cc]opy\s*(\d*))$")


class IntakeError(RuntimeError):
    """The folder of submissions cannot be read; the message says why."""


@dataclass
class Submission:
    """One student's files, in memory: `files` by their path inside; `problems` are for the student's feedback."""

    student: str
    lms_id: str
    key: str  # names the student's files in our output
    files: dict[str, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """16 hex digits over everything that was handed in."""
        digest = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            digest.update(f"{name}\0{len(data)}\0".encode("utf-8", "replace") + data)
        digest.update("\n".join(self.problems).encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


def collect(folder: Path) -> tuple[list[Submission], list[str]]:
    """The submissions in `folder`, sorted by name, and what was set aside, in words.

    Of several copies of one student's ("Ann.zip", "Ann (1).zip") the last one counts. Raises IntakeError where there is
    no folder or nothing in it.
    """
    if not folder.is_dir():
        raise IntakeError(f"{folder}: no such folder; name the one that holds one folder or zip per student")
    groups: dict[tuple[str, str], dict[int, list[Path]]] = {}
    aside = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in SKIPPED:
            continue
        if path.is_symlink():
            aside.append(f"{path.name}: a link, not followed")
            continue
        if path.is_file() and path.suffix.lower() not in {*KEPT, ".zip"}:
            aside.append(f"{path.name}: neither a folder nor a zip nor a notebook")
            continue
        name, identity, copy = read_name(path)
        groups.setdefault((name, identity), {}).setdefault(copy, []).append(path)
    submissions = []
    for (name, identity), copies in sorted(groups.items()):
        latest = max(copies)
        aside += [f"{p.name}: an earlier copy, not graded" for c in sorted(copies) if c != latest for p in copies[c]]
        submission = Submission(name, identity, file_key(name, identity))
        for path in copies[latest]:
            read_into(submission, path)
        submissions.append(submission)
    if not submissions:
        raise IntakeError(f"{folder}: nothing to grade in it; it must hold one folder or zip per student")
    return submissions, aside


def read_name(path: Path) -> tuple[str, str, int]:
    """`(student, id on the platform or "", number of the copy)` from the name of a folder or file."""
    stem = unicodedata.normalize("NFC", path.name if path.is_dir() else path.stem)
    if found := MOODLE.fullmatch(stem):
        return found["name"].strip(), found["id"], 0
    if found := CANVAS.fullmatch(stem):
        return found["name"].strip(), found["id"], 0
    copy = COPY.search(stem)
    if copy and stem[: copy.start()].strip() and path.suffix != ".ipynb":
        number = next((int(n) for n in copy.groups() if n), 1)
        return stem[: copy.start()].strip(), "", number
    return stem.strip(), "", 0


def file_key(name: str, identity: str) -> str:
    """A file name for the student that is safe everywhere and of which there is one only."""
    plain = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", name)).strip("-_")[:60] or "student"
    return f"{plain}-{hashlib.sha256(f'{name}|{identity}'.encode('utf-8', 'replace')).hexdigest()[:6]}"


def read_into(submission: Submission, path: Path) -> None:
    """Add the files of a folder, a zip or one file to `submission`; what is refused is named in its problems."""
    if path.is_dir():
        for name, file in _walk(path):
            add_file(submission, name, file.stat().st_size, file.read_bytes)
    elif path.suffix.lower() == ".zip":
        read_zip(submission, path.read_bytes(), "", DEEPEST)
    else:
        add_file(submission, path.name, path.stat().st_size, path.read_bytes)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below `folder` with their relative names; links are neither read nor followed."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name in SKIPPED:
            continue
        if path.is_dir():
            yield from ((f"{path.name}/{name}", file) for name, file in _walk(path))
        elif path.is_file():
            yield path.name, path


def add_file(submission: Submission, name: str, size: int, read: object, depth: int = DEEPEST) -> None:
    """Keep one file if its ending is one we grade and it is not too large."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".zip" and depth > 0 and size <= MOST_BYTES:
        read_zip(submission, read(), name + "/", depth - 1)
        return
    if suffix not in KEPT:
        return
    total = sum(map(len, submission.files.values()))
    if size > MOST_BYTES or total + size > MOST_IN_ALL or len(submission.files) >= MOST_FILES:
        problem = f"{name}: too large, not read"
        if problem not in submission.problems:
            submission.problems.append(problem)
        return
    submission.files[name] = read()


def read_zip(submission: Submission, data: bytes, prefix: str, depth: int) -> None:
    """Add what a zip holds. Entries that point outside, links, encrypted or damaged ones are refused by name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MOST_FILES:
                submission.problems.append(f"{prefix or 'the zip'}: more than {MOST_FILES} entries, not read")
                return
            for entry in entries:
                _read_entry(submission, archive, entry, prefix, depth)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        submission.problems.append(f"{prefix or 'the zip'}: damaged ({str(error)[:80]})")


def _read_entry(
    submission: Submission, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, prefix: str, depth: int
) -> None:
    name = entry_name(entry)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if entry.is_dir() or any(part in SKIPPED for part in parts):
        return
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        submission.problems.append(f"{name}: points outside of the zip, refused")
    elif stat.S_ISLNK(entry.external_attr >> 16):
        submission.problems.append(f"{name}: a link, refused")
    elif entry.flag_bits & 1:
        submission.problems.append(f"{name}: encrypted, not read")
    else:
        add_file(submission, prefix + name, entry.file_size, lambda: _bounded(archive, entry), depth)


def _bounded(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The entry's bytes, never more than its own header says. Raises BadZipFile where there are more."""
    with archive.open(entry) as file:
        data = file.read(entry.file_size + 1)
    if len(data) > entry.file_size:
        raise zipfile.BadZipFile(f"{entry.filename} is larger than it says")
    return data


def entry_name(entry: zipfile.ZipInfo) -> str:
    """The name of an entry; old tools write UTF-8 or a system's own code page without saying so."""
    if entry.flag_bits & 0x800:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename
