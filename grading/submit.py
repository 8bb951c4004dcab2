"""Pack what is to be handed in, the notebooks, the trained adapters and their loss curves, into `submission.zip`.

python submit.py
"""

import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("adapter_config.json", "adapter_model.safetensors", "probe.json")


def main() -> None:
    """Write the zip and say what is in it."""
    found = sorted(HERE.glob("*.ipynb"))
    found += [path for path in sorted(HERE.glob("artifacts/*/adapters/*/*")) if path.name in FILES]
    found += sorted(HERE.glob("artifacts/*/train/*/run.json"))
    with zipfile.ZipFile(HERE / "submission.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in found:
            file.write(path, path.relative_to(HERE).as_posix())
    print("submission.zip:", *(path.relative_to(HERE).as_posix() for path in found), sep="\n  ")
    if not any(path.suffix == ".safetensors" for path in found):
        print("There is no trained adapter in artifacts/: run 02-Train.ipynb first, or its points are lost.")


if __name__ == "__main__":
    main()
