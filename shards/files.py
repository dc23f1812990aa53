"""Atomic writes of files and folders, hashes, sizes, and checks of output folders."""

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
"""Suffix of incomplete files. Files that a killed run left behind may be deleted."""


@contextmanager
def atomic_write(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Context manager that yields a temporary path, and renames it to ``path`` when the block succeeds.

    The content is flushed to disk before the rename. When the block fails, the temporary file is removed and ``path``
    stays unchanged.

    Args:
        path: final path of the file.
        concurrent: whether other processes may write the same file. If so, the temporary name is unique, and the last
            process to finish wins.
    """
    unique = f".{uuid.uuid4().hex[:16]}" if concurrent else ""
    temporary = path.with_name(f"{path.name}{unique}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context manager that yields an empty temporary folder, and renames it to ``folder`` when the block succeeds.

    The content is flushed to disk before the rename. An existing ``folder`` is replaced on success, and stays unchanged
    when the block fails. Leftovers of killed processes are removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}{TEMPORARY_SUFFIX}")
    new, old = temporary / "new", temporary / "old"
    if old.exists() and not folder.exists():  # an earlier process was killed between the two renames below
        old.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for path in (*sorted(new.iterdir()), new):
            fsync(path)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush the content of a file, or the renames in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_outside_shards(output: Path, shards: str | Path) -> None:
    """Check that the output folder of a run is not the folder of its shards, nor inside it.

    An empty ``shards`` passes here; ``Manifest.open`` reports it.

    Raises:
        InputError: the output folder is the folder of the shards, or inside it.
    """
    shards_folder, output_folder = Path(shards).resolve(), output.resolve()
    if str(shards) and (output_folder == shards_folder or shards_folder in output_folder.parents):
        raise InputError(f"output={output} is inside the folder of the shards: choose another folder")


def check_new_folder(folder: Path) -> None:
    """Check that the folder is missing or empty, and create its parent.

    Raises:
        InputError: the path is a file or a folder with content, or its parent cannot be created.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not an empty folder: choose another one")
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error


def format_size(count: int) -> str:
    """Format a number of bytes as MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
