"""Read zips written by ``zipfile``, and refuse damaged and malicious ones."""

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from bocage.shards.source.flair_hub import zips
from bocage.shards.source.flair_hub.rasters import RasterSource
from bocage.shards.source.raster import RasterError

CONTENT = {"a/one.tif": b"first " * 300, "a/two.tif": bytes(range(256)) * 9, "a/none.tif": b""}


def write_zip(path: Path, method: int = zipfile.ZIP_DEFLATED, content: dict[str, bytes] = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.mkdir("a")
        for name, data in content.items():
            file.writestr(name, data)
    return path


def directory_start(data: bytes) -> int:
    return int(struct.unpack_from("<L", data, data.rindex(b"PK\5\6") + 16)[0])


def record(data: bytes, name: bytes) -> int:
    """Offset of the directory record of a member."""
    return data.index(name, directory_start(data)) - 46


def test_members_and_their_content(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / "x.zip", method)
        found = list(zips.members(path))
        assert [member.name.decode() for member in found] == list(CONTENT)
        assert {member.name.decode(): zips.read(path, member) for member in found} == CONTENT


def test_an_empty_zip_has_no_member(tmp_path: Path) -> None:
    assert list(zips.members(write_zip(tmp_path / "x.zip", content={}))) == []


def test_comment_that_looks_like_an_end_record(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"PK\5\6" + bytes(40)
    assert len(list(zips.members(path))) == 3


def test_zip_written_to_a_pipe_has_sizes_after_the_data(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    reader, writer = os.pipe()
    with open(writer, "wb") as pipe, zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/one.tif", CONTENT["a/one.tif"])
    with open(reader, "rb") as output:
        path.write_bytes(output.read())
    (member,) = zips.members(path)
    assert zips.read(path, member) == CONTENT["a/one.tif"]


def test_zip64_by_flag_and_by_offset(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file, file.open("a/one.tif", "w", force_zip64=True) as member:
        member.write(b"content")
    (found,) = zips.members(path)
    assert zips.read(path, found) == b"content"
    # Beyond 4 GiB, in a sparse file: the extra field holds the offsets, and the end record is zip64.
    with path.open("wb") as raw:
        raw.seek(5 << 30)
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("b/far.tif", b"far away" * 100)
    (found,) = zips.members(path)
    assert found.offset >= 5 << 30
    assert zips.read(path, found) == b"far away" * 100


def test_more_than_65535_members(tmp_path: Path) -> None:
    # Written by hand, because zipfile takes seconds for this many members.
    count = 65_600
    path = tmp_path / "x.zip"
    names = [f"{number:05}".encode() for number in range(count)]
    local = b"".join(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 5, 0) + name for name in names)
    parts = [struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *[0] * 7, 5, *[0] * 5, 35 * i) for i in range(count)]
    central = b"".join(part + name for part, name in zip(parts, names))
    end = len(local) + len(central)
    end_64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(central), len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(local + central + end_64 + locator + last)
    found = list(zips.members(path))
    assert [member.name for member in found] == names
    assert zips.read(path, found[-1]) == b""


def patched(path: Path, change: dict[int, bytes]) -> Path:
    data = bytearray(path.read_bytes())
    for at, new in change.items():
        data[at : at + len(new)] = new
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (8, b"\1\0", "is encrypted"),
        (10, b"\x0c\0", "compressed by method 12"),
        (20, b"\xf0\xff\xff\0", "lies outside"),
        (34, b"\1\0", "lies outside"),
        (42, b"\xf0\xff\xff\0", "lies outside"),
        (42, b"\2\0\0\0", "overlap"),
        (28, b"\xff\xff", "directory is damaged"),
        (0, b"PK\1\3", "directory is damaged"),
        (24, b"\xff\xff\xff\xff", "directory is damaged"),  # refers to a missing zip64 field
        (38, b"\0\0\xff\xa1", "is a link"),
        (46, b"../wo.tif", "leads out of the zip"),
        (46, b"/etc/wd.x", "leads out of the zip"),
        (46, b"C:tow.tif", "leads out of the zip"),
        (46, b"a\\two.tif", "leads out of the zip"),
    ],
)
def test_malicious_directory_record_is_refused(tmp_path: Path, field: int, value: bytes, message: str) -> None:
    path = write_zip(tmp_path / "x.zip")
    path = patched(path, {record(path.read_bytes(), b"a/two.tif") + field: value})
    with pytest.raises(zips.ZipError, match=message) as error:
        list(zips.members(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(8, b"\3\0", "split"), (4, b"\1\0", "split"), (12, b"\1\0\0\0", "damaged"), (16, b"\0\0\0\1", "damaged")],
)
def test_wrong_end_record_is_refused(tmp_path: Path, field: int, value: bytes, message: str) -> None:
    path = write_zip(tmp_path / "x.zip")
    path = patched(path, {path.read_bytes().rindex(b"PK\5\6") + field: value})
    with pytest.raises(zips.ZipError, match=message):
        list(zips.members(path))


def test_truncation_at_any_length_is_detected(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "x.zip").read_bytes()
    path = tmp_path / "cut.zip"
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(zips.ZipError, match="still being downloaded"):
            list(zips.members(path))


def test_flipped_bits_never_change_content_silently(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "x.zip").read_bytes()
    path = tmp_path / "flipped.zip"
    known = set(CONTENT.values())
    random = np.random.default_rng(0)
    refused = 0
    for at in random.permutation(len(whole))[:600].tolist():
        data = bytearray(whole)
        data[at] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        try:
            assert {zips.read(path, member) for member in list(zips.members(path))} <= known
        except zips.ZipError:
            refused += 1
    assert refused > 200


def test_contradicting_local_header_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip")
    member = list(zips.members(path))[1]
    original = path.read_bytes()
    for field, value in ((0, b"XX"), (8, b"\0\0"), (14, b"\0\0\0\0"), (18, b"\1\0"), (22, b"\1\0"), (30, b"b")):
        path.write_bytes(original)
        patched(path, {member.offset + field: value})
        with pytest.raises(zips.ZipError, match=r"x\.zip/a/two\.tif: cannot be read: its local header contradicts"):
            zips.read(path, member)


def test_content_longer_than_declared_is_not_inflated(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(50_000_000), 9, wbits=-15)
    path = tmp_path / "x.zip"
    name = b"a/bomb.tif"
    crc = zlib.crc32(bytes(1000))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(bomb), 1000, len(name), 0) + name + bomb
    central = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(bomb), 1000, len(name), 0, 0, 0, 0, 0, 0
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central + name), len(local), 0)
    path.write_bytes(local + central + name + end)
    (member,) = zips.members(path)
    with pytest.raises(zips.ZipError, match="not as long as the zip says"):
        zips.read(path, member)


def test_raster_source_in_a_zip_names_zip_and_member(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", zipfile.ZIP_STORED)
    member = next(zips.members(path))
    source = RasterSource(path, member)
    assert source.read() == CONTENT["a/one.tif"]
    assert str(source) == f"{path}/a/one.tif"
    patched(path, {path.read_bytes().index(b"first"): b"F"})
    with pytest.raises(RasterError, match=r"x\.zip/a/one\.tif: cannot be read: its CRC-32"):
        source.read()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RasterError, match=r"x\.zip/a/one\.tif: cannot be read: the zip ends within it"):
        source.read()
    path.unlink()
    with pytest.raises(RasterError, match=r"x\.zip/a/one\.tif: cannot be read: No such file"):
        source.read()
