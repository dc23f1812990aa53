"""Local cache of remote shards, bounded in bytes and shared by all processes of a machine.

``FOLDER/DIGEST/`` holds the files of one version of a dataset. A shard being downloaded is ``NAME.SIZE.part``. It
counts with its full size as soon as it exists, and the process that holds its ``flock`` downloads it. If that process
dies, another one takes the part over and resumes it. One lock on the cache folder guards the removal of old shards.
Readers open a shard only under a shared ``flock``, and only shards without readers are removed, so a removal frees
disk space at once.
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
from bocage.shards.files import atomic_write, fsync
from bocage.shards.read.object_store import ObjectStore

_RECENT = 20.0  # seconds; prefetching does not remove shards used within this time
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_UNITS["TIB"] = 1 << 40
_PART = re.compile(r".+\.tar\.(\d+)\.part")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Folder and size of the cache of remote shards; shards in local folders are read in place.

    Attributes:
        folder: cache folder, shared by all processes of the machine; empty for ``$XDG_CACHE_HOME/bocage/shards``
            (``~/.cache``).
        size: maximum size of the cached shards, with a unit (``MB``, ``GB``, ``TB``, ``GiB``) or in bytes. Indices and
            tables of datasets lie beside the shards and do not count.

    Raises:
        ValueError: ``size`` is not a size such as ``100GB``.
    """

    folder: str = ""
    size: str = "100GB"

    def __post_init__(self) -> None:
        if self._parse_size() is None:
            raise ValueError(f"size={self.size!r} is not a size such as 100GB")

    def _parse_size(self) -> int | None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?B)?", str(self.size).strip().upper())
        return int(float(match[1]) * _UNITS[match[2] or ""]) if match else None

    @property
    def bytes(self) -> int:
        """``size`` as a number of bytes."""
        return self._parse_size() or 0

    @property
    def path(self) -> Path:
        """Cache folder, with the default resolved."""
        if self.folder:
            return Path(self.folder).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "bocage" / "shards"


@dataclass(frozen=True)
class RemoteFile:
    """Name, size in bytes, and SHA-256 in hexadecimal of a file of the dataset."""

    name: str
    bytes: int
    sha256: str


class Cache:
    """Files of one version of a dataset, downloaded when they are missing. Picklable: it keeps no file open.

    Args:
        store: object store that the files are downloaded from.
        config: folder and maximum size.
        digest: digest of the dataset's description; each version has its own folder.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, store: ObjectStore, config: CacheConfig, digest: str) -> None:
        self.store, self.max_bytes = store, config.bytes
        self._root, self.folder = config.path, config.path / digest[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._space_lock():
                # Take the time from the file system, because some store whole seconds.
                os.utime(self._root / "lock")
                self._opened_at = (self._root / "lock").stat().st_mtime_ns
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> InputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(f"{self._root}: the disk of the cache is full; lower cache.size or move cache.folder")
        return InputError(f"{self._root}: the cache cannot be used: {error.strerror}; set cache.folder")

    def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Read bytes of a shard, downloading it first if needed; fewer bytes at its end.

        Raises:
            InputError: the shard cannot be downloaded or is damaged at its origin, or the cache cannot be used.
        """
        while True:
            try:
                data = self._read_cached(file, offset, length)
            except OSError as error:
                raise self._unusable(error) from error
            if data is None:
                data = self._fetch(file, (offset, length))
            if data is not None:
                return data

    def _read_cached(self, file: RemoteFile, offset: int, length: int) -> bytes | None:
        """Bytes of a cached shard; None if it is missing or damaged."""
        path = self.folder / file.name
        with suppress(FileNotFoundError), _locked(path, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            if not _still_at(descriptor, path):
                return None
            status = os.fstat(descriptor)
            # Each run verifies a shard of an earlier run once. The mtime records the verification.
            verified = status.st_mtime_ns >= self._opened_at and status.st_size == file.bytes
            if verified or _is_intact(descriptor, file):
                # The atime records the last use.
                os.utime(descriptor, ns=(time.time_ns(), max(status.st_mtime_ns, self._opened_at)))
                return os.pread(descriptor, length, offset)
            path.unlink()
        return None

    def prefetch(self, file: RemoteFile, protected: Collection[str]) -> bool:
        """Download a shard before it is read; False if the cache has no room for it now.

        Args:
            file: shard to download.
            protected: names of shards that must not be removed to make room.

        Raises:
            InputError: the shard cannot be downloaded or is damaged at its origin, or the cache cannot be written.
        """
        return (self.folder / file.name).exists() or self._fetch(file, None, protected) is not None

    def _fetch(
        self, file: RemoteFile, window: tuple[int, int] | None, protected: Collection[str] | None = None
    ) -> bytes | None:
        """Download a shard and return its bytes in ``window`` (offset, length), read before anyone can remove it.

        Without ``protected`` this waits for room; else it returns None if there is none. It also returns None if a
        ``window`` is given and the shard is already cached.
        """
        path, part = self.folder / file.name, self.folder / f"{file.name}.{file.bytes}.part"
        try:
            while True:
                with self._space_lock():
                    if path.exists():
                        return None if window else b""
                    has_room = part.exists() or self._make_room(file.bytes, protected)
                    if has_room:
                        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
                if has_room:
                    with suppress(FileNotFoundError), _locked(part, os.O_RDWR, fcntl.LOCK_EX) as descriptor:
                        if _still_at(descriptor, part):
                            self._download(descriptor, part, file, path)
                            return os.pread(descriptor, window[1], window[0]) if window else b""
                elif protected is not None:
                    return None
                else:
                    time.sleep(0.02)  # other processes download or read every cached shard, and will finish
        except OSError as error:
            raise self._unusable(error) from error

    def download_metadata(self, file: RemoteFile) -> None:
        """Download a file that lies beside the shards, if needed; it does not count towards the maximum size.

        Raises:
            InputError: the file cannot be downloaded or is damaged at its origin, or the cache cannot be written.
        """
        path, part = self.folder / file.name, self.folder / f"{file.name}.part"
        try:
            while not self._has_intact(file):
                with _locked(part, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as descriptor:
                    if _still_at(descriptor, part):
                        self._download(descriptor, part, file, path)
        except OSError as error:
            raise self._unusable(error) from error

    def _has_intact(self, file: RemoteFile) -> bool:
        with suppress(FileNotFoundError), _locked(self.folder / file.name, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            return _is_intact(descriptor, file)
        return False

    def write_metadata(self, name: str, content: bytes) -> None:
        """Write a file beside the shards.

        Raises:
            InputError: the cache cannot be written.
        """
        try:
            path = self.folder / name
            with self._space_lock():
                if not path.exists() or path.read_bytes() != content:
                    with atomic_write(path) as temporary:
                        temporary.write_bytes(content)
        except OSError as error:
            raise self._unusable(error) from error

    def _download(self, descriptor: int, part: Path, file: RemoteFile, path: Path) -> None:
        """Download the rest of the locked ``part``, verify it, and rename it to ``path``."""
        try:
            with os.fdopen(descriptor, "rb+", buffering=0, closefd=False) as out:
                for _ in range(2):
                    self.store.download(file.name, file.bytes, out)
                    if _is_intact(descriptor, file):
                        break
                    out.truncate(0)
                else:
                    part.unlink()
                    raise InputError(
                        f"{self.store.redacted_file_url(file.name)}: damaged: its SHA-256 is not the one in the "
                        "dataset's description; copy it there again"
                    )
            os.fsync(descriptor)
            with self._space_lock():
                os.utime(descriptor)
                os.replace(part, path)
        except OSError:
            # This process may remove the part only here, where it holds the part's lock.
            with suppress(OSError):
                part.unlink()
            raise
        fsync(path.parent)

    def _make_room(self, size: int, protected: Collection[str] | None) -> bool:
        """Remove the least recently used shards until ``size`` bytes fit; False if they cannot."""
        entries = []
        for path in self._root.glob("*/*"):
            match = _PART.fullmatch(path.name)
            if match is None and not path.name.endswith(".tar"):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_atime, int(match[1]) if match else status.st_size, path))
        occupied = sum(entry[1] for entry in entries)
        used_before = time.time() - (_RECENT if protected is not None else -1e9)
        for last_use, nbytes, path in sorted(entries):
            if occupied + size <= self.max_bytes:
                break
            is_protected = protected and path.parent == self.folder and path.name in protected
            if last_use < used_before and not is_protected and _remove(path):
                occupied -= nbytes
        return occupied + size <= self.max_bytes

    @contextmanager
    def _space_lock(self) -> Iterator[None]:
        """Lock of all processes of the machine under which bytes are reserved and removed."""
        with _locked(self._root / "lock", os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX):
            yield


_lock_descriptors: set[int] = set()


def _close_inherited_locks() -> None:
    """Close the locks that threads of the parent held at a fork, because parent and child would share them."""
    for descriptor in _lock_descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _lock_descriptors.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def _locked(path: Path, flags: int, lock: int) -> Iterator[int]:
    """Open a file under a ``flock``; yields its descriptor."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    _lock_descriptors.add(descriptor)
    try:
        fcntl.flock(descriptor, lock)
        yield descriptor
    finally:
        if descriptor in _lock_descriptors:
            _lock_descriptors.discard(descriptor)
            os.close(descriptor)


def _still_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this path: another process may have renamed or removed it before the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file unless a process holds its lock."""
    try:
        # Open for writing: NFS grants no exclusive lock otherwise (flock(2)).
        with _locked(path, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB):
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _is_intact(descriptor: int, file: RemoteFile) -> bool:
    """Whether an open file has the expected size and SHA-256."""
    if os.fstat(descriptor).st_size != file.bytes:
        return False
    content: BinaryIO
    with os.fdopen(os.dup(descriptor), "rb") as content:
        content.seek(0)
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
