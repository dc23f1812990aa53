"""Catalogue of tables of pixel series: Parquet files with a row for each date of a pixel.

Rows of one series lie anywhere in a file. Opening the catalogue reads each file once, a few columns at a time, checks
all values, and writes the rows by series and date to files without a name in the temporary folder. They are
memory-mapped, and vanish with the process. A patch carries its values, so worker processes, also on other machines,
open neither these files nor the tables.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.warp import transform

from bocage.shards.errors import InputError, counted
from bocage.shards.modality import Modality, Registry
from bocage.shards.source.catalogue import PatchSource
from bocage.shards.source.described.catalogue import DescribedCatalogue, assign_splits, name_patches
from bocage.shards.source.described.description import TABLE_FIELDS, DatasetDescription, build_registry
from bocage.shards.source.described.file_patterns import FilePattern, fill_template, list_files, plain_name
from bocage.shards.source.described.ground import ground_block, metres_per_unit, parse_crs, utm_crs
from bocage.shards.source.described.series_table import SeriesTable, read_table
from bocage.shards.source.raster import Raster
from bocage.shards.source.report import CatalogueReport

_BLOCK_ROWS = 1 << 17  # rows that are written at a time
_DEGREES = ("longitude", "latitude")
_MAX_EXAMPLES = 5  # series in a message


@dataclass(frozen=True)
class SeriesSource:
    """The values of one sensor or label of one pixel.

    Attributes:
        path: table that holds the series.
        series: value of the key column.
        raster: values as a raster of one pixel.
    """

    path: Path
    series: str
    raster: Raster

    def __str__(self) -> str:
        return f"{self.path}, series {self.series}"

    @property
    def container(self) -> Path:
        """The table."""
        return self.path

    def read_raster(self, modality: Modality) -> Raster:
        """The raster; the catalogue has checked it."""
        return self.raster


@dataclass(frozen=True)
class _Rows:
    """Rows of a sensor or label by series and date: records of ``day`` and ``values``, and the first row of each."""

    records: np.ndarray  # (rows,), mapped
    starts: np.ndarray  # (series + 1,) int64

    def of(self, series: int) -> np.ndarray:
        return self.records[self.starts[series] : self.starts[series + 1]]


@dataclass(frozen=True)
class TableCatalogue(DescribedCatalogue):
    """Patches of tables of pixel series: each is one pixel."""

    _rows: dict[str, _Rows]  # by modality, in the order of the files
    _series: np.ndarray  # (patches,) int64: number of each patch in this order
    _keys: list[str]  # values of the key column, by series
    _paths: list[Path]
    _path_ids: np.ndarray  # (series,) int64
    _positions: _Positions
    _digest: bytes

    @classmethod
    def open(cls, root: Path, description: DatasetDescription, folder: Path) -> TableCatalogue:
        """Open the catalogue of the tables below ``root``.

        Args:
            root: folder of the tables.
            description: description of the dataset.
            folder: folder that paths of the description are relative to.

        Raises:
            InputError: no file matches; a file cannot be read, or lacks a column; a value contradicts the description;
                a series is in two files, or has two rows of one date; or the temporary folder is full.
        """
        registry = build_registry(description)
        report = CatalogueReport()
        tables = [
            SeriesTable(root / path, fields, description)
            for path, fields in _find_files(root, description, report).items()
        ]
        for name in description.labels:
            if lacking := [table for table in tables if not table.has_label(name)]:
                if len(lacking) == len(tables):
                    lacking[0].check_label(name)  # raises
                report.notes.append(f"{len(lacking)} of {counted(len(tables), 'table')} without a column for {name}")
        with closing(_Writers(registry)) as writers:
            read = [read_table(table, writers.append) for table in tables]
            rows, digest = writers.finish()
        path_ids = np.repeat(np.arange(len(read)), [len(table.keys) for table in read])
        keys = [key for table in read for key in table.keys]
        fields = [item for table in read for item in table.fields]
        longitude, latitude = (np.concatenate([getattr(table, name) for table in read]) for name in _DEGREES)
        digest.update(longitude.tobytes() + latitude.tobytes())
        positions = _Positions.project(longitude, latitude)
        if description.blocks:
            for number, item in enumerate(fields):
                item["block"] = positions.block(number, description.blocks)
        presence = {name: np.diff(rows[name].starts) > 0 for name in registry}
        has_input = np.any([presence[name] for name in registry if registry[name].is_input], axis=0)
        kept = _kept_series(root, keys, has_input, registry, presence, report)
        paths = [table.path for table in tables]
        patch_keys = _patch_keys(description, kept, keys, fields, [paths[number] for number in path_ids])
        fields = [fields[number] for number in kept]
        names = name_patches(description, patch_keys, fields)
        series = kept[names.order]
        report.patches = len(series)
        for name, sensor in description.sensors.items():
            if sensor.role == "series" and (count := sum(table.empty_dates[name] for table in read)):
                total = sum(table.rows for table in tables)
                report.notes.append(f"{count:,} of {counted(total, 'date')} of {name} left out: no band has a value")
        report.present = {name: int(presence[name][series].sum()) for name in registry}
        occurring = [name for name in registry if report.present[name]]
        return cls(
            root=root,
            registry=Registry(tuple(registry[name] for name in occurring)),
            splits=assign_splits(description, names, [fields[row] for row in names.order], folder, report),
            description=description,
            names=names,
            _presence={name: presence[name][series] for name in occurring},
            _report=report,
            _rows={name: rows[name] for name in occurring},
            _series=series,
            _keys=keys,
            _paths=paths,
            _path_ids=path_ids,
            _positions=positions,
            _digest=digest.digest(),
        )

    def source(self, modality: str, index: int) -> PatchSource:
        """Source of the values of a sensor or label that the patch has."""
        number = self._series[index]
        # A copy, because a view would be pickled for a worker as the whole mapped file.
        values = np.array(self._rows[modality].of(number)["values"])
        array = values[:, :, None, None] if self.registry[modality].has_time_axis else values[0, :, None, None]
        side = self.description.patch_size
        raster = Raster(array, *self._positions.corner(number, side), side, values.nbytes)
        return SeriesSource(self._paths[self._path_ids[number]], self._keys[number], raster)

    def dates(self, modality: str, index: int) -> np.ndarray | None:
        """Dates of a series, int32 days since 1970-01-01; None if the patch lacks it, or for an image or label."""
        if not (self.registry[modality].has_time_axis and self._presence[modality][index]):
            return None
        return np.array(self._rows[modality].of(self._series[index])["day"])

    def layout_digest(self) -> bytes:
        """Hash of the dates, values and positions."""
        return self._digest


@dataclass(frozen=True)
class _Positions:
    """Centre of each series in the UTM zone of its point; all at 0, 0 of an unknown CRS if there are no positions."""

    zones: list[str]
    zone_ids: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def project(cls, longitude: np.ndarray, latitude: np.ndarray) -> _Positions:
        """Positions from degrees, all NaN if unknown."""
        x, y = np.zeros(len(longitude)), np.zeros(len(longitude))
        if np.isnan(longitude).all():
            return cls([""], np.zeros(len(x), np.int64), x, y)
        codes = np.array([utm_crs(*point) for point in zip(longitude.tolist(), latitude.tolist())])
        zones, zone_ids = np.unique(codes, return_inverse=True)
        for number, zone in enumerate(zones.tolist()):
            inside = zone_ids == number
            x[inside], y[inside] = transform(CRS.from_epsg(4326), parse_crs(zone), longitude[inside], latitude[inside])
        return cls(zones.tolist(), zone_ids, x, y)

    def corner(self, series: int, side: float) -> tuple[str, float, float]:
        """CRS, and upper-left corner of a pixel of this side that is centred on a series."""
        zone = self.zones[self.zone_ids[series]]
        half = side / 2 if zone else 0.0
        return zone, float(self.x[series]) - half, float(self.y[series]) + half

    def block(self, series: int, side: float) -> str:
        """Name of a ground block: UTM zone, and column and row counted in ``side`` metres from its origin."""
        zone, x, y = self.corner(series, 0.0)
        if not zone:
            raise InputError(f"blocks={side:g}: blocks need positions; name table.longitude and table.latitude")
        scale = metres_per_unit(zone, x, y)
        return ground_block(zone, x, y, scale, side)


def _find_files(root: Path, description: DatasetDescription, report: CatalogueReport) -> dict[str, dict[str, str]]:
    """Fields of the file name of each table, by path relative to the root."""
    pattern = FilePattern(description.table.files)
    if taken := [name for name in pattern.fields if name in (*TABLE_FIELDS, *description.table.fields)]:
        raise InputError(f"table.files: the field {taken[0]} is not free; give it another name")
    found: dict[str, dict[str, str]] = {}
    for path in list_files(root, [pattern.folder]):
        fields = pattern.match(path)
        if fields is None:
            report.add_unparsable(path)
        else:
            found[path] = fields
    if not found:
        examples = f"; files here: {', '.join(report.unparsable_examples)}" if report.unparsable else ""
        raise InputError(f"{root}: no file matches table.files {pattern.text!r}{examples}")
    return found


class _Writers:
    """Files without a name that receive the rows of each sensor and label; close them when they are mapped."""

    def __init__(self, registry: Registry) -> None:
        self._digest = hashlib.sha256()
        self._counts: dict[str, list[np.ndarray]] = {name: [] for name in registry}
        self._types = {
            name: np.dtype([("day", np.int32), ("values", item.dtype, (len(item.bands),))])
            for name, item in registry.items()
        }
        with self._explain_errors():
            self._files = {name: tempfile.TemporaryFile(prefix="bocage-") for name in registry}  # noqa: SIM115

    def close(self) -> None:
        """Close the files; mapped ones stay readable."""
        for file in self._files.values():
            file.close()

    def append(self, name: str, counts: np.ndarray, rows: np.ndarray, days: np.ndarray, values: np.ndarray) -> None:
        """Append rows of a table, see ``series_table.AppendRows``."""
        self._counts[name].append(counts)
        self._digest.update(name.encode() + counts.tobytes())
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = rows[start : start + _BLOCK_ROWS]
            records = np.empty(len(block), self._types[name])
            records["day"], records["values"] = days[block], values[block]
            content = records.tobytes()
            self._digest.update(content)
            with self._explain_errors():
                self._files[name].write(content)

    def finish(self) -> tuple[dict[str, _Rows], Any]:
        """Map the files.

        Returns:
            rows: rows of each sensor and label.
            digest: hash object of all rows.
        """
        rows = {}
        for name, file in self._files.items():
            starts = np.append(0, np.cumsum(np.concatenate(self._counts[name]))).astype(np.int64)
            with self._explain_errors():
                file.flush()
            count, kind = int(starts[-1]), self._types[name]
            records = np.memmap(file, kind, "r", shape=(count,)) if count else np.empty(0, kind)  # mmap needs a byte
            # Slices of a plain array are cheaper than slices of a memmap.
            rows[name] = _Rows(records.view(np.ndarray), starts)
        return rows, self._digest

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: cannot hold the values of the tables, sorted by series: {error.strerror}; "
                "set TMPDIR to a folder with more space"
            ) from error


def _kept_series(
    root: Path,
    keys: list[str],
    has_input: np.ndarray,
    registry: Registry,
    presence: Mapping[str, np.ndarray],
    report: CatalogueReport,
) -> np.ndarray:
    """Numbers of the series that have a value of some sensor; others are counted in the report."""
    if not has_input.any():
        raise InputError(f"{root}: none of {len(keys)} series has a value; see nodata in the description")
    empty = np.flatnonzero(~has_input)
    if len(empty):
        examples = ", ".join(keys[number] for number in empty[:_MAX_EXAMPLES])
        report.notes.append(f"{counted(len(empty), 'series')} left out: no sensor has a value, e.g. {examples}")
    for item in registry.labels:
        if without_sensor := [keys[number] for number in empty if presence[item.name][number]]:
            report.add_without_input(item.name, without_sensor)
    return np.flatnonzero(has_input)


def _patch_keys(
    description: DatasetDescription,
    kept: np.ndarray,
    keys: Sequence[str],
    fields: Sequence[Mapping[str, str]],
    paths: Sequence[Path],
) -> list[str]:
    """Key of the patch of each kept series.

    Raises:
        InputError: two series get the same key.
    """
    template = description.key or "{key}"
    owners: dict[str, int] = {}
    for number in kept.tolist():
        key = plain_name(fill_template(template, fields[number], "key"))
        if not key:
            raise InputError(f"{paths[number]}: a series has an empty key; see key in the description")
        first = owners.setdefault(key, number)
        if first == number:
            continue
        if paths[first] != paths[number] and keys[first] == keys[number]:
            raise InputError(
                f"series {keys[number]} is in two files, {paths[first]} and {paths[number]}; put it into one, or name "
                "a field that tells them apart in key"
            )
        raise InputError(f"{paths[number]}: series {keys[first]} and {keys[number]} both get the key {key}; see key")
    return list(owners)
