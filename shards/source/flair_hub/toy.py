"""The toy subset of FLAIR-HUB: one zip of folders, which IGN publishes outside of the hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write, fsync
from bocage.shards.source.flair_hub import naming, zips
from bocage.shards.source.flair_hub.download import check_disk
from bocage.shards.source.flair_hub.hub import RemoteZip, retried
from bocage.shards.source.flair_hub.metadata import METADATA_FOLDER

TOY_URL = (
    "https://storage.gra.cloud.ovh.net/v1/AUTH_366279ce616242ebb14161b7991a8461/defi-ia/flair_hub/"
    "FLAIR-HUB_TOY_DATASET.zip"
)
"""Address of the toy subset, about 750 MB, as given in the README of https://github.com/IGNF/FLAIR-HUB."""

_MARKER, _TEMPORARY = ".bocage-toy.json", ".bocage-toy.tmp"
_ATTEMPTS = 3


def find_toy() -> RemoteZip:
    """Ask the server for the size of the toy subset. IGN publishes no hash of it; its members have CRC-32 sums.

    Raises:
        InputError: the server cannot be reached or lacks the file.
    """
    from huggingface_hub import get_hf_file_metadata

    name = TOY_URL.rpartition("/")[2]
    size = retried(lambda: get_hf_file_metadata(TOY_URL, token=False).size, name, _ATTEMPTS)
    if size is None:
        raise InputError(f"{TOY_URL}: the server does not say how large the file is; download it by hand and unzip it")
    return RemoteZip(name, TOY_URL, size, digest="")


def is_unpacked(folder: Path, toy: RemoteZip) -> bool:
    """Whether ``unpack_toy`` has unpacked this version of the toy subset in ``folder``."""
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        return bool(marker["size"] == toy.size and marker["is_complete"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _recorded_names(folder: Path) -> list[str]:
    """Names of the folders and files that an earlier call has unpacked, or was about to."""
    try:
        names: list[str] = json.loads((folder / _MARKER).read_bytes())["names"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return names


def _record(folder: Path, toy: RemoteZip, names: list[str], *, is_complete: bool) -> None:
    with atomic_write(folder / _MARKER) as marker:
        marker.write_text(json.dumps({"size": toy.size, "names": names, "is_complete": is_complete}), encoding="utf-8")


def unpack_toy(folder: Path, toy: RemoteZip) -> list[str]:
    """Unpack the toy subset in ``folder``, and delete its zip. Folders of an earlier, interrupted call are replaced.

    Returns:
        Names of the new folders and files.

    Raises:
        InputError: the zip is damaged or refused, the disk is too small or full, or the folder has other data of these
            names.
    """
    archive, temporary = folder / toy.name, folder / _TEMPORARY
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        members = list(zips.members(archive))
        check_disk(folder, sum(member.size for member in members), f"to unpack {toy.name}")
        for member in members:
            path = temporary.joinpath(*_place(os.fsdecode(member.name).split("/")))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zips.read(archive, member))
        if not any(naming.FOLDER.fullmatch(path.name) for path in temporary.iterdir()):
            raise InputError(
                f"{archive}: has no folder like D012-2019_AERIAL_RGBI, so its layout is new; unzip it by hand"
            )
        names = sorted(path.name for path in temporary.iterdir())
        earlier = _recorded_names(folder)
        if foreign := [name for name in names if (folder / name).exists() and name not in earlier]:
            shutil.rmtree(temporary)
            raise InputError(f"{folder / foreign[0]}: exists and is not of the toy subset: give another folder")
        _record(folder, toy, sorted({*names, *earlier}), is_complete=False)
        for name in names:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            os.replace(temporary / name, folder / name)
        temporary.rmdir()
        fsync(folder)
        _record(folder, toy, names, is_complete=True)
        archive.unlink()
    except OSError as error:
        raise InputError(f"{archive}: cannot be unpacked: {error.strerror or error}") from error
    return names


def _place(parts: list[str]) -> list[str]:
    """Path in the new tree: from the folder of a modality or of the metadata on, else the name of the file."""
    for depth, part in enumerate(parts[:-1]):
        if part == METADATA_FOLDER or naming.FOLDER.fullmatch(part):
            return parts[depth:]
    return parts[-1:]
