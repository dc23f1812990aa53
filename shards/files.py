"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bocage.shards.errors import InputError

TEMPORARY_SUFFIX = ".tmp"
"""Ending of files that are still being written; leftovers of a killed run may be deleted."""


@contextmanager
def written_atomically(path: Path, *, contested: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it becomes ``path``, flushed to disk, when the block succeeds.

    When the block fails the temporary file is removed and ``path`` stays as it was.

    Args:
        path: the final name.
        contested: other processes may be writing the same file. The temporary name is then this call's own, so that
            they cannot meet in it; the last to succeed stays.
    """
    own = f".{uuid.uuid4().hex[:16]}" if contested else ""
    temporary = path.with_name(f"{path.name}{own}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes ``folder``, flushed to disk, when the block succeeds.

    What was there before is replaced then, and stays as it was when the block fails. What a killed process left is
    cleared away.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}{TEMPORARY_SUFFIX}")
    new, old = temporary / "new", temporary / "old"
    if old.exists() and not folder.exists():  # a process was killed between the two renames below
        old.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for path in (*sorted(new.iterdir()), new):
            flush(path)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file's content, or a folder's renames, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_apart(output: Path, shards: str | Path) -> None:
    """Check that a run does not write among shards.

    Raises:
        InputError: the folder is that of the shards or in it. Where there is no ``shards`` yet, another check says so.
    """
    there, own = Path(shards).resolve(), output.resolve()
    if str(shards) and (own == there or there in own.parents):
        raise InputError(f"output={output} is among the shards: choose another folder")


def check_new_folder(folder: Path) -> None:
    """Make the folder's parent, and check that the folder is not there or holds nothing yet.

    Raises:
        InputError: it is a file or holds something, or its parent cannot be made.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not an empty folder: choose another one")
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
