import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tree import write_tree

from bocage.shards.errors import InputError
from bocage.shards.flairhub import Catalogue
from bocage.shards.manifest import Manifest, schema
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.normalize import InputSpec
from bocage.shards.writer import write_shards

KEYS = [f"D012-2019_AF-S1-27_5-{column}" for column in range(4)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tree = write_tree(tmp_path / "tree", KEYS, ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"])
    return write_shards(Catalogue.open(tree), tmp_path / "out", samples_per_shard=3, order="roi").path


def rewritten(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = shards / "dataset.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def with_column(shards: Path, name: str, values: list[Any]) -> None:
    path = shards / "manifest.parquet"
    table = pq.read_table(path)
    position = table.column_names.index(name)
    pq.write_table(table.set_column(position, table.field(name), pa.array(values, table.field(name).type)), path)


def test_reads_back_what_was_written(shards: Path) -> None:
    manifest = Manifest.open(shards)
    assert len(manifest) == manifest.table.num_rows == 4
    assert manifest.table.schema.equals(schema(manifest.registry, ["split_1", "split_toy"]))
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
    with pytest.raises(InputError, match=r"'split_9'; splits: split_1, split_toy"):
        manifest.split("split_9", "train")
    with pytest.raises(InputError, match=r"values: test, train, valid"):
        manifest.split("split_1", "val")
    with pytest.raises(InputError, match="values: none"):
        manifest.split("split_toy", "train")


def test_input_spec_has_the_statistics_of_the_shards(shards: Path) -> None:
    manifest = Manifest.open(shards)
    mean, std = manifest.statistics["SENTINEL2_TS"]
    assert len(mean) == len(std) == 10
    assert manifest.input_spec("SENTINEL2_TS") == InputSpec.of(FLAIR_HUB["SENTINEL2_TS"], mean, std)
    with pytest.raises(InputError, match=r"no DEM_ELEV; they hold SPOT_RGBI"):
        manifest.input_spec("DEM_ELEV")
    with pytest.raises(InputError, match="mask"):
        manifest.input_spec("SENTINEL2_MSK-SC")


def test_folders_without_shards_get_a_hint(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder.*bocage shard SRC"):
        Manifest.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"a FLAIR-HUB tree, not shards.*bocage shard .*tree OUT"):
        Manifest.open(tmp_path / "tree")
    with pytest.raises(InputError, match="bocage shard SRC"):
        Manifest.open(tmp_path)
    (shards / "dataset.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        Manifest.open(shards)


def test_other_versions_are_refused(shards: Path) -> None:
    rewritten(shards, lambda description: description.update(schema_version=99))
    with pytest.raises(InputError, match="schema version 99"):
        Manifest.open(shards)


@pytest.mark.parametrize("name", ["../shard.tar", "/etc/passwd", "a/b.tar", "..", "shard.tar\n", "-", "", 7, None])
def test_shard_names_cannot_leave_the_folder(shards: Path, name: object) -> None:
    rewritten(shards, lambda description: description["shards"][0].update(name=name))
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
    ],
)
def test_contradictions_are_refused(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewritten(shards, change)
    with pytest.raises(InputError):
        Manifest.open(shards)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("shard", [0, 0, 0, 2]),
        ("shard", [0, 0, 0, -1]),
        ("offset.SPOT_RGBI", [-1, 0, 0, 0]),
        ("offset.SPOT_RGBI", [0, 0, 0, 2**62]),
        ("offset.SPOT_RGBI", [0, 0, 0, 2**63 - 1]),
        ("length.SPOT_RGBI", [0, 0, 0, 2**31 - 1]),
        ("length.SPOT_RGBI", [-1, 0, 0, 0]),
    ],
)
def test_members_cannot_lie_outside_their_shard(shards: Path, column: str, values: list[int]) -> None:
    with_column(shards, column, values)
    with pytest.raises(InputError, match=r"manifest\.parquet"):
        Manifest.open(shards)


def test_damaged_pages_are_named(shards: Path) -> None:
    path = shards / "manifest.parquet"
    data = path.read_bytes()
    metadata = 8 + int.from_bytes(data[-8:-4], "little")
    path.write_bytes(b"PAR1" + b"\xa5" * (len(data) - metadata - 4) + data[-metadata:])
    with pytest.raises(InputError, match=r"manifest\.parquet: damaged"):
        Manifest.open(shards)


def test_damaged_files_are_named(shards: Path) -> None:
    data = (shards / "manifest.parquet").read_bytes()
    (shards / "manifest.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.open(shards)
    (shards / "manifest.parquet").write_bytes(data)
    for text in ("", "{", "[]", "null"):
        (shards / "dataset.json").write_text(text)
        with pytest.raises(InputError):
            Manifest.open(shards)
