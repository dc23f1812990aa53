"""GeoTIFFs of predictions, and their figures."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from matplotlib.image import imread

from bocage.finetune.evaluation.figures import Panel, draw_panels, render_rgb
from bocage.finetune.evaluation.predict import write_prediction
from bocage.shards.classes import COSIA, LPIS_3
from bocage.shards.errors import InputError
from bocage.shards.inspect.composites import palette
from bocage.shards.modality import FLAIR_HUB

LOCAL_LAMBERT = (
    'LOCAL_CS["RGF93 / Lambert-93",UNIT["metre",1,AUTHORITY["EPSG","9001"]],'
    'AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
)


@pytest.mark.parametrize("crs", ["EPSG:2154", LOCAL_LAMBERT, ""])
def test_geotiffs_are_georeferenced_like_their_patch(tmp_path: Path, crs: str) -> None:
    predicted = np.random.default_rng(0).integers(0, 19, (512, 512), dtype=np.uint8)
    path = tmp_path / "D001-2020_AA_0-1.tif"
    write_prediction(path, predicted, COSIA, crs=crs, left=653_210.4, top=6_860_112.8, side=102.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = rasterio.open(path)
    with file:
        assert np.array_equal(file.read(1), predicted)
        assert (file.count, file.dtypes, file.profile["compress"]) == (1, ("uint8",), "lzw")
        assert file.transform.almost_equals(rasterio.Affine(0.2, 0, 653_210.4, 0, -0.2, 6_860_112.8))
        assert file.bounds.right == pytest.approx(653_210.4 + 102.4)
        if crs.startswith("EPSG"):
            assert file.crs.to_epsg() == 2154
        elif crs:
            assert "Lambert-93" in file.crs.to_wkt()
        else:
            assert file.crs is None
        assert file.colormap(1)[12] == (0x46, 0xE4, 0x83, 255)
        assert file.tags(1)["CLASS_12"] == "deciduous"
        assert file.descriptions == ("COSIA",)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_an_invalid_crs_raises(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.tif: coordinate system 'nowhere' cannot be read"):
        write_prediction(tmp_path / "a.tif", np.zeros((2, 2), np.uint8), COSIA, crs="nowhere", left=0, top=0, side=0.4)
    assert not list(tmp_path.iterdir())


def test_palette_is_official() -> None:
    assert palette(COSIA)[0].tolist() == [0xDB, 0x0E, 0x9A]
    assert palette(LPIS_3).shape == (46, 3)


def test_images_are_rendered_in_true_colour() -> None:
    aerial = np.zeros((4, 8, 8), np.uint8)
    aerial[2, :, 4:] = 200  # blue
    shown = render_rgb(aerial, FLAIR_HUB["AERIAL_RGBI"])
    assert shown.shape == (8, 8, 3)
    assert shown[0, -1].tolist() == [0, 0, 1]
    series = np.zeros((3, 10, 4, 4), np.uint16)
    series[:, 2, :2] = 3000  # B4, red
    series[0] = 9999  # the median ignores one cloudy date
    assert render_rgb(series, FLAIR_HUB["SENTINEL2_TS"])[0, 0].tolist() == [1, 0, 0]


def test_sensors_without_colour_bands_are_grey_and_nodata_is_black() -> None:
    heights = np.full((2, 4, 4), 100.0, np.float32)
    heights[0, :2] = 120.0
    heights[0, 0, 0] = -9999.0
    shown = render_rgb(heights, FLAIR_HUB["DEM_ELEV"])
    assert shown[0, 0].tolist() == [0, 0, 0]
    assert shown[0, 1].tolist() == [1, 1, 1]
    assert not render_rgb(np.full((2, 4, 4), -9999.0, np.float32), FLAIR_HUB["DEM_ELEV"]).any()


def test_panels_use_the_official_colours(tmp_path: Path) -> None:
    truth, predicted = np.full((64, 64), 8, np.uint8), np.full((64, 64), 6, np.uint8)
    path = tmp_path / "panels.png"
    image = np.zeros((64, 64, 3))
    draw_panels(path, [Panel("a", image, truth, predicted), Panel("b", None, None, predicted)], COSIA, "title")
    colours = {tuple(colour) for colour in (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    assert {(0x55, 0xFF, 0x00), (0x15, 0x53, 0xAE), (200, 30, 30)} <= colours
    assert [item.name for item in tmp_path.iterdir()] == ["panels.png"]
