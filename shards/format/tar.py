"""Write and check the POSIX ustar archives of shards.

``TarWriter`` writes bytes that depend on the members only, and returns the offset of each member's data. ``TarReader``
checks a tar header by header: it extracts nothing and trusts no declared size. The writer uses plain ustar headers, so
the reader refuses links, devices, folders, sparse files, and pax and GNU headers for long names or sizes.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20

_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.XHDTYPE: "a pax header",
    tarfile.XGLTYPE: "a global pax header",
    tarfile.SOLARIS_XHDTYPE: "a pax header",
    tarfile.GNUTYPE_LONGNAME: "a GNU long name",
    tarfile.GNUTYPE_LONGLINK: "a GNU long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class TarWriter:
    """Write POSIX ustar members with fixed times, owners and modes.

    Args:
        file: binary file to write to.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data in the tar.

        Raises:
            ValueError: the name is too long or the data too large for ustar.
        """
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = len(data), 0o644, "bocage", "bocage"
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> str:
        """Append the end-of-archive blocks and return the SHA-256 of the archive, in hexadecimal."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.size + end) % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)


class TarError(ValueError):
    """The tar does not have the expected content at an offset."""


class TarHeader(NamedTuple):
    """Untrusted content of a member's header.

    Attributes:
        name: name of the member.
        type: type flag of the member, e.g. ``tarfile.REGTYPE``.
        size: declared size of the data, in bytes.
    """

    name: str
    type: bytes
    size: int

    def describe(self) -> str:
        """Name and type of the member, safe to print."""
        kind = _TYPES.get(self.type, "" if self.type == tarfile.REGTYPE else f"of type {self.type!r}")
        return " ".join(filter(None, (printable(self.name), kind and f"({kind})")))


def printable(name: str) -> str:
    """Escape control characters of a name from an untrusted file, and shorten it."""
    name = name if name.isascii() and name.isprintable() else ascii(name)
    return name if len(name) <= 220 else f"{name[:200]}... ({len(name)} characters)"


class TarReader:
    """Read an open tar at given offsets.

    Args:
        descriptor: file descriptor of the tar.
        size: size of the tar, in bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes, starting at ``offset``.

        Raises:
            TarError: the range exceeds the tar. A range beyond ``size`` is refused without reading.
        """
        if not (offset >= 0 and 0 <= length <= self.size - offset):
            raise TarError(f"cut off: it ends at byte {offset + length}, but the shard has {self.size}")
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise TarError(f"cut off: read {len(data)} of {length} bytes at offset {offset}")
        return data

    def read_header(self, offset: int) -> TarHeader | None:
        """Read the header at ``offset``; None for an empty block.

        Raises:
            TarError: the block is neither a header nor empty, or the tar ends before its end.
        """
        block = self.read(offset, BLOCK)
        if not any(block):
            return None
        try:
            # frombuf parses these 512 bytes only: it does not follow pax and GNU headers to further blocks.
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise TarError(f"no tar header at byte {offset}: {error}") from error
        return TarHeader(info.name, info.type, info.size)

    def check_member(self, offset: int, name: str, size: int | None) -> int:
        """Check the member whose header is at ``offset``, and return its size.

        Args:
            offset: offset of the header.
            name: expected name.
            size: expected size, in bytes; None accepts any.

        Raises:
            TarError: the member is not a regular file of this name and size, or exceeds the tar.
        """
        header = self.read_header(offset)
        if header is None:
            raise TarError(f"an empty block instead of its header at byte {offset}")
        if header.name != name:
            raise TarError(f"{header.describe()} instead of it at byte {offset}")
        if header.type != tarfile.REGTYPE:
            raise TarError(f"the tar stores it as {_TYPES.get(header.type, 'no regular file')}")
        if size is not None and header.size != size:
            raise TarError(f"the tar says {header.size} bytes, the manifest {size}")
        end = offset + BLOCK + header.size
        if not offset + BLOCK <= end <= self.size:
            raise TarError(f"cut off: it ends at byte {end}, but the shard has {self.size}")
        if any(self.read(end, min(-end % BLOCK, self.size - end))):
            raise TarError("the padding of its last block is not zero")
        return header.size

    def check_end(self, offset: int, on_chunk: Callable[[], None]) -> None:
        """Check that the tar ends at ``offset``, with empty blocks only.

        Args:
            offset: end of the last member.
            on_chunk: callback before each chunk is read.

        Raises:
            TarError: the end-of-archive blocks are incomplete or not empty.
        """
        if self.size - offset < 2 * BLOCK or self.size % tarfile.RECORDSIZE:
            raise TarError(f"cut off: the end-of-archive blocks after byte {offset} are incomplete")
        for start in range(offset, self.size, _CHUNK):
            on_chunk()
            if any(self.read(start, min(_CHUNK, self.size - start))):
                header = self.read_header(offset)
                content = "bytes" if header is None else header.describe()
                raise TarError(f"{content} after its last sample, at byte {offset}: not in the manifest")
