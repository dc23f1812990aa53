"""Rasters with missing pixels: which patches are left out, filled, or taken from the next raster."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from mosaic_rasters import LEFT, TOP, describe, noise, open_catalogue, read_back, shard, write
from rasterio.enums import ColorInterp

from bocage.shards.errors import InputError
from bocage.shards.source.described import coverage
from bocage.shards.write.writer import write_shards


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
        if kind == "nodata of the description":
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
    [note] = [note for note in catalogue.report().warnings() if "left out" in note]
    assert "1 window of ORTHO left out because pixels are missing, in 1 of them at most 10%" in note
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


MARKS = ["two values", "value and tag", "value and alpha", "value and mask", "one band"]


@pytest.mark.parametrize("kind", MARKS)
def test_resampling_blends_no_value_that_marks_missing_pixels(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", noise(3, 800, 800), 0.2)
    values = np.full((2, 32, 32), 1000, np.uint16)
    values[:, 10, 10] = 0
    values[0 if kind == "one band" else slice(None), 4, 4] = 60_000
    hidden = np.zeros((32, 32), bool)
    hidden[4, 4] = True
    options: dict[str, Any] = {}
    changes: dict[str, Any] = {"S2__nodata": [0]}
    if kind in ("two values", "one band"):
        changes = {"S2__nodata": [0, 60_000]}
    elif kind == "value and tag":
        options = {"nodata": 60_000}
    elif kind == "value and mask":
        options = {"mask": ~hidden}
    else:
        values = np.concatenate((values, np.where(hidden, 0, 65535).astype(np.uint16)[None]))
        options = {"alpha": True}
        changes["S2__bands"] = {"R": 650, "N": 830, "A": "unused"}
    write(tmp_path / "s2/a.tif", values, 10.0, LEFT - 78.3, TOP + 78.3, **options)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", "S2", min_coverage=0.5, **changes))
    assert catalogue._sites[0].layers["S2"].rasters[0].is_resampled
    arrays = read_back(write_shards(catalogue, tmp_path / "out"))
    found = [modalities["S2"] for modalities in arrays.values() if "S2" in modalities]
    assert {value for array in found for value in np.unique(array).tolist()} == {0, 1000}
    assert sum((array == 0).all(axis=0).sum() for array in found) >= 1


def test_resampled_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    write(tmp_path / "ortho/a.tif", noise(3, 800, 800), 0.2)
    values = np.full((2, 32, 32), 1000, np.float32)
    values[0, 10, 10] = np.nan
    write(tmp_path / "s2/a.tif", values, 10.0, LEFT - 78.3, TOP + 78.3)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", "S2", S2__dtype="float32"))
    with pytest.raises(InputError, match=r"s2/a\.tif.*NaN values; if they mark missing pixels, add \.nan to nodata"):
        write_shards(catalogue, tmp_path / "out", max_bad=0.0)


@pytest.mark.parametrize("nodata", [[], [-9999.0]])
def test_a_tag_in_one_band_is_no_data(nodata: list[float], tmp_path: Path) -> None:
    heights = noise(3, 400, 800).astype(np.float32)
    heights[1, 5, 5] = -500
    write(tmp_path / "ortho/a.tif", heights, 0.2, nodata=-500)
    changes: dict[str, Any] = {"ORTHO__dtype": "float32", "ORTHO__nodata": nodata}
    catalogue = open_catalogue(tmp_path, describe("ORTHO", **changes))
    arrays = read_back(write_shards(catalogue, tmp_path / "out", max_bad=0.0))
    if not nodata:
        assert sorted(arrays) == ["0000-0001"]
        return
    expected = heights[:, :, :400].copy()
    expected[1, 5, 5] = -9999
    assert np.array_equal(arrays["0000-0000"]["ORTHO"], expected)


def test_a_used_band_is_no_alpha_band(tmp_path: Path) -> None:
    """Writers often declare the fourth of four bands as alpha, although it is near infrared."""
    array = noise(4, 400, 400)
    array[3, :100] = 0
    path = write(tmp_path / "ortho/a.tif", array, 0.2, alpha=True)
    with rasterio.open(path) as file:
        assert ColorInterp.alpha in file.colorinterp
    bands = {"R": 650, "G": 550, "B": 460, "N": 830}
    arrays = read_back(shard(tmp_path, describe("ORTHO", ORTHO__bands=bands), tmp_path / "out"))
    assert np.array_equal(arrays["0000-0000"]["ORTHO"], array)


def test_windows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    array = noise(3, 900, 1250)  # 2 x 3 whole windows, and 6 at the edges
    array[:, 100:200, 100:300] = 0  # 12 % of a window
    array[:, 500:510, 500:510] = 0
    write(tmp_path / "ortho/a.tif", array, 0.2)
    catalogue = open_catalogue(tmp_path, describe("ORTHO", ORTHO__nodata=[0]))
    assert len(catalogue) == 4
    [note] = [note for note in catalogue.report().warnings() if "left out" in note]
    assert note == (
        "8 windows of ORTHO left out because pixels are missing, in 1 of them at most 10%; to keep them, lower "
        "min_coverage"
    )


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
