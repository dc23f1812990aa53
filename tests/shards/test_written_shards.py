import dataclasses
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from small_shards import KEYS, SMALL
from small_tree import raster_path, series_date, write_raster, write_tree

from bocage.shards.errors import InputError
from bocage.shards.format.codec import decode
from bocage.shards.format.manifest import Manifest
from bocage.shards.format.running_stats import RunningStats, merge_stats
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import required_modalities
from bocage.shards.preprocess.normalize import represent
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.source.flair_hub import rasters
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patches with all ten rasters; the last lacks two of them."""
    root = write_tree(tmp_path_factory.mktemp("tree"), KEYS[:4])
    for name in ("DEM_ELEV", "SENTINEL1-DESC_TS"):
        raster_path(root, FLAIR_HUB[name], KEYS[3]).unlink()
    return root


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_shards(FlairHubCatalogue.open(tree), tmp_path_factory.mktemp("shards") / "out", samples_per_shard=3)


def test_every_raster_is_stored_losslessly_at_its_offset(tree: Path, shards: Manifest) -> None:
    catalogue = FlairHubCatalogue.open(tree)
    patches = {patch.key: patch for patch in map(catalogue.patch, range(len(catalogue)))}
    assert len(shards) == 4
    for index in range(len(shards)):
        row = shards.row(index)
        data = shards.shard_path(row["shard"]).read_bytes()
        patch = patches.pop(row["key"])
        assert (row["roi"], row["domain"], row["crs"]) == (patch.roi, patch.domain, "EPSG:2154")
        assert (row["left"], row["top"]) == (650_000 + 102.4 * int(patch.key[-1]), 6_860_000)
        assert row["split_1"] == patch.splits["split_1"]
        for name, modality in shards.registry.items():
            offset, length = row[f"offset.{name}"], row[f"length.{name}"]
            assert (length > 0) == (name in patch.sources)
            if length:
                raster = rasters.read_raster(patch.sources[name], modality)
                array = decode(data[offset : offset + length])
                assert array.dtype == raster.array.dtype
                assert np.array_equal(array, raster.array)
            elif modality.is_input:
                assert row[f"mean.{name}"] is None
        assert row["dates.SENTINEL1-ASC_TS"] == [series_date(number).toordinal() - 719_163 for number in (1, 2, 3)]
        assert len(row["dates.AERIAL_RGBI"]) == 1
        assert "dates.DEM_ELEV" not in row
        assert "dates.AERIAL_LABEL-COSIA" not in row
    assert not patches


def test_manifest_statistics_match_the_rasters(tree: Path, shards: Manifest) -> None:
    labels, heights = [], []
    catalogue = FlairHubCatalogue.open(tree)
    for index in range(4):
        row = shards.row(index)
        patch = next(patch for patch in map(catalogue.patch, range(4)) if patch.key == row["key"])
        label = rasters.read_raster(patch.sources["ALL_LABEL-LPIS"], FLAIR_HUB["ALL_LABEL-LPIS"]).array
        for band, (level, scheme) in enumerate(zip((1, 2, 3), FLAIR_HUB["ALL_LABEL-LPIS"].schemes)):
            histogram = row[f"histogram.ALL_LABEL-LPIS.level-{level}"]
            assert histogram == [int((label[band] == value).sum()) for value in range(len(scheme))]
        labels.append(sum(histogram))
        if "DEM_ELEV" in patch.sources:
            dem = rasters.read_raster(patch.sources["DEM_ELEV"], FLAIR_HUB["DEM_ELEV"]).array.astype(np.float64)
            relief = np.stack((dem[0] - dem[0].mean(), dem[0] - dem[1]))
            heights.append(relief)
            assert np.allclose(row["mean.DEM_ELEV"], relief.mean((1, 2)), atol=1e-4)
            assert np.allclose(row["minimum.DEM_ELEV"], relief.min((1, 2)), atol=1e-4)
            assert np.allclose(row["maximum.DEM_ELEV"], relief.max((1, 2)), atol=1e-4)
    assert labels == [512 * 512] * 4
    all_heights = np.stack(heights)
    mean, std = shards.statistics["DEM_ELEV"]
    assert np.allclose(mean, all_heights.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(std, all_heights.std((0, 2, 3)), rtol=1e-5)


def test_stock_webdataset_reads_the_shards(shards: Manifest) -> None:
    paths = [str(shards.shard_path(index)) for index in range(shards.shard_count)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == shards.column("key").to_pylist()
    for sample in samples:
        fields = {name for name in sample if not name.startswith("__")}
        expected = {name.lower() + ".bin" for name in shards.registry} | {"json"}
        assert fields <= expected
        assert len(expected - fields) == (2 if sample["__key__"] == KEYS[3] else 0)
        assert decode(sample["aerial_rgbi.bin"]).shape == (4, 512, 512)
        assert sample["json"]["key"] == sample["__key__"]
        assert sample["json"]["dates"]["SENTINEL2_TS"] == [str(series_date(number)) for number in (1, 2, 3)]
        listed = {name.split(".", 1)[1].lower() for name in sample["json"]["members"]}
        assert listed | {"json"} == fields


def test_tar_is_plain_and_in_the_documented_order(shards: Manifest) -> None:
    for index in range(shards.shard_count):
        path = shards.shard_path(index)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shards.shards[index].sha256
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert all(member.isreg() and member.mtime == 0 and member.uid == 0 for member in members)
        keys = [member.name.split(".")[0] for member in members]
        assert sorted(set(keys), key=keys.index) == [key for key, _ in _grouped(keys)]
        first = [member.name.split(".", 1)[1] for member in members if member.name.startswith(keys[0])]
        order = [*FLAIR_HUB.inputs, *FLAIR_HUB.by_role("mask"), *FLAIR_HUB.labels]
        documented = [f"{modality.name}.bin" for modality in order] + ["json"]
        assert first == [name for name in documented if name in first]


def _grouped(keys: list[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for key in keys:
        if runs and runs[-1][0] == key:
            runs[-1] = (key, runs[-1][1] + 1)
        else:
            runs.append((key, 1))
    return runs


def test_an_infinite_pixel_counts_as_nodata(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", KEYS[:1], ["DEM_ELEV"])
    bands = np.full((2, 512, 512), 100.0, np.float32)
    bands[0, 5, 5] = np.inf
    write_raster(raster_path(root, FLAIR_HUB["DEM_ELEV"], KEYS[0]), bands, 0.2)
    manifest = write_shards(FlairHubCatalogue.open(root), tmp_path / "out")
    assert manifest.input_spec("DEM_ELEV").mean == (0.0, 0.0)
    assert manifest.row(0)["maximum.DEM_ELEV"] == [0.0, 0.0]


def test_a_patch_with_a_mask_and_no_series_can_be_read(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", KEYS[:2], SMALL)
    raster_path(root, FLAIR_HUB["SENTINEL2_TS"], KEYS[0]).unlink()
    manifest = write_shards(FlairHubCatalogue.open(root), tmp_path / "out")
    modalities = required_modalities(manifest.registry, ["SPOT_RGBI", "SENTINEL2_TS"], [])
    (batch,) = evaluation_batches(manifest, np.arange(2), modalities, batch_size=2)
    for name in ("SENTINEL2_TS", "SENTINEL2_MSK-SC"):
        assert dict(zip(batch.keys, batch.present[name].tolist())) == {KEYS[0]: False, KEYS[1]: True}


def test_number_of_dates_must_match_the_raster(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", KEYS[:1], SMALL, dates=3)
    other = write_tree(tmp_path / "other", KEYS[:1], SMALL, dates=4)
    path = raster_path(root, FLAIR_HUB["SENTINEL2_TS"], KEYS[0])
    path.write_bytes(raster_path(other, FLAIR_HUB["SENTINEL2_TS"], KEYS[0]).read_bytes())
    with pytest.raises(InputError, match="4 dates in the file, 3 in the metadata"):
        write_shards(FlairHubCatalogue.open(root), tmp_path / "out", max_bad=0)


def test_a_new_modality_is_written_like_the_others(tmp_path: Path) -> None:
    thermal = dataclasses.replace(FLAIR_HUB["SPOT_RGBI"], name="THERMAL-X")
    registry = FLAIR_HUB.with_modality(thermal)
    root = write_tree(tmp_path / "tree", KEYS[:2], ["SPOT_RGBI"])
    for key in KEYS[:2]:
        path = raster_path(root, thermal, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raster_path(root, FLAIR_HUB["SPOT_RGBI"], key).read_bytes())
    manifest = write_shards(FlairHubCatalogue.open(root, registry), tmp_path / "out")
    assert list(manifest.registry) == ["SPOT_RGBI", "THERMAL-X"]
    assert manifest.registry["THERMAL-X"] == thermal
    assert manifest.statistics["THERMAL-X"] == manifest.statistics["SPOT_RGBI"]


def test_merged_statistics_equal_those_of_all_values() -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn((3, 2, size, 7), generator=generator) * 50 + 1e4 for size in (1, 5, 9)]
    chunks[1][:, 0, :2] = torch.nan
    empty = torch.full((1, 2, 2, 2), torch.nan)
    total = merge_stats(
        RunningStats.from_array(represent(chunk.numpy(), "linear")) for chunk in (empty, *chunks, empty)
    )
    assert total is not None
    for channel in range(2):
        values = np.concatenate([chunk[:, channel].double().numpy().ravel() for chunk in chunks])
        values = values[~np.isnan(values)]
        computed = (total.count, total.mean, total.std, total.minimum, total.maximum)
        expected = (len(values), values.mean(), values.std(), values.min(), values.max())
        assert np.allclose([item[channel] for item in computed], expected, rtol=1e-12)
    assert json.loads(json.dumps(total.to_json())) == RunningStats.from_json(total.to_json()).to_json()
