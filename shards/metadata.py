"""Dates and splits of FLAIR-HUB: the GeoPackages of GLOBAL_ALL_MTD and the CSV files of the official code.

GeoPackages are streamed by columns and batches, because at full size one of them holds 240,000 JSON texts; a text that
many patches share is parsed and kept once.
"""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyogrio

from bocage.shards.errors import InputError
from bocage.shards.modality import Modality

FOLDER = "GLOBAL_ALL_MTD"
SPLIT_FILE = "GLOBAL_ALL_MTD_SPLIT.gpkg"

_EPOCH = datetime.date(1970, 1, 1).toordinal()


@dataclass
class Dates:
    """Acquisition dates of one modality.

    Attributes:
        lists: distinct lists of dates, int32 days since 1970-01-01, in the order of the raster's bands.
        index: (patches,) int32 into ``lists``; -1 where the dates are unknown.
        duplicates: rows for a patch that already had one; the first counts.
        unreadable: rows whose dates could not be parsed; their patches stay without.
    """

    lists: list[np.ndarray]
    index: np.ndarray
    duplicates: int = 0
    unreadable: int = 0


def find(root: Path, name: str) -> Path | None:
    """The metadata file ``name`` in ``root/GLOBAL_ALL_MTD`` or ``root``; None when there is none."""
    return next((path for path in (root / FOLDER / name, root / name) if path.is_file()), None)


def read_dates(path: Path, modality: Modality, keys: pa.Array) -> Dates:
    """Dates of the patches ``keys`` of ``modality`` in ``GLOBAL_{NAME}_MTD_DATES.gpkg``.

    A day (or month) ``00`` means that it is unknown and is taken as the first.

    Raises:
        InputError: the file cannot be read or lacks a column.
    """
    column = "acquisition_dates" if modality.has_dates else "date"
    parse = _series_dates if modality.has_dates else _image_date
    dates = Dates([], np.full(len(keys), -1, np.int32))
    known: dict[str, int] = {}
    seen = np.zeros(len(keys), bool)
    for batch in _batches(path, ["patch_id", column]):
        rows, first = _matched(batch["patch_id"], keys, seen)
        dates.duplicates += len(first) - int(first.sum())
        texts = pc.cast(batch[column], pa.string()).dictionary_encode()
        lists = np.full(len(texts.dictionary) + 1, -1, np.int32)  # the last entry is for null
        for code, text in enumerate(texts.dictionary.to_pylist()):
            if text not in known:
                parsed = parse(text)
                known[text] = -1 if parsed is None else len(dates.lists)
                if parsed is not None:
                    dates.lists.append(parsed)
            lists[code] = known[text]
        codes = lists[pc.fill_null(texts.indices, len(texts.dictionary)).to_numpy(zero_copy_only=False)]
        codes = codes[rows >= 0][first]
        dates.index[rows[rows >= 0][first]] = codes
        dates.unreadable += int((codes < 0).sum())
    return dates


def read_splits(path: Path, keys: pa.Array) -> dict[str, pa.DictionaryArray]:
    """The ``split_*`` columns of ``GLOBAL_ALL_MTD_SPLIT.gpkg``: for each of ``keys`` train, valid, test or null.

    Raises:
        InputError: the file cannot be read, or has no such column.
    """
    names = [name for name in _columns(path) if name.startswith("split_")]
    if not names:
        raise InputError(f"{path}: no column is named split_...; columns: {', '.join(_columns(path))}")
    batches = list(_batches(path, ["patch_id", *names]))
    if not batches:  # a table without rows: the splits exist and no patch is in them
        return {name: pa.nulls(len(keys), pa.string()).dictionary_encode() for name in names}
    table = pa.Table.from_batches(batches)
    rows = pc.index_in(keys, value_set=table["patch_id"].combine_chunks())
    splits = {}
    for name in names:
        values = pc.cast(table[name].combine_chunks().take(rows), pa.string())
        empty = pc.equal(values, "")
        splits[name] = pc.if_else(empty, pa.scalar(None, pa.string()), values).dictionary_encode()
    return splits


def read_csv_paths(path: Path) -> list[dict[str, str]]:
    """Rows of a split CSV of the official code: a column a modality, each cell a path that starts with ``../``.

    The separator is a comma (toy files) or a semicolon (full files).

    Raises:
        InputError: the file cannot be read as such a CSV.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            separator = ";" if header.count(";") > header.count(",") else ","
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=separator, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV of patches: {error}") from error
    if not rows:
        raise InputError(f"{path}: holds no patch; expected a header and one row for each patch")
    return rows


def _matched(ids: pa.Array, keys: pa.Array, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row of ``keys`` for each id (-1: none), and which of the matched ones come for the first time.

    Marks these in ``seen``, (patches,) bool.
    """
    rows = pc.fill_null(pc.index_in(ids, value_set=keys), -1).to_numpy(zero_copy_only=False)
    matched = rows[rows >= 0]
    first = np.zeros(len(matched), bool)
    first[np.unique(matched, return_index=True)[1]] = True
    first &= ~seen[matched]
    seen[matched] = True
    return rows, first


def _columns(path: Path) -> list[str]:
    try:
        return [str(name) for name in pyogrio.read_info(path)["fields"]]
    except pyogrio.errors.DataSourceError as error:
        raise InputError(f"{path}: cannot be read as a GeoPackage: {error}") from error


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of the wanted columns of the default layer."""
    available = _columns(path)
    for column in columns:
        if column not in available:
            raise InputError(f"{path}: no column {column!r}; columns: {', '.join(available)}")
    try:
        with pyogrio.open_arrow(path, columns=columns, read_geometry=False, use_pyarrow=True) as (_, reader):
            yield from reader
    except (pyogrio.errors.DataSourceError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _day(text: str) -> int:
    """Days since 1970-01-01 of ``YYYYMMDD``; raises ValueError."""
    if len(text) != 8 or not text.isdecimal():
        raise ValueError(text)
    return datetime.date(int(text[:4]), int(text[4:6]) or 1, int(text[6:]) or 1).toordinal() - _EPOCH


def _image_date(text: str) -> np.ndarray | None:
    try:
        return np.array([_day(text)], np.int32)
    except ValueError:
        return None


def _series_dates(text: str) -> np.ndarray | None:
    """Dates of ``{"1": "20210114", ...}``, in the order of the numbers."""
    try:
        listed = {int(number): _day(str(day)) for number, day in json.loads(text).items()}
    except (ValueError, AttributeError):
        return None
    return np.array([listed[number] for number in sorted(listed)], np.int32)
