"""Download encoders from the Hugging Face hub and upload them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bocage.shards.errors import InputError
from bocage.ssl.encoders.description import CONFIG_FILE, is_encoder_config, read_encoder_config

HUB_PREFIX = "hf:"
"""Prefix of hub addresses: ``hf:org/name`` or ``hf:org/name@revision``."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[^\s@~^:?*\[\\]+")


def download(address: str, files: Sequence[str]) -> Path:
    """Download files of a repository into the local cache, unless they are there already.

    Args:
        address: ``hf:org/name``, or ``hf:org/name@revision`` for a branch, tag or commit.
        files: names of the files; those that the repository lacks are skipped.

    Returns:
        Folder of the local cache with the files.

    Raises:
        InputError: the address is malformed, or the repository is neither reachable nor in the cache.
    """
    # Imported here, because it takes a fraction of a second and most encoders come from folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, revision = parse_hub_address(address)
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except HFValidationError as error:
        raise InputError(f"{address} is not a valid name of a repository: {_one_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{address} is not in the local cache and huggingface.co cannot be reached: "
            f"copy {' and '.join(files)} from there to a folder and give that folder"
        ) from error
    except Exception as error:  # server and network errors, whose types depend on the hub's HTTP client
        raise InputError(f"{address} cannot be downloaded: {_one_line(error)}") from error


def parse_hub_address(address: str) -> tuple[str, str | None]:
    """Split ``hf:org/name`` or ``hf:org/name@revision`` into repository and revision.

    Raises:
        InputError: the address has another form.
    """
    repository, at, revision = address.removeprefix(HUB_PREFIX).partition("@")
    valid = _REPOSITORY.fullmatch(repository) and (not at or _REVISION.fullmatch(revision))
    if not address.startswith(HUB_PREFIX) or not valid:
        raise InputError(f"{address} is not of the form {HUB_PREFIX}org/name or {HUB_PREFIX}org/name@revision")
    return repository, revision or None


def has_token() -> bool:
    """Whether a token of the hub is set in the environment or stored by ``hf auth login``."""
    from huggingface_hub import get_token

    return get_token() is not None


def upload(folder: Path, address: str, *, private: bool, message: str) -> str:
    """Upload an encoder to a repository in one commit; other files of the repository are kept.

    Args:
        folder: folder of the encoder.
        address: ``hf:org/name``, or ``hf:org/name@revision`` for a branch; both are created if needed.
        private: visibility of a new repository.
        message: commit message.

    Returns:
        URL of the commit.

    Raises:
        InputError: the hub rejects the upload or cannot be reached, or the branch holds an encoder of another sensor
            or other files without an encoder.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, revision = parse_hub_address(address)
    try:
        api = HfApi(library_name="bocage")
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        existing = set(api.list_repo_files(repository, revision=revision)) - {".gitattributes"}
        sensor = None
        if CONFIG_FILE in existing:
            path = Path(api.hf_hub_download(repository, CONFIG_FILE, revision=revision))
            sensor = read_encoder_config(path)[0].modality if is_encoder_config(path) else None
        if existing and sensor != read_encoder_config(folder / CONFIG_FILE)[0].modality:
            content = f"an encoder of {sensor}" if sensor else f"other files ({', '.join(sorted(existing)[:3])})"
            raise InputError(f"{address} holds {content}: choose another name, or delete them there")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message)
    except InputError:
        raise
    except Exception as error:  # as in ``download``
        raise InputError(f"{address} cannot be written: {_one_line(error)}; {folder} is unchanged") from error
    return str(commit.commit_url)


def add_to_collection(title: str, addresses: Sequence[str], *, private: bool) -> str:
    """Add repositories to a collection of the first repository's owner, and create the collection if needed.

    Args:
        title: title of the collection.
        addresses: hub addresses of the repositories.
        private: visibility of a new collection.

    Returns:
        URL of the collection.

    Raises:
        InputError: the hub rejects the change or cannot be reached.
    """
    from huggingface_hub import HfApi

    repositories = [parse_hub_address(address)[0] for address in addresses]
    try:
        api = HfApi(library_name="bocage")
        owner = repositories[0].partition("/")[0]
        collection = api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        for repository in repositories:
            api.add_collection_item(collection.slug, repository, "model", exists_ok=True)
    except Exception as error:  # as in ``download``
        raise InputError(f"collection {title!r} cannot be written: {_one_line(error)}") from error
    return str(collection.url)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
