"""Read a Parquet table of pixel series: check its columns and values, and order its rows by series and date."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.shards.errors import InputError, counted
from bocage.shards.format.index import MAX_SERIES_LENGTH
from bocage.shards.source.described.description import DatasetDescription, SensorDescription
from bocage.shards.source.described.files import parse_day
from bocage.shards.source.described.rasters import RasterRules, convert, label_rules, sensor_rules

_BATCH_ROWS = 1 << 17  # rows that are read at a time
_EPOCH = datetime.date(1970, 1, 1)
_FIRST_DAY, _LAST_DAY = ((day - _EPOCH).days for day in (datetime.date.min, datetime.date.max))
_PER_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}
_DEGREES = ("longitude", "latitude")
_MAX_SHOWN = 40  # columns in a message


@dataclass(frozen=True)
class SeriesInfo:
    """What a table says about its series.

    Attributes:
        keys: key of each series.
        fields: fields of each series.
        longitude, latitude: position of each series in degrees, NaN if unknown.
        empty_dates: number of rows without a value, by sensor of role ``series``.
    """

    keys: list[str]
    fields: list[dict[str, str]]
    longitude: np.ndarray
    latitude: np.ndarray
    empty_dates: dict[str, int]


AppendRows = Callable[[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
"""Callback that receives a sensor or label, its number of rows by series, these rows by series and date as numbers of
rows of the table, and the dates and values of all rows of the table."""


class SeriesTable:
    """One Parquet file whose columns were checked.

    Args:
        path: path of the file.
        fields: fields of its name.
        description: description of the dataset.

    Attributes:
        rows: number of rows.

    Raises:
        InputError: the file cannot be read, has no rows, or its columns contradict the description.
    """

    def __init__(self, path: Path, fields: dict[str, str], description: DatasetDescription) -> None:
        self.path, self.file_fields, self.description = path, fields, description
        with self._explain_errors(), pq.ParquetFile(path) as file:
            self._schema, self.rows = file.schema_arrow, file.metadata.num_rows
        if not self.rows:
            raise InputError(f"{path}: has no rows; write it again, or leave it out of table.files")
        table = description.table
        self._check("table.key", table.key, _is_text, "text or integers")
        self._check("table.date", table.date, _is_date, "dates, timestamps, text or integers")
        for name in _DEGREES:
            if column := getattr(table, name):
                self._check(f"table.{name}", column, _is_number, "numbers")
        for name, column in table.fields.items():
            self._check(f"table.fields.{name}", column, _is_text, "text or integers")
        for name, sensor in description.sensors.items():
            for band, column in _columns(sensor).items():
                if sensor.dtype == "float32":
                    self._check(f"sensors.{name}.{band}", column, _is_number, "numbers")
                else:
                    self._check(f"sensors.{name}.{band}", column, _is_integer, f"integers ({sensor.dtype})")
        for name in description.labels:
            if self.has_label(name):
                self.check_label(name)

    def has_label(self, name: str) -> bool:
        """Whether the table has the column of a label."""
        return (self.description.labels[name].column or name) in self._schema.names

    def check_label(self, name: str) -> None:
        """Check the column of a label.

        Raises:
            InputError: the table lacks the column, or its type is no integer.
        """
        self._check(f"labels.{name}", self.description.labels[name].column or name, _is_integer, "integers")

    def _check(self, key: str, column: str, is_fitting: Callable[[pa.DataType], bool], expected: str) -> None:
        """Check that a column exists once, with a fitting type."""
        found = self._schema.get_all_field_indices(column)
        if len(found) != 1:
            names = self._schema.names
            known = ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
            count = "no column" if not found else f"{len(found)} columns"
            raise InputError(f"{self.path}: {count} {column!r} for {key}; its columns are {known}")
        if not is_fitting(kind := self._type(column)):
            raise InputError(f"{self.path}: column {column!r} is {kind}, but {key} needs {expected}")

    def _type(self, column: str) -> pa.DataType:
        kind = self._schema.field(column).type
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: cannot be read: {' '.join(str(error).split())}") from error

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[slice, list[pa.Array]]]:
        """Read some columns, a batch of rows at a time."""
        start = 0
        # The tables are opened for each reading, because there may be more of them than a process may open.
        with self._explain_errors(), pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                arrays = [batch.column(name) for name in columns]
                yield slice(start, start + batch.num_rows), [_decoded(array) for array in arrays]
                start += batch.num_rows

    def codes(self, column: str) -> tuple[np.ndarray, list[Any]]:
        """Number of the value of each row, (rows,) int32, -1 for null; and the values by number."""
        codes, numbers = np.empty(self.rows, np.int32), {None: -1}
        for rows, (array,) in self.batches([column]):
            encoded = array.dictionary_encode(null_encoding="encode")
            local = [numbers.setdefault(value, len(numbers) - 1) for value in encoded.dictionary.to_pylist()]
            codes[rows] = np.array(local, np.int32)[encoded.indices.to_numpy()]
        return codes, list(numbers)[1:]

    def days(self, column: str) -> np.ndarray:
        """Date of each row, (rows,) int32 days since 1970-01-01; of the UTC day of timestamps.

        Raises:
            InputError: a date is null, out of range, or a text of another form.
        """
        kind = self._type(column)
        if not pa.types.is_temporal(kind):
            codes, texts = self.codes(column)
            where, date_format = f"{self.path}: column {column!r}", self.description.date_format
            days = np.array([parse_day(where, str(text), date_format) for text in texts] + [0])[codes]
            is_null = codes < 0
        else:
            days, is_null = np.empty(self.rows, np.int64), np.empty(self.rows, bool)
            for rows, (array,) in self.batches([column]):
                is_null[rows] = array.is_null().to_numpy(zero_copy_only=False)
                array = array.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64()).fill_null(0)
                unit = kind.unit if pa.types.is_timestamp(kind) else "ms"
                days[rows] = array.to_numpy() // (1 if pa.types.is_date32(kind) else _PER_DAY[unit])
        if is_null.any():
            raise InputError(
                f"{self.path}: column {column!r}: {counted(is_null.sum(), 'null date')}; leave out such rows"
            )
        if (wrong := (days < _FIRST_DAY) | (days > _LAST_DAY)).any():
            raise InputError(f"{self.path}: column {column!r}: a date {days[wrong][0]} days after 1970 is out of range")
        return days.astype(np.int32)

    def numbers(self, column: str, array: pa.Array, dtype: str, fill: float) -> np.ndarray:
        """Values of a batch in another dtype, with ``fill`` for nulls.

        Raises:
            InputError: a value does not fit the dtype.
        """
        try:
            return array.cast(pa.from_numpy_dtype(np.dtype(dtype))).fill_null(fill).to_numpy()
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.path}: column {column!r}: does not fit {dtype}: {error}") from error


def read_table(table: SeriesTable, append: AppendRows) -> SeriesInfo:
    """Check all values of a table, and pass on the rows of each sensor and label.

    Raises:
        InputError: a value contradicts the description, or a series has two rows of one date.
    """
    description = table.description
    codes, keys = table.codes(description.table.key)
    if (codes < 0).any():
        raise InputError(
            f"{table.path}: column {description.table.key!r}: {counted((codes < 0).sum(), 'null key')}; leave out such "
            "rows"
        )
    days = table.days(description.table.date)
    rows = _OrderedRows(table.path, keys, codes, days, np.lexsort((days, codes)))
    fields = _read_fields(table, rows)
    longitude, latitude = (_read_degrees(table, rows, name) for name in _DEGREES)
    valid: dict[str, np.ndarray] = {}  # rows with a value, by series
    empty_dates: dict[str, int] = {}
    for name, sensor in sorted(description.sensors.items(), key=lambda item: item[1].role == "mask"):
        values, has_value = _read_sensor(table, sensor)
        if sensor.role == "image":
            chosen = rows.constant(name, values, has_value)
        elif sensor.role == "series":
            chosen, valid[name] = rows.dated(name, has_value), has_value
            empty_dates[name] = table.rows - len(chosen)
        else:
            chosen = rows.dated(name, valid[sensor.mask_of])
            if not has_value[chosen].all():
                key = keys[codes[chosen[has_value[chosen].argmin()]]]
                raise InputError(f"{table.path}: {name} has no value on a date of {sensor.mask_of} of series {key}")
        append(name, rows.counts(chosen), chosen, days, values)
    for name, label in description.labels.items():
        if table.has_label(name):
            values, has_value = _read_label(table, label.column or name, label_rules(label, description))
        else:
            values, has_value = np.zeros((table.rows, 1), np.uint8), np.zeros(table.rows, bool)
        chosen = rows.constant(name, values, has_value, may_miss=False)
        append(name, rows.counts(chosen), chosen, days, values)
    return SeriesInfo([str(key) for key in keys], fields, longitude, latitude, empty_dates)


@dataclass(frozen=True)
class _OrderedRows:
    """The rows of a table in the order of series and dates.

    Attributes:
        path: path of the table, for messages.
        keys: key of each series.
        codes: number of the series of each row of the table.
        days: date of each row of the table.
        order: rows of the table, sorted.
    """

    path: Path
    keys: list[Any]
    codes: np.ndarray
    days: np.ndarray
    order: np.ndarray

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Number of the given rows of each series."""
        return np.bincount(self.codes[rows], minlength=len(self.keys))

    def dated(self, name: str, is_chosen: np.ndarray) -> np.ndarray:
        """The chosen rows in order, checked to be of different dates.

        Raises:
            InputError: two of them are of one series and date, or a series is too long.
        """
        rows = self.order[is_chosen[self.order]]
        codes, days = self.codes[rows], self.days[rows]
        if (repeated := (codes[1:] == codes[:-1]) & (days[1:] == days[:-1])).any():
            row = rows[repeated.argmax()]
            day = _EPOCH + datetime.timedelta(days=int(self.days[row]))
            raise InputError(
                f"{self.path}: series {self.keys[self.codes[row]]} has two rows with values of {name} on {day}"
            )
        counts = self.counts(rows)
        if counts.max() > MAX_SERIES_LENGTH:
            raise InputError(
                f"{self.path}: series {self.keys[counts.argmax()]} has {counted(counts.max(), 'date')} of {name}; "
                f"shards hold {MAX_SERIES_LENGTH}"
            )
        return rows

    def constant(
        self,
        name: str,
        values: np.ndarray,
        is_chosen: np.ndarray | None = None,
        *,
        may_miss: bool = True,
        texts: Sequence[str] = (),
    ) -> np.ndarray:
        """The first chosen row of each series that has one, checked to have the value of its other rows.

        Args:
            name: what the values are, for messages.
            values: values of each row of the table, (rows, ...).
            is_chosen: rows that have a value; all by default.
            may_miss: whether some rows of a series may lack the value that others have.
            texts: text of each value for messages, if values are numbers of texts.

        Raises:
            InputError: a value changes within a series.
        """
        rows = self.order if is_chosen is None else self.order[is_chosen[self.order]]
        codes = self.codes[rows]
        is_first = np.append(True, codes[1:] != codes[:-1])[: len(codes)]
        firsts = rows[is_first]
        expected = firsts[np.cumsum(is_first) - 1]
        differs = values[rows] != values[expected]
        if values.dtype.kind == "f":
            differs &= ~(np.isnan(values[rows]) & np.isnan(values[expected]))
        differs = differs.any(axis=tuple(range(1, differs.ndim)))
        if differs.any():
            pair = [expected[differs.argmax()], rows[differs.argmax()]]
            shown = [texts[values[row]] if texts else _shown(values[row]) for row in pair]
            key = self.keys[self.codes[pair[0]]]
            raise InputError(f"{self.path}: {name} changes within series {key}: {shown[0]}, then {shown[1]}")
        if not may_miss:
            missing = ((counts := self.counts(rows)) > 0) & (counts < np.bincount(self.codes, minlength=len(self.keys)))
            if missing.any():
                raise InputError(f"{self.path}: {name} is null in some rows of series {self.keys[missing.argmax()]}")
        return firsts


def _shown(values: Any) -> str:
    return ", ".join(f"{value}" for value in np.ravel(values))


def _read_fields(table: SeriesTable, rows: _OrderedRows) -> list[dict[str, str]]:
    """Fields of each series of a table."""
    series = [{**table.file_fields, "key": str(key)} for key in rows.keys]
    for name, column in table.description.table.fields.items():
        codes, values = table.codes(column)
        if (codes < 0).any():
            key = rows.keys[rows.codes[(codes < 0).argmax()]]
            raise InputError(f"{table.path}: column {column!r} of the field {name} is null for series {key}")
        texts = [str(value) for value in values]
        firsts = rows.constant(f"the field {name}", codes, texts=texts)
        for fields, code in zip(series, codes[firsts].tolist()):
            fields[name] = texts[code]
    return series


def _read_degrees(table: SeriesTable, rows: _OrderedRows, name: str) -> np.ndarray:
    """Longitude or latitude of each series of a table, NaN if the description names no column."""
    column = getattr(table.description.table, name)
    if not column:
        return np.full(len(rows.keys), np.nan)
    values = np.empty(table.rows)
    for batch, (array,) in table.batches([column]):
        values[batch] = table.numbers(column, array, "float64", math.nan)
    limit = 180 if name == "longitude" else 90
    if (wrong := ~(np.abs(values) <= limit)).any():
        row = wrong.argmax()
        raise InputError(
            f"{table.path}: column {column!r}: {name} {values[row]} of series {rows.keys[rows.codes[row]]} is not in "
            f"degrees, -{limit} to {limit}"
        )
    return values[rows.constant(name, values)]


def _read_sensor(table: SeriesTable, sensor: SensorDescription) -> tuple[np.ndarray, np.ndarray]:
    """Values of a sensor, (rows, C), and which rows have any value.

    Raises:
        InputError: a value contradicts the description, or is null beside values of other bands and the description
            names no nodata value to store.
    """
    columns, rules = list(_columns(sensor).values()), sensor_rules(sensor, table.description)
    values, has_value = np.empty((table.rows, len(columns)), sensor.dtype), np.empty(table.rows, bool)
    fill = rules.nodata.fill
    for rows, arrays in table.batches(columns):
        for band, (column, array) in enumerate(zip(columns, arrays)):
            numbers = table.numbers(column, array, sensor.dtype, 0 if fill is None else fill)
            values[rows, band] = convert(f"{table.path}: column {column!r}", numbers, rules, None)
        block, is_null = values[rows], np.stack([array.is_null() for array in arrays], axis=1)
        has_value[rows] = (~is_null & ~rules.nodata.is_missing(block)).any(axis=1)
        if fill is None and (partial := is_null & has_value[rows, None]).any():
            column = columns[partial.any(axis=0).argmax()]
            raise InputError(
                f"{table.path}: column {column!r} is null where other bands have values; name a nodata value to store"
            )
    return values, has_value


def _read_label(table: SeriesTable, column: str, rules: RasterRules) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers of a label, (rows, 1) uint8, and which rows have one."""
    values, has_value = np.zeros((table.rows, 1), np.uint8), np.empty(table.rows, bool)
    for rows, (array,) in table.batches([column]):
        has_value[rows] = array.is_valid().to_numpy(zero_copy_only=False)
        labels = table.numbers(column, array.drop_null(), "int64", 0)
        values[rows, 0][has_value[rows]] = convert(f"{table.path}: column {column!r}", labels, rules, None)
    return values, has_value


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_date(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind) or _is_text(kind)


def _columns(sensor: SensorDescription) -> dict[str, str]:
    """Column of each band of the shards."""
    return {band.name: sensor.columns.get(band.name, band.name) for band in sensor.used_bands}
