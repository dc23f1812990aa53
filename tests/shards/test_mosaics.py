"""Rasters of any size cut into patches: grids, coordinate systems, series, keys and bytes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from mosaic_rasters import (
    LEFT,
    SENSORS,
    TOP,
    describe,
    direct,
    noise,
    open_catalogue,
    positions,
    read_back,
    roofs,
    shard,
    write,
    write_three,
)
from rasterio.transform import Affine
from small_shards import contents

from bocage.shards.errors import InputError
from bocage.shards.write.writer import write_shards


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


def test_heights_in_the_coordinate_system_make_no_other_site(tmp_path: Path) -> None:
    corner = (0.2, 650_000, 6_860_000)
    write(tmp_path / "ortho/a.tif", noise(3, 400, 400), *corner, "EPSG:2154+5720", GEOTIFF_VERSION="1.1")
    write(tmp_path / "label/a.tif", roofs(400, 400), *corner, "EPSG:2154")
    catalogue = open_catalogue(tmp_path, describe("ORTHO", label=True))
    assert catalogue.keys() == ["0000-0000"] and not catalogue.report().notes
    assert sorted(catalogue.patch(0).sources) == ["ORTHO", "ROOFS"]


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
    regions = {
        "a-0000-0000": "32631_6252_62524",
        "a-0000-0001": "32631_6253_62524",
    }  # UTM metres are 0.04 % longer on the ground
    regions |= {"b-0000-0000": "32631_6265_62524", "b-0000-0001": "32631_6266_62524"}
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
