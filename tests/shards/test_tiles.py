"""Folders of tiles become shards by a description; wrong tiles and descriptions are named."""

import itertools
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from bocage.recipes.loader import config_from_dict, load_dataset
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.verify import verify
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.read.patches import TreePatches
from bocage.shards.source.described.description import DatasetDescription, default_unit
from bocage.shards.source.described.file_patterns import FilePattern, list_files, plain_name
from bocage.shards.source.described.ground import metres_per_unit, utm_crs
from bocage.shards.source.described.open import open_described
from bocage.shards.write.writer import write_shards

SIZE, PIXEL = 32, 0.5
SENSOR: dict[str, Any] = {
    "files": "{site}/image/{tile}.tif",
    "bands": {"R": 650, "G": 550, "B": 460},
    "dtype": "uint8",
    "pixel": PIXEL,
}
LABEL: dict[str, Any] = {
    "files": "{site}/label/{tile}.tif",
    "pixel": PIXEL,
    "classes": {0: "background", 7: "roof"},
    "ignore": [255],
}


def image(seed: int = 0, bands: int = 3, dtype: str = "uint8", size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, (bands, size, size)).astype(dtype)


def mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 7, 255], np.uint8), (1, SIZE, SIZE))


def write_tile(
    path: Path,
    array: np.ndarray,
    column: int = 0,
    *,
    crs: str | None = "EPSG:32631",
    pixel: float = PIXEL,
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    corner = Affine(pixel, 0, 500_000 + column * SIZE * pixel, 0, -pixel, 5_000_000)
    profile = {"count": len(array), "height": array.shape[1], "width": array.shape[2], "dtype": array.dtype.name}
    options = {"driver": "GTiff", "crs": crs, "transform": corner, **options}
    with rasterio.open(path, "w", **profile, **options) as file:
        file.write(array)
    return path


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Two sites of four neighbouring tiles each; the last tile of each has no label."""
    for site in ("north", "south"):
        for column in range(4):
            write_tile(tmp_path / f"tiles/{site}/image/t{column}.tif", image(column), column)
            if column < 3:
                write_tile(tmp_path / f"tiles/{site}/label/t{column}.tif", mask(column), column)
    return tmp_path / "tiles"


def description(**changes: Any) -> DatasetDescription:
    values = {
        "name": "Test tiles",
        "patch": SIZE * PIXEL,
        "domain": "{site}",
        "sensors": {"RGB": {**SENSOR, **changes.pop("sensor", {})}},
        "labels": {"ROOF": {**LABEL, **changes.pop("label", {})}},
        **changes,
    }
    return config_from_dict(DatasetDescription, values, "test")


def shard(tiles: Path, out: Path, **changes: Any) -> Manifest:
    max_bad = changes.pop("max_bad", 0.0)
    return write_shards(open_described(tiles, description(**changes), tiles), out, max_bad=max_bad)


def test_tiles_come_back_bit_for_bit(tiles: Path, tmp_path: Path) -> None:
    manifest = shard(tiles, tmp_path / "shards")
    assert len(manifest) == 8 and manifest.counts["present"] == {"RGB": 8, "ROOF": 6}
    assert manifest.dataset.name == "Test tiles"
    assert manifest.registry.patch_size == pytest.approx(16.0)
    assert manifest.registry["ROOF"].schemes[0].classes == ("background", "roof", "ignored")
    assert manifest.registry["ROOF"].schemes[0].scored == (0, 1)
    modalities = list(manifest.registry.values())
    for batch in evaluation_batches(manifest, np.arange(8), modalities, batch_size=8):
        for row, key in enumerate(batch.keys):
            site, _, tile = key.partition("_")
            column = int(tile[1:])
            np.testing.assert_array_equal(batch.values["RGB"][row].numpy(), image(column))
            record = manifest.row(row)
            assert (record["crs"], record["side"]) == ("EPSG:32631", 16.0)
            assert record["left"] == 500_000 + column * 16 and record["roi"] == record["domain"] == site
            if column < 3:
                stored = np.searchsorted([0, 7, 255], mask(column))
                np.testing.assert_array_equal(batch.values["ROOF"][row].numpy(), stored)
    assert verify(manifest.path).sound


def test_two_workers_write_the_same_bytes_as_one_wherever_the_tiles_are(tiles: Path, tmp_path: Path) -> None:
    one = shard(tiles, tmp_path / "one")
    moved = tmp_path / "moved"
    shutil.move(tiles, moved)
    catalogue = open_described(moved, description(), moved)
    two = write_shards(catalogue, tmp_path / "two", max_bad=0.0, workers=2)
    assert [item.sha256 for item in one.shards] == [item.sha256 for item in two.shards]
    assert one.digest == two.digest


@pytest.mark.parametrize(("extension", "driver"), [("png", "PNG"), ("PNG", "PNG")])
def test_pictures_with_and_without_a_world_file(tmp_path: Path, extension: str, driver: str) -> None:
    for column in range(2):
        write_tile(tmp_path / f"tiles/{column}.{extension}", image(column), driver=driver, crs=None, transform=None)
        if column == 1:  # centre of the upper-left pixel
            text = f"{PIXEL}\n0\n0\n-{PIXEL}\n{600_000 + PIXEL / 2}\n{4_000_000 - PIXEL / 2}\n"
            (tmp_path / "tiles/1.pgw").write_text(text)
    files = "{key}.png"
    manifest = shard(
        tmp_path / "tiles", tmp_path / "out", sensor={"files": files}, labels={}, domain="", crs="EPSG:32631"
    )
    rows = {row["key"]: row for row in map(manifest.row, range(2))}
    assert (rows["0"]["left"], rows["0"]["top"]) == (0.0, 0.0)
    assert (rows["1"]["left"], rows["1"]["top"], rows["1"]["crs"]) == (600_000.0, 4_000_000.0, "EPSG:32631")


def test_pixels_of_web_map_tiles_are_measured_on_the_ground(tmp_path: Path) -> None:
    """A Mercator metre at 60 degrees north is half a metre on the ground."""
    top = 8_400_000.0
    transform = Affine(1.0, 0, 1_000_000, 0, -1.0, top)
    write_tile(tmp_path / "tiles/a.tif", image(), crs="EPSG:3857", transform=transform)
    sensor = {"files": "{key}.tif", "pixel": 0.5}
    manifest = shard(tmp_path / "tiles", tmp_path / "out", sensor=sensor, labels={}, domain="")
    assert manifest.row(0)["side"] == SIZE  # in units of the CRS
    with pytest.raises(InputError, match=r"a\.tif: pixels of 0\.5\d* m on the ground, but the description has 1 m"):
        shard(tmp_path / "tiles", tmp_path / "no", sensor={**sensor, "pixel": 1.0}, patch=32, labels={}, domain="")


def test_several_coordinate_systems_regions_by_block_and_splits(tiles: Path, tmp_path: Path) -> None:
    for site, column in itertools.product(("east", "west"), range(4)):  # so that all blocks have 4 tiles
        write_tile(tiles / f"{site}/image/t{column}.tif", image(column), column, crs="EPSG:32632")
    splits = {
        "split_site": {"by": "domain", "train": ["north"], "valid": ["east"], "test": "rest"},
        "split_block": {"by": "block", "train": 0.5, "test": 0.5, "allow_mixed_regions": False},
        "split_tile": {"by": "tile", "train": ["t0"], "test": "rest", "allow_mixed_regions": True},
    }
    manifest = shard(tiles, tmp_path / "out", blocks=32, splits=splits)
    rows = [manifest.row(row) for row in range(16)]
    sites = {"north": "train", "east": "valid", "south": "test", "west": "test"}
    assert {row["domain"]: row["split_site"] for row in rows} == sites
    assert {row["crs"] for row in rows} == {"EPSG:32631", "EPSG:32632"}
    regions = {row["roi"] for row in rows}
    assert all(region.count("/") == 1 for region in regions) and len(regions) > 3
    values = [row["split_block"] for row in rows]
    assert values.count("train") == 8 and values.count("test") == 8
    assert all(len({row["split_block"] for row in rows if row["roi"] == region}) == 1 for region in regions)
    assert sum(row["split_tile"] == "train" for row in rows) == 4


def test_bad_tiles_are_left_out_of_blocks(tiles: Path, tmp_path: Path) -> None:
    splits = {"split_block": {"by": "block", "train": 0.5, "test": "rest"}}
    changes: dict[str, Any] = {"blocks": 32, "splits": splits}
    (tiles / "south/image/t1.tif").write_bytes(b"")
    write_tile(tiles / "south/image/t3.tif", image(), 3, crs="EPSG:4326")
    write_tile(tiles / "north/image/t3.tif", image(), crs=None, transform=None)  # its only file
    with pytest.raises(InputError, match=r"--max-bad allows 1: .*t\d\.tif"):
        shard(tiles, tmp_path / "no", max_bad=0.1, **changes)
    [note] = [
        note for note in open_described(tiles, description(**changes), tiles).report().warnings() if "block" in note
    ]
    assert note.startswith("3 patches without a block cannot be read, e.g. ")
    manifest = shard(tiles, tmp_path / "out", max_bad=0.5, **changes)
    reasons = {"south_t1": "cannot be read", "south_t3": "in degrees", "north_t3": "has no position, so blocks of 32 m"}
    assert len(manifest) == 5 and set(manifest.skipped) == set(reasons)
    for key, reason in reasons.items():
        assert f"{key.replace('_', '/image/')}.tif: " in manifest.skipped[key] and reason in manifest.skipped[key]
    for path in tiles.glob("*/*/*.tif"):
        write_tile(path, image() if path.parent.name == "image" else mask(), crs=None, transform=None)
    with pytest.raises(InputError, match=r"t0\.tif: has no position, so blocks of 32 m cannot be made"):
        shard(tiles, tmp_path / "none", max_bad=1.0, **changes)


def test_blocks_of_two_coordinate_systems_are_two(tmp_path: Path) -> None:
    for crs in ("EPSG:32631", "EPSG:32632"):
        write_tile(tmp_path / f"tiles/{crs[-5:]}.tif", image(), crs=crs)
    catalogue = open_described(
        tmp_path, description(sensor={"files": "tiles/{key}.tif"}, labels={}, domain="", blocks=32), tmp_path
    )
    assert catalogue.names.regions == ["Test-tiles/32631_15631_156312", "Test-tiles/32632_15631_156312"]


def test_a_series_is_a_file_for_each_date(tmp_path: Path) -> None:
    days = ["20210301", "20210105", "20210620"]
    for day in days:
        write_tile(tmp_path / f"tiles/a_{day}.tif", image(int(day) % 97, dtype="uint16", bands=2))
    sensor = {
        "role": "series",
        "files": "{key}_{date}.tif",
        "bands": {"VV": "backscatter_vv", "VH": "backscatter_vh"},
        "dtype": "uint16",
    }
    manifest = shard(tmp_path / "tiles", tmp_path / "out", sensor=sensor, labels={}, domain="")
    batch = next(evaluation_batches(manifest, np.arange(1), list(manifest.registry.values()), batch_size=1))
    expected = np.stack([image(int(day) % 97, dtype="uint16", bands=2) for day in sorted(days)])
    np.testing.assert_array_equal(batch.values["RGB"][0].numpy(), expected)
    assert manifest.row(0)["dates.RGB"] == [18632, 18687, 18798]


def test_labels_without_a_position_take_that_of_their_image(tiles: Path, tmp_path: Path) -> None:
    for path in sorted(tiles.glob("*/label/*.tif")):
        write_tile(path.with_suffix(".png"), mask(int(path.stem[1])), crs=None, transform=None, driver="PNG")
        path.unlink()
    label = {"files": "{site}/label/{tile}.png"}
    manifest = shard(tiles, tmp_path / "out", label=label, crs="EPSG:32631", blocks=32)
    assert manifest.counts["present"] == {"RGB": 8, "ROOF": 6}
    for row in map(manifest.row, range(8)):
        assert (row["left"], row["crs"]) == (500_000 + int(row["key"][-1]) * 16, "EPSG:32631")
    # The same the other way round.
    for path in sorted(tiles.glob("*/image/*.tif")):
        column = int(path.stem[1])
        write_tile(path.with_suffix(".png"), image(column), crs=None, transform=None, driver="PNG")
        write_tile(path.parent.parent / f"label/{path.name}", mask(column), column)
        path.unlink()
    sensor = {"files": "{site}/image/{tile}.png"}
    manifest = shard(tiles, tmp_path / "swapped", sensor=sensor, blocks=32)
    for row in map(manifest.row, range(8)):
        assert (row["left"], row["crs"]) == (500_000 + int(row["key"][-1]) * 16, "EPSG:32631")


def test_patches_from_files_lie_where_their_shards_do(tmp_path: Path) -> None:
    for column in range(3):
        write_tile(tmp_path / f"tiles/rgb/{column}.png", image(column), crs=None, transform=None, driver="PNG")
        place = column if column < 2 else 5
        write_tile(tmp_path / f"tiles/nir/{column}.tif", image(column, bands=1), place)
        write_tile(tmp_path / f"tiles/dem/{column}.tif", image(column, bands=1), column)
    changes: dict[str, Any] = {
        "labels": {},
        "domain": "",
        "sensors": {
            "RGB": {**SENSOR, "files": "rgb/{key}.png"},
            "NIR": {**SENSOR, "files": "nir/{key}.tif", "bands": {"N": 830}},
            "DEM": {**SENSOR, "files": "dem/{key}.tif", "bands": {"H": "surface_height"}},
        },
    }
    manifest = shard(tmp_path / "tiles", tmp_path / "out", max_bad=0.5, **changes)
    patches = TreePatches(open_described(tmp_path / "tiles", description(**changes), tmp_path))
    batches = patches.batches(np.arange(3), list(manifest.registry.values()), batch_size=2, workers=0)
    found = {place.key: (place.crs, place.left, place.top, place.side) for _, places in batches for place in places}
    rows = map(manifest.row, range(2))
    assert found == {row["key"]: (row["crs"], row["left"], row["top"], row["side"]) for row in rows}
    assert found["1"] == ("EPSG:32631", 500_016, 5_000_000, 16)
    assert patches.skipped == manifest.skipped and list(patches.skipped) == ["2"]


def test_dates_of_a_series_may_differ_by_rounding(tmp_path: Path) -> None:
    sensor = {"role": "series", "files": "{key}_{date}.tif"}
    for number, shift in enumerate((0.0, 1e-7)):
        corner = Affine(0.5, 0, 500_000 + shift, 0, -0.5, 5_000_000 - shift)
        write_tile(tmp_path / f"tiles/a_2021010{number + 1}.tif", image(), transform=corner)
    assert len(shard(tmp_path / "tiles", tmp_path / "out", sensor=sensor, labels={}, domain="")) == 1
    write_tile(tmp_path / "tiles/a_20210103.tif", image(), transform=Affine(0.5, 0, 500_000.1, 0, -0.5, 5_000_000))
    with pytest.raises(InputError, match=r"a_20210103\.tif: lies elsewhere than .*a_20210101\.tif, of the same series"):
        shard(tmp_path / "tiles", tmp_path / "no", sensor=sensor, labels={}, domain="")


def test_heights_in_the_coordinate_system_change_nothing(tmp_path: Path) -> None:
    for kind, array, crs in (("image", image(), "EPSG:2154+5720"), ("label", mask(), "EPSG:2154")):
        corner = Affine(0.5, 0, 650_000, 0, -0.5, 6_860_000)
        write_tile(tmp_path / f"tiles/a/{kind}/t.tif", array, crs=crs, transform=corner, GEOTIFF_VERSION="1.1")
    with rasterio.open(tmp_path / "tiles/a/image/t.tif") as file:
        assert file.crs.to_string() == "EPSG:5698"
    manifest = shard(tmp_path / "tiles", tmp_path / "out", blocks=32)
    assert manifest.row(0)["crs"] == "EPSG:2154"


def series_with_clouds(root: Path, key: str, days: list[str], cloud_days: list[str]) -> dict[str, Any]:
    """Write a series and its quality mask, whose values are the months; return the sensors."""
    for day in days:
        write_tile(root / f"s2/{key}_{day}.tif", image(int(day) % 97, dtype="uint16", bands=2))
    for day in cloud_days:
        write_tile(root / f"clouds/{key}_{day}.tif", np.full((1, SIZE, SIZE), int(day[4:6]), np.uint8))
    series = {"role": "series", "files": "s2/{key}_{date}.tif", "bands": {"R": 650, "N": 830}, "dtype": "uint16"}
    bands = {"cloud": "cloud_probability"}
    clouds = {"role": "mask", "mask_of": "S2", "files": "clouds/{key}_{date}.tif", "bands": bands, "dtype": "uint8"}
    return {"S2": {**series, "pixel": PIXEL}, "CLOUDS": {**clouds, "pixel": PIXEL}}


def test_masks_belong_to_the_dates_of_their_series(tmp_path: Path) -> None:
    days = ["20210105", "20210301", "20210620"]
    root = tmp_path / "tiles"
    series_with_clouds(root, "equal", days, days)
    series_with_clouds(root, "more", days[1:], days)
    series_with_clouds(root, "shifted", days, ["20210105", "20210302", "20210620"])
    sensors = series_with_clouds(root, "fewer", days, days[1:])
    write_tile(root / "clouds/alone_20210105.tif", np.zeros((1, SIZE, SIZE), np.uint8))
    catalogue = open_described(root, description(sensors=sensors, labels={}, domain=""), root)
    warnings = "\n".join(catalogue.report().warnings())
    assert "2 patches without CLOUDS, which lacks dates of S2, e.g. that of s2/fewer_20210105.tif" in warnings
    assert "2 files of CLOUDS left out: S2 has no image of the date, e.g. clouds/more_20210105.tif" in warnings
    manifest = write_shards(catalogue, tmp_path / "out", max_bad=0.0)
    batch = next(evaluation_batches(manifest, np.arange(4), list(manifest.registry.values()), batch_size=4))
    months = {
        key: np.unique(batch.values["CLOUDS"][row].numpy()).tolist()
        for row, key in enumerate(batch.keys)
        if batch.present["CLOUDS"][row]
    }
    assert {key: [month for month in found if month] for key, found in months.items()} == {
        "equal": [1, 3, 6],
        "more": [3, 6],
    }
    dates = [manifest.row(row) for row in range(4)]
    assert all(row["dates.CLOUDS"] in (row["dates.S2"], None) for row in dates)


def test_images_of_several_dates_are_patches_if_the_key_names_the_date(tmp_path: Path) -> None:
    for day in ("20210105", "20210301"):
        write_tile(tmp_path / f"tiles/a_{day}.tif", image(int(day) % 97))
    sensor = {"files": "{tile}_{date}.tif"}
    with pytest.raises(InputError, match="key a occurs twice for RGB"):
        shard(tmp_path / "tiles", tmp_path / "no", sensor=sensor, labels={}, domain="")
    manifest = shard(tmp_path / "tiles", tmp_path / "out", sensor=sensor, labels={}, domain="", key="{tile}_{date}")
    rows = [manifest.row(row) for row in range(2)]
    assert {row["key"]: row["dates.RGB"] for row in rows} == {"a_20210105": [18632], "a_20210301": [18687]}


def test_unused_bands_are_left_out_and_nodata_is_kept_apart(tmp_path: Path) -> None:
    array = image(bands=4)
    array[:, :4] = 0
    write_tile(tmp_path / "tiles/a.tif", array, nodata=0)
    bands = {"R": 650, "G": 550, "alpha": "unused", "NIR": 840}
    sensor = {"files": "{key}.tif", "bands": bands, "nodata": [0]}
    manifest = shard(tmp_path / "tiles", tmp_path / "out", sensor=sensor, labels={}, domain="")
    batch = next(evaluation_batches(manifest, np.arange(1), list(manifest.registry.values()), batch_size=1))
    np.testing.assert_array_equal(batch.values["RGB"][0].numpy(), array[[0, 1, 3]])
    mean, _ = manifest.statistics["RGB"]
    assert mean == pytest.approx(array[[0, 1, 3], 4:].mean(axis=(1, 2)))


@pytest.mark.parametrize("kind", ["alpha", "mask", "mask beside"])
def test_transparent_pixels_of_tiles_are_missing(tmp_path: Path, kind: str) -> None:
    hidden = np.zeros((SIZE, SIZE), bool)
    hidden[:5] = True
    array, labels = np.where(hidden, 0, image()), np.where(hidden, 3, mask())  # 3 is no class
    bands: dict[str, Any] = {"R": 650, "G": 550, "B": 460}
    for path, values in ((tmp_path / "tiles/a/image/t.tif", array), (tmp_path / "tiles/a/label/t.tif", labels)):
        if kind == "alpha":
            values = np.concatenate((values, np.where(hidden, 0, 255)[None]))
        write_tile(path, values.astype(np.uint8))
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "mask"), rasterio.open(path, "r+") as file:
            if kind == "alpha":
                file.colorinterp = [ColorInterp.gray] * (len(values) - 1) + [ColorInterp.alpha]
            else:
                file.write_mask(~hidden)
    assert (tmp_path / "tiles/a/image/t.tif.msk").exists() == (kind == "mask beside")
    if kind == "alpha":
        bands |= {"A": "unused"}
    with pytest.raises(
        InputError, match=r"image/t\.tif: 160 pixels are transparent or masked; name a nodata value, e.g"
    ):
        shard(tmp_path / "tiles", tmp_path / "no", sensor={"bands": bands})
    changes: dict[str, Any] = {"sensor": {"bands": bands, "nodata": [255]}}
    label = {"classes": {0: "a", 7: "b", 255: "c"}, "ignore": []}
    with pytest.raises(InputError, match=r"label/t\.tif: 160 pixels are .*; add a value to ignore"):
        shard(tmp_path / "tiles", tmp_path / "no", label=label, **changes)
    manifest = shard(tmp_path / "tiles", tmp_path / "out", **changes)
    batch = next(evaluation_batches(manifest, np.arange(1), list(manifest.registry.values()), batch_size=1))
    np.testing.assert_array_equal(batch.values["RGB"][0].numpy(), np.where(hidden, 255, array))
    expected = np.where(hidden, 2, np.searchsorted([0, 7, 255], labels))
    np.testing.assert_array_equal(batch.values["ROOF"][0].numpy(), expected)


@pytest.mark.parametrize("declared", [-32_768.0, -9999.0, np.nan])
def test_a_tag_that_the_nodata_values_cover_is_accepted(tmp_path: Path, declared: float) -> None:
    heights = image(dtype="float32")
    heights[1, 3, 4] = declared
    write_tile(tmp_path / "tiles/a.tif", heights, nodata=declared)
    sensor = {"files": "{key}.tif", "dtype": "float32", "nodata": [-9999, np.nan]}
    manifest = shard(tmp_path / "tiles", tmp_path / "out", sensor=sensor, labels={}, domain="")
    batch = next(evaluation_batches(manifest, np.arange(1), list(manifest.registry.values()), batch_size=1))
    np.testing.assert_array_equal(batch.values["RGB"][0].numpy(), heights)


@pytest.mark.parametrize(
    ("tile", "options", "message"),
    [
        (image(size=16), {}, "16 x 16 pixels, but a patch of RGB has 32 x 32"),
        (image(bands=4), {}, "4 bands, but the description has 3; name bands to leave out as unused"),
        (image(dtype="uint16"), {}, "dtype uint16, but the description has uint8"),
        (image(), {"pixel": 0.6}, "pixels of 0.6"),
        (image(), {"crs": "EPSG:4326"}, "coordinates in degrees"),
        (image(), {"transform": Affine(0.4, 0.3, 0, 0.3, -0.4, 0)}, "rotated or flipped"),
        (image(), {"transform": Affine(0.5, 0, 0, 0, 0.5, 0)}, "rotated or flipped"),
        (image(), {"transform": Affine(0.5, 0, 0, 0, -0.6, 0)}, "not square"),
        (image(), {"nodata": int(image()[0, 0, 0])}, "as nodata and holds it"),
    ],
)
def test_a_wrong_tile_is_named_and_left_out(
    tiles: Path, tmp_path: Path, tile: np.ndarray, options: dict[str, Any], message: str
) -> None:
    path = write_tile(tiles / "south/image/t3.tif", tile, 3, **options)
    with pytest.raises(InputError, match=r"t3\.tif") as error:
        shard(tiles, tmp_path / "none")
    assert message in str(error.value) and str(path) in str(error.value)
    manifest = shard(tiles, tmp_path / "rest", max_bad=0.2)
    assert len(manifest) == 7 and list(manifest.skipped) == ["south_t3"]
    assert message in manifest.skipped["south_t3"]


@pytest.mark.parametrize("kind", ["tiles", "rasters"])
@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
def test_complex_labels_are_named(tiles: Path, tmp_path: Path, dtype: str, kind: str) -> None:
    path = tiles / "south/label/t0.tif"
    with rasterio.open(path) as file:
        profile = {**file.profile, "dtype": dtype, "nodata": None}
    rasterio.open(path, "w", **profile).close()
    with pytest.raises(InputError, match=rf"t0\.tif: dtype {dtype}, but classes are integers"):
        shard(tiles, tmp_path / "none", kind=kind)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    array = image(dtype="float32")
    array[0, 3, 4] = value
    write_tile(tmp_path / "tiles/a.tif", array)
    write_tile(tmp_path / "tiles/b.tif", image(1, dtype="float32"), 1)
    sensor: dict[str, Any] = {"files": "{key}.tif", "dtype": "float32"}
    with pytest.raises(InputError, match=r"a\.tif: (NaN|infinite) values"):
        shard(tmp_path / "tiles", tmp_path / "out", sensor=sensor, labels={}, domain="")
    if np.isnan(value):
        sensor["nodata"] = [np.nan]
        assert len(shard(tmp_path / "tiles", tmp_path / "out2", sensor=sensor, labels={}, domain="")) == 2


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.full((1, SIZE, SIZE), 9, np.uint8), {}, "value 9 is neither a class nor ignored"),
        (mask().astype(np.float32), {}, "dtype float32, but classes are integers"),
        (mask(), {"crs": "EPSG:32632"}, "coordinates in EPSG:32632"),
        (mask(), {"transform": Affine(0.5, 0, 500_010, 0, -0.5, 5_000_000)}, "corners lie up to 10 from those of"),
        (mask(), {"transform": Affine(0.5, 0, 500_000.3, 0, -0.5, 5_000_000)}, "corners lie up to 0.3 from those of"),
        # 16.304 m instead of 16 m: the upper-left corners agree.
        (mask(), {"transform": Affine(0.5095, 0, 500_000, 0, -0.5095, 5_000_000)}, "corners lie up to 0.304 from"),
    ],
)
def test_a_label_that_does_not_fit_its_image_is_named(
    tiles: Path, tmp_path: Path, array: np.ndarray, options: dict[str, Any], message: str
) -> None:
    path = write_tile(tiles / "south/label/t0.tif", array, **options)
    with pytest.raises(InputError, match=message) as error:
        shard(tiles, tmp_path / "out", label={"pixel_tolerance": 0.02})
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 16.3}, "pixels of 0.5 m do not divide a patch of 16.3 m; use a patch of 16 or 16.5 m"),
        ({"patch": "wide"}, "give the side of a patch in metres, or as pixels, e.g. 512 px"),
        ({"sensor": {"files": "{site}/picture/{tile}.tif"}}, "no file matches"),
        ({"sensor": {"files": "{site}/image/{tile.tif"}}, "a brace is not closed"),
        ({"sensor": {"files": "../{tile}.tif"}}, "give a path below the source folder"),
        ({"sensor": {"files": "{site}/image/{block}.tif"}}, "the field block is computed"),
        ({"sensor": {"files": "{site}/image/{date}.tif"}}, "date 't0' is not of the form %Y%m%d"),
        ({"sensor": {"role": "series"}}, r"a series has a file for each date: add \{date\}"),
        ({"key": "{tile}"}, "key t0 (occurs twice|stands for two patches)"),
        ({"key": "{name}"}, "no field 'name'; fields: site, tile"),
        (
            {"splits": {"split_a": {"by": "colour", "test": ["red"]}}},
            "by=colour is no field of north_t0; fields: domain",
        ),
        (
            {"splits": {"split_a": {"by": "domain", "test": ["west"]}}},
            "domain 'west' is not in the dataset; it has north",
        ),
        (
            {"splits": {"split_a": {"by": "domain", "test": ["north"], "train": ["north"]}}},
            "north is listed as train and as test",
        ),
        (
            {"splits": {"split_a": {"by": "tile", "test": ["t0"], "train": "rest"}}},
            "region north is in test and in train",
        ),
        ({"splits": {"split_a": {"by": "file", "test": "none.txt"}}}, "none.txt: cannot be read"),
    ],
)
def test_a_wrong_description_is_refused_before_any_work(
    tiles: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        shard(tiles, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensor": {"dtype": "int32"}}, "dtype='int32' is none of uint8"),
        ({"sensor": {"bands": {}}}, "bands: name at least one"),
        ({"sensor": {"bands": {"R": "red"}}}, "bands.R='red' is neither a wavelength in nm nor one of"),
        ({"sensor": {"pixel": 0}}, "pixel: give the side of a pixel on the ground, in metres"),
        ({"sensor": {"size": 12}}, "size"),
        ({"sensor": {"role": "mask"}}, "mask_of: masks, and only they"),
        ({"sensor": {"role": "mask", "mask_of": "S2"}}, "bands of a mask are snow_probability and cloud_probability"),
        ({"label": {"classes": {}}}, "classes: name at least one"),
        ({"label": {"ignore": [7]}}, "ignore: 7 is the class 'roof' too"),
        ({"label": {"colours": {7: "red"}}}, "colours.7='red' is not a colour rrggbb"),
        ({"labels": {"RGB": LABEL}}, "RGB is a sensor and a label"),
        ({"labels": {"type": LABEL}}, "'type': torch has an attribute of this name"),
        ({"splits": {"sites": {"test": "rest"}}}, "names of splits begin with split_"),
        ({"splits": {"split_a": {"train": 0.7, "test": 0.5}}}, "add up to 1.2"),
        ({"splits": {"split_a": {"by": "block", "test": 0.5}}}, "by=block needs blocks"),
        ({"kind": "cubes"}, "kind='cubes' is none of tiles"),
        ({"name": ""}, "give the dataset a name"),
    ],
)
def test_impossible_values_name_their_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        description(**changes)
    assert message in str(error.value)


def test_fields_that_no_image_has_must_agree_too(tmp_path: Path) -> None:
    write_tile(tmp_path / "tiles/image/t.tif", image())
    for name in ("roof/2020", "wall/2021"):
        write_tile(tmp_path / f"tiles/{name}/t.tif", mask())
    labels = {name.upper(): {**LABEL, "files": f"{name}/{{year}}/{{tile}}.tif"} for name in ("roof", "wall")}
    changes: dict[str, Any] = {"sensor": {"files": "image/{tile}.tif"}, "labels": labels, "key": "{tile}"}
    with pytest.raises(InputError, match=r"key t stands for two patches: year is '2020', and '2021' for wall/2021/t"):
        open_described(tmp_path / "tiles", description(domain="", **changes), tmp_path)
    (tmp_path / "tiles/wall/2021").rename(tmp_path / "tiles/wall/2020")
    assert open_described(tmp_path / "tiles", description(domain="{year}", **changes), tmp_path).domains == ["2020"]


@pytest.mark.parametrize("what", ["domain", "region"])
def test_two_places_do_not_become_one(what: str, tmp_path: Path) -> None:
    for column, site in enumerate(("Saint Jean", "Saint-Jean")):
        write_tile(tmp_path / f"tiles/{site}/t{column}.tif", image(), column)
    changes: dict[str, Any] = {"sensor": {"files": "{site}/{tile}.tif"}, "labels": {}, "domain": "", what: "{site}"}
    with pytest.raises(InputError, match=rf"{what}: 'Saint Jean' and 'Saint-Jean' both become 'Saint-Jean' in shards"):
        open_described(tmp_path / "tiles", description(**changes), tmp_path)


def test_labels_without_an_image_and_other_files_are_counted(tiles: Path) -> None:
    write_tile(tiles / "south/label/t9.tif", mask())
    (tiles / "notes.txt").write_text("taken in May")
    catalogue = open_described(tiles, description(), tiles)
    warnings = "\n".join(catalogue.report().warnings())
    assert "left out: 1 of ROOF, e.g. south_t9" in warnings and "1 name not understood, e.g. notes.txt" in warnings
    assert "2 of 8 patches without ROOF" in warnings


def test_listed_keys_that_are_not_in_the_dataset_are_named(tiles: Path) -> None:
    (tiles / "train.txt").write_text("north_t0\nnorth_t1\nNorth_t2\nnorth-t3\n")
    (tiles / "test.txt").write_text("south_t0\n")
    split = {"by": "file", "train": "train.txt", "test": "test.txt", "allow_mixed_regions": True}
    catalogue = open_described(tiles, description(splits={"split_a": split}), tiles)
    [note] = [note for note in catalogue.report().warnings() if "keys" in note]
    assert note == f"2 of 4 keys of {tiles / 'train.txt'} are not in the dataset, e.g. North_t2, north-t3"


def test_an_empty_folder_and_damaged_files(tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file matches .*; the folder is empty"):
        shard(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="no such folder"):
        shard(tmp_path / "missing", tmp_path / "out")
    content = (tiles / "south/image/t1.tif").read_bytes()
    (tiles / "south/image/t1.tif").write_bytes(content[: len(content) // 2])
    (tiles / "south/image/t2.tif").write_bytes(b"")
    manifest = shard(tiles, tmp_path / "out", max_bad=0.3)
    assert sorted(manifest.skipped) == ["south_t1", "south_t2"]
    assert all("cannot be read" in reason for reason in manifest.skipped.values())


def test_the_fingerprint_follows_how_files_are_read(tiles: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        return open_described(tiles, description(**changes), tiles).fingerprint()

    assert fingerprint() == fingerprint()
    assert fingerprint(label={"classes": {7: "background", 0: "roof"}}) != fingerprint()
    assert fingerprint(label={"band": 2}) != fingerprint()
    bands = [{"A": "unused", "R": 650, "G": 550}, {"R": 650, "A": "unused", "G": 550}]
    assert len({fingerprint(sensor={"bands": names}) for names in bands}) == 2
    nodata = [fingerprint(sensor={"nodata": values}) for values in ([0, 255], [255, 0])]
    assert len({*nodata, fingerprint()}) == 3


def test_fractions_that_add_up_to_one_take_every_region(tiles: Path) -> None:
    for seed in range(8):
        split = {"by": "region", "train": 0.7, "valid": 0.15, "test": 0.15, "seed": seed}
        catalogue = open_described(tiles, description(splits={"split_a": split}), tiles)
        assert None not in catalogue.splits["split_a"].to_pylist()


def test_a_pattern_without_fields_is_refused_before_any_work(tiles: Path) -> None:
    write_tile(tiles / "one.tif", image())
    with pytest.raises(InputError, match="its key is empty: name a field in the pattern of RGB"):
        open_described(tiles, description(sensor={"files": "one.tif"}, labels={}, domain=""), tiles)


@pytest.mark.parametrize(("extension", "driver"), [("png", "PNG"), ("jpg", "JPEG")])
@pytest.mark.parametrize("kind", ["tiles", "rasters"])
def test_a_picture_that_is_cut_off_is_not_read(extension: str, driver: str, kind: str, tmp_path: Path) -> None:
    """GDAL reads the missing rows of a PNG as 0 by default."""
    for column in range(4):
        path = tmp_path / f"tiles/{column}.{extension}"
        write_tile(path, image(column, size=256), driver=driver, crs=None, transform=None)
        if column == 2:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sensor = {"files": f"{{tile}}.{extension}"}
    options = {"sensor": sensor, "labels": {}, "domain": "", "kind": kind, "patch": "256 px", "max_bad": 0.3}
    manifest = shard(tmp_path / "tiles", tmp_path / "out", **options)
    assert len(manifest) == 3
    assert [key.startswith("2") and "cannot be read" in reason for key, reason in manifest.skipped.items()] == [True]


def test_a_block_that_yaml_reads_as_a_number_is_named(tiles: Path, tmp_path: Path) -> None:
    rgb = "{RGB: {files: '{site}/image/{tile}.tif', bands: {R: 650, G: 550, B: 460}, dtype: uint8, pixel: 0.5}}"
    path = tmp_path / "dataset.yaml"
    text = f"name: x\npatch: 16\nblocks: 32\nsensors: {rgb}\n"
    splits = "splits: {{split_block: {{by: block, train: [{}], test: rest}}}}\n"
    name = open_described(tiles, description(labels={}, domain="", blocks=32), tiles).names.regions[0].split("/")[1]
    path.write_text(text + splits.format(name))
    number = name.replace("_", "")
    with pytest.raises(InputError, match=rf"'{number}' is not in the dataset, .*in quotes"):
        open_described(tiles, load_dataset(str(path), []), tmp_path)
    path.write_text(text + splits.format(f"'{name}'"))
    assert "train" in open_described(tiles, load_dataset(str(path), []), tmp_path).splits["split_block"].to_pylist()


def test_descriptions_are_read_from_yaml_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text(
        "name: a\npatch: 32 px\nsensors:\n  RGB: {files: '{key}.tif', bands: {R: 650}, dtype: uint8, pixel: 1}\n"
    )
    assert load_dataset(str(path), ["patch=16"]).patch_size == 16
    assert load_dataset(str(path), []).patch_size == 32
    for text, message in (
        ("- a\n", "a mapping of keys to values, not a list"),
        ("name: [\n", "not valid YAML"),
        ("ptch: 1\n", "unknown key 'ptch'; did you mean 'patch'"),
        ("name: a\n", "sensors: describe at least one image or series"),
        ("name: a\nsensors: {RGB: {pixle: 1}}\n", "unknown key 'sensors.RGB.pixle'; did you mean 'sensors.RGB.pixel'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError) as error:
            load_dataset(str(path), [])
        assert message in str(error.value) and "dataset.yaml" in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        load_dataset(str(tmp_path / "none.yaml"), [])


def test_patterns_match_whole_paths() -> None:
    pattern = FilePattern("{site}/image/{x}-{y}_{site}.tif")
    assert pattern.match("a/image/1-2_a.TIF") == {"site": "a", "x": "1", "y": "2"}
    assert pattern.match("a/image/1-2_b.tif") is None and pattern.match("b/a/image/1-2_a.tif") is None
    assert FilePattern("**/{key}.tif").match("a/b/c.tif") == {"key": "c"}
    assert FilePattern("*/{key}.*").match("a/b.png") == {"key": "b"}


def test_names_of_any_script_stay_different() -> None:
    assert plain_name("Été 2021/a") == "Ete-2021-a"
    assert plain_name("Ｌｉｌｌｅ №5 (centre)") == "Lille-No5-centre-"
    names = ["北京", "上海", "Ørsted", "Orsted", "Москва", "दिल्ली", "दिल्ला", "a b"]
    assert plain_name("北京") == "u5317u4eac" and len(set(map(plain_name, names))) == len(names)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", plain_name(name)) for name in names)
    marked = ["ば", "は", "ぱ", "край", "краи", "ά", "α", "कि", "की", "क्", "क"]
    assert len({plain_name(text) for text in marked}) == len(marked)
    assert plain_name("Île m̄") == plain_name(unicodedata.normalize("NFD", "Île m̄")) == "Ile-m"


def test_files_are_listed_in_a_fixed_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/2.tif", "b/1.tif", "a.tif", ".hidden/x.tif", "b/.y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/loop").symlink_to(tmp_path)
    assert list(list_files(tmp_path)) == ["a.tif", "b/1.tif", "b/2.tif"]
    for path in ("c/d/1.tif", "c/e/1.tif", "ca/1.tif"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert list(list_files(tmp_path, ["b", "c/d"])) == ["a.tif", "ca/", "b/1.tif", "b/2.tif", "c/e/", "c/d/1.tif"]


def test_ground_scale_of_projections() -> None:
    assert metres_per_unit("EPSG:3857", 9_519_926, 3_202_940) == pytest.approx(0.8842, abs=2e-4)
    assert metres_per_unit("EPSG:2154", 700_000, 6_600_000) == pytest.approx(1.0, abs=1e-3)
    assert metres_per_unit("EPSG:2263", 1_000_000, 200_000) == pytest.approx(0.3048, abs=1e-4)
    assert utm_crs(39.2, -6.1) == "EPSG:32737" and utm_crs(85.5, 27.6) == "EPSG:32645"
    with pytest.raises(InputError, match="gdalwarp -t_srs EPSG:32631"):
        metres_per_unit("EPSG:4326", 3.0, 45.0)
    with pytest.raises(InputError, match="not a coordinate reference system"):
        metres_per_unit("EPSG:0", 0.0, 0.0)
    for crs in ('LOCAL_CS["site",UNIT["metre",1]]', "EPSG:4978"):
        with pytest.raises(InputError, match="not a projected coordinate system") as error:
            metres_per_unit(crs, 3.0, 45.0)
        assert "degrees" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "role", "unit"),
    [(512, "image", 32), (256, "image", 32), (128, "image", 16), (64, "image", 8), (16, "image", 4), (10, "series", 5)],
)
def test_default_mask_units_leave_pairs_of_blocks(size: int, role: str, unit: int) -> None:
    assert default_unit(size, role) == unit
