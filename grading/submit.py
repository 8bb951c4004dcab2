"""Pack what is to be handed in, the notebooks, the trained adapters and their loss curves, into `submission.zip`.

python submit.py
"""

import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("adapter_config.json", "adapter_model.safetensors", "probe.json")
GRADED = (*(f"adapters/positive/{name}" for name in FILES), "train/positive/run.json")  # of one profile


def main() -> None:
    """Write the zip and say what is in it, and what is missing."""
    notebooks = sorted(HERE.glob("[0-9][0-9]-*.ipynb"))  # the course's, no Untitled.ipynb
    found = notebooks + [path for path in sorted(HERE.glob("artifacts/*/adapters/*/*")) if path.name in FILES]
    found += sorted(HERE.glob("artifacts/*/train/*/run.json"))
    with zipfile.ZipFile(HERE / "submission.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in found:
            file.write(path, path.relative_to(HERE).as_posix())
    print("submission.zip:", *(path.relative_to(HERE).as_posix() for path in found), sep="\n  ")
    for name in [*missing_notebooks(notebooks), *missing_results()]:
        print(f"MISSING: {name}")
    print(f"{len(notebooks)} notebooks. Saved all of them? Only what is on disk was packed.")


def missing_notebooks(notebooks: list[Path]) -> list[str]:
    """The numbers that are left out from 01 to the last notebook that is there."""
    numbers = {int(path.name[:2]) for path in notebooks}
    lost = [number for number in range(1, max(numbers, default=1)) if number not in numbers]
    return [f"notebook {number:02}: rename it back, or take it from the zip you were given" for number in lost]


def missing_results() -> list[str]:
    """What 02 has not saved for the profile of which most is there."""
    profiles = sorted(path for path in HERE.glob("artifacts/*") if path.is_dir()) or [HERE / "artifacts" / "mini"]
    lost = min(([p / name for name in GRADED if not (p / name).is_file()] for p in profiles), key=len)
    return [f"{path.relative_to(HERE).as_posix()}: run 02-Train.ipynb, or its points are lost" for path in lost]


if __name__ == "__main__":
    main()
