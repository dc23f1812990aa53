"""Files of a Hugging Face repository to a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bocage.shards.errors import InputError

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

    repository, _, revision = place.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1:
        raise InputError(f"{place} is not of the form {PREFIX}org/name or {PREFIX}org/name@revision")
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
