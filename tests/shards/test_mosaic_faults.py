"""Rasters that contradict their description, are damaged, slow, or change during a run."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from mosaic_rasters import LEFT, TOP, describe, noise, open_catalogue, roofs, write
from rasterio.transform import Affine

from bocage.shards.errors import InputError
from bocage.shards.source.described import raster_windows
from bocage.shards.write.writer import write_shards

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
    with pytest.raises(InputError, match="2 unreadable patches, but --max-bad allows 1"):
        write_shards(catalogue, tmp_path / "strict")
    manifest = write_shards(catalogue, tmp_path / "out", max_bad=0.9)
    assert (
        "NaN values" in manifest.skipped["0000-0000"]
        and "a.tif (row 0, column 0 of the patches)" in manifest.skipped["0000-0000"]
    )
    assert "value 3 is neither a class nor ignored" in manifest.skipped["0000-0002"]


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
