"""A file lock on shards of a folder, for processes on one or several machines that share a file system."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from bocage.shards.errors import InputError

_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FileLock:
    """Context manager that locks a range of shards of a folder, or the whole folder, for this process.

    The lock is a POSIX lock on one byte of ``path`` per shard, so locks on disjoint ranges coexist. The system releases
    the locks of a process that dies, and NFS forwards them to its server.

    The lock only prevents duplicate work. Correctness does not depend on it, because writers use unique temporary names
    and rename complete files. On file systems without locks (Lustre mounted without ``flock``), entering therefore
    succeeds without a lock.

    The lock belongs to the process: a second lock of the same shards in the same process succeeds too.

    Args:
        path: lock file, created if missing.
        shards: range of shard numbers to lock; range(1) to lock the folder as a whole.
        folder: folder that is locked, for the error message.

    Raises:
        InputError: on entry, another process holds a lock on one of these shards.
    """

    def __init__(self, path: Path, shards: range, folder: Path) -> None:
        self._path, self._shards, self._folder = path, shards, folder

    def __enter__(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # At least 1: a POSIX lock of length 0 extends to the end of the file.
            length = max(1, len(self._shards))
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, self._shards.start)
        except OSError as error:
            if error.errno in _LOCKS_UNSUPPORTED:
                return self
            os.close(self._descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"{self._folder}: another run is writing there; wait until it ends, or stop it, and "
                    "run the same command again"
                ) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
