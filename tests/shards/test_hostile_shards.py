"""Hostile shards and manifests are reported or refused in one sentence, without writes and in bounded memory."""

import multiprocessing
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_shards import (
    add_member,
    edit_columns,
    edit_description,
    member_range,
    replace_member,
    rewrite_tar,
    update_hashes,
)
from small_tree import write_tree

from bocage.shards.errors import InputError
from bocage.shards.format.codec import encode
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.verify import verify
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

KEYS = [f"D012-2019_AF-S1-27_5-{column}" for column in range(4)]
TAR = "shard-000000.tar"
FIRST = f"{KEYS[0]}.SPOT_RGBI.bin"
MEMORY_LIMIT = 256 << 20  # bytes that reading a hostile file may allocate


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    tree = write_tree(folder / "tree", KEYS, ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"])
    return write_shards(FlairHubCatalogue.open(tree), folder / "out", samples_per_shard=2, order="roi").path


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "shards")


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def count_read_samples(shards: Path) -> int:
    """Number of samples that the reader yields."""
    manifest = Manifest.open(shards)
    modalities = [manifest.registry[name] for name in ("SPOT_RGBI", "SENTINEL2_TS")]
    batches = evaluation_batches(manifest, np.arange(len(manifest)), modalities, batch_size=1)
    return sum(len(batch.keys) for batch in batches)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "parent": ({"name": "../../evil.bin"}, "../../evil.bin"),
    "absolute": ({"name": "/tmp/bocage-evil.bin"}, "/tmp/bocage-evil.bin"),
    "symlink": ({"name": FIRST, "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a symbolic link"),
    "hard link": ({"name": FIRST, "type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"}, "a hard link"),
    "device": ({"name": FIRST, "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "a character device"),
    "disk": ({"name": FIRST, "type": tarfile.BLKTYPE, "devmajor": 8}, "a block device"),
    "pipe": ({"name": FIRST, "type": tarfile.FIFOTYPE}, "a pipe"),
    "folder": ({"name": "evil", "type": tarfile.DIRTYPE}, "a folder"),
    "control": ({"name": "\x1b[2Jevil"}, r"\x1b[2Jevil"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["first", "last"])
def test_foreign_tar_members_are_reported(shards: Path, tmp_path: Path, kind: str, place: str) -> None:
    """The hashes match the hostile tar. A member at the end leaves all offsets valid."""
    fields, what = HOSTILE[kind]

    def write(tar: tarfile.TarFile, members: dict[str, bytes]) -> None:
        if place == "first":
            add_member(tar, **fields)
        for name, data in members.items():
            add_member(tar, name, data)
        if place == "last":
            add_member(tar, **fields)

    rewrite_tar(shards, TAR, write, format=tarfile.GNU_FORMAT)
    before = files(tmp_path)
    report = verify(shards)
    assert report.broken == [TAR]
    assert any(what in problem.message for problem in report.problems), report.problems
    assert all(problem.message.isprintable() and problem.member.isprintable() for problem in report.problems)
    if place == "last":
        assert count_read_samples(shards) == 4
    else:  # all recorded offsets are wrong by one header
        with pytest.raises(InputError, match=f"{TAR}: SPOT_RGBI of {KEYS[0]} is damaged"):
            count_read_samples(shards)
    assert files(tmp_path) == before
    assert not Path("/tmp/bocage-evil.bin").exists()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with any size and type, and a valid checksum."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)[-512:]


@pytest.mark.parametrize(
    ("block", "what"),
    [
        (header(FIRST, 1 << 60), "the tar says 1152921504606846976 bytes"),
        (header(FIRST, (1 << 63) + 5), "the tar says 9223372036854775813 bytes"),
        (header(FIRST, 0), "the tar says 0 bytes"),
        (header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME), "a GNU long name"),
        (header("././@PaxHeader", 1 << 40, tarfile.XHDTYPE), "a pax header"),
        (header("pax_global", 1 << 40, tarfile.XGLTYPE), "a global pax header"),
        (header(FIRST, 1 << 40, tarfile.GNUTYPE_SPARSE), "a sparse file"),
        (bytes(512), "an empty block"),
        (b"\xff" * 512, "no tar header"),
    ],
)
def test_invalid_tar_headers_are_reported(shards: Path, block: bytes, what: str) -> None:
    data = bytearray((shards / TAR).read_bytes())
    data[:512] = block
    (shards / TAR).write_bytes(data)
    update_hashes(shards)
    problems = bounded(verify, shards).problems
    assert [(problem.file, problem.member) for problem in problems] == [(TAR, FIRST)]
    assert what in problems[0].message
    assert count_read_samples(shards) == 4  # readers use the recorded offsets and skip the headers


def bounded(work: Callable[[Path], Any], shards: Path) -> Any:
    """Result of ``work`` in a child process that may allocate at most ``MEMORY_LIMIT``."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_bounded, args=(work, shards, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    assert process.exitcode == 0
    if isinstance(result, BaseException):
        raise result
    return result


def _bounded(work: Callable[[Path], Any], shards: Path, sender: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        sender.send(work(shards))
    except BaseException as error:
        sender.send(error)


def test_decompression_bombs_are_reported(shards: Path) -> None:
    """Zeros compress a thousandfold, so the member is small and intact."""
    replace_member(shards, KEYS[1], "SPOT_RGBI", encode(np.zeros((1 << 19, 64, 16), np.uint16), "plain"))
    (problem,) = bounded(lambda path: verify(path, decode=None), shards).problems
    assert (problem.file, problem.member) == (TAR, f"{KEYS[1]}.SPOT_RGBI.bin")
    with pytest.raises(InputError, match=rf"{TAR}: SPOT_RGBI of {KEYS[1]} is uint16 of shape"):
        bounded(count_read_samples, shards)


@pytest.mark.parametrize("array", [np.zeros((4, 64, 64), np.float32), np.zeros((64, 64), np.uint16), np.uint16(7)])
def test_readers_refuse_arrays_of_another_shape_or_dtype(shards: Path, array: Any) -> None:
    replace_member(shards, KEYS[1], "SPOT_RGBI", encode(np.asarray(array), "plain"))
    with pytest.raises(InputError, match=f"{TAR}: SPOT_RGBI of {KEYS[1]}"):
        count_read_samples(shards)


def test_samples_that_share_a_member_are_reported(shards: Path) -> None:
    """Two samples that refer to the same bytes are readable, but contradict the tar."""
    offset, length = member_range(shards, KEYS[0], "SPOT_RGBI")
    changes = {
        "offset.SPOT_RGBI": lambda values: values.__setitem__(1, offset),
        "length.SPOT_RGBI": lambda values: values.__setitem__(1, length),
    }
    edit_columns(shards, changes)
    assert count_read_samples(shards) == 4
    problems = verify(shards).problems
    assert any(
        problem.member == f"{KEYS[1]}.SPOT_RGBI.bin" and "lies inside the previous member" in problem.message
        for problem in problems
    )


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"key": ' * 50_000, b"9" * 100_000, b'"\\ud800"', b"\xff", b"[]", b"0"]
)
def test_hostile_json_is_reported(shards: Path, text: bytes) -> None:
    def write(tar: tarfile.TarFile, members: dict[str, bytes]) -> None:
        for name, data in members.items():
            add_member(tar, name, text if name == f"{KEYS[1]}.json" else data)

    rewrite_tar(shards, TAR, write, format=tarfile.USTAR_FORMAT)
    (problem,) = verify(shards).problems
    assert (problem.file, problem.member) == (TAR, f"{KEYS[1]}.json")
    assert problem.message.startswith("not the description of a sample") and len(problem.message) < 400
    (shards / "dataset.json").write_bytes(text)
    with pytest.raises(InputError):
        Manifest.open(shards)
    assert verify(shards).broken == ["dataset.json"]


def test_implausibly_long_lists_are_refused(shards: Path) -> None:
    table = pq.read_table(shards / "manifest.parquet")
    name = "dates.SENTINEL2_TS"
    ends = pa.array([0, *[1 << 24] * 4], pa.int32())
    dates = pa.ListArray.from_arrays(ends, pa.array(np.zeros(1 << 24, np.int32)))
    table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), dates)
    pq.write_table(table, shards / "manifest.parquet")
    update_hashes(shards)
    assert (shards / "manifest.parquet").stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"manifest\.parquet: lists of more values"):
        Manifest.open(shards).column(name)
    problem = verify(shards).problems[0]
    assert problem.file == "manifest.parquet" and "lists of more values" in problem.message


@pytest.mark.parametrize("name", ["dataset.json", "manifest.parquet"])
def test_no_flipped_byte_crashes(shards: Path, name: str) -> None:
    """Flipped bytes never cause a traceback.

    The hash of the table is not updated, because Arrow's Parquet reader may abort on a damaged table.
    """
    path = shards / name
    pristine, description = path.read_bytes(), (shards / "dataset.json").read_bytes()
    random = np.random.default_rng(0)
    answers: set[bool | str] = set()
    for place in random.integers(0, len(pristine), 60).tolist():
        (shards / "dataset.json").write_bytes(description)
        data = bytearray(pristine)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            answers.add(verify(shards).sound)
        except InputError as error:
            answers.add(str(error)[:20])
    assert False in answers


@pytest.mark.parametrize(
    "change",
    [
        lambda description: description["shards"][0].update(samples=1 << 62),
        lambda description: [entry.update(samples=1 << 62) for entry in description["shards"]],
        lambda description: description["shards"][0].update(samples=10**12),
        lambda description: description["shards"][0].update(name="../" + TAR),
        lambda description: description["counts"].update(present=7),
        lambda description: description.update(counts=[]),
    ],
)
def test_descriptions_with_wrong_counts_are_reported(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_description(shards, change)
    assert not bounded(verify, shards).sound


@pytest.mark.parametrize(
    "fields",
    [{"gsd": float("nan")}, {"gsd": 1e-4, "size": 1_024_000}, {"gsd": -1.6, "size": -64}, {"size": 64.0}],
)
def test_descriptions_with_impossible_pixels_are_refused(shards: Path, fields: dict[str, Any]) -> None:
    def change(description: dict[str, Any]) -> None:
        next(item for item in description["registry"] if item["name"] == "SPOT_RGBI").update(fields)

    edit_description(shards, change)
    with pytest.raises(InputError, match="SPOT_RGBI"):
        Manifest.open(shards)
