"""Drafts of descriptions: they load, and unambiguous folders shard without edits."""

from __future__ import annotations

import datetime
import decimal
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import rasterio.shutil
import yaml
from rasterio.enums import ColorInterp
from small_tree import CORNER, write_raster

from bocage.recipes.loader import parse_dataset
from bocage.shards.draft.folder import draft_folder, draft_images
from bocage.shards.draft.names import FileGroup, find_layout, group_files
from bocage.shards.draft.rasters import Choices
from bocage.shards.draft.splits import FRACTIONS
from bocage.shards.draft.yaml import Draft, to_yaml
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.source.described.description import DatasetDescription, LabelDescription
from bocage.shards.source.described.open import open_described
from bocage.shards.source.described.rasters import check_file, label_rules
from bocage.shards.write.writer import write_shards

DATA = Path(__file__).parents[1] / "data"
random = np.random.default_rng(0)


def image(size: int = 64, bands: int = 3, dtype: str = "uint8", highest: int = 250) -> np.ndarray:
    return random.integers(1, highest, (bands, size, size)).astype(dtype)


def mask(size: int = 64, values: tuple[int, ...] = (0, 1)) -> np.ndarray:
    return random.choice(values, (1, size, size)).astype(np.uint8)


def corner(column: int, row: int = 0, side: float = 32.0) -> tuple[float, float]:
    return CORNER[0] + side * column, CORNER[1] - side * row


def write_tiles(
    root: Path, names: list[str], folder: str = "images", bands: int = 3, classes: tuple[int, ...] = (0, 1)
) -> None:
    """Tiles of 64 x 64 px beside each other, with masks of the same names in ``masks``."""
    for column, name in enumerate(names):
        photometric = {"photometric": "rgb"} if bands == 3 else {}
        write_raster(root / folder / f"{name}.tif", image(bands=bands), 0.5, corner(column), **photometric)
        write_raster(root / "masks" / f"{name}.tif", mask(values=classes), 0.5, corner(column))


def load(draft: Draft) -> DatasetDescription:
    """The description of a draft, whose text says what was meant."""
    text = draft.to_yaml()
    assert repr(yaml.safe_load(text)) == repr(plain(draft.values))
    assert all(len(line) <= 120 for line in text.splitlines())
    return parse_dataset(text, [], "draft")


def plain(value: Any) -> Any:
    """The value with whole numbers as integers, as YAML reads them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shard(draft: Draft, out: Path) -> Manifest:
    """Shards of a draft without edits."""
    return write_shards(open_described(draft.root, load(draft), Path()), out)


def test_real_drone_tiles_shard_without_edits(tmp_path: Path) -> None:
    draft = draft_folder(DATA / "drone_buildings")
    manifest = shard(draft, tmp_path / "out")
    assert draft.values["sensors"]["RGB"] == {
        "files": "{site}/image/{x}-{y}-19.tif",
        "bands": {"R": 650, "G": 550, "B": 460},
        "dtype": "uint8",
        "pixel": 0.14,
        "pixel_tolerance": 0.08,
    }
    assert draft.values["labels"]["LABEL"]["classes"] == {value: f"class {value}" for value in range(5)}
    assert (draft.values["kind"], draft.values["patch"], draft.values["domain"]) == ("tiles", "512 px", "{site}")
    assert not draft.notes
    assert len(manifest) == 7 and manifest.counts["present"]["LABEL"] == 5
    assert set(manifest.column("domain").to_pylist()) == {"banepa", "banepa_unlabelled", "zanzibar"}
    train = manifest.split("split_site", "train")
    assert {manifest.row(int(row))["domain"] for row in train} == {"banepa", "banepa_unlabelled"}
    assert len(set(manifest.column("roi").to_pylist())) == 4  # ground blocks
    text = draft.to_yaml()
    assert "names of 12 rasters, 12 headers and the values of 7 images\n# and 5 label rasters" in text
    assert re.search(r"0: class 0  # [\d.]+ % of the pixels", text)


def test_real_pixel_series_shard_without_edits(tmp_path: Path) -> None:
    draft = draft_folder(DATA / "worldcereal_fr")
    table = draft.values["table"]
    assert (table["key"], table["date"], table["longitude"], table["latitude"]) == (
        "sample_id",
        "timestamp",
        "lon",
        "lat",
    )
    assert list(draft.values["sensors"]["SENTINEL2"]["bands"])[:3] == ["B2", "B3", "B4"]
    assert draft.values["sensors"]["SENTINEL1"]["bands"] == {"VH": "backscatter_vh", "VV": "backscatter_vv"}
    assert all(sensor["nodata"] == [65535] for sensor in draft.values["sensors"].values())
    assert "slope" in draft.comments[("table",)]
    manifest = shard(draft, tmp_path / "out")
    assert len(manifest) == 80 and manifest.counts["present"]["EWOC_CODE"] == 80


# Names ----------------------------------------------------------------------------------------------------------------


def patterns(paths: list[str], look: Any = lambda path: (1, 1)) -> tuple[list[str], Any]:
    groups = sorted(group_files(paths, look), key=lambda group: group.is_label)
    layout = find_layout(groups)
    return [named.pattern for named in layout.groups], layout


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.tif", "b.tif"], ["{tile}.tif"]),
        (["a.tif", "b.tif", "a_mask.tif"], ["{tile}.tif", "{tile}_mask.tif"]),
        (["sat_1.jpg", "sat_2.jpg", "sat_1.png", "sat_2.png"], ["sat_{tile}.jpg", "sat_{tile}.png"]),
        (
            ["train/images/1.png", "val/images/2.png", "train/labels/1.png"],
            ["{part}/images/{tile}.png", "{part}/labels/{tile}.png"],
        ),
        (["p1/image.tif", "p2/image.tif", "p3/image.tif", "p1/mask.tif"], ["{patch}/image.tif", "{patch}/mask.tif"]),
        (["x/1_2.tif", "x/1_3.tif", "x/2_2.tif", "gt/1_3.tif"], ["x/{x}_{y}.tif", "gt/{x}_{y}.tif"]),
        (["s2/A_20210101.tif", "s2/A_20210201.tif", "labels/A.tif"], ["s2/{tile}_{date}.tif", "labels/{tile}.tif"]),
        (["2021-01-01/A.tif", "2021-02-01/A.tif"], ["{date}/{tile}.tif"]),
        (["imgs/acq_1_x7.tif", "imgs/acq_2_x14.tif", "masks/acq_2.tif"], ["imgs/acq_{x}_{y}.tif", "masks/acq_{x}.tif"]),
        (["p_B02.tif", "q_B02.tif", "p_B03.tif", "q_B03.tif"], ["{tile}_B02.tif", "{tile}_B03.tif"]),
        (["image.tif", "mask.tif"], ["image.tif", "mask.tif"]),
        (["odd{name}.tif"], ["{tile}.tif"]),
        (["one_2_three.tif"], ["{tile}.tif"]),
    ],
)
def test_patterns_of_names(paths: list[str], expected: list[str]) -> None:
    assert patterns(paths)[0] == expected


def test_sensors_in_folders_of_any_name_are_told_apart_by_their_content() -> None:
    paths = [f"{folder}/{column}_{row}.tif" for folder in ("opt", "other") for column in range(3) for row in range(2)]
    assert patterns(paths, lambda path: (path.split("/")[0], 1))[0] == ["opt/{x}_{y}.tif", "other/{x}_{y}.tif"]
    assert patterns(paths)[0] == ["{site}/{x}_{y}.tif"]  # the same content: two sites


def test_sites_and_single_files_with_other_content_are_no_sensors() -> None:
    content = {"a.tif": 3, "b.tif": 4, "c.tif": 3}
    assert patterns(list(content), lambda path: (content[path], 1))[0] == ["{tile}.tif"]
    paths = [f"{site}/{site}{number}.tif" for site in "abc" for number in range(3)]
    assert patterns(paths, lambda path: (path[0] == "c", 1))[0] == ["{site}/{tile}.tif"]
    assert len(patterns(["rgb/1.tif", "rgb/2.tif", "cir/1.tif", "cir/2.tif"])[0]) == 2  # words say so


def test_dates_of_a_key_are_a_series_and_extra_fields_leave_the_key() -> None:
    dates = ["20210101", "20210201"]
    _, layout = patterns([f"s2/{tile}_{date}.tif" for tile in "AB" for date in dates] + ["labels/A.tif"])
    assert layout.series == {0} and layout.date_format == "%Y%m%d" and layout.key == ""
    _, layout = patterns(["imgs/a_1_x7.tif", "imgs/a_2_x14.tif", "masks/a_2.tif"])
    assert layout.key == "{x}" and layout.groups[1].matched == 1


def test_many_names_take_seconds() -> None:
    names = [f"{x}-{y}-19.tif" for x in range(60) for y in range(100)]
    paths = [f"s{site}/{kind}/{name}" for site in range(5) for kind in ("image", "label") for name in names]
    start = time.monotonic()
    found, layout = patterns(paths)
    assert found == ["{site}/image/{x}-{y}-19.tif", "{site}/label/{x}-{y}-19.tif"]
    assert layout.groups[1].matched == 30_000
    assert time.monotonic() - start < 40  # 3 s on an idle core


# Rasters --------------------------------------------------------------------------------------------------------------


def test_tiles_with_masks_and_given_parts(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            name = f"{part}/{{}}/{number}.tif"
            place = corner(number, 0 if part == "train" else 5)
            write_raster(tmp_path / name.format("images"), image(), 0.5, place, photometric="rgb")
            write_raster(tmp_path / name.format("labels"), mask(values=(0, 1, 255)), 0.5, place)
    draft = draft_folder(tmp_path)
    label = draft.values["labels"]["LABELS"]
    assert label["classes"] == {0: "class 0", 1: "class 1"} and label["ignore"] == [255]
    assert draft.values["splits"]["split_given"]["valid"] == ["val"]
    assert "there is no test" in draft.comments[("splits", "split_given")]
    manifest = shard(draft, tmp_path / "out")
    assert len(manifest.split("split_given", "train")) == 3 and len(manifest.split("split_given", "valid")) == 2


def test_png_with_world_files_and_a_coordinate_system_to_add(tmp_path: Path) -> None:
    for number in range(3):
        for folder, array in (("images", image()), ("masks", mask())):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            with rasterio.open(path, "w", driver="PNG", width=64, height=64, count=len(array), dtype="uint8") as file:
                file.write(array)
            path.with_suffix(".png.aux.xml").unlink(missing_ok=True)
            left, top = corner(number)
            lines = (0.5, 0, 0, -0.5, left + 0.25, top - 0.25)
            path.with_suffix(".pgw").write_text("".join(f"{line}\n" for line in lines))
    draft = draft_folder(tmp_path)
    assert draft.values["crs"] == "" and draft.values["sensors"]["RGB"]["pixel"] == 0.5
    assert any("set crs" in note for note in draft.notes)
    description = parse_dataset(draft.to_yaml(), ["crs=EPSG:2154"], "draft")
    manifest = write_shards(open_described(tmp_path, description, Path()), tmp_path / "out")
    assert len(manifest) == 3 and manifest.row(0)["crs"] == "EPSG:2154"
    assert manifest.counts["present"]["MASKS"] == 3


def test_png_without_position(tmp_path: Path) -> None:
    for number in range(8):
        for folder, array in (("images", image()), ("masks", mask(values=(0, 255)))):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            with rasterio.open(path, "w", driver="PNG", width=64, height=64, count=len(array), dtype="uint8") as file:
                file.write(array)
    draft = draft_folder(tmp_path)
    assert any("set sensors.RGB.pixel and labels.MASKS.pixel to the side of" in note for note in draft.notes)
    # Masks of 0 and 255 have two classes; 255 is ignored only beside others.
    assert draft.values["labels"]["MASKS"]["classes"] == {0: "class 0", 255: "class 255"}
    assert any("255 marks pixels without a label" in note for note in draft.notes)
    assert draft.values["splits"] == {"split_random": {"by": "key", **FRACTIONS, "allow_mixed_regions": True}}
    assert len(shard(draft, tmp_path / "out")) == 8


@pytest.mark.parametrize(("last", "expected"), [("opacity", {"A": "unused"}), ("infrared", {"B4": "other"})])
def test_a_fourth_band_that_is_called_alpha(last: str, expected: dict[str, str], tmp_path: Path) -> None:
    for number in range(4):
        array = image(bands=4)
        if last == "opacity":
            array[3] = np.where(array[3] > 20, 255, 0)
        path = tmp_path / f"{number}.tif"
        write_raster(path, array, 0.5, corner(number), photometric="rgb", alpha="yes")
    draft = draft_folder(tmp_path)
    (sensor,) = draft.values["sensors"].values()
    assert sensor["bands"] == {"R": 650, "G": 550, "B": 460, **expected}
    assert draft.comments[("sensors", *draft.values["sensors"], "bands", *expected)].startswith(
        "alpha" if last == "opacity" else "near infrared?"
    )
    assert sensor.get("nodata") == ([0] if last == "opacity" else None)
    assert len(shard(draft, tmp_path / "out")) == 4


def test_sixteen_bits_with_band_descriptions_nodata_and_unpaired_masks(tmp_path: Path) -> None:
    for number in range(4):
        array = image(bands=4, dtype="uint16", highest=9000)
        array[:, :8] = 0
        path = tmp_path / "ms" / f"{number}.tif"
        write_raster(path, array, 0.5, corner(number), nodata=0)
        with rasterio.open(path, "r+") as file:
            file.descriptions = ("blue", "green", "red", "nir")
            file.colorinterp = [ColorInterp.undefined] * 4
        write_raster(tmp_path / "gt" / f"{number + 2}.tif", mask(values=(1, 2, 3)), 0.5, corner(number + 2))
    draft = draft_folder(tmp_path)
    sensor = draft.values["sensors"]["RGBI"]
    assert sensor["bands"] == {"B": 460, "G": 550, "R": 650, "NIR": 840}
    assert (sensor["dtype"], sensor["nodata"]) == ("uint16", [0])
    assert draft.notes == ["no image for 2 of 4 labels such as gt/2.tif"]
    manifest = shard(draft, tmp_path / "out")
    assert manifest.counts["present"] == {"RGBI": 4, "GT": 2}


def test_floats_with_nan_and_a_value_that_looks_like_nodata(tmp_path: Path) -> None:
    for number in range(4):
        array = image(bands=1, dtype="float32")
        array[0, 0, :4] = (math.nan, -9999, 0, 1)
        write_raster(tmp_path / "dsm" / f"{number}.tif", array, 0.5, corner(number))
    draft = draft_folder(tmp_path)
    assert repr(next(iter(draft.values["sensors"].values()))["nodata"]) == "[-9999.0, nan]"
    assert len(shard(draft, tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("dtype", "content", "declared", "nodata", "note"),
    [
        ("uint8", 7, 7, None, "all sampled pixels have the nodata value 7 that the files declare"),
        ("uint16", 65535, None, None, "all sampled pixels are 65535, so it is left out"),
        ("float32", (-25, -5), 0, None, "would also mark all lower values, -25 to -5, so it is left out"),
        ("uint8", (2, 250), 1, None, "would also mark all higher values, 2 to 250, so it is left out"),
        ("int16", (-50, 100), 0, [0], ""),
        ("float32", (0, 40), -9999, [-9999], ""),
    ],
)
def test_a_nodata_value_that_would_mark_all_pixels_is_left_out(
    dtype: str, content: Any, declared: float | None, nodata: list[float] | None, note: str, tmp_path: Path
) -> None:
    lowest, highest = content if isinstance(content, tuple) else (content, content)
    for number in range(4):
        array = np.linspace(lowest, highest, 64 * 64).reshape(1, 64, 64).astype(dtype)
        write_raster(tmp_path / "vv" / f"{number}.tif", array, 0.5, corner(number), nodata=declared)
    draft = draft_folder(tmp_path)
    (sensor,) = draft.values["sensors"]
    assert draft.values["sensors"][sensor].get("nodata") == nodata
    notes = [text for text in draft.notes if "left out" in text]
    assert len(notes) == bool(note) and all(note in text for text in notes)
    if lowest < 0 < highest:
        comment = draft.comments[("sensors", sensor, "nodata")]
        assert "0 also marks the lower values, down to -50, as missing" in comment


def test_rasters_of_several_sizes_become_one_mosaic(tmp_path: Path) -> None:
    left = 0.0
    for width in (300, 200, 340):
        place = (CORNER[0] + left, CORNER[1])
        array = image(size=340)[:, :320, :width]
        write_raster(tmp_path / f"flight_{width}.tif", array, 0.5, place, photometric="rgb")
        labels = mask(size=340, values=(0, 1, 2))[:, :320, :width]
        write_raster(tmp_path / f"flight_{width}_gt.tif", labels, 0.5, place)
        left += 0.5 * width
    draft = draft_folder(tmp_path)
    assert draft.values["kind"] == "rasters" and draft.values["patch"] == "288 px"
    assert draft.values["sensors"]["RGB"]["files"] == "flight_*.tif"
    assert draft.values["labels"]["GT"]["files"] == "flight_*_gt.tif"
    assert "300 x 320" in draft.comments[("kind",)]
    manifest = shard(draft, tmp_path / "out")
    assert len(manifest) == 2 and manifest.counts["present"] == {"RGB": 2, "GT": 2}  # 840 px wide


def test_rasters_that_overlap_are_cut_one_by_one(tmp_path: Path) -> None:
    for number in range(2):
        write_raster(tmp_path / f"flight_{number}.tif", image(size=600)[:, :, : 500 + number], 0.5, photometric="rgb")
    draft = draft_folder(tmp_path)
    assert draft.values["sensors"]["RGB"]["files"] == "flight_{tile}.tif"
    assert len(shard(draft, tmp_path / "out")) == 2


def test_two_sites_two_sensors_and_dates(tmp_path: Path) -> None:
    for site, row in (("east", 0), ("west", 90)):
        for number in range(3):
            place = corner(number, row)
            write_raster(tmp_path / site / "rgb" / f"{number}.tif", image(), 0.5, place, photometric="rgb")
            for date in ("2021-03-01", "2021-06-01"):
                dated = tmp_path / site / "s2" / f"{number}_{date}.tif"
                write_raster(dated, image(size=8, bands=4, dtype="uint16", highest=9000), 4.0, place)
    draft = draft_folder(tmp_path)
    assert draft.values["date_format"] == "%Y-%m-%d" and draft.values["domain"] == "{site}"
    assert draft.values["splits"]["split_site"] == {"by": "domain", "train": ["east"], "test": ["west"]}
    manifest = shard(draft, tmp_path / "out")
    assert manifest.counts["present"] == {"RGB": 6, "S2": 6}
    assert manifest.row(0)["dates.S2"] == [
        (datetime.date(2021, month, 1) - datetime.date(1970, 1, 1)).days for month in (3, 6)
    ]


def test_files_that_cannot_be_described_become_notes(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a", "b", "c"])
    (tmp_path / "images" / "d.tif").write_bytes(b"II*\0 and then nothing")
    for name in "ab":
        write_raster(tmp_path / "float64" / f"{name}.tif", image().astype(np.float64), 0.5)
        write_raster(tmp_path / "colour" / f"{name}_gt.tif", image(), 0.5)
        write_raster(tmp_path / "else" / f"z{name}_gt.tif", mask(), 0.5)
    (tmp_path / "table.parquet").touch()
    draft = draft_folder(tmp_path)
    load(draft)
    notes = "; ".join(draft.notes)
    for words in (
        "1 sampled file left out as unreadable, e.g.",
        "has the dtype float64, which is none of uint8",
        "seems to be a label but has 3 bands",
        "no image has such a name",
        "1 Parquet file left out",
    ):
        assert words in notes
    assert list(draft.values["sensors"]) == ["RGB"] and list(draft.values["labels"]) == ["MASKS"]


@pytest.mark.parametrize("dtype", ["complex_int16", "complex64"])
def test_complex_labels_are_noted(dtype: str, tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a", "b"])
    for path in (tmp_path / "masks").iterdir():
        write_raster(path, mask().astype(np.complex64), 0.5, dtype=dtype)
    draft = draft_folder(tmp_path)
    assert any(f"seems to be a label but has the dtype {dtype}" in note for note in draft.notes)
    assert "labels" not in draft.values
    file = tmp_path / "masks" / "a.tif"
    rules = label_rules(LabelDescription(classes={0: "ground"}), load(draft))
    with rasterio.open(file) as raster, pytest.raises(InputError, match=f"dtype {dtype}, but classes are integers"):
        check_file(file, raster, rules)


def test_pictures_that_are_not_square_and_have_no_position(tmp_path: Path) -> None:
    for number in range(3):
        for folder, array in (("images", image(200)), ("masks", mask(200))):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            with rasterio.open(path, "w", driver="PNG", width=200, height=100, count=len(array), dtype="uint8") as file:
                file.write(array[:, :100])
    draft = draft_folder(tmp_path)
    assert (draft.values["kind"], draft.values["patch"]) == ("rasters", "96 px")
    assert draft.values["labels"]["MASKS"]["files"] == "masks/{tile}.png"
    manifest = shard(draft, tmp_path / "out")
    assert len(manifest) == 6 and manifest.counts["present"] == {"RGB": 6, "MASKS": 6}


def test_a_mosaic_index_is_left_out(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a", "b"])
    rasterio.shutil.copy(tmp_path / "images" / "a.tif", tmp_path / "all.vrt", driver="VRT")
    draft = draft_folder(tmp_path)
    assert list(draft.values["sensors"]) == ["RGB"]
    assert draft.notes == ["1 VRT file beside other rasters left out, e.g. all.vrt"]


def test_degrees_are_noted(tmp_path: Path) -> None:
    write_raster(tmp_path / "a.tif", image(), 1e-5, (2.0, 48.0), crs="EPSG:4326", photometric="rgb")
    draft = draft_folder(tmp_path)
    load(draft)
    assert any("in degrees" in note for note in draft.notes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "it is empty"),
        (["a.h5", "b.h5", "c.zip"], "it has 2 .h5, 1 .zip"),
        (["D012-2019_AERIAL_RGBI/AF-S1-27/a.tif"], "holds folders or zips of FLAIR-HUB, which needs no description"),
        (["D012-2019_AERIAL_RGBI.zip", "GLOBAL_ALL_MTD.zip"], "run bocage shard"),
        (["a.tif"], "holds no images that can be described: 1 sampled file left out as unreadable"),
        (["a.parquet"], "no table with rows"),
    ],
)
def test_folders_without_anything_to_describe(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=re.escape(message)):
        draft_folder(tmp_path)


def test_masks_alone_are_no_images(tmp_path: Path) -> None:
    write_raster(tmp_path / "masks" / "a.tif", mask(), 0.5)
    with pytest.raises(InputError, match="labels only"):
        draft_folder(tmp_path)


# Images and labels in two folders -------------------------------------------------------------------------------------


def test_images_and_labels(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a", "b", "c"], folder="photos", bands=4)
    choices = Choices(bands={"R": 650, "G": 550, "B": 460, "NIR": 840}, classes={0: "ground", 1: "roof"})
    draft = draft_images(tmp_path / "photos", tmp_path / "masks", choices)
    assert draft.root == tmp_path
    manifest = shard(draft, tmp_path / "out")
    assert manifest.registry["MASKS"].schemes[0].classes == ("ground", "roof")
    (sensor,) = manifest.registry.inputs
    assert [band.name for band in sensor.bands] == ["R", "G", "B", "NIR"]


def test_images_alone(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a", "b"])
    draft = draft_images(tmp_path / "images", None, Choices())
    assert draft.root == tmp_path / "images" and "labels" not in draft.values
    assert len(shard(draft, tmp_path / "out")) == 2


def test_wrong_folders_of_images_and_labels(tmp_path: Path) -> None:
    write_tiles(tmp_path, ["a", "b"], bands=4)
    write_raster(tmp_path / "others" / "z.tif", mask(), 0.5)
    images, masks = tmp_path / "images", tmp_path / "masks"
    for arguments, message in (
        ((tmp_path / "none", None, Choices()), "no such folder"),
        ((tmp_path, masks, Choices()), "neither inside the other"),
        ((tmp_path, None, Choices()), "kinds of files"),
        ((images, masks, Choices()), "name all in order, e.g. --bands R,G,B,NIR"),
        ((images, masks, Choices(bands={"R": 650})), "--bands names 1 band, but"),
        ((images, masks, Choices(bands=dict.fromkeys("RGB", "other"))), "has 4; name all in order, and those to leave"),
        (
            (images, masks, Choices(bands=dict.fromkeys("RGBA", "other"), classes={1: "roof"})),
            "a.tif: values that are neither in --classes nor in --ignore: 0",
        ),
        ((images, tmp_path / "others", Choices(bands=dict.fromkeys("RGBA", "other"))), "no image has such a name"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            draft_images(*arguments)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_a_table_without_known_names(tmp_path: Path) -> None:
    days = [f"2021-0{month}-01" for month in range(1, 6)]
    rows = [(plot, day) for plot in range(12) for day in days]
    columns = {
        "plot_id": [f"p{plot}" for plot, _ in rows],
        "day": [day for _, day in rows],
        "index": [float(number % 7) for number, _ in enumerate(rows)],
        "crop": [plot % 3 for plot, _ in rows],
        "country": ["fr" if plot < 8 else "es" for plot, _ in rows],
    }
    pq.write_table(pa.table(columns), tmp_path / "plots.parquet")
    draft = draft_folder(tmp_path)
    assert draft.values["table"] == {
        "files": "plots.parquet",
        "key": "plot_id",
        "date": "day",
        "fields": {"site": "country"},
    }
    assert draft.values["date_format"] == "%Y-%m-%d"
    assert draft.values["sensors"]["SERIES"]["bands"] == {"index": "other"}
    assert draft.values["labels"]["CROP"]["classes"] == {0: "class 0", 1: "class 1", 2: "class 2"}
    manifest = shard(draft, tmp_path / "out")
    assert len(manifest) == 12 and set(manifest.column("domain").to_pylist()) == {"fr", "es"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1, 2]}, "no column of dates among a"),
        ({"id": ["x", "x"], "date": ["20210101", "20210101"]}, "no column names the series"),
        ({"id": ["x", "x"], "date": ["20210101", "20210102"]}, "no column of numbers changes"),
    ],
)
def test_tables_that_are_no_series(columns: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        draft_folder(tmp_path)


def series_table(first: int = 0, label: bool = True, **columns: Any) -> pa.Table:
    """Ten series of four dates."""
    rows = [(series, month) for series in range(first, first + 10) for month in range(1, 5)]
    values: dict[str, Any] = {
        "sample_id": [f"s{series}" for series, _ in rows],
        "date": [datetime.date(2021, month, 1) for _, month in rows],
        "B02": pa.array([100 + 7 * number % 50 for number, _ in enumerate(rows)], pa.uint16()),
        "B04": pa.array([200 + 11 * number % 50 for number, _ in enumerate(rows)], pa.float16()),
    }
    return pa.table(values | ({"crop": [series % 3 for series, _ in rows]} if label else {}) | columns)


def test_columns_of_types_that_no_description_can_use_are_left_out(tmp_path: Path) -> None:
    others = {
        "list": pa.array([[1.0]] * 40),
        "struct": pa.array([{"a": 1}] * 40),
        "decimal": pa.array([decimal.Decimal("1.25")] * 40),
        "duration": pa.array([datetime.timedelta(days=1)] * 40),
        "flag": pa.array([True] * 40),
    }
    pq.write_table(series_table(**others), tmp_path / "t.parquet")
    draft = draft_folder(tmp_path)
    assert draft.values["sensors"]["SENTINEL2"]["bands"] == {"B2": 490, "B4": 665}
    for text in ("list (list<", "struct (struct<", "decimal (decimal128", "duration (duration[us])", "flag (bool)"):
        assert text in draft.comments[("table",)]
    assert len(shard(draft, tmp_path / "out")) == 10


def test_keys_may_be_text_in_one_table_and_numbers_in_another(tmp_path: Path) -> None:
    numbers = pa.array([series for series in range(10, 20) for _ in range(4)])
    pq.write_table(series_table(), tmp_path / "a.parquet")
    pq.write_table(series_table(10, sample_id=numbers), tmp_path / "b.parquet")
    draft = draft_folder(tmp_path)
    assert "sample_id is int64 and string in different tables, and counts as text" in draft.notes
    assert draft.values["table"]["key"] == "sample_id"
    assert set(shard(draft, tmp_path / "out").column("key").to_pylist()) >= {"s0", "19"}


def test_a_label_that_some_tables_lack_is_kept_and_noted(tmp_path: Path) -> None:
    pq.write_table(series_table(), tmp_path / "labelled.parquet")
    pq.write_table(series_table(10, label=False), tmp_path / "other.parquet")
    draft = draft_folder(tmp_path)
    assert draft.values["labels"]["CROP"]["classes"] == {0: "class 0", 1: "class 1", 2: "class 2"}
    assert "CROP: 1 of 2 tables without the column crop, e.g. other.parquet; their series have no label" in draft.notes
    manifest = shard(draft, tmp_path / "out")
    assert (len(manifest), manifest.counts["present"]["CROP"]) == (20, 10)


def test_a_constant_that_some_tables_lack_is_no_label(tmp_path: Path) -> None:
    pq.write_table(series_table(label=False, label_version=pa.array([7] * 40)), tmp_path / "a.parquet")
    pq.write_table(series_table(10, label=False), tmp_path / "b.parquet")
    assert "labels" not in draft_folder(tmp_path).values


def test_a_row_that_occurs_twice_is_named(tmp_path: Path) -> None:
    first, second = series_table(), series_table(10)
    pq.write_table(pa.concat_tables([first, first.slice(5, 1)]), tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: series s1 of column sample_id has two rows of 2021-02-01"):
        draft_folder(tmp_path)
    pq.write_table(first, tmp_path / "a.parquet")
    pq.write_table(pa.concat_tables([second, first.slice(39)]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"a\.parquet and \S*b\.parquet: series s9 of .* two rows of 2021-04-01"):
        draft_folder(tmp_path)


# Text -----------------------------------------------------------------------------------------------------------------


def test_yaml_reads_back_what_was_meant() -> None:
    values = {
        "name": "no",
        "licence": "",
        "patch": "512 px",
        "sensors": {
            "RGB": {"bands": {"R": 650, "NO": "other", "Y": 1.5}, "nodata": [-3.4028234663852886e38, 1e-7, 1e22]}
        },
        "labels": {"L": {"classes": {0: "class 0", 1: "on", 3: 'ü: x # y "z"'}}},
        "splits": {"split_a": {"by": "domain", "train": ["012", "1e5", "a b", "~"], "long": ["abcdefghijk"] * 20}},
        "flag": True,
    }
    comments = {("licence",): "x " * 80, ("labels", "L", "classes", "1"): "20 %", ("splits",): "how"}
    text = to_yaml(values, comments, ["What this is. " * 20])
    assert yaml.safe_load(text) == values
    assert text.count("#") > 5 and all(len(line) <= 120 for line in text.splitlines())


def test_groups_have_words(tmp_path: Path) -> None:
    shutil.copytree(DATA / "drone_buildings" / "banepa", tmp_path / "site")
    paths = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.tif")]
    groups: list[FileGroup] = group_files(paths, lambda path: (1, 1))
    assert {(group.words, group.is_label, len(group.paths)) for group in groups} == {
        (("image",), False, 3),
        (("label",), True, 3),
    }
