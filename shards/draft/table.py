"""Draft the description of Parquet tables of pixel series, from their columns and a sample of their rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bocage.shards.draft.bands import KNOWN, name_bands
from bocage.shards.draft.splits import FRACTIONS, propose_splits
from bocage.shards.draft.yaml import Draft, Keys
from bocage.shards.errors import InputError, counted
from bocage.shards.source.described.file_patterns import plain_name

_FILES, _ROWS = 20, 200_000  # tables of which rows are read, and rows of all of them
_MAX_CLASSES, _MAX_SITES = 254, 100
_PIXEL = 10.0  # metres, of Sentinel
_BLOCK_SIDES = (50_000.0, 20_000.0, 10_000.0, 5_000.0, 2_000.0, 1_000.0)
_DEGREE = 111_320.0  # metres, at the equator
_KEY_NAME = re.compile(r"(^|[_-])(id|key|sample|series|pixel|parcel|point)([_-]|$)", re.IGNORECASE)
_LABEL_NAME = re.compile(r"(^|[_-])(label|class|code|crop|type|target|category|landcover|lc)([_-]|$)", re.IGNORECASE)
_SITE_NAME = re.compile(r"(^|[_-])(region|country|site|area|tile|domain|dataset)([_-]|$)", re.IGNORECASE)
_LONGITUDE, _LATITUDE = ("lon", "long", "longitude", "lng"), ("lat", "latitude")
_DATE_NAME = re.compile(r"date|time|day", re.IGNORECASE)
_DATE_FORMATS = {
    r"\d{4}-\d\d-\d\d": "%Y-%m-%d",
    r"\d{8}": "%Y%m%d",
    r"\d\d/\d\d/\d{4}": "%d/%m/%Y",
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d": "%Y-%m-%d %H:%M:%S",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d": "%Y-%m-%dT%H:%M:%S",
}
_MAX_SHOWN = 12
_MAX_REPEATED = 0.1  # part of the rows whose key and date are repeated, below which the column is a key with faults


def draft_tables(root: Path, paths: Sequence[str]) -> Draft:
    """Draft the description of tables.

    Args:
        root: source folder.
        paths: Parquet files, relative to it.

    Raises:
        InputError: no table can be read, or none has dates, keys, or numbers that change with the date.
    """
    draft = Draft(root, {"name": plain_name(root.resolve().name) or "dataset", "licence": "", "attribution": ""})
    draft.comments[("licence",)] = "licence of the data, such as CC-BY-4.0"
    draft.comments[("attribution",)] = "credit that the licence demands"
    draft.values |= {"kind": "table", "patch": _PIXEL}
    draft.comments[("patch",)] = "metres, the side of a pixel; 10 for Sentinel"
    sample = _read_sample(root, paths, draft)
    rows, roles = sample.rows, _find_roles(root, sample)
    table: dict[str, Any] = {"files": _pattern(paths), "key": roles.key, "date": roles.date}
    if roles.longitude and roles.latitude:
        table |= {"longitude": roles.longitude, "latitude": roles.latitude}
    if roles.date_format:
        draft.values["date_format"] = roles.date_format
    sites: dict[str, tuple[str, ...]] = {}
    series = rows.group_by(roles.key).aggregate([(name, "min") for name in roles.constant])
    if roles.site:
        table["fields"] = {"site": roles.site}
        sites = {"site": tuple(map(str, series[f"{roles.site}_min"].to_pylist()))}
    splits = propose_splits(draft, sites, [True] * len(series), _centres(series, roles), _BLOCK_SIDES)
    draft.values["table"] = table
    draft.values["sensors"] = _sensors(root, rows, roles, draft)
    if roles.label:
        draft.values["labels"] = {plain_name(roles.label).upper(): _label(root, paths, roles.label, draft)}
    if "blocks" not in draft.values and not sites:
        splits = {"split_random": {"by": "key", **FRACTIONS, "allow_mixed_regions": True}}
    draft.values["splits"] = splits
    _comment_columns(draft, sample, roles)
    return draft


def _pattern(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return re.sub(r"[{}*]+", "*", paths[0])
    extension = Path(paths[0]).suffix
    return ("**/" if any("/" in path for path in paths) else "") + f"*{extension}"


@dataclass(frozen=True)
class _Sample:
    """Rows of some tables.

    Attributes:
        rows: rows of all sampled tables, one after the other, with the columns that any of them has.
        paths: path of each sampled table.
        counts: number of rows of each.
        partial: columns that some of the tables lack; their values are null there.
        unused: type of the columns that no description can use, by name.
    """

    rows: pa.Table
    paths: list[Path]
    counts: list[int]
    partial: frozenset[str]
    unused: dict[str, str]

    def path(self, row: int) -> Path:
        """Table that a row is of."""
        return self.paths[int(np.searchsorted(np.cumsum(self.counts), row, side="right"))]


def _read_sample(root: Path, paths: Sequence[str], draft: Draft) -> _Sample:
    """Read some rows of some tables."""
    places = np.unique(np.linspace(0, len(paths) - 1, min(_FILES, len(paths))).astype(int))
    tables: dict[Path, pa.Table] = {}
    unused: dict[str, str] = {}
    problems = []
    for place in places:
        path = root / paths[place]
        try:
            with pq.ParquetFile(path) as file:
                names = [field.name for field in file.schema_arrow if _is_usable(field.type)]
                unused |= {field.name: str(field.type) for field in file.schema_arrow if field.name not in names}
                unused |= {name: "several columns" for name in names if names.count(name) > 1}
                names = [name for name in names if names.count(name) == 1]
                batch = next(file.iter_batches(_ROWS // len(places), columns=names), None)
                if batch is not None:
                    tables[path] = _decoded(pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError) as error:
            problems.append(f"{path}: cannot be read: {' '.join(str(error).split())}")
    if problems:
        draft.notes.append(
            f"{len(problems)} of {counted(len(places), 'sampled table')} left out as unreadable, e.g. {problems[0]}"
        )
    if not tables:
        raise InputError(f"{root}: no table with rows{f': {problems[0]}' if problems else ''}")
    rows = pa.concat_tables(_with_common_types(list(tables.values()), draft), promote_options="permissive")
    partial = {name for table in tables.values() for name in rows.column_names if name not in table.column_names}
    draft.sampled = f"{counted(len(rows), 'row')} of {len(tables)} of {counted(len(paths), 'table')}"
    unused = {name: kind for name, kind in unused.items() if name not in rows.column_names}
    return _Sample(rows, list(tables), [len(table) for table in tables.values()], frozenset(partial), unused)


def _is_usable(kind: pa.DataType) -> bool:
    """Whether a column of this type can be a key, a date, a field, a band or a label."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_text(kind) or _is_number(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def _decoded(table: pa.Table) -> pa.Table:
    """The table without dictionaries, and with half floats, which Arrow cannot compare, as floats."""
    for index, column in enumerate(table.columns):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        kind = pa.float32() if pa.types.is_float16(kind) else kind
        if kind != column.type:
            table = table.set_column(index, table.column_names[index], column.cast(kind))
    return table


def _with_common_types(tables: Sequence[pa.Table], draft: Draft) -> list[pa.Table]:
    """The tables with columns as text whose types in different tables have no common type, such as keys."""
    as_text = set()
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        columns = [table.select([name]) for table in tables if name in table.column_names]
        try:
            pa.concat_tables(columns, promote_options="permissive")
        except pa.ArrowException:
            as_text.add(name)
            kinds = " and ".join(sorted({str(column.schema[0].type) for column in columns}))
            draft.notes.append(f"{name} is {kinds} in different tables, and counts as text")
    return [
        pa.table(
            {name: table[name].cast(pa.string()) if name in as_text else table[name] for name in table.column_names}
        )
        for table in tables
    ]


@dataclass(frozen=True)
class _Roles:
    """What the columns are for; empty for none.

    Attributes:
        key, date, longitude, latitude, label, site: names of columns.
        date_format: format of the dates if they are text.
        constant: columns that do not change within a series.
        changing: columns of numbers that do.
        labels: columns that might be labels.
    """

    key: str
    date: str
    date_format: str
    longitude: str
    latitude: str
    constant: tuple[str, ...]
    changing: tuple[str, ...]
    labels: tuple[str, ...]
    label: str
    site: str


def _find_roles(root: Path, sample: _Sample) -> _Roles:
    """Find out what each column is for, from its name, type and values. Some tables may lack labels only."""
    rows = sample.rows
    complete = rows.select([name for name in rows.column_names if name not in sample.partial])
    date, date_format = _find_date(root, complete)
    key = _find_key(root, complete, date, sample)
    others = [name for name in rows.column_names if name not in (key, date)]
    counts = rows.group_by(key).aggregate([(name, "count_distinct") for name in others])
    constant = [name for name in others if (pc.max(counts[f"{name}_count_distinct"]).as_py() or 0) <= 1]
    labels = [name for name in constant if pa.types.is_integer(rows[name].type)]
    constant, others = ([name for name in names if name not in sample.partial] for names in (constant, others))
    changing = [name for name in others if name not in constant and _is_number(rows[name].type)]
    longitude, latitude = (
        next((name for name in constant if name.lower() in known and pa.types.is_floating(rows[name].type)), "")
        for known in (_LONGITUDE, _LATITUDE)
    )
    distinct = {name: len(pc.unique(rows[name].drop_null())) for name in (*constant, *labels)}
    labels = [name for name in labels if 2 <= distinct[name] <= _MAX_CLASSES]
    texts = [name for name in constant if _is_text(rows[name].type)]
    sites = [name for name in texts if 2 <= distinct[name] <= _MAX_SITES and _SITE_NAME.search(name)]
    return _Roles(
        key=key,
        date=date,
        date_format=date_format,
        longitude=longitude,
        latitude=latitude,
        constant=tuple(constant),
        changing=tuple(changing),
        labels=tuple(labels),
        label=next((name for name in labels if _LABEL_NAME.search(name)), ""),
        site=sites[0] if sites else "",
    )


def _find_date(root: Path, rows: pa.Table) -> tuple[str, str]:
    """Column of the dates, and their format if they are text or integers: the column with most dates."""
    candidates: list[tuple[int, str, str]] = []
    for name in rows.column_names:
        kind = rows[name].type
        distinct = pc.unique(rows[name].drop_null())
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            candidates.append((len(distinct), name, ""))
        elif _DATE_NAME.search(name) and len(distinct) and (_is_text(kind) or pa.types.is_integer(kind)):
            texts = [str(value) for value in distinct[:100].to_pylist()]
            for shape, form in _DATE_FORMATS.items():
                if all(re.fullmatch(shape, text) for text in texts):
                    candidates.append((len(distinct), name, form))
    if not candidates:
        raise InputError(f"{root}: no column of dates among {_shown(rows.column_names)}")
    _, name, form = max(candidates, key=lambda item: item[0])
    return name, "" if form == "%Y%m%d" else form


def _find_key(root: Path, rows: pa.Table, date: str, sample: _Sample) -> str:
    """Column that names the series: each of its values has several dates, and each date once."""
    best: tuple[bool, bool, int] | None = None
    key = ""
    repeated: dict[str, int] = {}  # repeated rows, by column that names the series but for them
    for name in rows.column_names:
        kind = rows[name].type
        if name == date or not (_is_text(kind) or pa.types.is_integer(kind)):
            continue
        counts = rows.group_by([name, date]).aggregate([([], "count_all")])
        distinct = len(pc.unique(rows[name]))
        if len(counts) < len(rows):
            if _KEY_NAME.search(name) and len(rows) - len(counts) <= _MAX_REPEATED * len(rows):
                repeated[name] = len(rows) - len(counts)
            continue
        if distinct == len(rows):
            continue
        rank = (bool(_KEY_NAME.search(name)), _is_text(kind), distinct)
        if best is None or rank > best:
            best, key = rank, name
    if not key and repeated:
        _refuse_repeated(min(repeated, key=repeated.__getitem__), date, sample)
    if not key:
        raise InputError(f"{root}: no column names the series: one whose values have each date of {date} once")
    return key


def _refuse_repeated(key: str, date: str, sample: _Sample) -> NoReturn:
    """Raise an error that names a row that occurs twice, and its tables."""
    places: dict[tuple[Any, Any], int] = {}
    pairs = zip(sample.rows[key].to_pylist(), sample.rows[date].to_pylist())
    for second, pair in enumerate(pairs):
        first = places.setdefault(pair, second)
        if first != second:
            break
    paths = " and ".join(dict.fromkeys(str(sample.path(row)) for row in (first, second)))
    raise InputError(
        f"{paths}: series {pair[0]} of column {key} has two rows of {pair[1]}; leave one out, or name the series by "
        "another column"
    )


def _centres(series: pa.Table, roles: _Roles) -> list[tuple[float, float]] | None:
    """Positions of the series in metres, good enough to count blocks; None without positions."""
    if not (roles.longitude and roles.latitude):
        return None
    longitude, latitude = (series[f"{name}_min"].to_numpy().astype(float) for name in (roles.longitude, roles.latitude))
    x = longitude * _DEGREE * np.cos(np.radians(latitude))
    return [(float(east), float(north)) for east, north in zip(x, latitude * _DEGREE)]


def _sensors(root: Path, rows: pa.Table, roles: _Roles, draft: Draft) -> dict[str, Any]:
    """Sensors with their bands, columns, dtype and nodata."""
    named = dict(zip(roles.changing, name_bands(roles.changing)))
    radar = {column: name for column, name in named.items() if name in ("VV", "VH")}
    optical = {column: name for column, name in named.items() if name is not None and column not in radar}
    numbers = [name for name in roles.constant if _is_number(rows[name].type)]
    if constant := [name for name in numbers if name_bands([*roles.changing, name])[-1]]:
        draft.notes.append(f"{_shown(constant)} is left out: its values do not change with the date")
    sensors: dict[str, dict[str, str]] = {}
    if optical:
        is_sentinel2 = any(re.fullmatch(r"B\d+A?", name) for name in optical.values())
        sensors["SENTINEL2" if is_sentinel2 else "OPTICAL"] = optical
    if radar:
        sensors["SENTINEL1"] = radar
    if not sensors:
        if not roles.changing:
            raise InputError(f"{root}: no column of numbers changes with the date, among {_shown(rows.column_names)}")
        sensors["SERIES"] = {column: plain_name(column) for column in roles.changing}
        draft.notes.append("SERIES: say what the bands measure")
    return {name: _sensor(rows, name, columns, draft) for name, columns in sensors.items()}


def _sensor(rows: pa.Table, name: str, columns: dict[str, Any], draft: Draft) -> dict[str, Any]:
    keys: Keys = ("sensors", name)
    values: dict[str, Any] = {"role": "series", "bands": {band: KNOWN.get(band, "other") for band in columns.values()}}
    if renamed := {band: column for column, band in columns.items() if band != column}:
        values["columns"] = renamed
    arrays = [rows[column].drop_null() for column in columns]
    limits = [pc.min_max(array).as_py() for array in arrays if len(array)]
    lowest, highest = min(item["min"] for item in limits), max(item["max"] for item in limits)
    has_null = any(rows[column].null_count for column in columns)
    values["dtype"] = _dtype([rows[column].type for column in columns], lowest, highest)
    draft.comments[(*keys, "dtype")] = f"values {lowest:g} to {highest:g}"
    nodata: list[float] = []
    if values["dtype"] == "float32":
        if has_null or any(pc.any(pc.is_nan(array)).as_py() for array in arrays if pa.types.is_floating(array.type)):
            nodata = [math.nan]
    elif values["dtype"] == "uint16" and (highest == 65535 or has_null):
        nodata = [65535]
    elif values["dtype"] == "int16" and (lowest in (-9999, -32768) or has_null):
        nodata = [lowest if lowest in (-9999, -32768) else -32768]
    if nodata:
        values["nodata"] = nodata
        draft.comments[(*keys, "nodata")] = "does it mark missing values?"
    return values


def _dtype(kinds: Sequence[pa.DataType], lowest: float, highest: float) -> str:
    """The smallest dtype of shards, uint16 at least, that holds the values of the columns."""
    if all(map(pa.types.is_integer, kinds)):
        for name in ("uint16", "int16"):
            if np.iinfo(name).min <= lowest and highest <= np.iinfo(name).max:
                return name
    return "float32"


def _label(root: Path, paths: Sequence[str], column: str, draft: Draft) -> dict[str, Any]:
    """The label of a column, with the classes of all tables."""
    counts: dict[int, int] = {}
    lacking: list[str] = []
    for path in paths:
        try:
            with pq.ParquetFile(root / path) as file:
                table = _decoded(file.read(columns=[column]))
        except (pa.ArrowException, OSError):
            continue  # a note names tables that cannot be read
        if column not in table.column_names:
            lacking.append(path)
            continue
        values = table[column]
        if not pa.types.is_integer(values.type):
            continue  # sharding names the table
        for item in pc.value_counts(values.drop_null()).to_pylist():
            counts[int(item["values"])] = counts.get(int(item["values"]), 0) + item["counts"]
    keys: Keys = ("labels", plain_name(column).upper())
    total = sum(counts.values())
    for value, count in counts.items():
        draft.comments[(*keys, "classes", str(value))] = f"{100 * count / total:.2g} % of the rows"
    draft.comments[(*keys, "classes")] = "name them"
    if lacking:
        draft.notes.append(
            f"{keys[1]}: {len(lacking)} of {counted(len(paths), 'table')} without the column {column}, e.g. "
            f"{lacking[0]}; their series have no label"
        )
    if len(counts) > _MAX_CLASSES:
        draft.notes.append(
            f"{keys[1]}: {counted(len(counts), 'value')} are more than shards hold; group them in the tables"
        )
    return {
        "column": column,
        "classes": {value: f"class {value}" for value in sorted(counts)},
    }


def _comment_columns(draft: Draft, sample: _Sample, roles: _Roles) -> None:
    """Name the columns that the draft leaves out, with their types."""
    used = {roles.key, roles.date, roles.longitude, roles.latitude, roles.label, roles.site}
    for sensor in draft.values["sensors"].values():
        used |= {sensor.get("columns", {}).get(band, band) for band in sensor["bands"]}
    kinds = {field.name: str(field.type) for field in sample.rows.schema} | sample.unused
    left = [f"{name} ({kind})" for name, kind in kinds.items() if name not in used]
    if left:
        draft.comments[("table",)] = f"columns left out: {', '.join(left)}"
    if others := [name for name in roles.labels if name != roles.label]:
        draft.notes.append(f"the label may be another column: {_shown(others)}")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
