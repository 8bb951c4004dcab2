"""Pack what is to be handed in, the notebooks, the trained adapters and their loss curves, into `submission.zip`.

python submit.py
"""

import json
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTEBOOKS = ("01-Setup.ipynb", "02-Train.ipynb", "03-Inference.ipynb", "04-Compare.ipynb")
FILES = ("adapter_config.json", "adapter_model.safetensors", "probe.json")
TASKS = {"positive": "run 02-Train.ipynb", "style": "do exercise 3.6"}  # whose files give points, and what makes them
GRADED = [name for task in TASKS for name in (*(f"adapters/{task}/{file}" for file in FILES), f"train/{task}/run.json")]


def main() -> None:
    """Write the zip and say what is in it, what is missing and what is broken; it is written all the same."""
    notebooks = sorted(HERE.glob("[0-9][0-9]-*.ipynb"))  # the course's, no Untitled.ipynb
    found = notebooks + [path for path in sorted(HERE.glob("artifacts/*/adapters/*/*")) if path.name in FILES]
    found += sorted(HERE.glob("artifacts/*/train/*/run.json"))
    part = HERE / "submission.zip.part"  # so that a good zip is replaced by a whole one only
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file:
        for path in found:
            file.write(path, path.relative_to(HERE).as_posix())
    part.replace(HERE / "submission.zip")
    print("submission.zip:", *(path.relative_to(HERE).as_posix() for path in found), sep="\n  ")
    problems = [*missing_notebooks(notebooks), *missing_results(), *broken_files(found)]
    for problem in problems:
        print(problem)
    if problems:
        print("submission.zip was written all the same. Mend this and run submit.py again, or hand it in as it is.")
    print(f"{len(notebooks)} notebooks. Saved all of them? Only what is on disk was packed.")


def missing_notebooks(notebooks: list[Path]) -> list[str]:
    """The course's notebooks of which there is none with their number."""
    numbers = {path.name[:2] for path in notebooks}
    lost = [name for name in NOTEBOOKS if name[:2] not in numbers]
    return [f"MISSING: {name}: rename it back, or take it from the zip you were given" for name in lost]


def missing_results() -> list[str]:
    """What has not been saved for the profile of which most is there."""
    profiles = sorted(path for path in HERE.glob("artifacts/*") if path.is_dir()) or [HERE / "artifacts" / "mini"]
    lost = min(([p / name for name in GRADED if not (p / name).is_file()] for p in profiles), key=len)
    remedies = {path: next(how for task, how in TASKS.items() if task in path.parts) for path in lost}
    return [
        f"MISSING: {path.relative_to(HERE).as_posix()}: {how}, or its points are lost" for path, how in remedies.items()
    ]


def broken_files(found: list[Path]) -> list[str]:
    """The files that nobody will be able to read: cut off, empty, or of another kind than their name says."""
    remedies = {".ipynb": "open it in Jupyter and save it, or take it from the zip you were given"}
    lost = [path for path in found if not is_whole(path)]
    return [
        f"BROKEN: {path.relative_to(HERE).as_posix()}: {remedies.get(path.suffix, 'run 02-Train.ipynb again')}"
        for path in lost
    ]


def is_whole(path: Path) -> bool:
    """Whether a notebook has cells, a JSON file is JSON, a safetensors file as long as its header says."""
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            size = 8 + int.from_bytes(data[:8], "little")
            tensors = [value for name, value in json.loads(data[8:size]).items() if name != "__metadata__"]
            return len(data) == size + max(tensor["data_offsets"][1] for tensor in tensors)
        content = read_json(data)
        return path.suffix != ".ipynb" or isinstance(content["cells"], list)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return False


def read_json(data: bytes) -> object:
    """JSON in whatever encoding an editor left it."""
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        return json.loads(data.decode("latin-1"))


if __name__ == "__main__":
    main()
