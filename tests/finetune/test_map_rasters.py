"""Map rasters: nodata, alpha bands and masks, alignment with the window grid, and units."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.enums import ColorInterp
from small_map import LEFT, NODATA, TOP, ground, model, read, write
from tiny_segmentation import AERIAL, COSIA, DEM, S2

from bocage.finetune.mapping.map_grid import plan_grid
from bocage.finetune.mapping.map_rasters import MapRaster, open_rasters, window_batch
from bocage.finetune.mapping.tiled_inference import write_map
from bocage.shards.errors import InputError
from bocage.shards.preprocess.inputs import cloudy_dates
from bocage.tools.cli.logging_setup import configure_logging


@pytest.mark.parametrize("alpha", [False, True])
def test_an_image_without_georeference_has_the_pixels_of_the_model(
    alpha: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = np.random.default_rng(0).integers(1, 255, (4 if alpha else 3, 64, 48)).astype(np.uint8)
    image[3:, :, 40:] = 0
    path = tmp_path / "photo.png"
    with rasterio.open(path, "w", driver="PNG", width=48, height=64, count=len(image), dtype="uint8") as file:
        file.write(image)
    raster = MapRaster("X", path, 3, 0.2, None)
    assert f"{path} has no georeference: its pixels count as 0.2 m" in caplog.text
    assert raster.extent.crs is None
    assert (raster.extent.left, raster.extent.top) == (0.0, 0.0)
    assert (raster.extent.width, raster.extent.height) == pytest.approx((9.6, 12.8))
    found = raster.read(0.0, 0.0, 9.6)
    assert np.array_equal(found[:, :, :40], image[:3, :48, :40])
    assert np.isnan(found[:, :, 40:]).all() == alpha


def test_the_fourth_band_is_infrared_and_a_fifth_one_can_be_alpha(tmp_path: Path) -> None:
    image = np.full((5, 40, 40), 100, np.uint8)
    image[3, :20] = 0
    image[4] = 255
    image[4, :, 30:] = 0
    four, five = write(tmp_path / "four.tif", image[:4], 0.2), write(tmp_path / "five.tif", image, 0.2)
    with rasterio.open(five, "r+") as file:
        file.colorinterp = [
            *file.colorinterp[:3],
            rasterio.enums.ColorInterp.undefined,
            ColorInterp.alpha,
        ]
    with rasterio.open(four) as file:
        assert file.colorinterp[3] == ColorInterp.alpha  # GDAL takes the infrared band for alpha
    for left in (LEFT, LEFT + 0.1):  # aligned with the pixels of the raster, and not aligned
        found = MapRaster("X", four, 4, 0.2, None).read(left, TOP, 6.4)
        assert np.isfinite(found).all()
        assert (found[3, :19] == 0).all()
        assert (found[0] == 100).all()
        masked = MapRaster("X", five, 4, 0.2, None).read(left, TOP, 6.4)
        assert np.isfinite(masked[:, :, :29]).all()
        assert np.isnan(masked[:, :, 30:]).all()


@pytest.mark.parametrize("inside", [True, False])
def test_a_mask_inside_or_next_to_the_file_marks_nodata(inside: bool, tmp_path: Path) -> None:
    image = np.full((4, 600, 600), 100, np.uint8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
        path = write(tmp_path / "masked.tif", image, 0.2)
        mask = np.full((600, 600), 255, np.uint8)
        mask[:, 300:] = 0
        with rasterio.open(path, "r+") as file:
            file.write_mask(mask)
    assert (tmp_path / "masked.tif.msk").exists() != inside
    for left in (LEFT, LEFT + 0.1):  # aligned with the pixels of the raster, and not aligned
        found = MapRaster("X", path, 4, 0.2, None).read(left, TOP, 102.4)
        assert np.isfinite(found[:, :, :298]).all()
        assert (found[:, :, :298] == 100).all()
        assert np.isnan(found[:, :, 300:]).all()
        assert np.isnan(MapRaster("X", path, 4, 0.2, None).read(LEFT - 51.2, TOP, 102.4)[:, :, :255]).all()
    chosen = model(AERIAL)
    rasters, reference = open_rasters(chosen, {AERIAL: path}, {})
    (found,) = read(write_map(chosen, rasters, plan_grid(chosen, reference, 12.8), tmp_path / "map")[COSIA])
    assert (found[:, 300:] == NODATA).all()
    assert not (found[:, :300] == NODATA).any()


def test_heights_that_no_ground_has_are_holes(tmp_path: Path) -> None:
    heights = np.full((2, 512, 512), 300.0, np.float32)
    heights[:, :, 256:] = -9999.0  # and the file does not say so
    chosen = model(DEM)
    rasters, reference = open_rasters(chosen, {DEM: write(tmp_path / "dem.tif", heights, 0.2)}, {})
    assert np.isnan(rasters[DEM].read(LEFT, TOP, 102.4)[:, :, 256:]).all()
    (found,) = read(write_map(chosen, rasters, plan_grid(chosen, reference, 12.8), tmp_path / "map")[COSIA])
    assert (found[:, 256:] == NODATA).all()
    assert not (found[:, :256] == NODATA).any()


def test_an_image_without_georeference_gives_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "photo.png"
    with rasterio.open(path, "w", driver="PNG", width=48, height=64, count=4, dtype="uint8") as file:
        file.write(np.full((4, 64, 48), 100, np.uint8))
    open_rasters(model(AERIAL), {AERIAL: path}, {})
    assert caplog.text.count(str(path)) == 1
    assert "and the map has no coordinate system" in caplog.text


def test_values_in_other_units_give_a_warning_or_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reflectances instead of digital numbers give a warning, 16-bit instead of 8-bit integers an error."""
    configure_logging()
    chosen = model(AERIAL)
    usual = np.array(chosen.model.encoder(AERIAL).spec.mean)
    for values, warns in ((ground(300, 300).astype(np.float32) / 255, True), (ground(300, 300), False)):
        assert values.max() < usual.min() / 20 or not warns
        path = write(tmp_path / f"{warns}.tif", values, 0.2, crs=None)
        rasters, reference = open_rasters(chosen, {AERIAL: path}, {})
        write_map(chosen, rasters, plan_grid(chosen, reference, 12.8), tmp_path / str(warns))
        logged = capsys.readouterr().err
        assert (logged.count("are they in the same units?") == 1) == warns
        assert f"{path} has no coordinate system" in logged
    large = write(tmp_path / "large.tif", np.full((4, 60, 60), 4000, np.uint16), 0.2)
    with pytest.raises(InputError, match=r"large.tif has uint16 values.* are trained on uint8"):
        open_rasters(chosen, {AERIAL: large}, {})


def test_nodata_of_one_date_or_band_does_not_spread_to_others(tmp_path: Path) -> None:
    series = np.full((20, 12, 12), 1000, np.int16)
    series[:10, :, 6:] = -9999
    path = write(tmp_path / "s2.tif", series, 10.0, nodata=-9999)
    found = MapRaster(S2, path, 10, 10.24, np.array([0, 30])).read(LEFT, TOP, 102.4)
    assert np.isnan(found[0, :, :, 7:]).all()
    assert (found[0, :, :, :5] == 1000).all()
    assert (found[1] == 1000).all()
    fine = np.full((4, 1100, 1100), 200, np.uint8)
    fine[1, 500:] = 0
    found = MapRaster("X", write(tmp_path / "fine.tif", fine, 0.1, nodata=0), 4, 0.2, None).read(LEFT, TOP, 102.4)
    assert np.isnan(found[1, 251:]).all()
    assert (found[[0, 2, 3]] == 200).all()


def test_quality_masks_keep_zeros_at_the_border_and_where_zero_is_nodata(tmp_path: Path) -> None:
    clouds = np.zeros((4, 12, 12), np.uint8)
    clouds[:2] = 100  # the first of two dates
    days = np.array([0, 30])
    for nodata in (None, 0):
        path = write(tmp_path / f"clouds-{nodata}.tif", clouds, 10.24, nodata=nodata)
        raster = MapRaster("SENTINEL2_MSK-SC", path, 2, 10.24, days, is_quality_mask=True)
        for left in (LEFT, LEFT + 51.2):  # inside, and beyond the border by a third
            values = torch.from_numpy(raster.read(left, TOP, 102.4))[None]
            assert cloudy_dates(values, torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[True, False]]


@pytest.mark.parametrize(("gsd", "pixel"), [(0.2, 0.2), (0.2, 0.05), (0.2, 0.5), (1.6, 1.5), (10.24, 10.0)])
def test_resampling_from_any_pixel_size_does_not_shift_edges(gsd: float, pixel: float, tmp_path: Path) -> None:
    edge = 61.3  # metres to the right of a corner that is not on the grid of the windows
    size = round(150 / pixel)
    centres = (np.arange(size) + 0.5) * pixel
    values = np.where(centres < edge, 0, 200).astype(np.uint8)[None, None].repeat(size, axis=1)
    path = write(tmp_path / "edge.tif", values, pixel, left=LEFT - 7.3, top=TOP + 7.3)
    found = MapRaster("X", path, 1, gsd, None).read(LEFT, TOP, 102.4)[0]
    assert found.shape == (round(102.4 / gsd),) * 2
    crossing = np.interp(100.0, found[len(found) // 2], (np.arange(len(found)) + 0.5) * gsd)
    assert abs(crossing - (edge - 7.3)) <= max(gsd, pixel) / 2 + 1e-6


def test_the_same_coordinate_system_under_another_name_is_accepted(tmp_path: Path) -> None:
    renamed = rasterio.crs.CRS.from_epsg(2154).to_wkt().replace("RGF93 v1 / Lambert-93", "Lambert 93 of IGN")
    first = MapRaster(AERIAL, write(tmp_path / "one.tif", ground(60, 60), 0.2), 4, 0.2, None)
    second = MapRaster(AERIAL, write(tmp_path / "other.tif", ground(60, 60), 0.2, crs=renamed), 4, 0.2, None)
    second.check_crs(first)
    nothing = MapRaster(AERIAL, write(tmp_path / "none.tif", ground(60, 60), 0.2, crs=None), 4, 0.2, None)
    with pytest.raises(InputError, match=r"none.tif has no coordinate system"):
        nothing.check_crs(first)


PARIS = {"EPSG:3857": (261_000.0, 6_250_000.0), "EPSG:32631": (452_000.0, 5_411_000.0), "EPSG:2263": (9e5, 2e5)}


@pytest.mark.parametrize("crs", PARIS)
def test_windows_are_ground_metres_in_any_projection(crs: str, tmp_path: Path) -> None:
    """Units are 1.5 per metre in web maps at this latitude, 3.3 in feet, and 1 in UTM."""
    left, top = PARIS[crs]
    scale = MapRaster("X", write(tmp_path / "near.tif", ground(8, 8), 1.0, left, top, crs), 4, 0.2, None).scale
    assert scale == pytest.approx({"EPSG:3857": 1.519, "EPSG:32631": 1.0, "EPSG:2263": 3.281}[crs], rel=2e-3)
    image = ground(700, 700)
    path = write(tmp_path / "image.tif", image, 0.2 * scale, left, top, crs)
    chosen = model(AERIAL)
    rasters, reference = open_rasters(chosen, {AERIAL: path}, {})
    assert np.array_equal(rasters[AERIAL].read(left, top, 102.4), image[:, :512, :512])
    found = read(write_map(chosen, rasters, plan_grid(chosen, reference), tmp_path / "map")[COSIA])
    plain = write(tmp_path / "plain.tif", image, 0.2)
    rasters, reference = open_rasters(chosen, {AERIAL: plain}, {})
    assert np.array_equal(
        found, read(write_map(chosen, rasters, plan_grid(chosen, reference), tmp_path / "same")[COSIA])
    )
    with rasterio.open(tmp_path / "map" / f"{COSIA}.tif") as file:
        assert file.crs == rasterio.crs.CRS.from_string(crs)
        assert file.bounds == pytest.approx((left, top - 140 * scale, left + 140 * scale, top))


def test_adjacent_windows_are_read_at_once_with_the_same_result(tmp_path: Path) -> None:
    series = np.random.default_rng(0).integers(1, 4000, (6, 9, 12)).astype(np.uint16)
    series[:, 4, 5] = 0
    path = write(tmp_path / "series.tif", series, 10.0, nodata=0)
    raster = MapRaster("X", path, 3, 10.0, np.array([0, 30]))
    corners = [(LEFT + 10.0 * column, TOP - 40.0) for column in range(2, 13)]  # the last one is outside
    corners += [(LEFT + 10.0 * column, TOP - 50.0) for column in (1, 2, 7)]
    batch, has_data = window_batch({"X": raster}, corners, 10.0)
    expected = np.stack([raster.read(*corner, 10.0) for corner in corners])
    assert np.array_equal(batch.values["X"].numpy(), expected, equal_nan=True)
    assert batch.values["X"].shape == (14, 2, 3, 1, 1)
    assert has_data.tolist() == [
        corner not in ((LEFT + 50.0, TOP - 40.0), (LEFT + 120.0, TOP - 40.0)) for corner in corners
    ]
