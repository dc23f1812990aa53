"""Files of a Hugging Face repository to a local folder, and a folder to a repository."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bocage.shards.errors import InputError
from bocage.ssl.encoders.description import CONFIG_FILE, is_description, read_description

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[^\s@~^:?*\[\\]+")
PREFIX = "hf:"
"""Marks a place on the hub: ``hf:org/name`` or ``hf:org/name@revision``."""


def download(place: str, files: Sequence[str]) -> Path:
    """The folder of the local cache that holds ``files`` of a repository, fetched when they are not there yet.

    Args:
        place: ``hf:org/name``, or ``hf:org/name@revision`` for a branch, tag or commit.
        files: names of the files wanted; the folder may lack those that the repository lacks.

    Raises:
        InputError: not such a place, or it can be neither reached nor found in the cache.
    """
    # Imported here: most encoders come from folders, and it costs a fraction of a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, revision = split_place(place)
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except HFValidationError as error:
        raise InputError(f"{place} cannot be the name of a repository: {_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{place} is not in the local cache and huggingface.co cannot be reached: "
            f"copy {' and '.join(files)} from there to a folder and give that"
        ) from error
    except Exception as error:  # refusals of the server and failures on the way, of whatever HTTP client hub uses
        raise InputError(f"{place} cannot be downloaded: {_line(error)}") from error


def split_place(place: str) -> tuple[str, str | None]:
    """Repository and revision of ``hf:org/name`` or ``hf:org/name@revision``.

    Raises:
        InputError: it is of another form.
    """
    repository, at, revision = place.removeprefix(PREFIX).partition("@")
    fits = _REPOSITORY.fullmatch(repository) and (not at or _REVISION.fullmatch(revision))
    if not place.startswith(PREFIX) or not fits:
        raise InputError(f"{place} is not of the form {PREFIX}org/name or {PREFIX}org/name@revision")
    return repository, revision or None


def may_upload() -> bool:
    """Whether there is a token of the hub, in the environment or where logging in leaves it."""
    from huggingface_hub import get_token

    return get_token() is not None


def upload(folder: Path, place: str, *, private: bool, message: str) -> str:
    """Put what a folder holds into a repository, in one commit; what else is there stays.

    Args:
        folder: the folder.
        place: ``hf:org/name``, or ``hf:org/name@revision`` for a branch, which is made where there is none.
        private: of a repository that does not exist yet.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the hub refuses or cannot be reached, or the branch holds an encoder of another sensor, or none and
            other files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, revision = split_place(place)
    try:
        api = HfApi(library_name="bocage")
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repository, revision=revision)) - {".gitattributes"}
        sensor = None
        if CONFIG_FILE in there:
            path = Path(api.hf_hub_download(repository, CONFIG_FILE, revision=revision))
            sensor = read_description(path)[0].modality if is_description(path) else None
        if there and sensor != read_description(folder / CONFIG_FILE)[0].modality:
            what = f"an encoder of {sensor}" if sensor else f"other files ({', '.join(sorted(there)[:3])})"
            raise InputError(f"{place} holds {what}: give another name, or delete them there")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message)
    except InputError:
        raise
    except Exception as error:  # refusals of the server and failures on the way, of whatever HTTP client hub uses
        raise InputError(f"{place} cannot be written: {_line(error)}; nothing of {folder} is lost") from error
    return str(commit.commit_url)


def collect(title: str, places: Sequence[str], *, private: bool) -> str:
    """Put repositories into a collection of the first one's owner, which is made where there is none; its address.

    Raises:
        InputError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    repositories = [split_place(place)[0] for place in places]
    try:
        api = HfApi(library_name="bocage")
        owner = repositories[0].partition("/")[0]
        collection = api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        for repository in repositories:
            api.add_collection_item(collection.slug, repository, "model", exists_ok=True)
    except Exception as error:  # as above
        raise InputError(f"collection {title!r} cannot be written: {_line(error)}") from error
    return str(collection.url)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
