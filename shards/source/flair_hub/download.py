"""Download zips into one folder: in parallel, with resume, and with a check of every hash.

``hf_hub_download`` of huggingface_hub 2.4 deletes an unfinished file when it fails, so an interruption costs gigabytes.
Its ``http_get`` continues from any byte, and is used here on files of our own. A zip gets its final name only after its
hash is checked.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write, format_size, fsync, sha256
from bocage.shards.locks import FileLock
from bocage.shards.source.flair_hub import zips as zip_reader
from bocage.shards.source.flair_hub.hub import RemoteZip, retried

PARTIAL_SUFFIX = ".partial"
"""Suffix of an unfinished zip, which the next run continues. The catalogue reports such a file as unfinished."""

Progress = Callable[[int, int, int], None]
"""Callback with the bytes that are done, the bytes of all zips, and the number of zips that are done."""

_RECORD, _LOCK = ".bocage-get.json", ".bocage-get.lock"
_ATTEMPTS = 6  # consecutive failures without a byte
_DAMAGED_ATTEMPTS = 3  # downloads of one zip with a wrong hash
_POLL_SECONDS = 0.2
_JOIN_SECONDS = 2.0
_SHA256_LENGTH = 64


@dataclass(frozen=True)
class LocalZips:
    """State of a folder of zips.

    Attributes:
        folder: the folder.
        complete: zips that are in the folder.
        missing: zips that are not, or that differ from the hub.
        differing: names of the zips in the folder that differ from the hub.
        partial_bytes: bytes of unfinished zips that need not be downloaded again.
    """

    folder: Path
    complete: list[RemoteZip]
    missing: list[RemoteZip]
    differing: list[str]
    partial_bytes: int

    @property
    def remaining_bytes(self) -> int:
        """Bytes to download."""
        return sum(item.size for item in self.missing) - self.partial_bytes


def inspect_folder(
    folder: Path, zips: Sequence[RemoteZip], *, check_hashes: bool = True, progress: Progress | None = None
) -> LocalZips:
    """Find the zips that are in ``folder`` already.

    The hash of a zip is computed once; a record in the folder keeps it while size and time of the file stay the same.

    Args:
        folder: folder of the zips; it may be missing.
        zips: zips to look for.
        check_hashes: whether to check the hashes of zips that the record does not hold, and to write the record. If
            not, their size decides, and nothing is written.
        progress: progress callback of the hashes.

    Raises:
        InputError: a file cannot be read.
    """
    record = _Record(folder)
    unknown = [item for item in zips if _size(folder / item.name) == item.size and not record.holds(item)]
    total = sum(item.size for item in unknown)
    done = 0
    for number, item in enumerate(unknown if check_hashes else (), start=1):
        try:
            if _is_intact(folder / item.name, item):
                record.add(item)
        except OSError as error:
            raise _local_error(folder, error) from error
        done += item.size
        if progress is not None:
            progress(done, total, number)
    complete = [item for item in zips if record.holds(item) or (item in unknown and not check_hashes)]
    missing = [item for item in zips if item not in complete]
    partial_sizes = [(_size(_partial(folder, item)) or 0, item.size) for item in missing]
    return LocalZips(
        folder,
        complete,
        missing,
        differing=[item.name for item in missing if _size(folder / item.name) is not None],
        partial_bytes=sum(size for size, full_size in partial_sizes if size <= full_size),
    )


def free_bytes(folder: Path) -> int:
    """Free disk space, in bytes, of the file system that holds ``folder`` or will hold it."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Context manager that creates a folder and locks it, so that no other run downloads into it.

    Raises:
        InputError: the folder cannot be written, or another run downloads into it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / _LOCK, range(1), folder))
        except OSError as error:
            raise _local_error(folder, error) from error
        yield


def check_disk(folder: Path, needed: int, use: str) -> None:
    """Check that a folder's disk has some bytes left.

    Args:
        folder: the folder; it may be missing.
        needed: number of bytes.
        use: what they are needed for, for the message.

    Raises:
        InputError: it has not.
    """
    free = free_bytes(folder)
    if needed > free:
        raise InputError(
            f"{folder}: {format_size(needed)} are needed {use}, but only {format_size(free)} are free: choose another "
            "folder, or download less"
        )


def download_zips(
    local: LocalZips, *, unpacked_bytes: int = 0, workers: int = 4, progress: Progress | None = None
) -> None:
    """Download the missing zips of a folder, several at a time.

    A zip that arrives damaged is downloaded again. An interrupted run keeps the zips and parts of zips that it has.
    The caller holds the lock of ``locked_folder``, also while the folder is inspected.

    Args:
        local: zips to download.
        unpacked_bytes: bytes that the caller needs on the same disk afterwards.
        workers: number of zips at a time.
        progress: progress callback; an exception that it raises stops the download.

    Raises:
        InputError: the disk is too small or full, the folder cannot be written, the server refuses a zip or does not
            answer, or zips are damaged at every attempt.
    """
    use = "to download and unpack" if unpacked_bytes else "to download"
    check_disk(local.folder, local.remaining_bytes + unpacked_bytes, use)
    try:
        for item in local.complete:
            _partial(local.folder, item).unlink(missing_ok=True)
    except OSError as error:
        raise _local_error(local.folder, error) from error
    if local.missing:
        _Downloads(local, progress).run(workers)


class _Downloads:
    """Threads that download the missing zips of a folder."""

    def __init__(self, local: LocalZips, progress: Progress | None) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars

        disable_progress_bars()  # http_get draws one for each file
        self._local, self._progress = local, progress
        # A compressed response could not be resumed. The token is for the hub only.
        plain = {"Accept-Encoding": "identity"}
        self._hub = constants.ENDPOINT
        self._headers = build_hf_headers(library_name="bocage", headers=plain)
        self._other_headers = build_hf_headers(library_name="bocage", headers=plain, token=False)
        self._record = _Record(local.folder)
        self._waiting = queue.SimpleQueue[RemoteZip]()
        self._finished = queue.SimpleQueue[RemoteZip | BaseException]()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bytes = sum(item.size for item in local.complete) + local.partial_bytes

    def run(self, workers: int) -> None:
        """Download all zips, or raise the first failure after stopping the threads."""
        for item in self._local.missing:
            self._waiting.put(item)
        total = sum(item.size for item in (*self._local.complete, *self._local.missing))
        count, done = len(self._local.complete), 0
        # Daemons, because a second Ctrl-C must not wait for the network.
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        damaged = []
        try:
            for thread in threads:
                thread.start()
            while done < len(self._local.missing):
                if self._progress is not None:
                    self._progress(self._bytes, total, count)
                try:
                    result = self._finished.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(result, _DamagedError):
                    damaged.append(str(result))
                elif isinstance(result, BaseException):
                    raise result
                else:
                    count += 1
                done += 1
            if self._progress is not None:
                self._progress(self._bytes, total, count)
        finally:
            self._stop.set()
            deadline = time.monotonic() + _JOIN_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if damaged:
            raise InputError(
                f"{', '.join(damaged)}: not the hash of the hub after {_DAMAGED_ATTEMPTS} downloads; the others are "
                "complete; run the same command again later"
            )

    def _work(self) -> None:
        """Download zips until none is left; the body of a thread."""
        while not self._stop.is_set():
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._fetch(item)
                self._finished.put(item)
            except OSError as error:
                self._finished.put(_local_error(self._local.folder, error))
            except BaseException as error:
                self._finished.put(error)

    def _fetch(self, item: RemoteZip) -> None:
        """Download one zip and check its hash."""
        path, partial = self._local.folder / item.name, _partial(self._local.folder, item)
        if (_size(partial) or 0) > item.size:
            partial.unlink()
        for _ in range(_DAMAGED_ATTEMPTS):
            self._complete(item, partial)
            if _is_intact(partial, item):
                os.replace(partial, path)
                fsync(path.parent)
                with self._lock:
                    self._record.add(item)
                return
            partial.unlink()
            self._count(-item.size)
        raise _DamagedError(item.name)

    def _complete(self, item: RemoteZip, partial: Path) -> None:
        """Download the rest of a zip."""
        headers = self._headers if item.url.startswith(self._hub) else self._other_headers
        with _PartialFile(partial, self._count, self._stop) as file:
            try:
                retried(
                    lambda: _transfer(item, file, headers),
                    item.name,
                    _ATTEMPTS,
                    progress=lambda: file.size,
                    wait=self._stop.wait,
                )
            except _WriteError as error:
                raise error.cause from None
            os.fsync(file.fileno())

    def _count(self, change: int) -> None:
        with self._lock:
            self._bytes += change


def _transfer(item: RemoteZip, file: _PartialFile, headers: dict[str, str]) -> None:
    """Append the rest of a zip to its partial file, in one request or a few."""
    from huggingface_hub.file_download import http_get

    file.check()
    try:
        http_get(item.url, file, resume_size=file.size, headers=headers, expected_size=item.size)
    finally:
        if file.size > item.size:  # the response was too long, or ignored the range
            file.truncate(0)


class _PartialFile(io.FileIO):
    """Unfinished zip, open at its end.

    Args:
        path: path of the file, created if missing.
        count: function that receives the number of bytes that are added, negative for removed ones.
        stop: event that makes the next write fail.

    Attributes:
        size: bytes in the file.
    """

    def __init__(self, path: Path, count: Callable[[int], None], stop: threading.Event) -> None:
        path.touch()
        super().__init__(path, "rb+")
        self.size = self.seek(0, os.SEEK_END)
        self._count_bytes, self._stop = count, stop

    def check(self) -> None:
        """Raise if the download is stopped."""
        if self._stop.is_set():
            raise _StoppedError

    def write(self, data: Any) -> int:
        """Write all of ``data``; ``FileIO`` may write less."""
        self.check()
        rest = memoryview(data)
        try:
            while rest:
                written = super().write(rest)
                self.size += written
                self._count_bytes(written)
                rest = rest[written:]
        except OSError as error:
            raise _WriteError(error) from error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Shorten the file to ``size``, by default to the position, and go to its end."""
        kept = super().truncate(size)
        self._count_bytes(kept - self.size)
        self.size = self.seek(kept)
        return kept


class _StoppedError(Exception):
    """The download is stopped."""


class _DamagedError(Exception):
    """Every download of a zip had a wrong hash; the text is its name."""


class _WriteError(Exception):
    """The disk refuses a write; no error of the network."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


class _Record:
    """Record of the zips in a folder whose hash is checked: size, time of change and hash, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            content = json.loads((folder / _RECORD).read_bytes())
        except (OSError, ValueError):  # without a record, hashes are checked again
            content = {}
        self._entries: dict[str, Any] = content if isinstance(content, dict) else {}

    def holds(self, item: RemoteZip) -> bool:
        """Whether the zip is in the folder, unchanged since its hash was checked."""
        entry = self._entries.get(item.name)
        return entry is not None and entry == self._entry(item)

    def add(self, item: RemoteZip) -> None:
        """Record a zip whose hash is checked."""
        self._entries[item.name] = self._entry(item)
        with atomic_write(self._folder / _RECORD) as temporary:
            temporary.write_text(json.dumps(self._entries, indent=0), encoding="utf-8")

    def _entry(self, item: RemoteZip) -> list[Any] | None:
        try:
            status = (self._folder / item.name).stat()
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns, item.digest]


def _is_intact(path: Path, item: RemoteZip) -> bool:
    """Whether the file is the zip on the server: by its hash, or without a hash by the CRC-32 of its members."""
    if not item.digest:
        try:
            return all(len(zip_reader.read(path, member)) == member.size for member in zip_reader.members(path))
        except zip_reader.ZipError:
            return False
    if len(item.digest) == _SHA256_LENGTH:
        return sha256(path) == item.digest
    content = path.read_bytes()  # in git rather than LFS, so it is small
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == item.digest


def _partial(folder: Path, item: RemoteZip) -> Path:
    return folder / (item.name + PARTIAL_SUFFIX)


def _size(path: Path) -> int | None:
    """Size of a file in bytes; None if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _local_error(folder: Path, error: OSError) -> InputError:
    """Error of the disk as a message for users."""
    if error.errno == errno.ENOSPC:
        return InputError(f"{folder}: the disk is full; free space and run the same command again")
    return InputError(f"{error.filename or folder}: cannot be read or written: {error.strerror or error}")
