"""The catalogue of a tree of folders: order, dates, splits, counts, and hints for wrong roots."""

from pathlib import Path

import numpy as np
import pytest
from small_tree import raster_path, series_date, write_table, write_tree

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue, read_csv_split

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"
SMALL = ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC", "AERIAL-RLT_PAN"]


def touch(root: Path, keys: list[str], *names: str) -> Path:
    """Create empty rasters, because the catalogue reads only names."""
    for key in keys:
        for name in names:
            path = raster_path(root, FLAIR_HUB[name], key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def days(year: int, month: int, day: int) -> int:
    return (np.datetime64(f"{year}-{month:02}-{day:02}") - np.datetime64("1970-01-01")).astype(int).item()


def test_real_patches_without_metadata() -> None:
    catalogue = FlairHubCatalogue.open(REAL)
    assert catalogue.keys() == ["D051-2019_UN-S0-15_1-1", "D055-2018_UF-S0-2_1-1", "D074-2020_UN-S0-3_1-1"]
    assert list(catalogue.registry) == ["AERIAL_RGBI", "AERIAL_LABEL-COSIA"]
    patch = catalogue.patch(0)
    assert (patch.domain, patch.roi) == ("D051-2019", "D051-2019/UN-S0-15")
    assert (patch.dates, patch.splits) == ({}, {})
    assert all(source.path.is_file() for source in patch.sources.values())
    assert catalogue.report().missing["DEM_ELEV"] == 3


def test_order_is_numeric_and_independent_of_the_modalities(tmp_path: Path) -> None:
    keys = ["D012-2019_AF-S1-2_2-10", "D012-2019_AF-S1-2_2-9", "D012-2019_AF-S1-10_0-0", "D004-2021_AA-S1-V18_1-0"]
    touch(tmp_path, keys[:3], "AERIAL_RGBI")
    touch(tmp_path, [keys[1], keys[3]], "DEM_ELEV")
    catalogue = FlairHubCatalogue.open(tmp_path)
    assert catalogue.keys() == [keys[3], keys[1], keys[0], keys[2]]
    assert [list(catalogue.patch(index).sources) for index in range(4)] == [
        ["DEM_ELEV"],
        ["AERIAL_RGBI", "DEM_ELEV"],
        ["AERIAL_RGBI"],
        ["AERIAL_RGBI"],
    ]
    assert catalogue.report().present["DEM_ELEV"] == 2


def test_historical_image_belongs_to_every_year_of_its_department(tmp_path: Path) -> None:
    keys = ["D017-2018_UU-S2-1_3-4", "D017-2021_UU-S2-1_3-4", "D017-2021_UU-S2-1_3-5"]
    touch(tmp_path, keys, "AERIAL_RGBI")
    touch(tmp_path, [keys[0], "D017-2018_UU-S2-1_9-9"], "AERIAL-RLT_PAN")
    catalogue = FlairHubCatalogue.open(tmp_path)
    old = [catalogue.patch(index).sources.get("AERIAL-RLT_PAN") for index in range(3)]
    assert catalogue.keys() == keys
    assert old[0] == old[1]
    assert old[0] is not None and old[0].path == raster_path(tmp_path, FLAIR_HUB["AERIAL-RLT_PAN"], keys[0])
    assert old[2] is None
    assert catalogue.report().historical_without_patch == 1


def test_paired_domain_and_names_with_dashes(tmp_path: Path) -> None:
    touch(tmp_path, ["D024047-2020_FF-S1-3_0-1"], "ALL_LABEL-LPIS", "SPOT_RGBI")
    patch = FlairHubCatalogue.open(tmp_path).patch(0)
    assert patch.key == "D024047-2020_FF-S1-3_0-1"
    assert patch.sources["ALL_LABEL-LPIS"].path.name == "D024047-2020_ALL_LABEL-LPIS_FF-S1-3_0-1.tif"


def test_dates_and_splits(tmp_path: Path) -> None:
    keys = [f"D012-2019_AF-S1-27_5-{column}" for column in range(4)]
    catalogue = FlairHubCatalogue.open(write_tree(tmp_path, keys, SMALL, dates=3))
    patch = catalogue.patch(1)
    expected = [days(date.year, date.month, date.day) for date in map(series_date, (1, 2, 3))]
    assert patch.dates["SENTINEL2_TS"].tolist() == patch.dates["SENTINEL2_MSK-SC"].tolist() == expected
    assert patch.dates["SENTINEL2_TS"].dtype == np.int32
    assert patch.dates["AERIAL-RLT_PAN"].tolist() == [days(1955, 6, 1)]  # stored as 19550600: unknown day
    assert patch.dates["SPOT_RGBI"].tolist() == [days(2019, 7, 4)]
    assert [catalogue.patch(index).splits["split_1"] for index in range(4)] == ["train", "valid", "test", "train"]
    assert patch.splits["split_toy"] is None


def test_odd_metadata_rows_are_counted(tmp_path: Path) -> None:
    keys = [f"D012-2019_AF-S1-27_5-{column}" for column in range(4)]
    touch(tmp_path, keys, "AERIAL_RGBI", "SENTINEL1-ASC_TS")
    rows = [keys[0], keys[0], keys[1], keys[2], "D099-2019_XX-S1-1_0-0"]
    write_table(
        tmp_path / "GLOBAL_SENTINEL1-ASC_MTD_DATES.gpkg",
        {
            "patch_id": rows,
            "acquisition_dates": ['{"2": "20210301", "1": "20210501", "10": "20210601"}', "{}", "{}", "{broken", "{}"],
        },
    )
    catalogue = FlairHubCatalogue.open(tmp_path)
    report = catalogue.report()
    assert (report.duplicate_rows, report.unreadable_dates) == (1, 1)
    # Dates have the order of the band numbers, not of the JSON text or of time.
    assert catalogue.patch(0).dates["SENTINEL1-ASC_TS"].tolist() == [
        days(2021, 5, 1),
        days(2021, 3, 1),
        days(2021, 6, 1),
    ]
    assert catalogue.patch(1).dates["SENTINEL1-ASC_TS"].tolist() == []
    # A series without readable dates is left out and counted.
    assert report.undated == {"SENTINEL1-ASC_TS": 2}
    assert list(catalogue.patch(2).sources) == ["AERIAL_RGBI"]
    assert report.present["SENTINEL1-ASC_TS"] == 2


def test_names_that_do_not_follow_the_pattern_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, ["D012-2019_AF-S1-27_5-10"], "AERIAL_RGBI")
    roi = tmp_path / "D012-2019_AERIAL_RGBI" / "AF-S1-27"
    for name in (
        "notes.txt",
        "D012-2019_AERIAL_RGBI_AF-S1-27_05-10.tif",
        "D013-2019_AERIAL_RGBI_AF-S1-27_5-11.tif",
        "5-12.tif",
    ):
        (roi / name).touch()
    (tmp_path / "D012-2019_THERMAL" / "AF-S1-27").mkdir(parents=True)
    (tmp_path / "D012-2019_AERIAL-RLT_PAN" / "AF-S1-27").mkdir(parents=True)
    catalogue = FlairHubCatalogue.open(tmp_path)
    assert len(catalogue) == 1
    assert catalogue.report().unparsable == 5
    assert catalogue.report().unknown_folders == ["D012-2019_THERMAL"]


def test_modalities_can_be_chosen(tmp_path: Path) -> None:
    touch(tmp_path, ["D012-2019_AF-S1-27_5-10"], "AERIAL_RGBI", "DEM_ELEV")
    assert list(FlairHubCatalogue.open(tmp_path, modalities=["DEM_ELEV"]).registry) == ["DEM_ELEV"]
    with pytest.raises(InputError, match=r"'DEM'.*DEM_ELEV"):
        FlairHubCatalogue.open(tmp_path, modalities=["DEM"])


@pytest.mark.parametrize("separator", [",", ";"])
def test_csv_split(tmp_path: Path, separator: str) -> None:
    keys = [f"D012-2019_AF-S1-27_5-{column}" for column in range(4)]
    touch(tmp_path, keys, "AERIAL_RGBI")
    elsewhere = "D012-2019_AF-S1-27_5-9"
    for value, chosen in (("train", [*keys[:2], elsewhere]), ("test", keys[3:])):
        rows = [["AERIAL-RLT_PAN", "AERIAL_RGBI", "DEM_ELEV"]]
        for key in chosen:
            paths = [raster_path(Path(".."), FLAIR_HUB[name], key).as_posix() for name in rows[0][:2]]
            rows.append([*paths, ""])
        (tmp_path / f"{value}.csv").write_text("\n".join(separator.join(row) for row in rows) + "\n")
    assert read_csv_split(tmp_path / "train.csv") == [*keys[:2], elsewhere]
    files = {"train": tmp_path / "train.csv", "test": tmp_path / "test.csv"}
    catalogue = FlairHubCatalogue.open(tmp_path).with_csv_split("split_mine", files)
    [note] = catalogue.report().notes
    assert note == f"1 of 3 keys of {files['train']} are not in the dataset, e.g. {elsewhere}"
    assert [catalogue.patch(index).splits["split_mine"] for index in range(4)] == ["train", "train", None, "test"]
    with pytest.raises(InputError, match="listed as train and as test"):
        catalogue.with_csv_split("split_other", {"train": tmp_path / "train.csv", "test": tmp_path / "train.csv"})
    with pytest.raises(InputError, match="split_mine"):
        catalogue.with_csv_split("split_mine", files)


def test_unusable_csv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    path.write_text("AERIAL_RGBI\nhello\n")
    with pytest.raises(InputError, match=r"split\.csv, line 2"):
        read_csv_split(path)
    path.write_text("SPOT_RGBI\n../D001-2019_SPOT_RGBI/AA-S1-1/D001-2019_SPOT_RGBI_AA-S1-1_0-0.tif\n")
    catalogue = FlairHubCatalogue.open(REAL)
    with pytest.raises(InputError, match="none of its patches"):
        catalogue.with_csv_split("split_x", {"train": path})


def test_wrong_root_gets_a_hint(tmp_path: Path) -> None:
    tree = touch(tmp_path / "data", ["D012-2019_AF-S1-27_5-10"], "AERIAL_RGBI")
    for root, hint in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, f"{tree} looks like a FLAIR-HUB tree"),
        (tree / "D012-2019_AERIAL_RGBI", f"give its parent folder {tree}"),
        (tree / "D012-2019_AERIAL_RGBI" / "AF-S1-27", f"give the folder {tree}"),
    ):
        with pytest.raises(InputError) as error:
            FlairHubCatalogue.open(root)
        assert hint in str(error.value)
    zips = tmp_path / "zips"
    zips.mkdir()
    with pytest.raises(InputError, match=f"expected folders like .*`bocage describe {zips} -o FILE`"):
        FlairHubCatalogue.open(zips)
    (zips / "D012-2019_AERIAL_RGBI.zip").touch()
    with pytest.raises(InputError, match=r"D012-2019_AERIAL_RGBI\.zip: has no directory at its end: truncated"):
        FlairHubCatalogue.open(zips)


def test_historical_images_and_undated_series_alone_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "old", ["D012-2019_AF-S1-27_5-10"], "AERIAL-RLT_PAN")
    with pytest.raises(InputError, match="historical"):
        FlairHubCatalogue.open(tmp_path / "old")
    touch(tmp_path / "series", ["D012-2019_AF-S1-27_5-10"], "SENTINEL2_TS")
    with pytest.raises(InputError, match="series without dates"):
        FlairHubCatalogue.open(tmp_path / "series")


def test_fingerprint_depends_on_content_not_location(tmp_path: Path) -> None:
    first = FlairHubCatalogue.open(touch(tmp_path / "a", ["D012-2019_AF-S1-27_5-10"], "AERIAL_RGBI"))
    second = FlairHubCatalogue.open(touch(tmp_path / "b", ["D012-2019_AF-S1-27_5-10"], "AERIAL_RGBI"))
    third = FlairHubCatalogue.open(touch(tmp_path / "c", ["D012-2019_AF-S1-27_5-11"], "AERIAL_RGBI"))
    assert first.fingerprint() == second.fingerprint() != third.fingerprint()


def test_a_mask_without_its_series_is_left_out_and_counted(tmp_path: Path) -> None:
    keys = [f"D012-2019_AF-S1-27_5-{column}" for column in range(3)]
    write_tree(tmp_path, keys, ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"])
    raster_path(tmp_path, FLAIR_HUB["SENTINEL2_TS"], keys[1]).unlink()
    catalogue = FlairHubCatalogue.open(tmp_path)
    assert list(catalogue.patch(1).sources) == ["SPOT_RGBI"]
    assert list(catalogue.patch(2).sources) == ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"]
    assert catalogue.report().masks_without_series == {"SENTINEL2_MSK-SC": 1}
    assert catalogue.report().present["SENTINEL2_MSK-SC"] == 2
    with pytest.raises(InputError, match="name both"):
        FlairHubCatalogue.open(tmp_path, modalities=["SPOT_RGBI", "SENTINEL2_MSK-SC"])
    for key in keys:
        raster_path(tmp_path, FLAIR_HUB["SENTINEL2_TS"], key).unlink(missing_ok=True)
    assert list(FlairHubCatalogue.open(tmp_path).registry) == ["SPOT_RGBI"]
    for key in keys:
        raster_path(tmp_path, FLAIR_HUB["SPOT_RGBI"], key).unlink()
    with pytest.raises(InputError, match="only SENTINEL2_MSK-SC without its series"):
        FlairHubCatalogue.open(tmp_path)


def test_an_empty_roi_beside_a_historical_image_holds_no_patch(tmp_path: Path) -> None:
    key = "D017-2018_UU-S2-1_3-4"
    touch(tmp_path, [key], "AERIAL_RGBI", "AERIAL-RLT_PAN")
    raster_path(tmp_path, FLAIR_HUB["AERIAL_RGBI"], key).unlink()
    with pytest.raises(InputError, match="only historical images"):
        FlairHubCatalogue.open(tmp_path)


def test_a_split_file_without_rows_puts_no_patch_in_a_split(tmp_path: Path) -> None:
    keys = ["D012-2019_AF-S1-27_5-0"]
    touch(tmp_path, keys, "AERIAL_RGBI")
    path = tmp_path / "GLOBAL_ALL_MTD" / "GLOBAL_ALL_MTD_SPLIT.gpkg"
    write_table(path, {"patch_id": [], "split_1": []})
    assert FlairHubCatalogue.open(tmp_path).patch(0).splits == {"split_1": None}
    path.write_bytes(b"")
    with pytest.raises(InputError, match="SPLIT"):
        FlairHubCatalogue.open(tmp_path)
