"""Verify shards: damaged files, contradicting descriptions, workers, the command, and interrupts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_shards import edit_columns, edit_description, flip_bit, member_range, replace_member
from small_tree import write_tree

from bocage.shards.errors import InputError
from bocage.shards.format.codec import encode
from bocage.shards.inspect.verify import Verification, verify
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main

KEYS = [f"D012-2019_AF-S1-27_5-{column}" for column in range(6)]
MODALITIES = ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC", "SENTINEL1-ASC_TS", "ALL_LABEL-LPIS"]
SECOND = "shard-000001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two patches; the fourth patch has no labels and no SPOT image."""
    folder = tmp_path_factory.mktemp("verify")
    tree = write_tree(folder / "tree", KEYS, MODALITIES)
    for path in tree.rglob(f"*_{KEYS[3].split('_', 1)[1]}.tif"):
        if "SPOT" in path.name or "LABEL" in path.name:
            path.unlink()
    return write_shards(FlairHubCatalogue.open(tree), folder / "out", samples_per_shard=2, order="roi").path


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "shards")


def described(result: Verification) -> list[tuple[str, str, str]]:
    return [(problem.file, problem.member, problem.message) for problem in result.problems]


@pytest.mark.parametrize("decode", [0, 1, None])
def test_written_shards_are_sound(sound: Path, decode: int | None) -> None:
    calls: list[tuple[int, int, int]] = []
    result = verify(sound, decode=decode, progress=lambda *numbers: calls.append(numbers))
    assert result.sound and not result.warnings and result.broken == []
    assert (result.samples, result.shards) == (6, 3)
    assert result.decoded == {0: 0, 1: 3, None: 6}[decode]
    assert result.bytes == sum(path.stat().st_size for path in sound.glob("*.tar"))
    assert calls[-1] == (result.bytes, result.bytes, 0) and len(calls) >= 3


def test_workers_find_the_same_problems(shards: Path) -> None:
    for key in (KEYS[0], KEYS[5]):
        offset, length = member_range(shards, key, "SENTINEL2_TS")
        flip_bit(shards / f"shard-00000{KEYS.index(key) // 2}.tar", offset + length - 1)
    assert described(verify(shards, workers=2)) == described(verify(shards))
    assert verify(shards).broken == ["shard-000000.tar", "shard-000002.tar"]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("decode", [0, None])
def test_flipped_bit_is_named_with_its_member(shards: Path, modality: str, decode: int | None) -> None:
    offset, length = member_range(shards, KEYS[2], modality)
    flip_bit(shards / SECOND, offset + length // 2)
    result = verify(shards, decode=decode)
    whole, member = described(result)
    assert whole == (SECOND, "", "damaged: its SHA-256 is not the one in the dataset's description")
    assert member[:2] == (SECOND, f"{KEYS[2]}.{modality}.bin")
    assert "checksum does not match" in member[2]
    # All samples of the damaged shard were decoded, and ``decode`` samples of the other shards.
    assert result.decoded == (2 if decode == 0 else 6)


def test_flipped_bits_outside_of_arrays_are_named(shards: Path) -> None:
    path = shards / SECOND
    pristine = path.read_bytes()
    offset, length = member_range(shards, KEYS[2], "SPOT_RGBI")
    description = pristine.index(b'{"key": "' + KEYS[2].encode())
    for place, member, what in (
        (offset - 512, f"{KEYS[2]}.SPOT_RGBI.bin", "no tar header at byte 0: bad checksum"),
        (offset + length, f"{KEYS[2]}.SPOT_RGBI.bin", "the padding of its last block is not zero"),
        (description + 10, f"{KEYS[2]}.json", "key differ from the manifest"),
        (description, f"{KEYS[2]}.json", "not the description of a sample"),
        (len(pristine) - 1, "", "after its last sample"),
    ):
        path.write_bytes(pristine)
        flip_bit(path, place)
        whole, problem = described(verify(shards, decode=0))[:2]
        assert "SHA-256" in whole[2]
        assert problem[:2] == (SECOND, member) and what in problem[2]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_truncated_shards(shards: Path, share: float) -> None:
    path = shards / SECOND
    size = path.stat().st_size
    os.truncate(path, int(size * share))
    result = verify(shards, decode=0)
    whole, first, *more = described(result)
    assert whole == (SECOND, "", f"{int(size * share)} bytes, but the dataset's description says {size}")
    assert "cut off" in first[2] and not more
    if share == 0:
        assert first[1] == f"{KEYS[2]}.SPOT_RGBI.bin" and "1 sample after it lost too" in first[2]
    assert result.broken == [SECOND]


def test_missing_shard_and_pipe(shards: Path) -> None:
    (shards / SECOND).unlink()
    (shards / "shard-000000.tar").unlink()
    os.mkfifo(shards / "shard-000000.tar")  # opening it must not wait for a writer
    result = verify(shards)
    assert described(result) == [("shard-000000.tar", "", "not a regular file"), (SECOND, "", "missing")]
    assert result.decoded == 2


def test_unexpected_files_are_warnings(shards: Path) -> None:
    shutil.copy(shards / SECOND, shards / "stray.tar")
    (shards / "shard-000007.tar.0123.tmp").write_bytes(b"x")
    (shards / "parts").mkdir()
    (shards / "notes.txt").touch()
    result = verify(shards)
    assert result.sound
    assert [(item.file, item.message.split(";")[0]) for item in result.warnings] == [
        ("parts", "left over from sharding"),
        ("shard-000007.tar.0123.tmp", "left over from an interrupted run"),
        ("stray.tar", "not in the manifest"),
    ]


@pytest.mark.parametrize("name", ["index.arrow", "manifest.parquet", "dataset.json"])
def test_damaged_descriptions(shards: Path, name: str) -> None:
    flip_bit(shards / name, 0)
    os.truncate(shards / SECOND, 1000)
    result = verify(shards)
    assert result.problems[0].file == name
    assert str(shards) not in result.problems[0].message
    # Shards are checked without the index or the table, but not without the description.
    assert (SECOND in result.broken) == (name != "dataset.json")
    assert result.decoded == {"index.arrow": 4, "manifest.parquet": 0, "dataset.json": 0}[name]


@pytest.mark.parametrize(
    ("column", "row", "value", "file", "member", "what"),
    [
        ("crs", 1, "EPSG:4326", "shard-000000.tar", f"{KEYS[1]}.json", "crs differ from the manifest"),
        ("left", 2, 7.0, SECOND, f"{KEYS[2]}.json", "left differ from"),
        ("roi", 2, "elsewhere", "index.arrow", KEYS[2], "column roi differs from manifest.parquet"),
        ("offset.SPOT_RGBI", 5, 512, "index.arrow", KEYS[5], "column offset.SPOT_RGBI differs"),
        ("dates.SENTINEL2_TS", 4, [1, 2, 4], "index.arrow", KEYS[4], "column dates.SENTINEL2_TS differs"),
        ("dates.SENTINEL2_MSK-SC", 4, [1, 2, 3, 4], "shard-000002.tar", f"{KEYS[4]}.SENTINEL2_MSK-SC.bin", "(4, 2"),
        ("histogram.ALL_LABEL-LPIS.level-2", 0, [0] * 31, "shard-000000.tar", None, "histogram of level-2"),
        ("minimum.SPOT_RGBI", 0, [0.0] * 4, "shard-000000.tar", f"{KEYS[0]}.SPOT_RGBI.bin", "its minimum is"),
        ("mean.SENTINEL1-ASC_TS", 3, None, SECOND, f"{KEYS[3]}.SENTINEL1-ASC_TS.bin", "but the manifest says None"),
        ("shard", 1, 1, "manifest.parquet", "", "not in the order of the shards"),
    ],
)
def test_rows_that_contradict_their_sample(
    shards: Path, column: str, row: int, value: Any, file: str, member: str | None, what: str
) -> None:
    edit_columns(shards, {column: lambda values: values.__setitem__(row, value)}, index=False)
    problems = described(verify(shards, decode=None))
    assert any(
        problem[0] == file and (member is None or problem[1] == member) and what in problem[2] for problem in problems
    ), problems


def test_statistics_and_counts_of_the_dataset(shards: Path) -> None:
    edit_description(shards, lambda description: description["counts"]["present"].update(SPOT_RGBI=6))
    counts = ("dataset.json", "", "its counts are not those of manifest.parquet")
    assert described(verify(shards)) == [counts]
    edit_description(shards, lambda description: description["counts"]["present"].update(SPOT_RGBI=5))
    assert verify(shards, decode=None).sound
    std = json.loads((shards / "dataset.json").read_text())["statistics"]["SENTINEL2_TS"]["std"]
    std[3] *= 1.01
    edit_description(shards, lambda description: description["statistics"]["SENTINEL2_TS"].update(std=std))
    assert verify(shards).sound
    (problem,) = described(verify(shards, decode=None))
    assert problem[0] == "dataset.json" and problem[2].startswith("the std of SENTINEL2_TS is")


@pytest.mark.parametrize(
    ("modality", "array", "what"),
    [
        ("ALL_LABEL-LPIS", np.zeros((3, 512, 512), np.uint16), "uint16 of 3 x 512 x 512, but"),
        ("ALL_LABEL-LPIS", np.zeros((3, 256, 256), np.uint8), "uint8 of 3 x 256 x 256, but"),
        ("ALL_LABEL-LPIS", np.zeros((3, 512, 512), np.int8), "int8 of 3 x 512 x 512, but"),
        (
            "ALL_LABEL-LPIS",
            np.full((3, 512, 512), 45, np.uint8),
            "value 45 in band level-1, but LPIS level 1",
        ),
        ("ALL_LABEL-LPIS", np.zeros((3, 512, 512), np.uint8), "histogram of level-3 differs"),
        ("SPOT_RGBI", np.zeros(1 << 28, np.uint8), "uint8 of 268435456, but"),
        ("SPOT_RGBI", np.zeros((4, 64, 64), np.uint16), "its maximum is [0.0, 0.0, 0.0, 0.0], but the manifest says"),
        ("SPOT_RGBI", np.zeros((), np.uint16), "uint16 of , but"),
        ("SENTINEL2_TS", np.zeros((2, 10, 10, 10), np.uint16), "2 x 10 x 10 x 10, but"),
        ("SENTINEL2_TS", np.zeros((4, 10, 10, 10), np.uint16), "uint16 of 4 x 10 x 10 x 10, but"),
        ("SENTINEL1-ASC_TS", np.zeros((3, 2, 10, 10), np.int32), "int32 of 3 x 2 x 10 x 10, but"),
    ],
)
def test_contradicting_arrays_are_named(shards: Path, modality: str, array: np.ndarray, what: str) -> None:
    """The members have intact checksums and offsets, but arrays that contradict registry or manifest."""
    replace_member(shards, KEYS[2], modality, encode(array, "plain"))
    problems = described(verify(shards, decode=None))
    assert {problem[:2] for problem in problems} <= {(SECOND, f"{KEYS[2]}.{modality}.bin")}
    assert any(what in problem[2] for problem in problems), problems
    assert verify(shards, decode=0).sound


def test_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["verify", str(shards), "--decode", "all", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "6 patches in 3 shards" in printed and printed.endswith("\nsound\n")
    assert json.loads(report.read_text())["decoded"] == 6
    flip_bit(shards / SECOND, 5000)
    assert main(["verify", str(shards), "--json", str(report)]) == 1
    printed = capsys.readouterr().out
    assert f"broken: {SECOND}: damaged" in printed
    assert f"repair: delete {SECOND} and run the same `bocage shard SRC {shards}` again" in printed
    assert json.loads(report.read_text())["broken"] == [SECOND]
    assert main(["verify", str(tmp_path)]) == 2
    assert "bocage shard SRC" in capsys.readouterr().err
    assert main(["verify", str(shards), "--json", str(tmp_path / "no" / "where.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    edit_description(shards, lambda description: description.update(schema_version=1))
    assert main(["verify", str(shards)]) == 2
    assert "schema version 1" in capsys.readouterr().err


# Starts three processes and waits until the workers read.
def test_interrupt_ends_all_processes(shards: Path) -> None:
    size = 64 << 30  # sparse: hashing takes far longer than this test waits
    for name in ("shard-000000.tar", SECOND):
        os.truncate(shards / name, size)

    def enlarge(description: dict[str, Any]) -> None:
        for entry in description["shards"][:2]:
            entry.update(bytes=size)

    edit_description(shards, enlarge)
    command = [sys.executable, "-m", "bocage", "verify", str(shards), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def hashing() -> bool:
        folders = [Path(f"/proc/{child}/fd") for child in children.read_text().split()]
        try:
            opened = [os.readlink(link) for folder in folders for link in folder.iterdir()]
        except OSError:  # the file was closed or its process ended meanwhile
            return False
        return sum(name.endswith(".tar") for name in opened) == 2

    deadline = time.monotonic() + 60
    while not hashing():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "nowhere")
