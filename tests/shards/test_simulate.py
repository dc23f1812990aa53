"""The simulator: FLAIR-HUB's format, determinism, and agreement between sensors."""

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio

from bocage.shards.classes import COSIA, LPIS_1, LPIS_2, LPIS_3
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Band, Modality, SimulatedSensor
from bocage.shards.simulate.noise import generator
from bocage.shards.simulate.surfaces import Palette, crop_surface
from bocage.shards.simulate.tree import SPLITS, image_date, plan_patches, render_patch, series_dates, write_tree
from bocage.tools.main import main

PATCHES, SEED, DATES = 16, 3, (20, 24)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:  # written once for all tests, in a few seconds
    root = tmp_path_factory.mktemp("sample")
    write_tree(root, patches=PATCHES, seed=SEED, dates=DATES)
    return root


def read(root: Path, index: int, name: str) -> np.ndarray:
    """Array of one patch; series as (T, C, H, W)."""
    modality = FLAIR_HUB[name]
    with rasterio.open(plan_patches(PATCHES, SEED)[index].path(root, modality)) as file:
        array = file.read()
    return array.reshape(-1, len(modality.bands), *array.shape[1:]) if modality.has_time_axis else array


def read_all(root: Path, name: str) -> np.ndarray:
    return np.stack([read(root, index, name) for index in range(PATCHES)])


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.tif"))}


def cells(field: np.ndarray, size: int = 10) -> np.ndarray:
    """Mean of a (512, 512) field in size x size cells."""
    edges = np.arange(size) * field.shape[0] // size
    sums = np.add.reduceat(np.add.reduceat(field.astype(float), edges, 0), edges, 1)
    counts = np.diff(np.append(edges, field.shape[0]))
    return sums / np.outer(counts, counts)


# Format


def test_names_shapes_dtypes_and_georeferencing(tree: Path) -> None:
    pattern = re.compile(r"(D\d{3}-(?:\d{4}|195X)_([A-Z0-9_-]+))/([A-Z]{2}-S\d-\d+)/\1_\3_\d+-\d+\.tif")
    matches = [pattern.fullmatch(str(path.relative_to(tree))) for path in tree.rglob("*.tif")]
    assert all(matches)
    assert len(matches) == PATCHES * len(FLAIR_HUB)
    assert all(("195X" in match[1]) == FLAIR_HUB[match[2]].historical for match in matches if match)
    for patch in plan_patches(PATCHES, SEED)[:3]:
        for modality in FLAIR_HUB.values():
            with rasterio.open(patch.path(tree, modality)) as file:
                assert file.crs.to_epsg() == 2154
                assert file.dtypes[0] == modality.dtype
                assert file.compression.name == "lzw"
                assert (file.height, file.width) == (modality.size, modality.size)
                expected = (modality.gsd, 0.0, patch.corner[0], 0.0, -modality.gsd, patch.corner[1])
                assert file.transform[:6] == pytest.approx(expected, abs=1e-6)
                source = FLAIR_HUB[modality.mask_of] if modality.mask_of else modality
                dates = len(series_dates(patch, source, DATES)) if modality.has_time_axis else 1
                assert file.count == dates * len(modality.bands)


def test_neighbours_touch_and_share_one_terrain() -> None:
    patches = plan_patches(32, SEED)
    first = [patch for patch in patches if patch.roi_number == patches[0].roi_number]
    assert [patch.position for patch in first] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = [tuple(map(int, patch.grid_indices.split("-"))) for patch in first]
    assert np.subtract(rows[3], rows[0]).tolist() == [1, 1]
    assert np.subtract(first[3].corner, first[0].corner) == pytest.approx([102.4, -102.4])
    left, right = (next(render_patch(patch, FLAIR_HUB, {"DEM_ELEV"}, DATES))[1] for patch in first[:2])
    assert np.abs(left[1, :, -1] - right[1, :, 0]).max() < 0.5


def test_metadata(tree: Path) -> None:
    folder = tree / "GLOBAL_ALL_MTD"
    keys = [patch.key for patch in plan_patches(PATCHES, SEED)]
    assert len({path.name for path in folder.iterdir()}) == 7
    for name in ("SENTINEL2", "SENTINEL1-ASC", "SENTINEL1-DESC"):
        meta, _, geometry, (ids, texts) = pyogrio.raw.read(folder / f"GLOBAL_{name}_MTD_DATES.gpkg")
        assert list(meta["fields"]) == ["patch_id", "acquisition_dates"]
        assert list(ids) == keys
        assert meta["crs"] == "EPSG:2154"
        assert all(geometry)
        for index in range(3):
            dates = json.loads(texts[index])
            assert list(dates) == [str(number) for number in range(1, len(dates) + 1)]
            days = [datetime.datetime.strptime(date, "%Y%m%d") for date in dates.values()]
            assert days == sorted(days)
            assert len(dates) == len(read(tree, index, f"{name}_TS"))
    for name in ("AERIAL", "AERIAL-RLT", "SPOT"):
        meta, _, _, (_, texts) = pyogrio.raw.read(folder / f"GLOBAL_{name}_MTD_DATES.gpkg")
        assert list(meta["fields"]) == ["patch_id", "date"]
        assert all(re.fullmatch(r"(19|20)\d{6}", text) for text in texts)
    meta, _, _, columns = pyogrio.raw.read(folder / "GLOBAL_ALL_MTD_SPLIT.gpkg")
    assert tuple(meta["fields"]) == ("patch_id", *SPLITS)
    assert set(columns[1]) == {"train", "valid", "test"}


def test_historical_dates_sometimes_lack_the_day(tmp_path: Path) -> None:
    write_tree(tmp_path, patches=8, seed=0, registry=FLAIR_HUB.subset(["AERIAL-RLT_PAN"]))
    *_, (_, texts) = pyogrio.raw.read(tmp_path / "GLOBAL_ALL_MTD" / "GLOBAL_AERIAL-RLT_MTD_DATES.gpkg")
    assert {text[6:] == "00" for text in texts} == {True, False}


# Determinism


def test_content_does_not_depend_on_workers_or_number_of_patches(tmp_path: Path) -> None:  # slow: two processes start
    registry = FLAIR_HUB.subset(["AERIAL_RGBI", "SENTINEL2_TS", "SENTINEL1-ASC_TS", "ALL_LABEL-LPIS"])
    write_tree(tmp_path / "one", patches=3, seed=7, registry=registry)
    write_tree(tmp_path / "two", patches=3, seed=7, registry=registry, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    few, many = plan_patches(8, 7), plan_patches(40, 7)
    assert set(few) <= set(many)


def test_another_seed_gives_another_scene() -> None:
    images = [next(render_patch(plan_patches(1, seed)[0], FLAIR_HUB, {"SPOT_RGBI"}, DATES))[1] for seed in (0, 1)]
    assert not np.array_equal(images[0], images[1])


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    registry = FLAIR_HUB.subset(["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"])
    write_tree(tmp_path, patches=2, seed=1, registry=registry)
    before = contents(tmp_path)
    deleted = next(tmp_path.rglob("*_SENTINEL2_MSK-SC_*.tif"))
    untouched = next(tmp_path.rglob("*_SPOT_RGBI_*.tif"))
    deleted.unlink()
    modified = untouched.stat().st_mtime_ns
    write_tree(tmp_path, patches=2, seed=1, registry=registry)
    assert contents(tmp_path) == before
    assert untouched.stat().st_mtime_ns == modified


def test_other_folders_and_other_parameters_are_rejected(tmp_path: Path) -> None:
    registry = FLAIR_HUB.subset(["SPOT_RGBI"])
    write_tree(tmp_path / "sample", patches=1, seed=1, registry=registry)
    with pytest.raises(InputError, match="other parameters"):
        write_tree(tmp_path / "sample", patches=1, seed=2, registry=registry)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not a sample"):
        write_tree(tmp_path / "foreign", patches=1, seed=1, registry=registry)
    mistakes: list[dict[str, Any]] = [{"patches": 0}, {"gaps": 1.5}, {"workers": 0}, {"dates": (5, 4)}]
    for wrong in mistakes:
        with pytest.raises(InputError, match=next(iter(wrong))):
            write_tree(tmp_path / "new", **{"patches": 1, "seed": 0, **wrong})
    assert not (tmp_path / "new").exists()


# Agreement between sensors


def test_surface_model_is_above_terrain_at_buildings_and_trees(tree: Path) -> None:
    cover = read_all(tree, "AERIAL_LABEL-COSIA")[:, 0]
    surface, terrain = read_all(tree, "DEM_ELEV").swapaxes(0, 1)
    height = surface - terrain
    names = COSIA.classes
    assert np.median(height[cover == names.index("building")]) > 2.5
    assert np.median(height[cover == names.index("deciduous")]) > 2.0
    for flat in ("impervious", "pervious", "herbaceous", "swimming pool"):
        assert abs(np.median(height[cover == names.index(flat)])) < 0.5


def test_vegetation_is_bright_in_the_near_infrared(tree: Path) -> None:
    cover = read_all(tree, "AERIAL_LABEL-COSIA")[:, 0]
    red, _, _, infrared = read_all(tree, "AERIAL_RGBI").astype(float).swapaxes(0, 1)
    index = (infrared - red) / (infrared + red + 1)
    median = {
        name: np.median(index[cover == COSIA.classes.index(name)]) for name in ("deciduous", "building", "impervious")
    }
    assert median["deciduous"] > median["building"] + 0.2
    assert median["deciduous"] > median["impervious"] + 0.2


def test_no_single_cue_tells_buildings() -> None:
    """Roofs share their materials with paved and bare ground."""
    patches = [patch for patch in plan_patches(64, 0) if patch.domain.region == "suburb"][:4]
    colours: dict[str, list[np.ndarray]] = {"building": [], "impervious": []}
    for patch in patches:
        arrays = dict(render_patch(patch, FLAIR_HUB, {"AERIAL_RGBI", "AERIAL_LABEL-COSIA"}, DATES))
        image, label = arrays.values()
        for name, values in colours.items():
            values.append(image[0][label[0] == COSIA.classes.index(name)])
    building, paved = (np.concatenate(values) for values in colours.values())
    low, high = np.percentile(paved, (5, 95))
    assert 0.2 < np.mean((building > low) & (building < high)) < 0.98


def test_spot_and_aerial_images_agree(tree: Path) -> None:
    sensor = FLAIR_HUB["AERIAL_RGBI"].sensor
    correlations = []
    for index in range(PATCHES):
        aerial = (np.maximum(read(tree, index, "AERIAL_RGBI") - sensor.offset, 0) / sensor.gain) ** (1 / sensor.gamma)
        spot = read(tree, index, "SPOT_RGBI")
        coarse = aerial.reshape(4, 64, 8, 64, 8).mean((2, 4))
        correlations.append(np.corrcoef(coarse[0].ravel(), spot[0].ravel())[0, 1])
    # Dates differ, and so do crops: only the median is tested.
    assert np.median(correlations) > 0.6


def test_pixels_under_the_cloud_mask_are_bright(tree: Path) -> None:
    blue = np.concatenate([read(tree, index, "SENTINEL2_TS")[:, 0].ravel() for index in range(PATCHES)])
    mask = np.concatenate([read(tree, index, "SENTINEL2_MSK-SC") for index in range(PATCHES)])
    snow, cloud = mask[:, 0].ravel(), mask[:, 1].ravel()
    assert mask.max() <= 100
    assert np.median(blue[cloud > 90]) > 3 * np.median(blue[(cloud == 0) & (snow == 0)])
    assert np.corrcoef(cloud, blue)[0, 1] > 0.8
    assert 0.1 < np.mean(cloud > 50) < 0.6
    assert (snow > 50).any()


def test_water_is_dark_and_buildings_are_bright_in_radar(tree: Path) -> None:
    cover = read_all(tree, "AERIAL_LABEL-COSIA")[:, 0]
    for name in ("SENTINEL1-ASC_TS", "SENTINEL1-DESC_TS"):
        vertical, cross = [], []
        built, water = [], []
        for index in range(PATCHES):
            mean = read(tree, index, name).mean(0)
            vertical.append(mean[0].ravel())
            cross.append(mean[1].ravel())
            built.append(cells(cover[index] == COSIA.classes.index("building")).ravel())
            water.append(cells(cover[index] == COSIA.classes.index("water")).ravel())
        vv, vh = np.concatenate(vertical), np.concatenate(cross)
        assert 0.05 < vv.mean() < 0.2
        assert 0.008 < vh.mean() < 0.04
        assert vv[np.concatenate(built) > 0.3].mean() > 1.5 * vv.mean()
        assert vv[np.concatenate(water) > 0.6].mean() < 0.5 * vv.mean()


def test_the_historical_image_differs_from_the_present_one(tree: Path) -> None:
    now = read_all(tree, "AERIAL_RGBI")[:, 0].astype(float)
    then = read_all(tree, "AERIAL-RLT_PAN")[:, 0].astype(float)
    correlations = [
        np.corrcoef(cells(a, 64).ravel(), cells(b, 64).ravel())[0, 1] for a, b in zip(now, then, strict=True)
    ]
    assert 0.02 < np.mean(correlations) < 0.9


def test_lpis_levels_follow_the_hierarchy(tree: Path) -> None:
    labels = read_all(tree, "ALL_LABEL-LPIS")
    assert LPIS_2.parents is not None
    assert LPIS_3.parents is not None
    assert np.array_equal(np.array(LPIS_3.parents)[labels[:, 2]], labels[:, 1])
    assert np.array_equal(np.array(LPIS_2.parents)[labels[:, 1]], labels[:, 0])
    assert len(np.unique(labels[:, 2])) >= 10
    cover = read_all(tree, "AERIAL_LABEL-COSIA")[:, 0]
    assert np.array_equal(cover == COSIA.classes.index("vineyard"), labels[:, 0] == LPIS_1.classes.index("vineyard"))


@pytest.mark.parametrize(
    ("first", "second", "summer"),
    [
        ("winter-wheat", "winter-barley", 225.0),
        ("winter-wheat", "triticale", 225.0),
        ("maize", "soy", 222.0),
        ("maize", "sunflower", 213.0),
    ],
)
def test_similar_crops_are_separable_only_over_time(first: str, second: str, summer: float) -> None:
    """One summer image does not separate the parcels of two such crops; a year of NDVI does."""
    random = generator("parcels")
    count = 60
    surfaces = [crop_surface(name, random, "brown soil", 0.0, 0.0) for name in (first, second) for _ in range(count)]
    palette = Palette(surfaces)

    def separation(values: np.ndarray, noise: float) -> np.ndarray:
        """Distance between the means of the crops in standard deviations, (..., parcels) -> (...)."""
        one, two = values[..., :count], values[..., count:]
        return np.abs(one.mean(-1) - two.mean(-1)) / np.sqrt(0.5 * (one.var(-1) + two.var(-1)) + noise**2)

    aerial = palette.reflectance(np.array([summer]), np.array([0.3]), [650.0, 550.0, 460.0, 840.0])[0][0]
    assert separation(aerial.T, noise=0.02).max() < 1.6
    days = np.arange(5.0, 365.0, 10.0)
    red, infrared = np.moveaxis(palette.reflectance(days, np.full(len(days), 0.4), [665.0, 842.0])[0], -1, 0)
    assert separation((infrared - red) / (infrared + red), noise=0.01).max() > 3.0


# Registry


def test_new_sensors_need_only_a_registry_entry(tmp_path: Path) -> None:
    sharpened = Modality(
        name="NEW-IMAGE_GR",
        role="image",
        bands=(
            Band(name="G", quantity="reflectance", wavelength=500.0),
            Band(name="R", quantity="reflectance", wavelength=700.0),
        ),
        dtype="uint16",
        gsd=0.8,
        size=128,
        codec="reflectance",
        groups=(("G", "R"),),
        dates_table="NEW-IMAGE",
        sensor=SimulatedSensor(gain=10_000.0, noise=20.0),
    )
    revisit = Modality(
        name="NEW-RADAR_TS",
        role="series",
        bands=(Band(name="VV", quantity="backscatter_vv"), Band(name="NIR", quantity="reflectance", wavelength=860.0)),
        dtype="float32",
        gsd=25.6,
        size=4,
        codec="float",
        groups=(("VV",), ("NIR",)),
        dates_table="NEW-RADAR",
    )
    registry = FLAIR_HUB.subset(["AERIAL_RGBI"]).with_modality(sharpened).with_modality(revisit)
    write_tree(tmp_path, patches=2, seed=4, registry=registry)
    patch = plan_patches(2, 4)[0]
    with rasterio.open(patch.path(tmp_path, sharpened)) as file:
        image = file.read()
    with rasterio.open(patch.path(tmp_path, FLAIR_HUB["AERIAL_RGBI"])) as file:
        aerial = file.read(2).reshape(128, 4, 128, 4).mean((1, 3))
    assert image.shape == (2, 128, 128)
    assert image.dtype == np.uint16
    assert np.corrcoef(image[0].ravel(), aerial.ravel())[0, 1] > 0.5
    with rasterio.open(patch.path(tmp_path, revisit)) as file:
        assert file.count == 2 * len(series_dates(patch, revisit, (20, 35)))
        assert np.isfinite(file.read()).all()
    assert (tmp_path / "GLOBAL_ALL_MTD" / "GLOBAL_NEW-IMAGE_MTD_DATES.gpkg").is_file()
    assert image_date(patch, sharpened).year == patch.domain.year


# Missing modalities, and the command


def test_missing_modalities(tmp_path: Path) -> None:
    registry = FLAIR_HUB.subset(
        ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC", "SENTINEL1-ASC_TS", "AERIAL_LABEL-COSIA"]
    )
    write_tree(tmp_path / "some", patches=16, seed=0, registry=registry, gaps=0.5)
    present = np.array(
        [[patch.path(tmp_path / "some", m).exists() for m in registry.values()] for patch in plan_patches(16, 0)]
    )
    spot, series, mask, radar, label = present.T
    assert label.all()
    assert np.array_equal(series, mask)
    inputs = np.stack((spot, series, radar))
    assert 0.25 < inputs.mean() < 0.85
    assert inputs.any(0).all()
    write_tree(tmp_path / "all", patches=2, seed=0, registry=registry, gaps=1.0)
    assert len(list((tmp_path / "all").rglob("*.tif"))) in range(4, 7)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sample"
    assert main(["sample", str(out), "--patches", "1", "--seed", "2"]) == 0
    assert "1 patch in" in capsys.readouterr().out
    assert len(list(out.rglob("*.tif"))) == len(FLAIR_HUB)
    assert main(["sample", str(out), "--patches", "1", "--seed", "3"]) == 2
    assert "other parameters" in capsys.readouterr().err
    some = ["AERIAL_RGBI", "AERIAL_LABEL-COSIA"]
    assert main(["sample", str(tmp_path / "some"), "--patches", "1", "--seed", "2", "--modalities", *some]) == 0
    for path in (tmp_path / "some").rglob("*.tif"):  # the content does not depend on the other modalities
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "some")).read_bytes()
    assert len(list((tmp_path / "some").rglob("*.tif"))) == 2
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "wrong"), "--modalities", "SPOT"]) == 2
    assert "unknown modality 'SPOT'" in capsys.readouterr().err


def test_command_does_not_import_torch() -> None:
    code = "import sys, bocage.tools.main, bocage.tools.sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rois_of_a_domain_never_overlap() -> None:
    # 500 ROIs per domain: more than the 400 cells of one grid.
    patches = [patch for patch in plan_patches(16_000, SEED) if patch.cell == 0]
    side = 2 * FLAIR_HUB.patch_size
    for domain in {patch.domain.name for patch in patches}:
        corners = np.array([patch.corner for patch in patches if patch.domain.name == domain])
        distance = np.abs(corners[:, None] - corners[None]).max(axis=2)
        assert len(corners) == 500
        assert distance[~np.eye(500, dtype=bool)].min() >= side
