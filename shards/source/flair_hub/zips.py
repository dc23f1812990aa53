"""Read zips in place: a strict reader of the central directory, and of single members at their offset.

The standard library's ``zipfile`` keeps a Python object per member, and it opens archives whose parts contradict each
other. This reader refuses a zip that is incomplete or may be malicious.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bocage.shards.errors import InputError

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_RECORD = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF  # placeholders: the zip64 field holds the value
_ZIP_64 = 1  # id of the extra field
_MAX_DIRECTORY = 1 << 30  # bytes; 2.4 million rasters of FLAIR-HUB take a third of it
_ENCRYPTED = 1 | 1 << 6 | 1 << 13  # flags: encrypted, strongly encrypted, masked local header
_SIZES_FOLLOW = 1 << 3  # flag: sizes and CRC follow the data, and the local header may hold zeros
_STORED, _DEFLATED = 0, 8
_UNIX, _TYPE_MASK, _LINK = 3, 0o170000, 0o120000


class ZipError(InputError):
    """A zip or member that cannot be read or is refused; the message names it."""


class ZipMember(NamedTuple):
    """One member of a zip, as described by the central directory.

    Attributes:
        name: name as stored.
        offset: offset of the local header, in bytes.
        stored: size in the zip, in bytes.
        size: size of the content, in bytes.
        crc: CRC-32 of the content.
        method: compression method: 0 stored, 8 deflated.
    """

    name: bytes
    offset: int
    stored: int
    size: int
    crc: int
    method: int


def members(path: Path) -> Iterator[ZipMember]:
    """Yield the members of the zip ``path`` in the order of its directory, without folders.

    The checks end with the last member: discard all members if this raises.

    Raises:
        ZipError: the zip is truncated or damaged, spans disks, or holds encrypted members, links, absolute names, names
            with ``..``, unknown compression methods, or members that overlap or lie outside the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            directory, start, count = _read_directory(path, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ZipError(f"{path}: cannot be read: {error.strerror}") from error
    begins, ends = array("Q"), array("Q")
    at = 0
    for _ in range(count):
        if at + _RECORD.size > len(directory):
            raise ZipError(f"{path}: its directory is damaged; download it again")
        (signature, made, _, flags, method, _, _, crc, stored, size, *lengths, disk, _, external, offset) = (
            _RECORD.unpack_from(directory, at)
        )
        first = at + _RECORD.size
        name = directory[first : first + lengths[0]]
        at = first + sum(lengths)
        if signature != b"PK\1\2" or at > len(directory) or not name:
            raise ZipError(f"{path}: its directory is damaged; download it again")
        if _FULL_32 in (size, stored, offset) or disk == _FULL_16:
            extra = directory[first + lengths[0] : first + lengths[0] + lengths[1]]
            size, stored, offset, disk = _read_zip64(path, extra, size, stored, offset, disk)
        is_link = made >> 8 == _UNIX and external >> 16 & _TYPE_MASK == _LINK
        _check_member(path, name, flags, method, stored, size, is_link)
        end = offset + _LOCAL.size + len(name) + stored
        if end > start or disk:
            raise ZipError(f"{path}: member {_printable(name)} lies outside the file; download it again")
        begins.append(offset)
        ends.append(end)
        if not name.endswith(b"/"):
            yield ZipMember(name, offset, stored, size, crc, method)
    if at != len(directory):
        raise ZipError(f"{path}: its directory is damaged; download it again")
    order = np.argsort(np.frombuffer(begins, np.uint64)) if count else np.zeros(0, np.int64)
    if count and (np.frombuffer(begins, np.uint64)[order][1:] < np.frombuffer(ends, np.uint64)[order][:-1]).any():
        raise ZipError(f"{path}: members overlap; the zip is not read")


def read(path: Path, member: ZipMember) -> bytes:
    """Read the content of a member of the zip ``path``.

    Raises:
        ZipError: the zip cannot be read, or the member contradicts the directory.
    """
    name = f"{path}/{_printable(member.name)}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = os.pread(descriptor, _LOCAL.size + len(member.name), member.offset)
            start = member.offset + len(header) + _local_extra_length(name, header, member)
            data = _read_fully(descriptor, start, member.stored)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ZipError(f"{name}: cannot be read: {error.strerror}") from error
    if len(data) != member.stored:
        raise ZipError(f"{name}: cannot be read: the zip ends within it")
    if member.method == _DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # One byte more than declared detects a longer content, and limits a zip bomb.
            data = inflater.decompress(data, member.size + 1)
        except zlib.error as error:
            raise ZipError(f"{name}: cannot be read: damaged in the zip ({error})") from error
        # The end of the deflate stream may follow the last byte of content.
        if not inflater.eof and len(data) == member.size:
            data += inflater.decompress(inflater.unconsumed_tail, 1)
        if not inflater.eof or inflater.unused_data:
            raise ZipError(f"{name}: cannot be read: its content is not as long as the zip says")
    if len(data) != member.size:
        raise ZipError(f"{name}: cannot be read: its content is not as long as the zip says")
    if zlib.crc32(data) != member.crc:
        raise ZipError(f"{name}: cannot be read: its CRC-32 is not the one in the zip")
    return data


def _read_directory(path: Path, descriptor: int) -> tuple[bytes, int, int]:
    """Bytes of the central directory, its offset, and the number of its records."""
    length = os.fstat(descriptor).st_size
    tail_start = max(0, length - _END.size - _MAX_COMMENT)
    tail = _read_fully(descriptor, tail_start, length - tail_start)
    at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
    while at >= 0 and at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail):
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise ZipError(f"{path}: has no directory at its end: truncated, still being downloaded, or no zip")
    _, *disks, records, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = os.pread(descriptor, _LOCATOR_64.size, end - _LOCATOR_64.size) if end >= _LOCATOR_64.size else b""
    if locator[:4] == b"PK\6\7":
        _, disk, end, _ = _LOCATOR_64.unpack(locator)
        record = os.pread(descriptor, _END_64.size, end) if end < length else b""
        if len(record) < _END_64.size or record[:4] != b"PK\6\6":
            raise ZipError(f"{path}: its directory is damaged; download it again")
        *_, disk_64, start_disk, records, count, size, start = _END_64.unpack(record)
        disks = [disk, disk_64, start_disk]
    if any(disks) or records != count:
        raise ZipError(f"{path}: is one part of a split zip; join the parts first")
    if start + size != end or count * _RECORD.size > size:
        raise ZipError(f"{path}: its directory is damaged; download it again")
    if size > _MAX_DIRECTORY:
        raise ZipError(f"{path}: its directory takes {size} bytes; the limit is {_MAX_DIRECTORY}")
    directory = _read_fully(descriptor, start, size)
    if len(directory) != size:
        raise ZipError(f"{path}: its directory is damaged; download it again")
    return directory, start, count


def _read_zip64(path: Path, extra: bytes, size: int, stored: int, offset: int, disk: int) -> tuple[int, int, int, int]:
    """The values, with those of the zip64 extra field in place of placeholders."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == _ZIP_64:
            values = []
            for value, full, width in ((size, _FULL_32, 8), (stored, _FULL_32, 8), (offset, _FULL_32, 8)):
                if value == full:
                    if len(body) < width:
                        break
                    value, body = int.from_bytes(body[:width], "little"), body[width:]
                values.append(value)
            else:
                if disk == _FULL_16 and len(body) >= 4:
                    disk = int.from_bytes(body[:4], "little")
                return values[0], values[1], values[2], disk
            break
    raise ZipError(f"{path}: its directory is damaged; download it again")


def _check_member(path: Path, name: bytes, flags: int, method: int, stored: int, size: int, is_link: bool) -> None:
    """Refuse members that a zip of rasters has no reason to hold."""
    has_parent = b".." in name and b".." in name.split(b"/")
    if has_parent or name[:1] == b"/" or name[1:2] == b":" or b"\\" in name or b"\0" in name:
        raise ZipError(f"{path}: member {_printable(name)} has a name that leads out of the zip; the zip is not read")
    if flags & _ENCRYPTED:
        raise ZipError(f"{path}: member {_printable(name)} is encrypted; the zip is not read")
    if method not in (_STORED, _DEFLATED):
        raise ZipError(f"{path}: member {_printable(name)} is compressed by method {method}; only deflate is read")
    if is_link:
        raise ZipError(f"{path}: member {_printable(name)} is a link; the zip is not read")
    if method == _STORED and stored != size:
        raise ZipError(f"{path}: member {_printable(name)} has two sizes; download it again")


def _local_extra_length(name: str, header: bytes, member: ZipMember) -> int:
    """Length of the extra field between header and data; raises if the local header contradicts the directory."""
    if len(header) == _LOCAL.size + len(member.name):
        signature, _, flags, method, _, _, crc, stored, size, length, extra = _LOCAL.unpack_from(header)
        same = signature == b"PK\3\4" and method == member.method and not flags & _ENCRYPTED
        same &= length == len(member.name) and header[_LOCAL.size :] == member.name
        if not flags & _SIZES_FOLLOW:
            same &= crc == member.crc and stored in (member.stored, _FULL_32) and size in (member.size, _FULL_32)
        if same:
            return int(extra)
    raise ZipError(f"{name}: cannot be read: its local header contradicts the zip's directory")


def _read_fully(descriptor: int, start: int, length: int) -> bytes:
    """Read ``length`` bytes from ``start``; fewer only at the end of the file."""
    data = os.pread(descriptor, length, start)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), start + len(data))):
        data += more
    return data


def _printable(name: bytes) -> str:
    """Name of a member for messages: unprintable characters are replaced, so it is one line."""
    text = name.decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)
