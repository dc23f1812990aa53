"""Tables of pixel series become shards by a description; wrong tables and descriptions are named."""

from __future__ import annotations

import datetime
import math
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rasterio.warp import transform
from small_disk import tmpfs

from bocage.recipes.loader import config_from_dict, load_dataset
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.contact_sheet import contact_sheet
from bocage.shards.inspect.verify import verify
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.source.described.description import DatasetDescription
from bocage.shards.source.described.open import open_described
from bocage.shards.write.writer import write_shards

ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests" / "data" / "worldcereal_fr"
REAL_DESCRIPTION = ROOT / "examples" / "datasets" / "worldcereal.yaml"
REAL_BANDS = ["02", "03", "04", "05", "06", "07", "08", "11", "12"]
EPOCH = datetime.date(1970, 1, 1)

DAYS = [datetime.date(2021, month, 15) for month in (3, 6, 9)]
DESCRIPTION: dict[str, Any] = {
    "name": "Test series",
    "kind": "table",
    "patch": 10,
    "table": {"key": "id", "date": "day", "fields": {"site": "site"}},
    "domain": "{site}",
    "sensors": {
        "S2": {"role": "series", "dtype": "uint16", "bands": {"R": 665, "N": 842}, "nodata": [65535]},
        "TERRAIN": {"dtype": "float32", "bands": {"height": "terrain_height"}, "nodata": [math.nan]},
    },
    "labels": {"CROP": {"column": "crop", "classes": {10: "maize", 20: "wheat", 21: "wheat"}, "ignore": [0]}},
}


def columns(series: int = 4) -> dict[str, Any]:
    """Columns of a table of ``series`` series with three dates each, ordered by date."""
    numbers = np.arange(3 * series)
    return {
        "id": pa.array([f"p{number}" for number in range(series)] * 3),
        "day": pa.array([day for day in DAYS for _ in range(series)]),
        "site": pa.array([f"s{number % 2}" for number in range(series)] * 3),
        "R": pa.array(100 + numbers, pa.uint16()),
        "N": pa.array(2000 + numbers, pa.uint16()),
        "height": pa.array([float(number) for number in range(series)] * 3, pa.float32()),
        "crop": pa.array([(10, 20, 21, 0)[number % 4] for number in range(series)] * 3, pa.int64()),
    }


def replaced(name: str, row: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value of a column."""

    def change(table: dict[str, Any]) -> None:
        values = table[name].to_pylist()
        values[row] = value
        table[name] = pa.array(values, table[name].type)

    return change


def cast(name: str, kind: pa.DataType) -> Callable[[dict[str, Any]], None]:
    """A change of the type of a column."""

    def change(table: dict[str, Any]) -> None:
        table[name] = table[name].cast(kind)

    return change


def write(path: Path, table: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, **options)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "tables" / "a.parquet", columns()).parent


def description(**changes: Any) -> DatasetDescription:
    values = dict(DESCRIPTION)
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return config_from_dict(DatasetDescription, values, "test")


def shard(source: Path, out: Path, **changes: Any) -> Manifest:
    return write_shards(open_described(source, description(**changes), source), out, max_bad=0.0)


def arrays(manifest: Manifest) -> dict[str, dict[str, np.ndarray]]:
    """Values by key and modality, without padding, read as training reads them; and dates as ``M.dates``."""
    found: dict[str, dict[str, np.ndarray]] = {}
    modalities = list(manifest.registry.values())
    for batch in evaluation_batches(manifest, np.arange(len(manifest)), modalities, batch_size=7):
        for sample, key in enumerate(batch.keys):
            patch = found[key] = {}
            for name, values in batch.values.items():
                if not batch.present[name][sample]:
                    continue
                patch[name] = values[sample].numpy()
                if name in batch.padding:
                    kept = ~batch.padding[name][sample].numpy()
                    patch[name] = patch[name][kept]
    for row in range(len(manifest)):
        record = manifest.row(row)
        for name in list(found[record["key"]]):
            if f"dates.{name}" in record:
                found[record["key"]][f"{name}.dates"] = np.array(record[f"dates.{name}"])
    return found


def test_real_series_come_back_bit_for_bit_without_their_empty_dates(tmp_path: Path) -> None:
    catalogue = open_described(REAL, load_dataset(str(REAL_DESCRIPTION), []), REAL_DESCRIPTION.parent)
    manifest = write_shards(catalogue, tmp_path / "shards", max_bad=0.0)
    assert verify(manifest.path).sound and len(manifest) == 80
    found = arrays(manifest)
    classes = load_dataset(str(REAL_DESCRIPTION), []).labels["CROP"].stored_values
    columns_of = {
        "S2": [f"S2-L2A-B{band}" for band in REAL_BANDS],
        "S1": ["S1-SIGMA0-VV", "S1-SIGMA0-VH"],
        "WEATHER": ["AGERA5-PRECIP", "AGERA5-TMEAN"],
    }
    absent = empty = 0
    for path in sorted(REAL.glob("*.parquet")):
        table = pq.read_table(path)
        keys = np.array(table["sample_id"].to_pylist())
        days = table["timestamp"].to_numpy().astype("datetime64[D]").astype(int)
        for key in np.unique(keys):
            rows = np.flatnonzero(keys == key)
            rows = rows[np.argsort(days[rows])]
            for name, names in columns_of.items():
                values = np.stack([table[column].to_numpy()[rows] for column in names], axis=1)
                kept = (values != 65535).any(axis=1)
                empty += int((~kept).sum())
                if not kept.any():
                    absent += 1
                    assert name not in found[key]
                    continue
                np.testing.assert_array_equal(found[key][name][:, :, 0, 0], values[kept])
                np.testing.assert_array_equal(found[key][f"{name}.dates"], days[rows][kept])
            terrain = [table[column].to_numpy()[rows[0]] for column in ("slope", "elevation")]
            assert found[key]["TERRAIN"][:, 0, 0].tolist() == terrain
            assert found[key]["CROP"].item() == classes[table["ewoc_code"][rows[0]].as_py()]
    assert absent == 5 and empty > 800  # series without Sentinel-2 or Sentinel-1, and genuine gaps
    assert manifest.counts["present"]["S2"] + manifest.counts["present"]["S1"] == 160 - absent


def test_a_pixel_is_centred_on_its_point_in_its_utm_zone(tmp_path: Path) -> None:
    catalogue = open_described(REAL, load_dataset(str(REAL_DESCRIPTION), []), REAL_DESCRIPTION.parent)
    manifest = write_shards(catalogue, tmp_path / "shards")
    points: dict[str, tuple[float, float]] = {}
    for path in REAL.glob("*.parquet"):
        table = pq.read_table(path, columns=["sample_id", "lon", "lat"])
        points |= {key: (x, y) for key, x, y in zip(*(table[name].to_pylist() for name in table.column_names))}
    rows = [manifest.row(row) for row in range(len(manifest))]
    assert {row["crs"] for row in rows} == {"EPSG:32630", "EPSG:32631", "EPSG:32632"}
    for row in rows:
        assert row["side"] == 10.0
        x, y = row["left"] + 5, row["top"] - 5
        longitude, latitude = transform(row["crs"], "EPSG:4326", [x], [y])
        assert (longitude[0], latitude[0]) == pytest.approx(points[row["key"]], abs=1e-8)


def test_two_workers_write_the_same_bytes_as_one_wherever_the_tables_are(tmp_path: Path) -> None:
    def write_real(folder: Path, out: Path, workers: int) -> Manifest:
        catalogue = open_described(folder, load_dataset(str(REAL_DESCRIPTION), []), folder)
        return write_shards(catalogue, out, samples_per_shard=20, workers=workers)

    moved = tmp_path / "moved"
    shutil.copytree(REAL, moved)
    one, two = write_real(REAL, tmp_path / "one", 1), write_real(moved, tmp_path / "two", 2)
    assert [item.sha256 for item in one.shards] == [item.sha256 for item in two.shards] and len(one.shards) == 4
    assert one.digest == two.digest


def test_the_order_of_the_rows_and_the_layout_of_the_file_do_not_matter(source: Path, tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permutation(12)
    table = {name: column.take(pa.array(shuffled)) for name, column in columns().items()}
    table["id"], table["crop"] = table["id"].dictionary_encode(), table["crop"].dictionary_encode()
    write(tmp_path / "other" / "a.parquet", table, row_group_size=5, compression="none")
    first, second = (arrays(shard(folder, folder / "out")) for folder in (source, tmp_path / "other"))
    assert first.keys() == second.keys() == {"p0", "p1", "p2", "p3"}
    for key, patch in first.items():
        assert patch.keys() == second[key].keys()
        for name, values in patch.items():
            np.testing.assert_array_equal(values, second[key][name])
    assert first["p1"]["S2"][:, 0, 0, 0].tolist() == [101, 105, 109]
    assert first["p1"]["S2.dates"].tolist() == [(day - EPOCH).days for day in DAYS]


@pytest.mark.parametrize("rows", [3, 1 << 17])
def test_columns_are_read_and_written_in_blocks(
    source: Path, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bocage.shards.source.described.series_table._BATCH_ROWS", rows)
    monkeypatch.setattr("bocage.shards.source.described.pixel_series._BLOCK_ROWS", rows)
    found = arrays(shard(source, tmp_path / "out"))
    assert [found[key]["S2"][-1, 1, 0, 0] for key in sorted(found)] == [2008, 2009, 2010, 2011]


def test_values_with_one_name_are_one_class_and_null_is_no_label(source: Path, tmp_path: Path) -> None:
    table = columns(5)
    table["crop"] = pa.array([10, 20, 21, 0, None] * 3, pa.int32())
    manifest = shard(write(source / "a.parquet", table).parent, tmp_path / "out")
    scheme = manifest.registry["CROP"].schemes[0]
    assert scheme.classes == ("maize", "wheat", "ignored") and scheme.scored == (0, 1)
    found = arrays(manifest)
    assert [found[f"p{number}"]["CROP"].item() for number in range(4)] == [0, 1, 1, 2]
    assert "CROP" not in found["p4"]


def test_a_table_beside_a_labelled_one_may_lack_the_label(source: Path, tmp_path: Path) -> None:
    table = columns(2)
    del table["crop"]
    write(source / "b.parquet", {**table, "id": pa.array(["u0", "u1"] * 3)})
    catalogue = open_described(source, description(), source)
    assert "1 of 2 tables without a column for CROP" in catalogue.report().warnings()
    found = arrays(write_shards(catalogue, tmp_path / "out"))
    assert {key for key, patch in found.items() if "CROP" not in patch} == {"u0", "u1"}


def test_colours_and_unscored_classes_name_one_value_of_a_class() -> None:
    label = {"classes": {1: "maize", 2: "wheat", 3: "wheat"}, "colours": {3: "00ff00"}, "unscored": [2]}
    scheme = description(labels={"CROP": label}).labels["CROP"].scheme("CROP")
    assert scheme.colours[1] == "00ff00" and scheme.scored == (0,)


def test_null_and_nodata_are_missing(source: Path, tmp_path: Path) -> None:
    """A row in which all bands are missing is no date; one missing band is stored as nodata."""
    table = columns(3)
    table["R"] = pa.array([None, 101, None, 65535, 104, 105, None, 107, 108], pa.uint16())
    table["N"] = pa.array([None, 65535, 7, 65535, None, 8, None, 9, 10], pa.uint16())
    table["height"] = pa.array([math.nan, None, 2.5, math.nan, 4.5, None, None, 4.5, 2.5], pa.float32())
    found = arrays(shard(write(source / "a.parquet", table).parent, tmp_path / "out"))
    assert "p0" not in found  # no value of any sensor
    assert found["p1"]["S2"][:, :, 0, 0].tolist() == [[101, 65535], [104, 65535], [107, 9]]
    assert found["p2"]["S2"][:, :, 0, 0].tolist() == [[65535, 7], [105, 8], [108, 10]]
    assert (found["p1"]["TERRAIN"].item(), found["p2"]["TERRAIN"].item()) == (4.5, 2.5)
    notes = "\n".join(open_described(source, description(), source).report().warnings())
    assert "3 of 9 dates of S2 left out: no band has a value" in notes
    assert "1 series left out: no sensor has a value, e.g. p0" in notes


def test_sensors_on_rows_of_their_own_and_a_mask(source: Path, tmp_path: Path) -> None:
    """A table may hold a row for each sensor and date: the columns of other sensors are null there."""
    table = {
        "id": pa.array(["p"] * 5),
        "day": pa.array([DAYS[0], DAYS[0], DAYS[1], DAYS[2], DAYS[2]]),
        "site": pa.array(["s"] * 5),
        "R": pa.array([1, None, 2, None, 3], pa.int64()),
        "N": pa.array([4, None, 5, None, 6], pa.int64()),
        "cloud": pa.array([10, None, 20, None, 30], pa.uint8()),
        "VV": pa.array([None, 0.5, None, 0.25, None], pa.float64()),
    }
    sensors = {
        "S2": {"role": "series", "dtype": "uint16", "bands": {"R": 665, "N": 842}},
        "CLOUDS": {"role": "mask", "mask_of": "S2", "dtype": "uint8", "bands": {"cloud": "cloud_probability"}},
        "S1": {"role": "series", "dtype": "float32", "bands": {"VV": "backscatter_vv"}, "representation": "decibel"},
    }
    write(source / "a.parquet", table)
    settings = config_from_dict(DatasetDescription, {**DESCRIPTION, "sensors": sensors, "labels": {}}, "test")
    found = arrays(write_shards(open_described(source, settings, source), tmp_path / "out"))["p"]
    assert found["S2"][:, 0, 0, 0].tolist() == [1, 2, 3]
    assert found["CLOUDS"][:, 0, 0, 0].tolist() == [10, 20, 30]
    assert found["S1"][:, 0, 0, 0].tolist() == [0.5, 0.25]
    assert found["S1.dates"].tolist() == [(day - EPOCH).days for day in (DAYS[0], DAYS[2])]


@pytest.mark.parametrize(
    ("dates", "settings"),
    [
        (pa.array(DAYS, pa.date64()), {}),
        (pa.array([datetime.datetime(2021, day.month, 15, 23, 59) for day in DAYS], pa.timestamp("ns")), {}),
        (pa.array([datetime.datetime(2021, day.month, 15) for day in DAYS], pa.timestamp("s", "Europe/Paris")), {}),
        (pa.array([f"{day:%Y%m%d}" for day in DAYS]), {}),
        (pa.array([int(f"{day:%Y%m%d}") for day in DAYS]), {}),
        (pa.array([f"{day:%d.%m.%Y}" for day in DAYS]).dictionary_encode(), {"date_format": "%d.%m.%Y"}),
    ],
    ids=["date64", "timestamp", "zone", "text", "number", "format"],
)
def test_dates_of_any_type(source: Path, tmp_path: Path, dates: pa.Array, settings: dict[str, Any]) -> None:
    table = {**columns(1), "day": dates}
    found = arrays(shard(write(source / "a.parquet", table).parent, tmp_path / "out", **settings))
    assert found["p0"]["S2.dates"].tolist() == [(day - EPOCH).days for day in DAYS]


def test_dates_before_1970_are_whole_days(source: Path, tmp_path: Path) -> None:
    days = [datetime.datetime(1969, 12, 30, hour) for hour in (1, 23)]
    later = [datetime.datetime(2021, month, 1) for month in (1, 2)]
    table = {**columns(1), "day": pa.array([days[0], *later], pa.timestamp("ms"))}
    assert arrays(shard(write(source / "a.parquet", table).parent, tmp_path / "a"))["p0"]["S2.dates"][0] == -2
    table["day"] = pa.array([*days, later[0]], pa.timestamp("ms"))
    with pytest.raises(InputError, match="series p0 has two rows with values of S2 on 1969-12-30"):
        shard(write(source / "a.parquet", table).parent, tmp_path / "b")


def test_fields_of_columns_and_file_names_make_keys_regions_and_splits(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    for year in (2020, 2021):
        write(tables / f"year={year}" / "part.parquet", columns())
    splits = {
        "split_year": {"by": "year", "train": ["2020"], "test": ["2021"]},
        "split_site": {"by": "domain", "train": ["s0"], "test": "rest"},
    }
    manifest = shard(
        tables,
        tmp_path / "out",
        table={**DESCRIPTION["table"], "files": "year={year}/*.parquet"},
        key="{year}_{key}",
        region="{year}",
        splits=splits,
    )
    rows = {row["key"]: row for row in map(manifest.row, range(len(manifest)))}
    assert rows["2021_p1"]["domain"] == "s1" and rows["2021_p1"]["roi"] == "s1/2021"
    assert (rows["2021_p1"]["split_year"], rows["2021_p1"]["split_site"]) == ("test", "test")
    assert len(rows) == 8 and rows["2020_p0"]["split_year"] == "train"
    assert rows["2021_p1"]["crs"] == "" and rows["2021_p1"]["left"] == 0.0


def test_blocks_of_ground_are_regions(tmp_path: Path) -> None:
    table = {**columns(), "x": pa.array([2.9, 2.9001, 3.2, 3.2] * 3), "y": pa.array([45.0, 45.0, 45.0, -45.0] * 3)}
    source = write(tmp_path / "tables" / "a.parquet", table).parent
    settings = {"table": {**DESCRIPTION["table"], "longitude": "x", "latitude": "y"}, "domain": "", "blocks": 1000}
    manifest = shard(source, tmp_path / "out", **settings)
    regions = {row["key"]: row["roi"].partition("/")[2] for row in map(manifest.row, range(4))}
    assert regions["p0"] == regions["p1"] and len(set(regions.values())) == 3
    assert re.fullmatch(r"32631_-?\d+_\d+", regions["p2"]) and regions["p3"].startswith("32731_")
    with pytest.raises(InputError, match=r"blocks need positions; name table.longitude and table.latitude"):
        shard(source, tmp_path / "none", domain="", blocks=1000)


def test_patches_carry_their_values_and_the_temporary_folder_stays_empty(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers on other machines need neither the tables nor the sorted copy, of which nothing is left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    catalogue = open_described(source, description(), source)
    assert not list(temporary.iterdir())
    shutil.rmtree(source)
    pickled = pickle.dumps(catalogue.patch(1))
    assert len(pickled) < 3000
    patch = pickle.loads(pickled)
    raster = patch.sources["S2"].read_raster(catalogue.registry["S2"])
    assert raster.array[:, 0, 0, 0].tolist() == [102, 106, 110]  # p2, the second of site s0


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "tables" / "a.parquet", columns(5000)).parent
    with tmpfs(tmp_path / "small", "64k") as small:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        with pytest.raises(InputError, match=r"small: cannot hold the values of the tables.*No space left.*set TMPDIR"):
            open_described(source, description(), source)
        monkeypatch.undo()
    assert len(open_described(source, description(), source)) == 5000


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda table: table.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("id"), "no column 'id' for table.key; its columns are day, site, R, N, height, crop"),
        (drop("day"), "no column 'day' for table.date"),
        (drop("N"), "no column 'N' for sensors.S2.N"),
        (drop("crop"), "no column 'crop' for labels.CROP"),
        (drop("site"), "no column 'site' for table.fields.site"),
        (cast("R", pa.float64()), "column 'R' is double, but sensors.S2.R needs integers (uint16)"),
        (cast("height", pa.string()), "column 'height' is string, but sensors.TERRAIN.height needs numbers"),
        (cast("crop", pa.float32()), "column 'crop' is float, but labels.CROP needs integers"),
        (cast("height", pa.float64()), None),
        (cast("R", pa.int64()), None),
        (cast("id", pa.large_string()), None),
        (replaced("id", 5, None), "column 'id': 1 null key; leave"),
        (replaced("day", 5, None), "column 'day': 1 null date; leave"),
        (replaced("day", 5, DAYS[0]), "series p1 has two rows with values of S2 on 2021-03-15"),
        (replaced("site", 5, None), "column 'site' of the field site is null for series p1"),
        (replaced("site", 5, "s0"), "the field site changes within series p1: s1, then s0"),
        (replaced("crop", 5, 10), "CROP changes within series p1: 1, then 0"),
        (replaced("crop", 5, None), "CROP is null in some rows of series p1"),
        (replaced("crop", 5, 77), "column 'crop': value 77 is neither a class nor ignored"),
        (replaced("height", 5, 7.5), "TERRAIN changes within series p1: 1.0, then 7.5"),
        (replaced("height", 5, math.inf), "column 'height': infinite values"),
    ],
)
def test_a_wrong_table_is_named_before_any_work(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str | None
) -> None:
    table = columns()
    change(table)
    write(source / "a.parquet", table)
    if message is None:
        assert len(shard(source, tmp_path / "out")) == 4
        return
    with pytest.raises(InputError) as error:
        shard(source, tmp_path / "out")
    assert message in str(error.value) and str(source / "a.parquet") in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "changes", "message"),
    [
        (("R", pa.array([70_000] * 12)), {}, "column 'R': does not fit uint16: Integer value 70000"),
        (("R", pa.array([-1] * 12)), {}, "column 'R': does not fit uint16: Integer value -1"),
        (("height", pa.array([math.nan] * 12)), {"TERRAIN": {"nodata": []}}, "column 'height': NaN values"),
        (("R", pa.array([None] * 12, pa.uint16())), {"S2": {"nodata": []}}, "column 'R' is null where other bands"),
        (("R", pa.array([65535] * 12)), {"S2": {"bands": {"R": 665}}}, None),
    ],
)
def test_values_that_do_not_fit_the_sensor_are_named(
    source: Path, tmp_path: Path, column: tuple[str, pa.Array], changes: dict[str, Any], message: str | None
) -> None:
    write(source / "a.parquet", {**columns(), column[0]: column[1]})
    sensors = {name: {**sensor, **changes.get(name, {})} for name, sensor in DESCRIPTION["sensors"].items()}
    if message is None:
        manifest = shard(source, tmp_path / "out", sensors=sensors)
        assert list(manifest.registry) == ["TERRAIN", "CROP"]  # no series has a value of S2
        return
    with pytest.raises(InputError) as error:
        shard(source, tmp_path / "out", sensors=sensors)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("longitude", "latitude", "message"),
    [
        ([1.0, 200.0], [45.0, 45.0], "column 'x': longitude 200.0 of series p1 is not in degrees, -180 to 180"),
        ([1.0, 2.0], [45.0, 4_500_000.0], "latitude 4500000.0 of series p1 is not in degrees"),
        ([1.0, None], [45.0, 45.0], "longitude nan of series p1"),
    ],
)
def test_a_position_that_is_not_in_degrees_is_named(
    source: Path, tmp_path: Path, longitude: list[float], latitude: list[float], message: str
) -> None:
    table = {**columns(2), "x": pa.array(longitude * 3), "y": pa.array(latitude * 3)}
    write(source / "a.parquet", table)
    settings = {**DESCRIPTION["table"], "longitude": "x", "latitude": "y"}
    with pytest.raises(InputError) as error:
        shard(source, tmp_path / "out", table=settings)
    assert message in str(error.value)


def test_a_series_in_two_files_and_names_that_become_one_key_are_refused(source: Path, tmp_path: Path) -> None:
    second = write(source / "b.parquet", columns(2))
    with pytest.raises(InputError, match=r"series p0 is in two files, .*a\.parquet and .*b\.parquet"):
        shard(source, tmp_path / "out")
    write(second, {**columns(2), "id": pa.array(["x.1", "x 1"] * 3)})
    with pytest.raises(InputError, match=r"b\.parquet: series x\.1 and x 1 both get the key x-1; see key"):
        shard(source, tmp_path / "out")
    write(second, {**columns(2), "id": pa.array(["", "y"] * 3)})
    with pytest.raises(InputError, match="a series has an empty key"):
        shard(source, tmp_path / "out")


def test_a_table_that_is_none_is_named(source: Path, tmp_path: Path) -> None:
    (source / "b.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read: Parquet file size is 0 bytes"):
        shard(source, tmp_path / "out")
    content = (source / "a.parquet").read_bytes()
    (source / "b.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read: "):
        shard(source, tmp_path / "out")
    damaged = bytearray(content)
    damaged[4:400] = bytes(396)
    (source / "b.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read: "):
        shard(source, tmp_path / "out")
    write(source / "b.parquet", {name: column.slice(0, 0) for name, column in columns().items()})
    with pytest.raises(InputError, match=r"b\.parquet: has no rows"):
        shard(source, tmp_path / "out")
    duplicated = pa.Table.from_arrays([*columns().values(), columns()["R"]], names=[*columns(), "R"])
    pq.write_table(duplicated, source / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: 2 columns 'R' for sensors.S2.R"):
        shard(source, tmp_path / "out")


def test_a_folder_without_tables_or_values_is_named(source: Path, tmp_path: Path) -> None:
    (source / "notes.txt").write_text("from the archive")
    (source / "a.parquet").rename(source / "a.parq")
    with pytest.raises(InputError, match=r"no file matches table.files '\*\.parquet'; files here: a\.parq, notes\.txt"):
        shard(source, tmp_path / "out")
    (source / "a.parq").unlink()
    table = {**columns(), "R": pa.array([65535] * 12), "N": pa.array([65535] * 12)}
    write(source / "a.parquet", table | {"height": pa.array([math.nan] * 12)})
    with pytest.raises(InputError, match="none of 4 series has a value; see nodata in the description"):
        shard(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": "1 px"}, "patch='1 px': give the side of a patch in metres"),
        ({"table": {"files": "{site}.parquet", "fields": {"site": "site"}}}, "table.files: the field site is not free"),
        ({"table": {"files": "{key}.parquet"}}, "table.files: the field key is not free"),
        ({"table": {"key": ""}}, "table.key: name a column"),
        ({"table": {"longitude": "x"}}, "name both columns or none"),
        ({"table": {"fields": {"block": "site"}}}, "table.fields.block: block is computed"),
        ({"domain": "{place}"}, "no field 'place'; fields: key, site"),
        ({"sensors": {"S2": {**DESCRIPTION["sensors"]["S2"], "files": "a.tif"}}}, "table.files; leave this one out"),
        ({"sensors": {"S2": {**DESCRIPTION["sensors"]["S2"], "pixel": 10}}}, "as large as patch; leave pixel out"),
        (
            {"sensors": {"S2": {**DESCRIPTION["sensors"]["S2"], "columns": {"B": "R"}}}},
            "columns.B: not among the bands",
        ),
        ({"labels": {"CROP": {"classes": {1: "a", 2: "a"}, "colours": {1: "000000", 2: "ffffff"}}}}, "another colour"),
        ({"kind": "tiles", "patch": 10}, "S2: files: give the pattern of its files"),
    ],
)
def test_an_impossible_description_names_its_key(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        shard(source, tmp_path / "out", **changes)
    assert message in str(error.value)


def test_a_series_of_one_pixel_is_drawn_as_curves(source: Path, tmp_path: Path) -> None:
    table = columns(1)
    table["N"] = pa.array([2000, 65535, 2500], pa.uint16())
    manifest = shard(write(source / "a.parquet", table).parent, tmp_path / "out")
    figure = contact_sheet(manifest, 0)
    (axis,) = figure.axes
    curves = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axis.lines}
    assert curves["R"] == [100, 101, 102] and np.isnan(curves["N"][1]) and curves["N"][::2] == [2000, 2500]
    assert np.asarray(axis.lines[0].get_xdata())[0] == np.datetime64("2021-03-15")
    assert "TERRAIN height: 0, CROP: maize" in [text.get_text() for text in figure.texts]
