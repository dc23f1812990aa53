"""Who may write in a folder, among processes on one machine or on several that share a file system."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from bocage.shards.errors import InputError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FileLock:
    """Context in which this process alone writes some neighbouring shards of a folder, or all that is in it.

    A claim is a POSIX lock on one byte of ``path`` for each shard: disjoint claims stand side by side, the system gives
    up those of a process that died, and NFS passes them on to its server. Nothing depends on it but that work is not
    done twice: temporary files have names of their own and appear under the final one whole. So where the file system
    has no locks (Lustre mounted without ``flock``), the claim is granted unseen.

    The lock belongs to the process: a second claim of the same folder in the same process is granted too.

    Args:
        path: the file of the claims; made when missing.
        shards: what to claim; range(1) where a folder is claimed as a whole.
        folder: what holds them, for the message.

    Raises:
        InputError: on entry, when another process holds some of these shards.
    """

    def __init__(self, path: Path, shards: range, folder: Path) -> None:
        self._path, self._shards, self._folder = path, shards, folder

    def __enter__(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Of length 0 a lock would reach to the end of the file.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, max(1, len(self._shards)), self._shards.start)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return self
            os.close(self._file)
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
        os.close(self._file)
