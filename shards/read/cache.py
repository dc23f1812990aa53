"""A local cache of remote shards, bounded in bytes and shared by all processes of a machine.

``FOLDER/DIGEST/`` holds the files of one version of a dataset. A shard being fetched is ``NAME.SIZE.part``: it counts
with its full size from the moment it exists, and whoever holds its ``flock`` fetches it, so a dead process's part is
free to be taken over. Room is made under one lock of the folder. Readers hold a shard open only under a shared
``flock`` and only a shard nobody reads is removed, so what is removed leaves the disk at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bocage.shards.errors import InputError
from bocage.shards.files import flush, written_atomically
from bocage.shards.read.object_store import ObjectStore

_FRESH = 20.0  # seconds since its last use in which a shard is not removed for one that nobody waits for
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_UNITS["TIB"] = 1 << 40
_PART = re.compile(r".+\.tar\.(\d+)\.part")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where remote shards are kept, and how many; local folders are read where they are.

    Attributes:
        folder: shared by all processes of the machine; empty for ``$XDG_CACHE_HOME/bocage/shards`` (``~/.cache``).
        size: what the shards in it may occupy, with a unit (``MB``, ``GB``, ``TB``, ``GiB``) or in bytes. Index and
            table of a dataset lie beside them and do not count.

    Raises:
        ValueError: ``size`` is not a size such as ``100GB``.
    """

    folder: str = ""
    size: str = "100GB"

    def __post_init__(self) -> None:
        if self._parsed() is None:
            raise ValueError(f"size={self.size!r} is not a size such as 100GB")

    def _parsed(self) -> int | None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?B)?", str(self.size).strip().upper())
        return int(float(found[1]) * _UNITS[found[2] or ""]) if found else None

    @property
    def bytes(self) -> int:
        """``size`` as a number."""
        return self._parsed() or 0

    @property
    def path(self) -> Path:
        """The folder, whether named or not."""
        if self.folder:
            return Path(self.folder).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "bocage" / "shards"


@dataclass(frozen=True)
class Wanted:
    """A file to have: plain name, size in bytes, SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


class Cache:
    """The files of one version of a dataset, fetched when they are missing. Picklable; holds nothing open.

    Args:
        place: where the files come from.
        config: folder and bound.
        digest: of the dataset's description: versions never mix.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, place: ObjectStore, config: CacheConfig, digest: str) -> None:
        self.place, self.bound = place, config.bytes
        self._root, self.folder = config.path, config.path / digest[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._accounts():
                # What the file system makes of now: some keep whole seconds.
                os.utime(self._root / "lock")
                self._since = (self._root / "lock").stat().st_mtime_ns
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(f"{self._root}: the disk of the cache is full; lower cache.size or move cache.folder")
        return InputError(f"{self._root}: the cache cannot be used: {error.strerror}; set cache.folder")

    def read(self, wanted: Wanted, offset: int, length: int) -> bytes:
        """Bytes of a shard, fetched first if it is not here; fewer where it ends.

        Raises:
            InputError: it cannot be had, or is damaged where it comes from.
        """
        while True:
            try:
                data = self._kept(wanted, offset, length)
            except OSError as error:
                raise self._unwritable(error) from error
            if data is None:
                data = self._fetch(wanted, (offset, length))
            if data is not None:
                return data

    def _kept(self, wanted: Wanted, offset: int, length: int) -> bytes | None:
        """Bytes of a shard that is here; None if it is not, or no longer as it was."""
        path = self.folder / wanted.name
        with suppress(FileNotFoundError), _locked(path, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            if not _is_at(descriptor, path):
                return None
            status = os.fstat(descriptor)
            # A shard of an earlier run is verified once in this one; the time of the check is its mtime.
            known = status.st_mtime_ns >= self._since and status.st_size == wanted.bytes
            if known or _is_right(descriptor, wanted):
                # The other time is that of its last use.
                os.utime(descriptor, ns=(time.time_ns(), max(status.st_mtime_ns, self._since)))
                return os.pread(descriptor, length, offset)
            path.unlink()
        return None

    def fetch(self, wanted: Wanted, keep: Collection[str]) -> bool:
        """Fetch a shard that nobody waits for yet; False if there is no room for it now.

        Args:
            wanted: the shard.
            keep: names of shards that are not to be removed for it.

        Raises:
            InputError: it cannot be had, or is damaged where it comes from; or the cache cannot be written.
        """
        return (self.folder / wanted.name).exists() or self._fetch(wanted, None, keep) is not None

    def _fetch(
        self, wanted: Wanted, window: tuple[int, int] | None, keep: Collection[str] | None = None
    ) -> bytes | None:
        """A window of the shard, read before anyone can remove it; None if there is no room or it is here already."""
        path, part = self.folder / wanted.name, self.folder / f"{wanted.name}.{wanted.bytes}.part"
        try:
            while True:
                with self._accounts():
                    if path.exists():
                        return None if window else b""
                    room = part.exists() or self._make_room(wanted.bytes, keep)
                    if room:
                        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
                if room:
                    with suppress(FileNotFoundError), _locked(part, os.O_RDWR, fcntl.LOCK_EX) as descriptor:
                        if _is_at(descriptor, part):
                            self._complete(descriptor, part, wanted, path)
                            return os.pread(descriptor, window[1], window[0]) if window else b""
                elif keep is not None:
                    return None
                else:
                    time.sleep(0.02)  # every byte is being fetched or read by others, who will finish
        except OSError as error:
            raise self._unwritable(error) from error

    def bring(self, wanted: Wanted) -> None:
        """Have one of the files that lie beside the shards; they do not count for the bound.

        Raises:
            InputError: it cannot be had, or is damaged where it comes from; or the cache cannot be written.
        """
        path, part = self.folder / wanted.name, self.folder / f"{wanted.name}.part"
        try:
            while not self._has(wanted):
                with _locked(part, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as descriptor:
                    if _is_at(descriptor, part):
                        self._complete(descriptor, part, wanted, path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _has(self, wanted: Wanted) -> bool:
        with suppress(FileNotFoundError), _locked(self.folder / wanted.name, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            return _is_right(descriptor, wanted)
        return False

    def write(self, name: str, content: bytes) -> None:
        """Put a file that is here already in memory beside the shards.

        Raises:
            InputError: the cache cannot be written.
        """
        try:
            path = self.folder / name
            with self._accounts():
                if not path.exists() or path.read_bytes() != content:
                    with written_atomically(path) as temporary:
                        temporary.write_bytes(content)
        except OSError as error:
            raise self._unwritable(error) from error

    def _complete(self, descriptor: int, part: Path, wanted: Wanted, path: Path) -> None:
        """Fetch what the locked part lacks, verify it, and give it its name."""
        try:
            with os.fdopen(descriptor, "rb+", buffering=0, closefd=False) as out:
                for _ in range(2):
                    self.place.download(wanted.name, wanted.bytes, out)
                    if _is_right(descriptor, wanted):
                        break
                    out.truncate(0)
                else:
                    part.unlink()
                    raise InputError(
                        f"{self.place.name_of(wanted.name)}: damaged: its SHA-256 is not the one in the dataset's "
                        "description; copy it there again"
                    )
            os.fsync(descriptor)
            with self._accounts():
                os.utime(descriptor)
                os.replace(part, path)
        except OSError:
            # Only here, under its lock, is the part this process's to remove.
            with suppress(OSError):
                part.unlink()
            raise
        flush(path.parent)

    def _make_room(self, size: int, keep: Collection[str] | None) -> bool:
        """Remove the least recently used shards until ``size`` bytes fit; False if they cannot."""
        entries = []
        for path in self._root.glob("*/*"):
            found = _PART.fullmatch(path.name)
            if found is None and not path.name.endswith(".tar"):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_atime, int(found[1]) if found else status.st_size, path))
        occupied = sum(entry[1] for entry in entries)
        newest = time.time() - (_FRESH if keep is not None else -1e9)
        for used, counted, path in sorted(entries):
            if occupied + size <= self.bound:
                break
            if used < newest and not (keep and path.parent == self.folder and path.name in keep) and _remove(path):
                occupied -= counted
        return occupied + size <= self.bound

    @contextmanager
    def _accounts(self) -> Iterator[None]:
        """The lock under which bytes are reserved and removed, by all processes of the machine."""
        with _locked(self._root / "lock", os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX):
            yield


_held: set[int] = set()


def _forget_held() -> None:
    """A lock belongs to parent and child of a fork alike: the child lets go of those its parent's threads held."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_held)


@contextmanager
def _locked(path: Path, flags: int, lock: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, lock)
        yield descriptor
    finally:
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name: it may have been renamed or removed before its lock was had."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file unless someone holds its lock."""
    try:
        # Open for writing: NFS grants no exclusive lock otherwise (flock(2)).
        with _locked(path, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB):
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _is_right(descriptor: int, wanted: Wanted) -> bool:
    if os.fstat(descriptor).st_size != wanted.bytes:
        return False
    file: BinaryIO
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256
