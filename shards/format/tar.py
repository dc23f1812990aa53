"""Write and check the plain POSIX ustar archives of shards.

``TarWriter`` writes bytes that depend on the members only, and returns the offset of each member's data. ``TarReader``
checks a tar header by header: nothing is extracted, and no declared size is trusted. The writer uses plain ustar
headers, so the reader refuses links, devices, folders, sparse files, and pax and GNU headers for long names or sizes.
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
    """Writes POSIX ustar members to ``file``; times, owners and modes are fixed.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member and returns the offset of its data in the tar.

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
        """Appends the end-of-archive blocks and returns the SHA-256 of the whole, hexadecimal."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.size + end) % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)


class TarError(ValueError):
    """What stands at a place of a tar is not what must stand there."""


class Header(NamedTuple):
    """What a header says of its member: name, kind of member, and bytes of data; nothing of it is to be trusted."""

    name: str
    type: bytes
    size: int

    def described(self) -> str:
        """Name and kind, safe to print."""
        kind = _TYPES.get(self.type, "" if self.type == tarfile.REGTYPE else f"of type {self.type!r}")
        return " ".join(filter(None, (printable(self.name), kind and f"({kind})")))


def printable(name: str) -> str:
    """A name from an untrusted file without control characters, and not too long."""
    name = name if name.isascii() and name.isprintable() else ascii(name)
    return name if len(name) <= 220 else f"{name[:200]}... ({len(name)} characters)"


class TarReader:
    """Reads an open tar at given places.

    Args:
        descriptor: of the open file.
        size: its bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self.size = size

    def data(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        Raises:
            TarError: the tar ends before; nothing is read where its size says so.
        """
        if not (offset >= 0 and 0 <= length <= self.size - offset):
            raise TarError(f"cut off: it would end at byte {offset + length} of a shard of {self.size}")
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise TarError(f"cut off: {len(data)} of {length} bytes at {offset}")
        return data

    def header(self, place: int) -> Header | None:
        """The header at ``place``, None for an empty block.

        Raises:
            TarError: it is neither, or the tar ends before.
        """
        block = self.data(place, BLOCK)
        if not any(block):
            return None
        try:
            # Parses these 512 bytes and no more: what pax and GNU headers would make it read stays unread.
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise TarError(f"no tar header at byte {place}: {error}") from error
        return Header(info.name, info.type, info.size)

    def check_member(self, place: int, name: str, size: int | None) -> int:
        """The size of the member that begins at ``place``.

        Raises:
            TarError: it is not a regular file of this name and, unless None, this size, or is longer than the tar.
        """
        header = self.header(place)
        if header is None:
            raise TarError(f"an empty block at byte {place} in place of its header")
        if header.name != name:
            raise TarError(f"{header.described()} stands in its place at byte {place}")
        if header.type != tarfile.REGTYPE:
            raise TarError(f"the tar says that it is {_TYPES.get(header.type, 'no regular file')}")
        if size is not None and header.size != size:
            raise TarError(f"the tar says {header.size} bytes, the manifest {size}")
        end = place + BLOCK + header.size
        if not place + BLOCK <= end <= self.size:
            raise TarError(f"cut off: it would end at byte {end} of a shard of {self.size}")
        if any(self.data(end, min(-end % BLOCK, self.size - end))):
            raise TarError("the bytes that fill its last block are not zero")
        return header.size

    def check_end(self, place: int, tick: Callable[[], None]) -> None:
        """Check that only the empty blocks of an end stand from ``place`` on; ``tick`` is called for each piece read.

        Raises:
            TarError: the end is not whole, or something stands there.
        """
        if self.size - place < 2 * BLOCK or self.size % tarfile.RECORDSIZE:
            raise TarError(f"cut off: the tar has no whole end after byte {place}")
        for start in range(place, self.size, _CHUNK):
            tick()
            if any(self.data(start, min(_CHUNK, self.size - start))):
                header = self.header(place)
                what = "bytes" if header is None else header.described()
                raise TarError(f"{what} after its last sample, at byte {place}: not in the manifest")
