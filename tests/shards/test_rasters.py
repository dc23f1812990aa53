"""Read GeoTIFFs of every layout, and refuse rasters that are damaged or contradict the registry."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from rasterio import Affine
from small_tree import write_raster

from bocage.shards.modality import FLAIR_HUB, Modality
from bocage.shards.source.flair_hub import rasters
from bocage.shards.source.flair_hub.rasters import RasterSource
from bocage.shards.source.raster import RasterError


def layouts() -> list[tuple[str, dict[str, object]]]:
    return [
        ("AERIAL_RGBI", {"interleave": "pixel"}),
        ("AERIAL_RGBI", {"interleave": "band", "compress": "none"}),
        ("DEM_ELEV", {"tiled": True, "blockxsize": 256, "blockysize": 256}),
        ("SPOT_RGBI", {"interleave": "pixel"}),
        ("SENTINEL2_TS", {"interleave": "pixel"}),
        ("SENTINEL2_TS", {"interleave": "band", "compress": "deflate"}),
        ("SENTINEL1-ASC_TS", {"interleave": "band"}),
        ("AERIAL_LABEL-COSIA", {}),
        ("ALL_LABEL-LPIS", {"interleave": "pixel"}),
    ]


@pytest.mark.parametrize(("name", "options"), layouts())
def test_every_layout_gives_the_same_array(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    modality = FLAIR_HUB[name]
    count = len(modality.bands) * (3 if modality.has_time_axis else 1)
    bands = np.random.default_rng(0).integers(0, 18, (count, modality.size, modality.size)).astype(modality.dtype)
    path = tmp_path / "raster.tif"
    write_raster(path, bands, modality.gsd, **options)
    raster = rasters.read_raster(RasterSource(path), modality)
    shape = (3, -1, modality.size, modality.size) if modality.has_time_axis else bands.shape
    assert np.array_equal(raster.array, bands.reshape(shape))
    assert raster.array.flags.c_contiguous
    assert raster[1:4] == ("EPSG:2154", 650_000.0, 6_860_000.0)


@pytest.mark.parametrize("name", ["SPOT_RGBI", "DEM_ELEV"])
def test_lambert_93_without_a_code_is_accepted(tmp_path: Path, name: str) -> None:
    modality = FLAIR_HUB[name]
    path = tmp_path / "local.tif"
    bands = np.zeros((len(modality.bands), modality.size, modality.size), modality.dtype)
    write_raster(path, bands, modality.gsd, crs='LOCAL_CS["RGF93 / Lambert-93",UNIT["metre",1]]')
    raster = rasters.read_raster(RasterSource(path), modality)
    assert "Lambert-93" in raster.crs
    assert (raster.left, raster.top) == (650_000.0, 6_860_000.0)


def wrong(modality: Modality, path: Path, what: str) -> None:
    size, bands, gsd = modality.size, len(modality.bands), modality.gsd
    dtype = np.dtype(modality.dtype)
    match what:
        case "bands":
            bands += 1
        case "size":
            size -= 1
        case "dtype":
            dtype = np.dtype("int16")
        case "pixel":
            gsd *= 2
    write_raster(path, np.zeros((bands, size, size), dtype), gsd)


@pytest.mark.parametrize("name", ["AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS", "AERIAL_LABEL-COSIA"])
@pytest.mark.parametrize(
    ("what", "message"), [("bands", "bands, but"), ("size", "pixels, but"), ("dtype", "int16"), ("pixel", "pixels of")]
)
def test_rasters_that_contradict_the_registry_are_named(tmp_path: Path, name: str, what: str, message: str) -> None:
    path = tmp_path / "wrong.tif"
    wrong(FLAIR_HUB[name], path, what)
    with pytest.raises(RasterError, match=message) as error:
        rasters.read_raster(RasterSource(path), FLAIR_HUB[name])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["AERIAL_RGBI", "SPOT_RGBI"])
def test_missing_blocks_are_an_error(tmp_path: Path, name: str) -> None:
    modality = FLAIR_HUB[name]
    path = tmp_path / "sparse.tif"
    bands = np.ones((4, modality.size, modality.size), modality.dtype)
    bands[:, modality.size // 2 :] = 0
    write_raster(path, bands, modality.gsd, blockysize=8, sparse_ok=False)
    assert np.array_equal(rasters.read_raster(RasterSource(path), modality).array, bands)
    write_raster(path, bands, modality.gsd, blockysize=8, sparse_ok=True)
    with pytest.raises(RasterError, match="never written"):
        rasters.read_raster(RasterSource(path), modality)


@pytest.mark.parametrize("nodata", [None, -9999.0, float("nan")])
def test_missing_tiles_of_heights_are_an_error(tmp_path: Path, nodata: float | None) -> None:
    bands = np.full((2, 512, 512), 120.0, np.float32)
    bands[:, :256, 256:] = 0 if nodata is None else nodata
    path = tmp_path / "sparse.tif"
    layouts: list[dict[str, Any]] = [{"blockxsize": 256, "blockysize": 256, "tiled": True}, {"blockysize": 64}]
    for options in layouts:
        if "tiled" not in options:
            bands[:, :256] = 0 if nodata is None else nodata
        write_raster(path, bands, 0.2, nodata=nodata, sparse_ok=False, **options)
        array = rasters.read_raster(RasterSource(path), FLAIR_HUB["DEM_ELEV"]).array
        assert np.isnan(array).sum() == (0 if nodata is None else (bands != 120).sum())
        write_raster(path, bands, 0.2, nodata=nodata, sparse_ok=True, **options)
        with pytest.raises(RasterError, match="never written"):
            rasters.read_raster(RasterSource(path), FLAIR_HUB["DEM_ELEV"])


@pytest.mark.parametrize("name", ["SPOT_RGBI", "DEM_ELEV", "SENTINEL1-ASC_TS"])
@pytest.mark.parametrize(
    ("crs", "message"),
    [
        ("EPSG:32631", "coordinates in EPSG:32631"),
        ("EPSG:4326", "coordinates in EPSG:4326"),
        ("EPSG:3857", "Lambert-93"),
        ('GEOGCS["mine",DATUM["mine",SPHEROID["mine",6378137,298]],PRIMEM["G",0],UNIT["degree",0.0174]]', "geographic"),
    ],
)
def test_other_coordinate_systems_are_named(tmp_path: Path, name: str, crs: str, message: str) -> None:
    modality = FLAIR_HUB[name]
    path = tmp_path / "elsewhere.tif"
    write_raster(
        path, np.ones((len(modality.bands), modality.size, modality.size), modality.dtype), modality.gsd, crs=crs
    )
    with pytest.raises(RasterError, match=message) as error:
        rasters.read_raster(RasterSource(path), modality)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["SPOT_RGBI", "DEM_ELEV"])
@pytest.mark.parametrize("crs", ["EPSG:9794", None])
def test_lambert_93_by_another_code_and_no_crs_are_accepted(tmp_path: Path, name: str, crs: str | None) -> None:
    modality = FLAIR_HUB[name]
    path = tmp_path / "same.tif"
    write_raster(
        path, np.ones((len(modality.bands), modality.size, modality.size), modality.dtype), modality.gsd, crs=crs
    )
    raster = rasters.read_raster(RasterSource(path), modality)
    assert raster[1:4] == (crs or "", 650_000.0, 6_860_000.0)


@pytest.mark.parametrize("name", ["SPOT_RGBI", "DEM_ELEV"])
def test_rotated_rasters_are_named(tmp_path: Path, name: str) -> None:
    modality = FLAIR_HUB[name]
    path = tmp_path / "turned.tif"
    bands = np.ones((len(modality.bands), modality.size, modality.size), modality.dtype)
    turned = Affine(0, modality.gsd, 650_000, modality.gsd, 0, 6_860_000)
    write_raster(path, bands, modality.gsd, transform=turned)
    with pytest.raises(RasterError, match="rotated against north"):
        rasters.read_raster(RasterSource(path), modality)


@pytest.mark.parametrize("name", ["SPOT_RGBI", "DEM_ELEV"])
@pytest.mark.parametrize("tag", [33550, 33922])
def test_nan_positions_are_named(tmp_path: Path, name: str, tag: int) -> None:
    modality = FLAIR_HUB[name]
    path = tmp_path / "nowhere.tif"
    write_raster(path, np.ones((len(modality.bands), modality.size, modality.size), modality.dtype), modality.gsd)
    with tifffile.TiffFile(path, mode="r+") as file:
        entry = file.pages.first.tags[tag]
        entry.overwrite([*entry.value[:-3], *[float("nan")] * 3])
    with pytest.raises(RasterError, match=r"nowhere\.tif: (pixels of nan|its position)"):
        rasters.read_raster(RasterSource(path), modality)


def test_system_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(RasterError, match=r"gone\.tif: cannot be read: No such file"):
        rasters.read_raster(RasterSource(tmp_path / "gone.tif"), FLAIR_HUB["DEM_ELEV"])
    with pytest.raises(RasterError, match="cannot be read: Is a directory"):
        rasters.read_raster(RasterSource(tmp_path), FLAIR_HUB["DEM_ELEV"])


def test_class_value_outside_the_scheme_is_named(tmp_path: Path) -> None:
    modality = FLAIR_HUB["ALL_LABEL-LPIS"]
    bands = np.zeros((3, 512, 512), np.uint8)
    bands[1, 3, 4] = 31
    path = tmp_path / "label.tif"
    write_raster(path, bands, 0.2)
    with pytest.raises(RasterError, match=r"value 31 in band level-2.*0 to 30"):
        rasters.read_raster(RasterSource(path), modality)


@pytest.mark.parametrize("name", ["AERIAL_RGBI", "SENTINEL2_TS", "SPOT_RGBI"])
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.95])
def test_truncated_files_are_named(tmp_path: Path, name: str, keep: float) -> None:
    modality = FLAIR_HUB[name]
    path = tmp_path / "cut.tif"
    count = len(modality.bands) * (2 if modality.has_time_axis else 1)
    bands = np.random.default_rng(1).integers(0, 200, (count, modality.size, modality.size)).astype(modality.dtype)
    write_raster(path, bands, modality.gsd, interleave="pixel")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    reason = "" if keep else "it is empty"
    with pytest.raises(RasterError, match=rf"cut\.tif: cannot be read: {reason}"):
        rasters.read_raster(RasterSource(path), modality)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(RasterError, match=r"cut\.tif: cannot be read: it begins with b'<htm', so it is no TIFF"):
        rasters.read_raster(RasterSource(path), modality)
    path.unlink()
    with pytest.raises(RasterError, match="cannot be read"):
        rasters.read_raster(RasterSource(path), modality)


@pytest.mark.parametrize("name", ["DEM_ELEV", "SENTINEL1-ASC_TS"])
@pytest.mark.parametrize("nodata", [-9999.0, -3.4028234663852886e38, float("nan"), 77.5])
def test_declared_nodata_of_a_float_raster_is_nan(tmp_path: Path, name: str, nodata: float) -> None:
    modality = FLAIR_HUB[name]
    bands = np.full((2, modality.size, modality.size), 77.0, np.float32)
    bands[1, 3, 4] = nodata
    write_raster(tmp_path / "x.tif", bands, modality.gsd, nodata=nodata)
    array = rasters.read_raster(RasterSource(tmp_path / "x.tif"), modality).array
    assert array.dtype == np.float32
    assert np.argwhere(np.isnan(array.reshape(bands.shape))).tolist() == [[1, 3, 4]]


def test_declared_nodata_of_an_integer_raster_is_kept(tmp_path: Path) -> None:
    modality = FLAIR_HUB["SPOT_RGBI"]
    bands = np.zeros((4, modality.size, modality.size), np.uint16)
    write_raster(tmp_path / "x.tif", bands, modality.gsd, nodata=0)
    assert np.array_equal(rasters.read_raster(RasterSource(tmp_path / "x.tif"), modality).array, bands)
