"""Rasters of any size are cut into patches by a description; values equal those that rasterio reads."""

import copy
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.windows import Window
from small_shards import contents

from bocage.recipes.loader import config_from_dict
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.verify import verify
from bocage.shards.read.dataset import ShardDataset
from bocage.shards.source.described import coverage, raster_windows
from bocage.shards.source.described.description import DatasetDescription
from bocage.shards.source.described.mosaics import RasterCatalogue
from bocage.shards.source.described.open import open_described
from bocage.shards.write.writer import write_shards

LEFT, TOP = 500_000.0, 5_000_000.0
SENSORS: dict[str, dict[str, Any]] = {
    "ORTHO": {"files": "ortho/*.tif", "bands": {"R": 650, "G": 550, "B": 460}, "dtype": "uint8", "pixel": 0.2},
    "SPOT": {"files": "spot/*.tif", "bands": {"R": 650, "N": 830}, "dtype": "uint16", "pixel": 1.6},
    "S2": {"files": "s2/*.tif", "bands": {"R": 650, "N": 830}, "dtype": "uint16", "pixel": 10.0},
}
LABEL: dict[str, Any] = {"files": "label/*.tif", "pixel": 0.2, "classes": {0: "ground", 7: "roof"}}


def describe(*sensors: str, label: bool = False, **changes: Any) -> DatasetDescription:
    """Description of the sensors; ``ORTHO__nodata`` sets a key of a sensor or of the label."""
    chosen: dict[str, Any] = {
        "name": "mosaic",
        "kind": "rasters",
        "patch": 80.0,
        "sensors": copy.deepcopy({name: SENSORS[name] for name in sensors}),
        "labels": {"ROOFS": copy.deepcopy(LABEL)} if label else {},
    }
    for key, value in changes.items():
        name, _, part = key.partition("__")
        if part:
            chosen["labels" if name == "ROOFS" else "sensors"][name][part] = value
        else:
            chosen[key] = value
    return config_from_dict(DatasetDescription, chosen, "the description")


def open_catalogue(root: Path, description: DatasetDescription) -> RasterCatalogue:
    catalogue = open_described(root, description, root)
    assert isinstance(catalogue, RasterCatalogue)
    return catalogue


def noise(bands: int, height: int, width: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 250, (bands, height, width)).astype(dtype)


def roofs(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 7], np.uint8), (1, height, width))


def write(
    path: Path,
    array: np.ndarray,
    pixel: float,
    left: float = LEFT,
    top: float = TOP,
    crs: str | None = "EPSG:32631",
    mask: np.ndarray | None = None,
    alpha: bool = False,
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"count": len(array), "height": array.shape[1], "width": array.shape[2], "dtype": array.dtype.name}
    options = {"driver": "GTiff", "crs": crs, "transform": Affine(pixel, 0, left, 0, -pixel, top), **options}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile, **options) as file:
        if alpha:
            file.colorinterp = [ColorInterp.gray] * (len(array) - 1) + [ColorInterp.alpha]
        file.write(array)
        if mask is not None:
            file.write_mask(mask)
    return path


def write_three(root: Path, left: float = LEFT, top: float = TOP) -> None:
    """The orthophoto covers 4 x 3 patches and some pixels more, SPOT 3 x 4, Sentinel-2 all of them and a margin."""
    write(root / "ortho/a.tif", noise(3, 1250, 1650), 0.2, left, top, tiled=True, blockxsize=256, blockysize=256)
    write(root / "spot/a.tif", noise(2, 200, 160, "uint16"), 1.6)
    write(root / "s2/a.tif", noise(2, 48, 48, "uint16"), 10.0, LEFT - 80, TOP + 80)


def read_back(manifest: Manifest) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of all patches by key and modality, as training reads them."""
    dataset = ShardDataset(manifest, list(manifest.registry.values()), None, 0)
    samples = [dataset[0, row] for row in range(len(dataset))]
    return {sample.key: sample.arrays for sample in samples}


def shard(root: Path, description: DatasetDescription, out: Path, **options: Any) -> Manifest:
    manifest = write_shards(open_catalogue(root, description), out, **options)
    assert not verify(out, decode=None).problems
    return manifest


def direct(path: Path, left: float, top: float, size: int) -> np.ndarray:
    """A window of a raster whose pixels lie on the grid of the patches."""
    with rasterio.open(path) as file:
        column, row = (left - file.transform.c) / file.transform.a, (top - file.transform.f) / file.transform.e
        assert abs(column - round(column)) < 0.01 and abs(row - round(row)) < 0.01
        values: np.ndarray = file.read(window=Window(round(column), round(row), size, size))
        return values


def positions(manifest: Manifest) -> dict[str, tuple[float, float]]:
    columns = (manifest.column(name).to_pylist() for name in ("key", "left", "top"))
    return {key: (left, top) for key, left, top in zip(*columns)}


def test_sensors_of_different_pixels_and_extents(tmp_path: Path) -> None:
    write_three(tmp_path)
    manifest = shard(tmp_path, describe(*SENSORS), tmp_path / "out")
    arrays, corners = read_back(manifest), positions(manifest)
    # Row and column 0 are the margin of Sentinel-2.
    present = {name: {key for key, modalities in arrays.items() if name in modalities} for name in SENSORS}
    assert present["ORTHO"] == {f"{row:04}-{column:04}" for row in (1, 2, 3) for column in (1, 2, 3, 4)}
    assert present["SPOT"] == {f"{row:04}-{column:04}" for row in (1, 2, 3, 4) for column in (1, 2, 3)}
    assert present["S2"] == set(arrays) == {f"{row:04}-{column:04}" for row in range(6) for column in range(6)}
    assert corners["0001-0001"] == (LEFT, TOP)
    assert set(manifest.column("side").to_pylist()) == {80.0}
    for key, modalities in arrays.items():
        for name, array in modalities.items():
            path = tmp_path / SENSORS[name]["files"].replace("*", "a")
            assert np.array_equal(array, direct(path, *corners[key], manifest.registry[name].size)), (key, name)


def test_the_grid_starts_where_the_pixels_of_all_sensors_meet(tmp_path: Path) -> None:
    # 0.4 m east and 0.8 m south of the corner of a Sentinel-2 pixel: the grid starts 9.6 m and 9.2 m further.
    write(tmp_path / "ortho/a.tif", noise(3, 1250, 1650), 0.2, LEFT + 0.4, TOP - 0.8)
    write(tmp_path / "s2/a.tif", noise(2, 48, 48, "uint16"), 10.0, LEFT - 80, TOP + 80)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", "S2"))
    assert not [note for note in catalogue.report().warnings() if "resampled" in note]
    manifest = write_shards(catalogue, tmp_path / "out")
    arrays, corners = read_back(manifest), positions(manifest)
    assert sum("ORTHO" in modalities for modalities in arrays.values()) == 3 * 4
    key = min(key for key, modalities in arrays.items() if "ORTHO" in modalities)
    assert corners[key] == pytest.approx((LEFT + 10, TOP - 10))
    for key, modalities in arrays.items():
        assert np.array_equal(modalities["S2"], direct(tmp_path / "s2/a.tif", *corners[key], 8))
        if "ORTHO" in modalities:
            assert np.array_equal(modalities["ORTHO"], direct(tmp_path / "ortho/a.tif", *corners[key], 400))


def test_a_grid_that_would_lose_many_patches_resamples_instead(tmp_path: Path) -> None:
    # Two patches wide: a grid that starts 9.6 m further would have only one column.
    write(tmp_path / "ortho/a.tif", noise(3, 800, 820), 0.2, LEFT + 0.4, TOP)
    columns = np.arange(48.0) * 10 + LEFT - 80 + 5  # a ramp, of which bilinear interpolation is exact
    ramp = np.broadcast_to((columns - LEFT) * 10 + 2000, (2, 48, 48)).astype(np.uint16)
    write(tmp_path / "s2/a.tif", ramp, 10.0, LEFT - 80, TOP + 80)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", "S2"))
    [note] = [note for note in catalogue.report().warnings() if "resampled" in note]
    assert "s2/a.tif: its pixels lie 0.04 and 0.00 pixels off" in note and "(bilinear)" in note
    manifest = write_shards(catalogue, tmp_path / "out")
    corners = positions(manifest)
    with_ortho = {key: arrays for key, arrays in read_back(manifest).items() if "ORTHO" in arrays}
    assert len(with_ortho) == 4
    for key, arrays in with_ortho.items():
        expected = (corners[key][0] - LEFT + np.arange(8) * 10 + 5) * 10 + 2000
        assert arrays["S2"][0] == pytest.approx(np.broadcast_to(expected, (8, 8)), abs=0.51)


def test_map_sheets_make_one_mosaic(tmp_path: Path) -> None:
    # Sheets of 500 and 620 px that overlap by 60 px; the first by name counts. Three patches a row cross the edges.
    first, second = noise(3, 800, 500, seed=1), noise(3, 800, 760, seed=2)
    write(tmp_path / "ortho/a.tif", first, 0.2)
    write(tmp_path / "ortho/b.tif", second, 0.2, LEFT + 440 * 0.2)
    arrays = read_back(shard(tmp_path, describe("ORTHO"), tmp_path / "out"))
    assert sorted(arrays) == [f"{row:04}-{column:04}" for row in (0, 1) for column in (0, 1, 2)]
    whole = np.concatenate((first, second[:, :, 60:]), axis=2)
    for key, modalities in arrays.items():
        row, column = (int(part) * 400 for part in key.split("-"))
        assert np.array_equal(modalities["ORTHO"], whole[:, row : row + 400, column : column + 400])


def test_sites_in_several_coordinate_systems(tmp_path: Path) -> None:
    systems = {"north": "EPSG:2154", "south": "EPSG:32631"}
    for site, crs in systems.items():
        write(tmp_path / f"ortho/{site}.tif", noise(3, 800, 800), 0.2, 650_000, 6_860_000, crs)
        write(tmp_path / f"s2/{site}.tif", noise(2, 16, 16, "uint16"), 10.0, 650_000, 6_860_000, crs)
    description = describe("ORTHO", "S2", ORTHO__files="ortho/{site}.tif", S2__files="s2/{site}.tif", domain="{site}")
    manifest = shard(tmp_path, description, tmp_path / "out")
    arrays, corners = read_back(manifest), positions(manifest)
    assert sorted(arrays) == [f"{site}_{row:04}-{column:04}" for site in systems for row in (0, 1) for column in (0, 1)]
    for key, domain, crs in zip(*(manifest.column(name).to_pylist() for name in ("key", "domain", "crs"))):
        assert (domain, crs) == (key.split("_")[0], systems[domain])
        assert np.array_equal(arrays[key]["ORTHO"], direct(tmp_path / f"ortho/{domain}.tif", *corners[key], 400))
        assert np.array_equal(arrays[key]["S2"], direct(tmp_path / f"s2/{domain}.tif", *corners[key], 8))


def test_rasters_without_fields_in_two_systems_make_two_sites(tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", noise(3, 400, 400), 0.2, 650_000, 6_860_000, "EPSG:2154")
    write(tmp_path / "ortho/b.tif", noise(3, 400, 400), 0.2)
    assert open_catalogue(tmp_path, describe("ORTHO")).keys() == ["EPSG-2154_0000-0000", "EPSG-32631_0000-0000"]


def test_another_coordinate_system_is_resampled(tmp_path: Path) -> None:
    # The values of Sentinel-2 are its coordinates, so that they show where the pixels came from.
    write(tmp_path / "ortho/a.tif", noise(3, 800, 800), 0.2, 650_000, 6_860_000, "EPSG:2154")
    [x], [y] = rasterio.warp.transform("EPSG:2154", "EPSG:32631", [650_080], [6_859_920])
    left, top = x - 400, y + 400
    centres = np.arange(80) * 10 + 5
    grid = np.stack(np.broadcast_arrays(centres * 10, centres[:, None] * 10)).astype(np.uint16)
    write(tmp_path / "s2/a.tif", grid, 10.0, left, top)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", "S2"))
    assert len(catalogue) == 4  # Sentinel-2 makes no patches in a system that is not its own
    assert any(
        "s2/a.tif: it is in EPSG:32631, the patches are in EPSG:2154" in n for n in catalogue.report().warnings()
    )
    manifest = write_shards(catalogue, tmp_path / "out")
    corners = positions(manifest)
    for key, arrays in read_back(manifest).items():
        columns, rows = np.meshgrid(np.arange(8) * 10 + 5, np.arange(8) * 10 + 5)
        xs, ys = corners[key][0] + columns, corners[key][1] - rows
        easting, northing = rasterio.warp.transform("EPSG:2154", "EPSG:32631", xs.ravel(), ys.ravel())
        expected = np.stack([np.array(easting) - left, top - np.array(northing)]).reshape(2, 8, 8) * 10
        assert arrays["S2"] == pytest.approx(expected, abs=3)  # 0.3 m: 0.02 pixels of GDAL, and rounding


def test_a_raster_of_all_sites_makes_no_patches_of_its_own(tmp_path: Path) -> None:
    for number, site in enumerate(("a", "b")):
        write(tmp_path / f"ortho/{site}.tif", noise(3, 400, 800), 0.2, LEFT + 320 * number, TOP)
    write(tmp_path / "s2/all.tif", noise(2, 16, 64, "uint16"), 10.0, LEFT - 80, TOP + 80)
    write(tmp_path / "s2/far.tif", noise(2, 16, 16, "uint16"), 10.0, LEFT + 50_000, TOP)
    write(tmp_path / "s2/farther.tif", noise(2, 16, 16, "uint16"), 10.0, 500_000, 5_000_000, "EPSG:32755")
    manifest = shard(tmp_path, describe("ORTHO", "S2", ORTHO__files="ortho/{site}.tif"), tmp_path / "out")
    arrays, corners = read_back(manifest), positions(manifest)
    assert sorted(arrays) == ["a_0000-0000", "a_0000-0001", "b_0000-0000", "b_0000-0001"]
    for key, modalities in arrays.items():
        assert np.array_equal(modalities["S2"], direct(tmp_path / "s2/all.tif", *corners[key], 8))


def test_web_maps_have_patches_of_ground_metres(tmp_path: Path) -> None:
    # At 45 degrees north a metre of EPSG:3857 has 0.708 m on the ground.
    pixel, scale = 0.2 / 0.7083, 0.7083
    write(tmp_path / "ortho/a.tif", noise(3, 800, 800), pixel, 300_000, 5_621_521, "EPSG:3857")
    write(tmp_path / "s2/a.tif", noise(2, 20, 20, "uint16"), pixel * 50, 300_000, 5_621_521, "EPSG:3857")
    manifest = shard(tmp_path, describe("ORTHO", "S2"), tmp_path / "out")
    assert manifest.column("side").to_pylist() == pytest.approx([80 / scale] * 4)
    arrays, corners = read_back(manifest), positions(manifest)
    for key, modalities in arrays.items():
        for name, size in (("ORTHO", 400), ("S2", 8)):
            path = tmp_path / SENSORS[name]["files"].replace("*", "a")
            assert np.array_equal(modalities[name], direct(path, *corners[key], size))


def holes(height: int = 800, width: int = 1200) -> np.ndarray:
    """Mask of missing pixels: none in the first column of patches, 4 in one of the second, all in the third."""
    missing = np.zeros((height, width), bool)
    missing[10:12, 500:502] = True
    missing[:, 800:] = True
    return missing


COMPLETE = ["0000-0000", "0001-0000", "0001-0001"]


@pytest.mark.parametrize("kind", ["nodata of the description", "tag", "alpha", "mask"])
@pytest.mark.parametrize("tiled", [True, False])
def test_patches_with_missing_pixels_are_left_out(kind: str, tiled: bool, tmp_path: Path) -> None:
    missing, array = holes(), noise(3, 800, 1200)
    options: dict[str, Any] = {"tiled": tiled, **({"blockxsize": 256, "blockysize": 256} if tiled else {})}
    changes: dict[str, Any] = {}
    if kind in ("nodata of the description", "tag"):
        array[:, missing] = 0
        array[0, 600:610, 500] = 0  # a dark value in one band is not missing
        options |= {"nodata": 0} if kind == "tag" else {}
        changes = {} if kind == "tag" else {"ORTHO__nodata": [0]}
    elif kind == "alpha":
        array = np.concatenate((array, np.where(missing, 0, 255).astype(np.uint8)[None]))
        options |= {"alpha": True}
        changes = {"ORTHO__bands": {"R": 650, "G": 550, "B": 460, "A": "unused"}}
    else:
        options |= {"mask": ~missing}
    write(tmp_path / "ortho/a.tif", array, 0.2, **options)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", **changes))
    assert catalogue.keys() == COMPLETE
    assert any("1 windows of ORTHO are left out because up to 10%" in note for note in catalogue.report().warnings())
    arrays = read_back(write_shards(catalogue, tmp_path / "out"))
    assert np.array_equal(arrays["0001-0001"]["ORTHO"], array[:3, 400:, 400:800])


@pytest.mark.parametrize("kind", ["nodata of the description", "tag", "alpha", "mask", "nan"])
def test_missing_pixels_of_a_resampled_raster_spoil_no_others(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", noise(3, 800, 800), 0.2)
    values = np.full((2, 32, 32), 1000, np.uint16 if kind != "nan" else np.float32)
    missing = np.zeros((32, 32), bool)
    missing[10, 10] = True
    options: dict[str, Any] = {}
    changes: dict[str, Any] = {"S2__nodata": [0], "min_coverage": 0.5}
    if kind in ("nodata of the description", "tag", "nan"):
        values[:, missing] = np.nan if kind == "nan" else 0
        options |= {"nodata": 0} if kind == "tag" else {}
        changes |= {"S2__nodata": [float("nan")], "S2__dtype": "float32"} if kind == "nan" else {}
    elif kind == "alpha":
        values[:, missing] = 5
        values = np.concatenate((values, np.where(missing, 0, 65535).astype(np.uint16)[None]))
        options |= {"alpha": True}
        changes |= {"S2__bands": {"R": 650, "N": 830, "A": "unused"}}
    else:
        values[:, missing] = 5
        options |= {"mask": ~missing}
    # The grids do not fit together; pixel (10, 10) lies in patch (0, 0), between pixels of the patch.
    write(tmp_path / "s2/a.tif", values, 10.0, LEFT - 78.3, TOP + 78.3, **options)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", "S2", ORTHO__pixel=0.2, **changes))
    layer = catalogue._sites[0].layers["S2"]
    assert layer.rasters[0].is_resampled
    arrays = read_back(write_shards(catalogue, tmp_path / "out"))
    found = {key: modalities["S2"] for key, modalities in arrays.items() if "S2" in modalities}
    marks = [np.isnan(array) if kind == "nan" else array == 0 for array in found.values()]
    assert sum(mark[0].sum() for mark in marks) >= (1 if kind == "nan" else 0)
    for array, mark in zip(found.values(), marks):
        assert (array[~mark] == 1000).all()  # neither the nodata value nor the hidden one


def test_a_mask_beside_the_raster_counts(tmp_path: Path) -> None:
    missing, array = holes(), noise(3, 800, 1200)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        path = write(tmp_path / "ortho/a.tif", array, 0.2)
        with rasterio.open(path, "r+") as file:
            file.write_mask(~missing)
    assert path.with_name("a.tif.msk").exists()
    catalogue = open_catalogue(tmp_path, describe("ORTHO"))
    assert catalogue.keys() == COMPLETE and catalogue.report().unparsable == 0


def test_slow_counts_of_missing_pixels_are_kept_until_the_raster_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    array = noise(3, 800, 1200)
    array[:, holes()] = 0
    path = write(tmp_path / "ortho/a.tif", array, 0.2, nodata=0)
    assert open_catalogue(tmp_path, describe("ORTHO")).keys() == COMPLETE
    assert not (tmp_path / "cache").exists()  # it took less than a second
    monkeypatch.setattr(coverage, "_WORTH_KEEPING", 0.0)
    first = open_catalogue(tmp_path, describe("ORTHO"))
    [kept] = (tmp_path / "cache/bocage/coverage").iterdir()

    def fail(*arguments: Any) -> None:
        raise AssertionError("the raster is read again")

    with monkeypatch.context() as patched:
        patched.setattr(coverage, "_count_chunk", fail)
        again = open_catalogue(tmp_path, describe("ORTHO"))
        assert (again.keys(), again.fingerprint()) == (COMPLETE, first.fingerprint())
    kept.write_bytes(b"damaged")
    assert open_catalogue(tmp_path, describe("ORTHO")).keys() == COMPLETE
    array[:] = 1
    write(path, array, 0.2, nodata=0)
    assert len(open_catalogue(tmp_path, describe("ORTHO"))) == 6


def test_a_lower_coverage_keeps_patches_and_fills_them_with_nodata(tmp_path: Path) -> None:
    missing, array = holes(), noise(3, 800, 1200)
    array = np.concatenate((array, np.where(missing, 0, 255).astype(np.uint8)[None]))
    write(tmp_path / "ortho/a.tif", array, 0.2, alpha=True)
    bands = {"R": 650, "G": 550, "B": 460, "A": "unused"}
    description = describe("ORTHO", ORTHO__bands=bands, ORTHO__nodata=[255], min_coverage=0.5)
    manifest = shard(tmp_path, description, tmp_path / "out")
    arrays = read_back(manifest)
    assert sorted(arrays) == sorted([*COMPLETE, "0000-0001"])
    expected = np.where(missing, 255, array[:3])[:, :400, 400:800]
    assert np.array_equal(arrays["0000-0001"]["ORTHO"], expected)
    # Without a nodata value, missing pixels could not be marked.
    description = describe("ORTHO", ORTHO__bands=bands, min_coverage=0.5)
    assert open_catalogue(tmp_path, description).keys() == COMPLETE


def test_patches_across_the_edge_of_a_raster_follow_the_coverage(tmp_path: Path) -> None:
    array = noise(3, 400, 1000).astype(np.float32)
    array[:, :, 990:] = np.nan
    write(tmp_path / "ortho/a.tif", array, 0.2)
    options: dict[str, Any] = {"ORTHO__dtype": "float32", "ORTHO__nodata": [float("nan"), -9999.0]}
    assert len(open_catalogue(tmp_path, describe("ORTHO", **options))) == 2
    arrays = read_back(shard(tmp_path, describe("ORTHO", **options, min_coverage=0.4), tmp_path / "out"))
    expected = np.full((3, 400, 400), np.nan, np.float32)
    expected[:, :, :200] = array[:, :, 800:]
    assert np.array_equal(arrays["0000-0002"]["ORTHO"], expected, equal_nan=True)


def test_a_hole_in_a_sheet_is_filled_from_the_next(tmp_path: Path) -> None:
    first, second = noise(3, 400, 400, seed=1), noise(3, 400, 400, seed=2)
    first[:, 100:200, 100:200] = 0
    write(tmp_path / "ortho/a.tif", first, 0.2)
    write(tmp_path / "ortho/b.tif", second, 0.2)
    arrays = read_back(shard(tmp_path, describe("ORTHO", ORTHO__nodata=[0]), tmp_path / "out"))
    expected = first.copy()
    expected[:, 100:200, 100:200] = second[:, 100:200, 100:200]
    assert np.array_equal(arrays["0000-0000"]["ORTHO"], expected)


SERIES = {"role": "series", "files": "s2/*_{date}.tif", "bands": {"R": 650, "N": 830}, "dtype": "uint16"}
CLOUDS = {"role": "mask", "files": "clouds/*_{date}.tif", "bands": {"cloud": "cloud_probability"}, "dtype": "uint8"}


def test_a_series_has_the_dates_that_cover_a_patch(tmp_path: Path) -> None:
    days = ("20200101", "20200111", "20200121")
    series = {day: noise(2, 16, 24, "uint16", seed) for seed, day in enumerate(days)}
    series[days[1]][:, :, 10:] = 0  # the swath ends in the second patch
    for day, array in series.items():
        write(tmp_path / f"s2/T31_{day}.tif", array, 10.0)
        if day != days[2]:
            write(tmp_path / f"clouds/T31_{day}.tif", array[:1].clip(0, 100).astype(np.uint8), 10.0)
    sensors = {"CLOUDS": {**CLOUDS, "pixel": 10.0, "mask_of": "S2"}, "S2": {**SERIES, "pixel": 10.0, "nodata": [0]}}
    catalogue = open_catalogue(tmp_path, describe(sensors=sensors))
    assert any("1 dates of S2 have no file" in note for note in catalogue.report().warnings())
    assert not catalogue.report().present["CLOUDS"]
    (tmp_path / f"s2/T31_{days[2]}.tif").unlink()
    manifest = shard(tmp_path, describe(sensors=sensors), tmp_path / "out")
    dates = dict(zip(manifest.column("key").to_pylist(), manifest.column("dates.S2").to_pylist()))
    first, second = 18262, 18272
    assert dates == {
        f"{row:04}-{column:04}": [first] if column else [first, second] for row in (0, 1) for column in (0, 1, 2)
    }
    for key, arrays in read_back(manifest).items():
        row, column = (int(part) * 8 for part in key.split("-"))
        window = np.s_[:, row : row + 8, column : column + 8]
        expected = np.stack([series[day][window] for day in days[: 1 if column else 2]])
        assert np.array_equal(arrays["S2"], expected)
        assert np.array_equal(arrays["CLOUDS"], expected[:, :1].clip(0, 100))


def test_images_of_several_dates_of_one_ground_are_mentioned(tmp_path: Path) -> None:
    for year in (2018, 2021):
        write(tmp_path / f"ortho/{year}.tif", noise(3, 400, 800, seed=year), 0.2)
    description = describe("ORTHO", ORTHO__files="ortho/{date}.tif", date_format="%Y")
    catalogue = open_catalogue(tmp_path, description)
    assert any("2021.tif show the same ground at different dates" in note for note in catalogue.report().warnings())
    assert [catalogue.patch(row).dates["ORTHO"].tolist() for row in range(2)] == [[17532], [17532]]
    catalogue = open_catalogue(
        tmp_path, describe("ORTHO", ORTHO__files="ortho/{year}.tif", region="{block}", blocks=80)
    )
    assert catalogue.keys() == [f"{year}_0000-000{column}" for column in (0, 1) for year in (2018, 2021)]


def test_labels_that_lie_between_pixels_are_resampled(tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", noise(3, 800, 800), 0.2)
    label = roofs(840, 840)
    write(tmp_path / "label/a.tif", label, 0.2, LEFT - 2 + 0.06, TOP + 2)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", label=True))
    assert any("(nearest neighbour), e.g." in n and "0.30 and 0.00" in n for n in catalogue.report().warnings())
    arrays = read_back(write_shards(catalogue, tmp_path / "out"))
    assert len(arrays) == 4
    for key, modalities in arrays.items():
        row, column = (int(part) * 400 + 10 for part in key.split("-"))
        expected = label[:, row : row + 400, column : column + 400] == 7
        assert np.array_equal(modalities["ROOFS"], expected)


def test_partial_labels_need_values_to_ignore(tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", noise(3, 400, 1200), 0.2)
    label = roofs(400, 1000)
    label[0, :50, :50] = 255
    write(tmp_path / "label/a.tif", label, 0.2, nodata=255)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", label=True))
    present = [sorted(catalogue.patch(row).sources) for row in range(3)]
    assert present == [["ORTHO"], ["ORTHO", "ROOFS"], ["ORTHO"]]
    arrays = read_back(shard(tmp_path, describe("ORTHO", label=True, ROOFS__ignore=[9]), tmp_path / "out"))
    numbers = np.full((1, 400, 1200), 2, np.uint8)
    numbers[:, :, :1000] = np.where(label == 255, 2, label == 7)
    for column in range(3):
        expected = numbers[:, :, column * 400 : column * 400 + 400]
        assert np.array_equal(arrays[f"0000-{column:04}"]["ROOFS"], expected)
    # A nodata value that is a class marks no missing pixels.
    write(tmp_path / "label/a.tif", roofs(400, 1000), 0.2, nodata=0)
    assert open_catalogue(tmp_path, describe("ORTHO", label=True)).report().present["ROOFS"] == 2


def test_bytes_depend_neither_on_workers_nor_on_interruptions(tmp_path: Path) -> None:
    # Two processes start, which takes some seconds.
    write_three(tmp_path / "tree")
    catalogue = open_catalogue(tmp_path / "tree", describe(*SENSORS))
    write_shards(catalogue, tmp_path / "one", samples_per_shard=10)
    write_shards(catalogue, tmp_path / "two", samples_per_shard=10, workers=2)

    def stop(done: int, total: int, written: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(catalogue, tmp_path / "resumed", samples_per_shard=10, progress=stop)
    assert len(list((tmp_path / "resumed").glob("*.tar"))) == 1
    again = open_catalogue(tmp_path / "tree", describe(*SENSORS))
    write_shards(again, tmp_path / "resumed", samples_per_shard=10)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "resumed")


def test_the_fingerprint_follows_the_rasters_and_not_their_folder(tmp_path: Path) -> None:
    write_three(tmp_path / "tree")
    shutil.copytree(tmp_path / "tree", tmp_path / "elsewhere/copy")
    prints = [open_catalogue(tmp_path / name, describe(*SENSORS)).fingerprint() for name in ("tree", "elsewhere/copy")]
    assert prints[0] == prints[1]
    write(tmp_path / "tree/s2/a.tif", noise(2, 48, 48, "uint16"), 10.0, LEFT - 90, TOP + 80)
    assert open_catalogue(tmp_path / "tree", describe(*SENSORS)).fingerprint() != prints[0]


def test_keys_stay_when_rasters_are_added_to_the_south_and_east(tmp_path: Path) -> None:
    write(tmp_path / "ortho/b.tif", noise(3, 400, 800), 0.2)
    before = open_catalogue(tmp_path, describe("ORTHO")).keys()
    write(tmp_path / "ortho/c.tif", noise(3, 800, 400), 0.2, LEFT + 160, TOP - 80)
    assert set(before) < set(open_catalogue(tmp_path, describe("ORTHO")).keys())
    # A sheet that comes first by name and lies in the north-west may change them, but they are never negative.
    write(tmp_path / "ortho/a.tif", noise(3, 400, 400), 0.2, LEFT - 800, TOP + 160)
    keys = open_catalogue(tmp_path, describe("ORTHO")).keys()
    assert keys[0] == "0000-0000" and len(keys) == 5


def test_templates_of_keys_regions_and_splits(tmp_path: Path) -> None:
    for number, site in enumerate(("a", "b")):
        write(tmp_path / f"ortho/{site}_2021.tif", noise(3, 400, 800), 0.2, LEFT + 1000 * number, TOP)
    split = {"split_site": {"by": "site", "train": ["a"], "test": "rest"}}
    options: dict[str, Any] = {
        "ORTHO__files": "ortho/{site}_{year}.tif",
        "key": "{site}-{row}-{column}",
        "domain": "{year}",
    }
    catalogue = open_catalogue(tmp_path, describe("ORTHO", **options, splits=split, blocks=80, region="{block}"))
    patches = [catalogue.patch(row) for row in range(4)]
    assert {patch.domain for patch in patches} == {"2021"}
    regions = {"a-0000-0000": "6252_62524", "a-0000-0001": "6253_62524"}  # UTM metres are 0.04 % longer on the ground
    regions |= {"b-0000-0000": "6265_62524", "b-0000-0001": "6266_62524"}
    expected = {key: (f"2021/{name}", "train" if key[0] == "a" else "test") for key, name in regions.items()}
    assert {patch.key: (patch.roi, patch.splits["split_site"]) for patch in patches} == expected
    with pytest.raises(InputError, match=r"key 2021 stands for two patches: .*name more fields in key"):
        open_catalogue(tmp_path, describe("ORTHO", **{**options, "key": "{year}"}))
    with pytest.raises(InputError, match="the field row is computed"):
        open_catalogue(tmp_path, describe("ORTHO", ORTHO__files="ortho/{row}_{year}.tif"))


def test_rasters_without_a_position_are_cut_by_their_pixels(tmp_path: Path) -> None:
    image, label = noise(3, 850, 1200), roofs(850, 1200)
    for path, array in ((tmp_path / "ortho/a.png", image), (tmp_path / "label/a.png", label)):
        write(path, array, 1.0, driver="PNG", crs=None, transform=None)
    options: dict[str, Any] = {"ORTHO__files": "ortho/{name}.png", "ROOFS__files": "label/{name}.png"}
    manifest = shard(tmp_path, describe("ORTHO", label=True, **options), tmp_path / "out")
    for key, arrays in read_back(manifest).items():
        row, column = (int(part) * 400 for part in key.removeprefix("a_").split("-"))
        assert np.array_equal(arrays["ORTHO"], image[:, row : row + 400, column : column + 400])
        assert np.array_equal(arrays["ROOFS"], label[:, row : row + 400, column : column + 400] == 7)
    assert len(manifest) == 6
    write(tmp_path / "label/a.png", label[:, :800], 1.0, driver="PNG", crs=None, transform=None)
    with pytest.raises(InputError, match=r"label/a\.png: 1200 x 800 pixels without a position, but 1200 x 850 cover"):
        open_catalogue(tmp_path, describe("ORTHO", label=True, **options))
    write(tmp_path / "ortho/b.png", image, 1.0, driver="PNG", crs=None, transform=None)
    with pytest.raises(InputError, match=r"a\.png and .*b\.png: have no position"):
        open_catalogue(tmp_path, describe("ORTHO", ORTHO__files="ortho/*.png"))


def test_a_world_file_gives_the_position(tmp_path: Path) -> None:
    image = noise(3, 400, 800)
    write(tmp_path / "ortho/a.png", image, 1.0, driver="PNG", crs=None, transform=None)
    (tmp_path / "ortho/a.pgw").write_text("0.2\n0\n0\n-0.2\n500000.1\n4999999.9\n")
    write(tmp_path / "label/a.tif", roofs(400, 800), 0.2)
    (tmp_path / "ortho/a.png.aux.xml").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"a\.png: has no coordinate system, but .*a\.tif.* is in EPSG:32631; set crs"):
        open_catalogue(tmp_path, describe("ORTHO", label=True, ORTHO__files="ortho/*.png"))
    catalogue = open_catalogue(tmp_path, describe("ORTHO", label=True, ORTHO__files="ortho/*.png", crs="EPSG:32631"))
    assert catalogue.report().unparsable == 0
    arrays = read_back(write_shards(catalogue, tmp_path / "out"))
    assert np.array_equal(arrays["0000-0001"]["ORTHO"], image[:, :, 400:])
    assert catalogue.report().present == {"ORTHO": 2, "ROOFS": 2}


def test_one_file_of_two_sensors(tmp_path: Path) -> None:
    array = noise(4, 400, 400)
    write(tmp_path / "ortho/a.tif", array, 0.2)
    bands = {"R": 650, "G": 550, "B": 460, "N": 830}
    sensors = {
        "RGB": {**SENSORS["ORTHO"], "bands": {**bands, "N": "unused"}},
        "NIR": {**SENSORS["ORTHO"], "bands": {**dict.fromkeys(bands, "unused"), "N": 830}},
    }
    arrays = read_back(shard(tmp_path, describe(sensors=sensors), tmp_path / "out"))
    assert np.array_equal(arrays["0000-0000"]["RGB"], array[:3])
    assert np.array_equal(arrays["0000-0000"]["NIR"], array[3:])


def test_a_large_and_sparse_raster_is_a_small_catalogue(tmp_path: Path) -> None:
    # 62,500 patches of a sparse file of 10 gigapixels; nothing is read.
    options = {
        "driver": "GTiff",
        "crs": "EPSG:32631",
        "transform": Affine(0.2, 0, LEFT, 0, -0.2, TOP),
        "dtype": "uint8",
    }
    path = tmp_path / "ortho/a.tif"
    path.parent.mkdir()
    size = {"width": 100_000, "height": 100_000, "count": 3, "tiled": True, "blockxsize": 2048, "blockysize": 2048}
    with rasterio.open(path, "w", sparse_ok=True, bigtiff=True, **options, **size):
        pass
    write(tmp_path / "s2/a.tif", noise(2, 80, 80, "uint16"), 10.0)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", "S2"))
    assert (len(catalogue), catalogue.report().present["S2"]) == (62_500, 100)
    cells = catalogue._cells
    assert sum(column.nbytes for column in (cells.site, cells.row, cells.column, *cells.presence.values())) < 1e6
    assert catalogue.patch(62_499).sources["ORTHO"].read_raster(catalogue.registry["ORTHO"]).left == LEFT + 249 * 80


def test_a_virtual_mosaic_is_a_raster(tmp_path: Path) -> None:
    write(tmp_path / "parts/a.tif", noise(3, 400, 500), 0.2)
    source = (
        "<ComplexSource><SourceFilename relativeToVRT='1'>../parts/a.tif</SourceFilename><SourceBand>{0}</SourceBand>"
        "<SrcRect xOff='0' yOff='0' xSize='500' ySize='400'/><DstRect xOff='{1}' yOff='0' xSize='500' ySize='400'/>"
        "</ComplexSource>"
    )
    band = "<VRTRasterBand dataType='Byte' band='{0}'><NoDataValue>0</NoDataValue>{1}</VRTRasterBand>"
    bands = [band.format(number, source.format(number, 0) + source.format(number, 600)) for number in (1, 2, 3)]
    (tmp_path / "ortho").mkdir()
    (tmp_path / "ortho/all.vrt").write_text(
        "<VRTDataset rasterXSize='1200' rasterYSize='400'><SRS>EPSG:32631</SRS>"
        f"<GeoTransform>{LEFT}, 0.2, 0, {TOP}, 0, -0.2</GeoTransform>{''.join(bands)}</VRTDataset>"
    )
    arrays = read_back(shard(tmp_path, describe("ORTHO", ORTHO__files="ortho/*.vrt"), tmp_path / "out"))
    assert sorted(arrays) == ["0000-0000"]
    description = describe("ORTHO", ORTHO__files="ortho/*.vrt", ORTHO__nodata=[0], min_coverage=0.5)
    assert open_catalogue(tmp_path, description).keys() == ["0000-0000", "0000-0001", "0000-0002"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"array": noise(4, 400, 400)}, r"ortho/a\.tif: 4 bands, but the description has 3"),
    ({"array": noise(3, 400, 400, "uint16")}, r"ortho/a\.tif: dtype uint16, but the description has uint8"),
    ({"pixel": 0.25}, r"ortho/a\.tif: pixels of 0\.2[0-9]+ m on the ground, but the description has 0\.2 m"),
    ({"crs": "EPSG:4326", "left": 3.0, "top": 45.0, "pixel": 2e-6}, r"ortho/a\.tif: coordinates in degrees"),
    ({"transform": Affine(0.2, 0.01, LEFT, 0.01, -0.2, TOP)}, r"ortho/a\.tif: its grid is rotated or flipped"),
    ({"array": noise(3, 300, 399)}, r"1 rasters cover no patch of 80 m; .*a\.tif has 79\.8 x 60\.0 m: give a smaller"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_rasters_that_contradict_the_description_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options = {"array": noise(3, 400, 400), "pixel": 0.2, **changes}
    write(tmp_path / "ortho/a.tif", **options)
    with pytest.raises(InputError, match=message):
        open_catalogue(tmp_path, describe("ORTHO"))


def test_an_empty_folder_a_series_without_dates_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches 'ortho/\*\.tif'; the folder is empty"):
        open_catalogue(tmp_path, describe("ORTHO"))
    with pytest.raises(InputError, match=r"sensors\.S2: a series has a file for each date"):
        open_catalogue(tmp_path, describe("S2", S2__role="series"))
    write(tmp_path / "ortho/a.tif", noise(3, 400, 400), 0.2)
    (tmp_path / "ortho/b.tif").write_bytes(b"no raster")
    report = open_catalogue(tmp_path, describe("ORTHO")).report()
    assert report.unreadable == 1 and "ortho/b.tif: cannot be read" in report.unreadable_examples[0]
    (tmp_path / "ortho/a.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"ortho/a\.tif: cannot be read"):
        open_catalogue(tmp_path, describe("ORTHO"))


def test_rasters_that_no_patch_needs_are_mentioned(tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", noise(3, 400, 400), 0.2)
    write(tmp_path / "label/a.tif", roofs(400, 400), 0.2, LEFT + 10_000, TOP)
    report = open_catalogue(tmp_path, describe("ORTHO", label=True)).report()
    assert any("label/a.tif spans x 510000 to 510080" in note for note in report.notes)
    assert any("patches span x 500000 to 500080, y 4999920 to 5000000 in EPSG:32631" in n for n in report.notes)
    options: dict[str, Any] = {"ORTHO__files": "ortho/{site}.tif", "ROOFS__files": "label/{site}.tif"}
    (tmp_path / "label/a.tif").rename(tmp_path / "label/c.tif")
    report = open_catalogue(tmp_path, describe("ORTHO", label=True, **options)).report()
    assert report.without_input == {"ROOFS": 1}


@pytest.mark.parametrize(
    ("options", "is_slow"),
    [({"blockysize": 1}, True), ({"tiled": True}, False), ({"driver": "PNG", "crs": None, "transform": None}, True)],
)
def test_rasters_that_are_slow_to_cut_are_mentioned(options: dict[str, Any], is_slow: bool, tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", np.ones((3, 500, 8000), np.uint8), 0.2, **options)
    notes = open_catalogue(tmp_path, describe("ORTHO")).report().notes
    assert bool([note for note in notes if "gdal_translate -co TILED=YES" in note]) == is_slow


def test_values_that_the_description_does_not_name_skip_their_patches(tmp_path: Path) -> None:
    image, label = noise(3, 400, 1200).astype(np.float32), roofs(400, 1200)
    image[0, 5, 5], label[0, 5, 805] = np.nan, 3
    write(tmp_path / "ortho/a.tif", image, 0.2)
    write(tmp_path / "label/a.tif", label, 0.2)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", label=True, ORTHO__dtype="float32"))
    with pytest.raises(InputError, match="2 patches are unreadable but --max-bad allows 1"):
        write_shards(catalogue, tmp_path / "strict")
    manifest = write_shards(catalogue, tmp_path / "out", max_bad=0.9)
    assert (
        "NaN values" in manifest.skipped["0000-0000"]
        and "a.tif (row 0, column 0 of the patches)" in manifest.skipped["0000-0000"]
    )
    assert "values 3 are neither classes nor ignored" in manifest.skipped["0000-0002"]


@pytest.mark.parametrize("nodata", [None, 0])
def test_damaged_blocks_skip_their_patches_until_they_are_repaired(nodata: int | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tiled": True,
        "blockxsize": 400,
        "blockysize": 400,
        "compress": "deflate",
        "nodata": nodata,
    }
    path = write(tmp_path / "ortho/a.tif", noise(3, 800, 2000), 0.2, **options)
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        start = file.pages.first.dataoffsets[6]
    path.write_bytes(data[:start] + bytes(100) + data[start + 100 :])
    catalogue = open_catalogue(tmp_path, describe("ORTHO"))
    assert len(catalogue) == 10
    manifest = write_shards(catalogue, tmp_path / "out", samples_per_shard=5, max_bad=0.3)
    assert list(manifest.skipped) == ["0001-0001"]
    path.write_bytes(data)
    whole = open_catalogue(tmp_path, describe("ORTHO"))
    assert whole.fingerprint() == catalogue.fingerprint()
    assert len(write_shards(whole, tmp_path / "whole", samples_per_shard=5)) == 10


def test_a_raster_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "ortho/a.tif", noise(3, 400, 400), 0.2)
    catalogue = open_catalogue(tmp_path, describe("ORTHO"))
    modality = catalogue.registry["ORTHO"]
    source = catalogue.patch(0).sources["ORTHO"]
    before = source.read_raster(modality).array
    write(path, 255 - before, 0.2)
    assert np.array_equal(source.read_raster(modality).array, 255 - before)  # the open dataset is not reused
    write(path, before, 0.2, LEFT + 80)
    with pytest.raises(InputError, match=r"a\.tif: has changed since its position was read"):
        source.read_raster(modality)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.tif: cannot be read: No such file"):
        source.read_raster(modality)


def test_sources_are_small_and_few_datasets_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write(tmp_path / f"ortho/{number}.tif", noise(3, 400, 400), 0.2, LEFT + 80 * number, TOP)
    catalogue = open_catalogue(tmp_path, describe("ORTHO"))
    monkeypatch.setattr(raster_windows, "_MAX_OPEN", 2)
    monkeypatch.setattr(raster_windows, "_datasets", raster_windows._Datasets())
    patches = [catalogue.patch(row) for row in range(6)]
    for patch in patches:
        assert patch.sources["ORTHO"].read_raster(catalogue.registry["ORTHO"]).array.shape == (3, 400, 400)
    assert len(raster_windows._datasets._open) == 2
    buffer = io.BytesIO()
    pickle.dump(patches, buffer)
    assert buffer.tell() < 6 * 1000
    again = pickle.loads(buffer.getvalue())[0].sources["ORTHO"]
    assert np.array_equal(
        again.read_raster(catalogue.registry["ORTHO"]).array,
        patches[0].sources["ORTHO"].read_raster(catalogue.registry["ORTHO"]).array,
    )
