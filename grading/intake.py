"""What a learning platform exported, read safely: one `Submission` a student, from a folder, a zip, or loose files.

Only bytes with the endings of `KEPT` come in; nothing is ever executed, written
or followed here.

Known forms of a name: Moodle's `Name_123456_assignsubmission_file_`, Canvas's `namefirst_12345_678_file.ipynb`, or the
student's name alone; a browser's " (1)" is a later copy of the same.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from grading import GradingError, cells

KEPT = {".ipynb", ".json", ".safetensors"}
# What students hand in by mistake: not read, but named.
NAMED = {".rar", ".7z", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".pdf", ".doc", ".docx", ".odt", ".html", ".zip"}
MOST_FILES = 2000  # that are kept, of one submission
MOST_ENTRIES = 20_000  # of all zips of one submission
MOST_BYTES = 64 << 20  # of one file
MOST_IN_ALL = 256 << 20  # of one submission, zips inside zips counted too
DEEPEST = 2  # zips inside zips
DEEPEST_FOLDER = 20
MOST_PROBLEMS = 50
LONGEST_NAME = 200
KEY_BYTES = 100  # of a student's name, in the names of our files
SKIPPED = ("__MACOSX", ".ipynb_checkpoints", ".git", ".venv", "venv", "node_modules", "__pycache__")
MOODLE = re.compile(r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_(?:[a-z]+_)?(?P<file>.*)")
CANVAS = re.compile(r"(?P<name>[^_]+)_(?P<late>LATE_)?(?P<id>\d+)_\d+_(?P<file>.+)")
ENTRY = re.compile(rb"PK\x01\x02")  # stands before each entry of a zip's table
COPY = re.compile(r"(?P<name>.*\S)\s*\((?P<number>\d{1,4})\)")


@dataclass
class Submission:
    """One student's files, in memory: `files` by their path inside; `problems` are for the student's feedback.

    `failure`: why we could not read it, for the instructor; nobody loses points for that. `late`: the platform's file
    name says so.
    """

    student: str
    lms_id: str
    key: str  # names the student's files in our output
    files: dict[str, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failure: str = ""
    late: bool = False
    return_name: str = ""  # under which the platform takes a page back for this student; "" where no platform named her
    entries: int = 0  # of zips, so far
    size: int = 0  # bytes read, so far

    def refuse(self, problem: str) -> None:
        """Note once, for the student, what was not read."""
        if problem not in self.problems and len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)

    def digest(self) -> str:
        """16 hex digits over everything that was handed in."""
        digest = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            digest.update(f"{name}\0{len(data)}\0".encode("utf-8", "replace") + data)
        digest.update("\n".join([*self.problems, self.failure]).encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


def collect(folder: Path) -> tuple[list[Submission], list[str]]:
    """The submissions in `folder`, sorted by name, and what was set aside, in words.

    Of several copies of one student's ("Ann.zip", "Ann (1).zip") the last one counts. Raises GradingError where there
    is no folder or nothing in it.
    """
    if not folder.is_dir():
        raise GradingError(f"{folder}: no such folder; name the one that holds one folder or zip per student")
    paths, aside = _entries(folder)
    submissions: dict[str, Submission] = {}
    for (name, identity), copies in sorted(_by_student(paths).items()):
        latest = max(copies)
        aside += [
            f"{shown(p.name)}: an earlier copy, not graded" for c in sorted(copies) if c < latest for p in copies[c]
        ]
        submission = Submission(shown(name), identity, file_key(name, identity))
        if submission.key in submissions:
            aside.append(f"{shown(name)}: its key is that of another student, not graded; rename it")
            continue
        names = [CANVAS.fullmatch(bare_name(path)) for path in copies[latest]]
        submission.late = any(found and found["late"] for found in names)
        submission.return_name = return_name(copies[latest][0])
        loose = identity and all(path.is_file() for path in copies[latest])
        if len(copies[latest]) > 1 and not (loose and sum(p.suffix.lower() == ".zip" for p in copies[latest]) < 2):
            aside.append(f"{', '.join(shown(p.name) for p in copies[latest])}: graded together, as one student's")
        submissions[submission.key] = submission
        for path in copies[latest]:
            try:
                read_into(submission, path)
            except Exception as error:  # whatever a file system or a library has in store: it stops nobody else
                why = f"{type(error).__name__}: {str(error)[:80]}"
                submission.failure = f"{shown(path.name)} could not be read ({why})"
    if not submissions:
        raise GradingError(f"{folder}: nothing to grade in it; it must hold one folder or zip per student")
    return list(submissions.values()), aside


def shown(name: str) -> str:
    """A name of a student or a file, on one line and not too long, its ending kept."""
    plain = " ".join(cells.printable(name).split())
    return plain if len(plain) <= LONGEST_NAME else f"...{plain[-LONGEST_NAME:]}"


def _entries(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders, zips and notebooks in `folder`, and what else is there, in words."""
    found, aside = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or is_noise(path.name):
            continue
        mode = path.lstat().st_mode
        known = stat.S_ISREG(mode) and path.suffix.lower() in {*KEPT, ".zip"}
        if stat.S_ISLNK(mode):
            aside.append(f"{shown(path.name)}: a link, not followed")
        elif stat.S_ISDIR(mode) or known:
            found.append(path)
        else:
            aside.append(f"{shown(path.name)}: neither a folder nor a zip nor a notebook")
    return found, aside


def _by_student(paths: list[Path]) -> dict[tuple[str, str], dict[int, list[Path]]]:
    """The paths of each student (name and id), by the number of the copy.

    "Group (1)" and "Group (2)" are copies only where there is a "Group".
    """
    groups: dict[tuple[str, str], dict[int, list[Path]]] = {}
    for path in paths:
        name, identity, copy = read_name(path)
        groups.setdefault((name, identity), {}).setdefault(copy, []).append(path)
    for (name, identity), copies in list(groups.items()):
        if 0 not in copies and len(copies) > 1:
            del groups[name, identity]
            groups |= {(f"{name} ({number})", identity): {0: found} for number, found in copies.items()}
    return groups


def is_noise(name: str) -> bool:
    """Whether a program, and no student, has made the file or folder of this name."""
    return name in SKIPPED or name.startswith("._")  # what macOS keeps beside a file


def read_name(path: Path) -> tuple[str, str, int]:
    """`(student, id on the platform or "", number of the copy)` from the name of a folder or file."""
    stem = bare_name(path)
    if found := MOODLE.fullmatch(stem) or CANVAS.fullmatch(stem):
        return found["name"].strip(), found["id"], 0
    if (found := COPY.fullmatch(stem)) and path.suffix != ".ipynb":
        return found["name"].strip(), "", int(found["number"])
    return stem.strip(), "", 0


def return_name(path: Path) -> str:
    """Where in a zip Moodle (multiple feedback files) or Canvas (uploaded again) looks for the student's page; or "".

    Moodle: a folder of the submission's name, up to `_file_`. Canvas: the name up to both numbers.
    """
    if found := MOODLE.fullmatch(stem := bare_name(path)):
        return f"{found['name']}_{found['id']}_assignsubmission_file_/feedback.html"
    if found := CANVAS.fullmatch(stem):
        return f"{stem.removesuffix(found['file'])}feedback.html"
    return ""


def bare_name(path: Path) -> str:
    """The name of a folder, or of a file without its ending, its letters composed in one way (NFC)."""
    return unicodedata.normalize("NFC", path.name if path.is_dir() else path.stem)


def file_key(name: str, identity: str) -> str:
    """A file name for the student that is safe everywhere and of which there is one only."""
    plain = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", name)).strip("-_")
    plain = plain.encode("utf-8", "ignore")[:KEY_BYTES].decode("utf-8", "ignore") or "student"
    return f"{plain}-{hashlib.sha256(f'{name}|{identity}'.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def read_into(submission: Submission, path: Path) -> None:
    """Add the files of a folder, a zip or one file to `submission`; what is refused is named in its problems."""
    if path.is_dir():
        for name, file in _walk(path, submission):
            add_file(submission, name, file.stat().st_size, file.read_bytes)
    elif path.suffix.lower() != ".zip":
        found = MOODLE.fullmatch(path.name) or CANVAS.fullmatch(path.name)  # it ends with the student's own name
        add_file(submission, (found and found["file"]) or path.name, path.stat().st_size, path.read_bytes)
    elif path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            read_zip(submission, file, data, "", DEEPEST)
    else:
        submission.refuse("the zip: empty")


def _walk(folder: Path, submission: Submission, depth: int = DEEPEST_FOLDER) -> Iterator[tuple[str, Path]]:
    """The files below `folder` with their relative names; links are neither read nor followed."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or is_noise(path.name):
            continue
        if path.is_dir() and depth == 0:
            submission.refuse(f"{shown(path.name)}: more than {DEEPEST_FOLDER} folders deep, not read")
        elif path.is_dir():
            yield from ((f"{path.name}/{name}", file) for name, file in _walk(path, submission, depth - 1))
        elif path.is_file():
            yield path.name, path


def add_file(
    submission: Submission, name: str, size: int, read: Callable[[], bytes], depth: int = DEEPEST, prefix: str = ""
) -> None:
    """Keep one file if its ending is one we grade and it is not too large; of a zip, what is in it."""
    name, suffix = shown(prefix + name), PurePosixPath(name).suffix.lower()
    is_zip = suffix == ".zip" and depth > 0
    if suffix not in KEPT and not is_zip:
        if suffix in NAMED:
            submission.refuse(f"{name}: not read, only notebooks, adapters and zips are")
        return
    if size > MOST_BYTES or submission.size + size > MOST_IN_ALL or len(submission.files) >= MOST_FILES:
        submission.refuse(f"{name}: too large, not read")
        return
    submission.size += size
    if is_zip:
        data = read()
        read_zip(submission, io.BytesIO(data), data, name + "/", depth - 1)
        return
    while name in submission.files:
        name = f"again/{name}"
    submission.files[name] = read()


def read_zip(submission: Submission, file: BinaryIO, data: bytes | mmap.mmap, prefix: str, depth: int) -> None:
    """Add what a zip holds. Entries that point outside, links, encrypted or damaged ones are refused by name."""
    place = prefix or "the zip"
    submission.entries += sum(1 for _ in islice(ENTRY.finditer(data), MOST_ENTRIES + 1))
    if submission.entries > MOST_ENTRIES:
        submission.refuse(f"{place}: more than {MOST_ENTRIES} entries, not read")
        return
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # the library raises a dozen kinds for a damaged table
        submission.refuse(f"{place}: damaged ({str(error)[:80]})")
        return
    for entry in archive.infolist():
        try:
            _read_entry(submission, archive, entry, prefix, depth)
        except Exception as error:  # each way of packing has errors of its own, zlib's and lzma's among them
            submission.refuse(f"{shown(prefix + entry.filename)}: damaged ({str(error)[:80]})")


def _read_entry(
    submission: Submission, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, prefix: str, depth: int
) -> None:
    name = entry_name(entry).replace("\\", "/")  # as Windows writes it
    label = shown(name)
    parts = PurePosixPath(name).parts
    if name.endswith("/") or any(is_noise(part) for part in parts):
        return
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        submission.refuse(f"{label}: points outside of the zip, refused")
    elif stat.S_ISLNK(entry.external_attr >> 16):
        submission.refuse(f"{label}: a link, refused")
    elif entry.flag_bits & 1:
        submission.refuse(f"{label}: encrypted, not read")
    else:
        add_file(submission, name, entry.file_size, lambda: _bounded(archive, entry), depth, prefix)


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
