"""Read the dates and splits of FLAIR-HUB from the GeoPackages of GLOBAL_ALL_MTD and the CSV files of the official code.

GeoPackages are streamed in batches of the needed columns, because at full size one of them holds 240,000 JSON texts. A
text that many patches share is parsed and stored once. GeoPackages inside ``GLOBAL_ALL_MTD.zip`` are read in place.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyogrio

from bocage.shards.errors import InputError
from bocage.shards.modality import Modality
from bocage.shards.source.flair_hub import zips

METADATA_FOLDER = "GLOBAL_ALL_MTD"
SPLIT_FILE = "GLOBAL_ALL_MTD_SPLIT.gpkg"

_EPOCH = datetime.date(1970, 1, 1).toordinal()


@dataclass(frozen=True)
class TableFile:
    """One GeoPackage, in a folder or in a zip; ``str()`` gives its name for messages.

    Attributes:
        path: path of the GeoPackage, or of the zip that holds it.
        member: name in the zip; None if ``path`` is the GeoPackage.
    """

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    @property
    def gdal_path(self) -> str:
        """Path for GDAL."""
        return str(self.path) if self.member is None else f"/vsizip/{{{self.path.absolute()}}}/{self.member}"


@dataclass
class Dates:
    """Acquisition dates of one modality.

    Attributes:
        days: (N,) int32 days since 1970-01-01: the distinct lists of dates, concatenated, each in the order of the
            raster's bands.
        bounds: (lists + 1,) int64; list k is ``days[bounds[k]:bounds[k + 1]]``.
        index: (patches,) int32, index of the list of each patch; -1 for unknown dates.
        duplicates: number of rows for a patch that already had one; the first row counts.
        unreadable: number of rows whose dates cannot be parsed; the dates of their patches are unknown.
    """

    days: np.ndarray
    bounds: np.ndarray
    index: np.ndarray
    duplicates: int = 0
    unreadable: int = 0

    def of_patch(self, patch: int) -> np.ndarray | None:
        """Dates of a patch, (T,) int32 days since 1970-01-01; None if unknown."""
        index = self.index[patch]
        return None if index < 0 else self.days[self.bounds[index] : self.bounds[index + 1]]


def find_table(root: Path, name: str) -> TableFile | None:
    """Find the metadata file ``name`` in ``root/GLOBAL_ALL_MTD``, ``root`` or the zip; None if it does not exist.

    Raises:
        InputError: the zip is needed and cannot be read.
    """
    for path in (root / METADATA_FOLDER / name, root / name):
        if path.is_file():
            return TableFile(path)
    archive = root / f"{METADATA_FOLDER}.zip"
    if not archive.is_file():
        return None
    members = {member.name.decode("utf-8", "replace") for member in zips.members(archive)}
    return next((TableFile(archive, path) for path in (f"{METADATA_FOLDER}/{name}", name) if path in members), None)


def read_dates(table: TableFile, modality: Modality, keys: pa.Array) -> Dates:
    """Read the dates of the patches ``keys`` of ``modality`` from ``GLOBAL_{NAME}_MTD_DATES.gpkg``.

    An unknown day or month (``00``) is read as the first.

    Raises:
        InputError: the file cannot be read or lacks a column.
    """
    column = "acquisition_dates" if modality.has_time_axis else "date"
    parse = _series_dates if modality.has_time_axis else _image_date
    index = np.full(len(keys), -1, np.int32)
    days, bounds = array("i"), array("q", [0])
    list_of_text: dict[bytes, int] = {}  # by hash of the text, because texts are long and may all differ
    has_row = np.zeros(len(keys), bool)
    duplicates = unreadable = 0
    for batch in _batches(table, ["patch_id", column]):
        rows, first = _matched(batch["patch_id"], keys, has_row)
        duplicates += len(first) - int(first.sum())
        texts = pc.cast(batch[column], pa.string()).dictionary_encode()
        lists = np.full(len(texts.dictionary) + 1, -1, np.int32)  # the last entry is for null
        for code, text in enumerate(texts.dictionary):
            content = text.as_py()
            digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
            if digest not in list_of_text:
                parsed = parse(content)
                list_of_text[digest] = -1 if parsed is None else len(bounds) - 1
                if parsed is not None:
                    days.extend(parsed)
                    bounds.append(len(days))
            lists[code] = list_of_text[digest]
        codes = lists[pc.fill_null(texts.indices, len(texts.dictionary)).to_numpy(zero_copy_only=False)]
        codes = codes[rows >= 0][first]
        index[rows[rows >= 0][first]] = codes
        unreadable += int((codes < 0).sum())
    return Dates(np.array(days, np.int32), np.array(bounds, np.int64), index, duplicates, unreadable)


def read_splits(table: TableFile, keys: pa.Array) -> dict[str, pa.DictionaryArray]:
    """Read the ``split_*`` columns of ``GLOBAL_ALL_MTD_SPLIT.gpkg``: train, valid, test or null for each of ``keys``.

    Raises:
        InputError: the file cannot be read or has no such column.
    """
    names = [name for name in _columns(table) if name.startswith("split_")]
    if not names:
        raise InputError(f"{table}: no column is named split_...; columns: {', '.join(_columns(table))}")
    batches = list(_batches(table, ["patch_id", *names]))
    if not batches:  # a table without rows: the splits exist, but hold no patch
        return {name: pa.nulls(len(keys), pa.string()).dictionary_encode() for name in names}
    content = pa.Table.from_batches(batches)
    rows = pc.index_in(keys, value_set=content["patch_id"].combine_chunks())
    splits = {}
    for name in names:
        values = pc.cast(content[name].combine_chunks().take(rows), pa.string())
        empty = pc.equal(values, "")
        splits[name] = pc.if_else(empty, pa.scalar(None, pa.string()), values).dictionary_encode()
    return splits


def read_csv_paths(path: Path) -> Iterator[list[str]]:
    """Read the rows of a split CSV of the official code: one column per modality, each cell a path from ``../``.

    The separator is a comma (toy files) or a semicolon (full files).

    Raises:
        InputError: the file cannot be read as such a CSV.
    """
    number = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            separator = ";" if header.count(";") > header.count(",") else ","
            for row in csv.reader(file, delimiter=separator):
                if row:
                    number += 1
                    yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV of patches: {error}") from error
    if not number:
        raise InputError(f"{path}: holds no patch; expected a header and one row for each patch")


def _matched(ids: pa.Array, keys: pa.Array, has_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row in ``keys`` of each id (-1 for none), and whether each matched id appears for the first time.

    Marks matched rows in ``has_row``, (patches,) bool.
    """
    rows = pc.fill_null(pc.index_in(ids, value_set=keys), -1).to_numpy(zero_copy_only=False)
    matched = rows[rows >= 0]
    first = np.zeros(len(matched), bool)
    first[np.unique(matched, return_index=True)[1]] = True
    first &= ~has_row[matched]
    has_row[matched] = True
    return rows, first


def _columns(table: TableFile) -> list[str]:
    try:
        return [str(name) for name in pyogrio.read_info(table.gdal_path)["fields"]]
    except pyogrio.errors.DataSourceError as error:
        raise InputError(f"{table}: cannot be read as a GeoPackage: {error}") from error


def _batches(table: TableFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Read ``columns`` of the default layer in record batches."""
    available = _columns(table)
    for column in columns:
        if column not in available:
            raise InputError(f"{table}: no column {column!r}; columns: {', '.join(available)}")
    try:
        with pyogrio.open_arrow(table.gdal_path, columns=columns, read_geometry=False, use_pyarrow=True) as (_, reader):
            yield from reader
    except (pyogrio.errors.DataSourceError, pa.ArrowException) as error:
        raise InputError(f"{table}: cannot be read: {error}") from error


def _day(text: str) -> int:
    """Days since 1970-01-01 of ``YYYYMMDD``; raises ValueError."""
    if len(text) != 8 or not text.isdecimal():
        raise ValueError(text)
    return datetime.date(int(text[:4]), int(text[4:6]) or 1, int(text[6:]) or 1).toordinal() - _EPOCH


def _image_date(text: str) -> list[int] | None:
    try:
        return [_day(text)]
    except ValueError:
        return None


def _series_dates(text: str) -> list[int] | None:
    """Dates of ``{"1": "20210114", ...}``, in the order of the numbers."""
    try:
        days = {int(number): _day(str(day)) for number, day in json.loads(text).items()}
    except (ValueError, AttributeError):
        return None
    return [days[number] for number in sorted(days)]
