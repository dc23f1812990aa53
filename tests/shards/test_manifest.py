import hashlib
import json
import multiprocessing
import pickle
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tree import write_tree

from bocage.shards.dataset_info import FLAIR_HUB_INFO
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest, manifest_schema
from bocage.shards.inspect.verify import verify
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

DATA = Path(__file__).parents[1] / "data"
KEYS = [f"D012-2019_AF-S1-27_5-{column}" for column in range(4)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tree = write_tree(tmp_path / "tree", KEYS, ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"])
    return write_shards(FlairHubCatalogue.open(tree), tmp_path / "out", samples_per_shard=3, order="roi").path


def edit_description(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = shards / "dataset.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def update_hashes(shards: Path) -> None:
    """Update sizes and hashes to match changed files, as an attacker would."""

    def describe(description: dict[str, Any]) -> None:
        for name in description["files"]:
            data = (shards / name).read_bytes()
            description["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_description(shards, describe)


def read_index(shards: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(shards / "index.arrow").get_batch(0)


def write_index(shards: Path, *batches: pa.RecordBatch, **options: Any) -> None:
    options = {"options": pa.ipc.IpcWriteOptions(**options)}
    with pa.ipc.new_file(str(shards / "index.arrow"), batches[0].schema, **options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    update_hashes(shards)


def replace_index_column(shards: Path, name: str, values: Any) -> None:
    batch = read_index(shards)
    column = values if isinstance(values, pa.Array) else pa.array(values, batch.schema.field(name).type)
    columns = dict(zip(batch.schema.names, batch.columns)) | {name: column}
    fields = [field.with_type(columns[field.name].type) for field in batch.schema]
    write_index(shards, pa.record_batch(list(columns.values()), schema=pa.schema(fields)))


def test_manifest_of_written_shards(shards: Path) -> None:
    manifest = Manifest.open(shards)
    assert len(manifest) == manifest.table.num_rows == 4
    assert manifest.table.schema.equals(manifest_schema(manifest.registry, ["split_1", "split_toy"]))
    assert {name: manifest.registry[name] for name in manifest.registry} == {
        name: FLAIR_HUB[name] for name in ("SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC")
    }
    assert manifest.column("key").to_pylist() == KEYS
    assert manifest.column("shard").to_pylist() == [0, 0, 0, 1]
    assert [manifest.shard_path(index).name for index in range(manifest.shard_count)] == [
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    assert manifest.counts["present"]["SPOT_RGBI"] == 4
    with pytest.raises(InputError, match=r"'nothing'.*offset\.SPOT_RGBI"):
        manifest.column("nothing")
    with pytest.raises(IndexError):
        manifest.row(4)


def test_split(shards: Path) -> None:
    manifest = Manifest.open(shards)
    rows = manifest.split("split_1", "train")
    assert rows.dtype == np.int64
    assert rows.tolist() == [0, 3]
    with pytest.raises(InputError, match=r"'split_9'; set split= to one of: split_1, split_toy"):
        manifest.split("split_9", "train")
    with pytest.raises(InputError, match=r"values: test, train, valid"):
        manifest.split("split_1", "val")
    with pytest.raises(InputError, match="values: none"):
        manifest.split("split_toy", "train")


def test_input_spec_has_the_statistics_of_the_shards(shards: Path) -> None:
    manifest = Manifest.open(shards)
    mean, std = manifest.statistics["SENTINEL2_TS"]
    assert len(mean) == len(std) == 10
    assert manifest.input_spec("SENTINEL2_TS") == InputSpec.from_modality(FLAIR_HUB["SENTINEL2_TS"], mean, std)
    with pytest.raises(InputError, match=r"no DEM_ELEV; they hold SPOT_RGBI"):
        manifest.input_spec("DEM_ELEV")
    with pytest.raises(InputError, match="mask"):
        manifest.input_spec("SENTINEL2_MSK-SC")


def test_folders_without_a_manifest_get_a_hint(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder.*bocage shard SRC"):
        Manifest.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"a FLAIR-HUB tree, not shards.*bocage shard .*tree OUT"):
        Manifest.open(tmp_path / "tree")
    with pytest.raises(InputError, match="bocage shard SRC"):
        Manifest.open(tmp_path)
    (shards / "dataset.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        Manifest.open(shards)


def test_other_schema_versions_are_refused(shards: Path) -> None:
    for version in (1, 99):
        edit_description(shards, methodcaller("update", schema_version=version))
        with pytest.raises(InputError, match=f"schema version {version}.*shard the tree again"):
            Manifest.open(shards)


@pytest.mark.parametrize("name", ["../shard.tar", "/etc/passwd", "a/b.tar", "..", "shard.tar\n", "-", "", 7, None])
def test_shard_names_cannot_leave_the_folder(shards: Path, name: object) -> None:
    edit_description(shards, lambda description: description["shards"][0].update(name=name))
    with pytest.raises(InputError, match="not a plain name"):
        Manifest.open(shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda description: description.pop("registry"),
        lambda description: description["registry"][0].pop("gsd"),
        lambda description: description["registry"][0].update(name="../x"),
        lambda description: description["shards"].pop(),
        lambda description: description["shards"][0].update(samples=4),
        lambda description: description["shards"][0].update(sha256="abc"),
        lambda description: description["shards"][0].update(bytes=10),
        lambda description: description["shards"][0].update(bytes="x"),
        lambda description: description["shards"][0].update(bytes=1.5),
        lambda description: description["shards"][0].update(bytes=1 << 70),
        lambda description: description["shards"][0].update(samples=None),
        lambda description: description["shards"][0].update(samples=True),
        lambda description: description["registry"][0].update(bands=[{"scheme": "x"}]),
        lambda description: description.update(statistics=[]),
        lambda description: description.update(statistics={}),
        lambda description: description["statistics"]["SPOT_RGBI"].update(mean="1234"),
        lambda description: description["statistics"]["SPOT_RGBI"].update(mean=[]),
        lambda description: description["statistics"]["SPOT_RGBI"].update(std=None),
        lambda description: description["statistics"]["SPOT_RGBI"].update(std=[1.0, 1.0, 1.0, float("inf")]),
        lambda description: description["shards"][0].update(extra=1),
        lambda description: description["splits"].append("split_x"),
        lambda description: description["registry"].pop(0),
        lambda description: description.pop("files"),
        lambda description: description["files"].pop("index.arrow"),
        lambda description: description["files"]["index.arrow"].update(sha256="0" * 64),
        lambda description: description["files"]["index.arrow"].update(bytes=-1),
        lambda description: description["files"]["manifest.parquet"].update(bytes=True),
    ],
)
def test_contradictory_descriptions_are_refused(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_description(shards, change)
    with pytest.raises(InputError):
        Manifest.open(shards).column("key")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("shard", [0, 0, 0, 2]),
        ("shard", [0, 0, 0, -1]),
        ("shard", [0, 0, 1, 1]),
        ("offset.SPOT_RGBI", [-1, 0, 0, 0]),
        ("offset.SPOT_RGBI", [0, 0, 0, 2**62]),
        ("offset.SPOT_RGBI", [0, 0, 0, 2**63 - 1]),
        ("offset.SPOT_RGBI", [0, 0, 0, None]),
        ("length.SPOT_RGBI", [0, 0, 0, 2**31 - 1]),
        ("length.SPOT_RGBI", [-1, 0, 0, 0]),
        ("length.SPOT_RGBI", pa.array([0, 0, 0, 0], pa.int64())),
        ("length.SPOT_RGBI", ["0", "0", "0", "0"]),
        ("key", [KEYS[0], KEYS[0], *KEYS[2:]]),
        ("key", [None, *KEYS[1:]]),
        ("key", ["", *KEYS[1:]]),
        ("key", ["../../etc/passwd", *KEYS[1:]]),
        ("key", ["a.b", *KEYS[1:]]),
        ("key", ["x" * 201, *KEYS[1:]]),
        ("key", [f"{KEYS[0]}\n", *KEYS[1:]]),
        ("key", pa.array([b"\xff\xfe", *KEYS[1:]], pa.binary()).view(pa.string())),
        ("roi", pa.array(["<script>", "a", "b", "c"]).dictionary_encode()),
        ("roi", pa.DictionaryArray.from_arrays(pa.array([0] * 4, pa.int32()), pa.array([None], pa.string()))),
        ("roi", pa.DictionaryArray.from_arrays(pa.array([0, 0, 0, 1], pa.int32()), pa.array(["a"]), safe=False)),
        ("roi", pa.DictionaryArray.from_arrays(pa.array([0, 0, 0, -1], pa.int32()), pa.array(["a"]), safe=False)),
    ],
)
def test_hostile_indexes_are_refused(shards: Path, column: str, values: Any) -> None:
    replace_index_column(shards, column, pa.array(values) if values == ["0"] * 4 else values)
    with pytest.raises(InputError, match=r"index\.arrow"):
        Manifest.open(shards)


def coded(codes: list[int], lists: list[list[int | None] | None]) -> pa.DictionaryArray:
    """Dates as the index stores them, without validation."""
    return pa.DictionaryArray.from_arrays(
        pa.array(codes, pa.int32()), pa.array(lists, pa.list_(pa.int32())), safe=False
    )


@pytest.mark.parametrize(
    "dates",
    [
        coded([0, 0, 0, 1], [[1, 2, 3]]),
        coded([0, 0, 0, -1], [[1, 2, 3]]),
        coded([0] * 4, [[1, None, 3]]),
        coded([0] * 4, [[1, 2], None]),
        coded([0] * 4, [[0] * 40_000]),
    ],
)
def test_hostile_dates_are_refused(shards: Path, dates: pa.DictionaryArray) -> None:
    replace_index_column(shards, "dates.SENTINEL2_TS", coded([0, 0, 0, 1], [[1, 2, 3], []]))
    index = Manifest.open(shards).index
    assert [index.dates("SENTINEL2_TS", row).tolist() for row in (0, 3)] == [[1, 2, 3], []]
    replace_index_column(shards, "dates.SENTINEL2_TS", dates)
    with pytest.raises(InputError, match=r"index\.arrow"):
        Manifest.open(shards)


@pytest.mark.parametrize("end", [2**30, -5, 2000, 778])
def test_date_lists_cannot_point_outside_their_values(shards: Path, end: int) -> None:
    replace_index_column(shards, "dates.SENTINEL2_TS", coded([0, 0, 0, 1], [[0] * 777, [0] * 777]))
    path = shards / "index.arrow"
    offsets, hostile = (np.array([777, last], np.int32).tobytes() for last in (1554, end))
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, hostile))
    update_hashes(shards)
    if end == 778:  # a different list, but within the values
        assert len(Manifest.open(shards).index.dates("SENTINEL2_TS", 3)) == 1
        return
    with pytest.raises(InputError, match=r"index\.arrow"):
        Manifest.open(shards)


def test_indexes_of_another_layout_are_refused(shards: Path) -> None:
    batch = read_index(shards)
    write_index(shards, batch, batch)
    with pytest.raises(InputError, match="2 record batches"):
        Manifest.open(shards)
    write_index(shards, batch.select(batch.schema.names[:-1]))
    with pytest.raises(InputError, match="do not match the modalities"):
        Manifest.open(shards)
    write_index(shards, batch, compression="zstd")
    with pytest.raises(InputError, match="compressed"):
        Manifest.open(shards)


def test_no_flipped_byte_of_an_index_crashes(shards: Path) -> None:
    """The hash is updated after each damage, so only the content can reveal it."""
    path = shards / "index.arrow"
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    context = multiprocessing.get_context("fork")
    # Run in a child process, because an access outside the mapping would crash the process.
    process = context.Process(target=_open_damaged_indexes, args=(shards, sound, random.integers(0, len(sound), 400)))
    process.start()
    process.join()
    assert process.exitcode == 0


def _open_damaged_indexes(shards: Path, sound: bytes, places: np.ndarray) -> None:
    for place in places.tolist():
        data = bytearray(sound)
        data[place] ^= 1 << place % 8
        (shards / "index.arrow").write_bytes(data)
        update_hashes(shards)
        try:
            index = Manifest.open(shards).index
        except InputError:
            continue
        for row in range(len(index)):
            assert len(index.key(row)) + len(index.roi(row)) + len(index.dates("SENTINEL2_TS", row)) < 10_000


def test_a_pickled_index_is_its_path(shards: Path) -> None:
    manifest = Manifest.open(shards)
    sent = pickle.dumps(manifest.index)
    again = pickle.loads(sent)
    assert len(sent) < 20_000
    for row in range(4):
        stored = manifest.row(row)
        assert (again.key(row), again.roi(row)) == (stored["key"], stored["roi"])
        assert again.dates("SENTINEL2_TS", row).tolist() == stored["dates.SENTINEL2_TS"]
        assert again.shard[row] == stored["shard"]
        for name in manifest.registry:
            assert again.offset[name][row] == stored[f"offset.{name}"]
            assert again.length[name][row] == stored[f"length.{name}"]
    assert not again.offset["SPOT_RGBI"].flags.owndata


def test_the_table_must_match_the_description(shards: Path) -> None:
    path = shards / "manifest.parquet"
    table = pq.ParquetFile(path).read()
    pq.write_table(table.slice(1), path)
    update_hashes(shards)
    with pytest.raises(InputError, match=r"manifest\.parquet: 3 rows for 4 samples"):
        Manifest.open(shards).column("key")
    pq.write_table(table.drop_columns(["roi"]), path)
    update_hashes(shards)
    with pytest.raises(InputError, match=r"manifest\.parquet: columns roi do not match"):
        Manifest.open(shards).split("split_1", "train")


def test_damaged_pages_are_named(shards: Path) -> None:
    path = shards / "manifest.parquet"
    data = path.read_bytes()
    metadata = 8 + int.from_bytes(data[-8:-4], "little")
    path.write_bytes(b"PAR1" + b"\xa5" * (len(data) - metadata - 4) + data[-metadata:])
    with pytest.raises(InputError, match=r"manifest\.parquet: damaged: its SHA-256"):
        Manifest.open(shards).row(0)
    update_hashes(shards)
    with pytest.raises(InputError, match=r"manifest\.parquet: damaged"):
        Manifest.open(shards).row(0)


@pytest.mark.parametrize("name", ["manifest.parquet", "index.arrow"])
def test_damaged_files_are_named(shards: Path, name: str) -> None:
    data = (shards / name).read_bytes()
    (shards / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=rf"{name}: {len(data) // 2} bytes, but"):
        Manifest.open(shards)
    update_hashes(shards)
    with pytest.raises(InputError, match=rf"{name}: cannot be read"):
        Manifest.open(shards).column("key")
    (shards / name).write_bytes(data[:-1] + b"x")
    update_hashes(shards)
    with pytest.raises(InputError, match=rf"{name}: cannot be read"):
        Manifest.open(shards).column("key")
    (shards / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: cannot be read: No such file"):
        Manifest.open(shards)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_damaged_descriptions_are_refused(shards: Path, text: str) -> None:
    (shards / "dataset.json").write_text(text)
    with pytest.raises(InputError):
        Manifest.open(shards)


def test_shards_of_format_version_2_open() -> None:
    manifest = Manifest.open(DATA / "shards_v2")
    assert manifest.dataset == FLAIR_HUB_INFO
    assert manifest.row(0)["side"] == pytest.approx(102.4)
    modalities = list(manifest.registry.values())
    batches = list(evaluation_batches(manifest, np.arange(3), modalities, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert verify(manifest.path).sound
