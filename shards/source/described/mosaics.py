"""Catalogue of rasters of any size, which are cut into patches."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from bocage.shards.errors import InputError, counted
from bocage.shards.modality import Registry
from bocage.shards.source.catalogue import PatchSource
from bocage.shards.source.described.catalogue import DescribedCatalogue, assign_splits, name_patches
from bocage.shards.source.described.coverage import count_valid, counting_threads
from bocage.shards.source.described.description import DatasetDescription, build_registry
from bocage.shards.source.described.file_patterns import fill_template, plain_name
from bocage.shards.source.described.files import explain_empty, find_files
from bocage.shards.source.described.ground import crs_name, ground_block, same_crs
from bocage.shards.source.described.raster_sites import FoundRaster, Layer, Site, make_sites
from bocage.shards.source.described.raster_windows import (
    Bounds,
    PixelGrid,
    PlacedRaster,
    WindowSource,
    describe_raster,
    grid_bounds,
    has_holes,
)
from bocage.shards.source.described.rasters import RasterRules, open_raster, raster_rules, sidecar_environment
from bocage.shards.source.raster import RasterError
from bocage.shards.source.report import CatalogueReport

_RESERVED = ("block", "row", "column", "crs")
_ROUNDING = 1e-6  # pixels
_BAND_PIXELS = 4096  # least height of the bands of patches that are counted together
_BAND_PATCHES = 4_000_000  # most patches of a band, times the days of a series
_ALMOST_COMPLETE = 0.9  # fraction of valid pixels from which the report says that windows that are left out lack few
_SLOW_BYTES = 8 << 20  # bytes decoded for one window from which the report calls a raster slow
_SLOW_RATIO = 8  # decoded bytes per byte of the window from which it does
_MAX_COMPARED = 2000  # rasters of a site whose dates are compared


@dataclass(frozen=True)
class _Cells:
    """Patches of a catalogue as columns.

    Attributes:
        site, row, column: site and position of each patch, (patches,) int32.
        presence: whether each patch has a modality, (patches,) bool, by modality.
        days: bits of the days of a series that a patch has, (patches, bytes) uint8, by modality.
    """

    site: np.ndarray
    row: np.ndarray
    column: np.ndarray
    presence: dict[str, np.ndarray]
    days: dict[str, np.ndarray]

    def take(self, order: np.ndarray) -> _Cells:
        """Patches in another order."""
        return _Cells(
            self.site[order],
            self.row[order],
            self.column[order],
            {name: column[order] for name, column in self.presence.items()},
            {name: bits[order] for name, bits in self.days.items()},
        )


@dataclass(frozen=True)
class RasterCatalogue(DescribedCatalogue):
    """Patches that are cut from rasters of any size."""

    _sites: list[Site]
    _cells: _Cells
    _rules: dict[str, RasterRules]

    @classmethod
    def open(cls, root: Path, description: DatasetDescription, folder: Path) -> RasterCatalogue:
        """Open the catalogue of the rasters below ``root``.

        Rasters in which pixels may be missing are read once.

        Args:
            root: folder of the rasters.
            description: description of the dataset.
            folder: folder that paths of the description are relative to.

        Raises:
            InputError: no file matches, a raster contradicts the description, or no raster covers a patch.
        """
        registry = build_registry(description)
        report = CatalogueReport()
        rules = raster_rules(description)
        found = _find_rasters(root, description, rules, report)
        if not any(found[modality.name] for modality in registry.inputs):
            raise InputError((report.unreadable_examples or [explain_empty(root, description, report)])[0])
        sites = make_sites(found, registry, report)
        left_out: dict[str, Counter[bool]] = {name: Counter() for name in registry}
        with counting_threads() as threads:
            parts = [
                part
                for number, site in enumerate(sites)
                for part in _cover(number, site, registry, description, rules, threads, left_out)
            ]
        cells = _join(parts, registry)
        if not len(cells.site):
            raise InputError(_explain_uncovered(root, found, registry))
        fields = _PatchFields(sites, cells, description.blocks)
        keys = _keys(description, sites, cells, fields)
        names = name_patches(description, keys, fields)
        cells = cells.take(names.order)
        report.patches = len(keys)
        report.present |= {name: int(cells.presence[name].sum()) for name in registry}
        report.notes += _notes(sites, cells, found, registry, description, rules, left_out)
        occurring = [name for name in registry if report.present[name]]
        return cls(
            root=root,
            registry=Registry(tuple(registry[name] for name in occurring)),
            splits=assign_splits(description, names, _PatchFields(sites, cells, description.blocks), folder, report),
            description=description,
            names=names,
            _presence={name: cells.presence[name] for name in occurring},
            _report=report,
            _sites=sites,
            _cells=cells,
            _rules=rules,
        )

    def source(self, modality: str, index: int) -> PatchSource:
        """Source of a raster that the patch has."""
        layer, row, column = self._locate(modality, index)
        by_day: dict[int, list[PlacedRaster]] = {day: [] for day in self._day_indices(modality, index, layer).tolist()}
        hits = layer.hits(row, column)
        for hit, day in zip(hits.tolist(), layer.day_index[hits].tolist()):
            if day in by_day:
                by_day[day].append(layer.rasters[hit])
        frames = tuple(map(tuple, by_day.values()))
        return WindowSource(layer.grid, self._rules[modality], frames, row, column)

    def dates(self, modality: str, index: int) -> np.ndarray | None:
        """Dates of a raster, int32 days since 1970-01-01; None if the patch lacks it or it has no dates."""
        if self.registry[modality].dates_table is None or not self._presence[modality][index]:
            return None
        layer, row, column = self._locate(modality, index)
        if modality in self._cells.days:
            return layer.days[self._day_indices(modality, index, layer)].astype(np.int32)
        return layer.dates[layer.hits(row, column)[:1]]

    def layout_digest(self) -> bytes:
        """Hash of the paths, positions and dates of the rasters, and of the patches."""
        digest = hashlib.sha256()
        for site in self._sites:
            digest.update(json.dumps([site.fields, site.crs, site.left, site.top, site.side]).encode())
            for name, layer in site.layers.items():
                paths = [raster.file.path.relative_to(self.root).as_posix() for raster in layer.rasters]
                placed = [(raster.is_resampled, raster.row, raster.column) for raster in layer.rasters]
                digest.update(json.dumps([name, paths, placed]).encode())
                for array in (layer.boxes, layer.days, layer.day_index, layer.dates):
                    digest.update(array.tobytes())
        cells = self._cells
        for array in (cells.site, cells.row, cells.column, *cells.days.values()):
            digest.update(array.tobytes())
        return digest.digest()

    def _locate(self, modality: str, index: int) -> tuple[Layer, int, int]:
        cells = self._cells
        return self._sites[cells.site[index]].layers[modality], int(cells.row[index]), int(cells.column[index])

    def _day_indices(self, modality: str, index: int, layer: Layer) -> np.ndarray:
        """Indices into the days of a layer that the patch has; (0,) without a series."""
        bits = self._cells.days.get(modality)
        return np.zeros(1, np.int64) if bits is None else np.flatnonzero(np.unpackbits(bits[index])[: len(layer.days)])


class _PatchFields(Sequence[Mapping[str, str]]):
    """Fields of each patch: those of its site, its row and column, the code of the CRS, and the block."""

    def __init__(self, sites: Sequence[Site], cells: _Cells, block_side: float) -> None:
        self._sites, self._cells, self._block_side = sites, cells, block_side

    def __len__(self) -> int:
        return len(self._cells.site)

    @overload
    def __getitem__(self, index: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, str]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, str] | list[dict[str, str]]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        site = self._sites[self._cells.site[index]]
        row, column = int(self._cells.row[index]), int(self._cells.column[index])
        # Rows and columns have four digits, so that keys sort by position and neighbours share blocks of the files.
        fields = {**site.fields, "row": f"{row:04}", "column": f"{column:04}", "crs": crs_name(site.crs)}
        if self._block_side:
            x, y = site.left + (column + 0.5) * site.side, site.top - (row + 0.5) * site.side
            block = ground_block(site.crs, x, y, site.scale, self._block_side)
            # Blocks of a raster without position are parts of this raster.
            fields["block"] = block if site.has_position else "_".join([*site.fields.values(), block])
        return fields


def _keys(
    description: DatasetDescription, sites: Sequence[Site], cells: _Cells, fields: Sequence[Mapping[str, str]]
) -> list[str]:
    """Key of each patch.

    Raises:
        InputError: two patches have the same key.
    """
    sites_with = Counter(tuple(site.fields.items()) for site in sites)
    templates = []
    for site in sites:
        parts = [f"{{{name}}}" for name in site.fields]
        parts += ["{crs}"] if sites_with[tuple(site.fields.items())] > 1 else []
        templates.append(description.key or "_".join([*parts, "{row}-{column}"]))
    keys = [
        plain_name(fill_template(templates[site], patch_fields, "key"))
        for site, patch_fields in zip(cells.site.tolist(), fields)
    ]
    if len(set(keys)) < len(keys):
        first: dict[str, int] = {}
        clash = next(row for row, key in enumerate(keys) if first.setdefault(key, row) != row)
        raise InputError(
            f"key {keys[clash]} stands for two patches: {_describe_fields(fields[first[keys[clash]]])}, and "
            f"{_describe_fields(fields[clash])}; name more fields in key, such as {{row}}-{{column}}"
        )
    return keys


def _describe_fields(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value)


def _find_rasters(
    root: Path, description: DatasetDescription, rules: Mapping[str, RasterRules], report: CatalogueReport
) -> dict[str, list[FoundRaster]]:
    """Find and check the rasters of each sensor and label, by path.

    Raises:
        InputError: a raster contradicts the description.
    """
    found: dict[str, list[FoundRaster]] = {name: [] for name in rules}
    with sidecar_environment():
        for item in find_files(root, description, report, _RESERVED):
            path = root / item.path
            try:
                dataset = open_raster(path)
            except RasterError as error:
                report.add_unreadable(str(error))
                continue
            with dataset:
                file = describe_raster(path, dataset, rules[item.name])
            found[item.name].append(FoundRaster(file, item.fields, item.day))
    return found


def _cover(
    number: int,
    site: Site,
    registry: Registry,
    description: DatasetDescription,
    rules: Mapping[str, RasterRules],
    threads: Executor,
    left_out: Mapping[str, Counter[bool]],
) -> Iterator[_Cells]:
    """Find the patches of a site, in bands of rows, and count the windows that are left out; see ``_available``."""
    height = max(math.ceil(_BAND_PIXELS / max(layer.grid.size for layer in site.layers.values())), 1)
    for name, layer in site.layers.items():
        blocks = [raster.file.block[0] for raster in layer.rasters if has_holes(raster.file, rules[name])]
        height = max(height, math.ceil(2 * max(blocks, default=0) / layer.grid.size))
    days = max(len(layer.days) for layer in site.layers.values())
    height = max(1, min(height, _BAND_PATCHES // (site.columns * days)))
    for start in range(0, site.rows, height):
        rows = range(start, min(start + height, site.rows))
        available = {
            name: _available(name, layer, rules[name], description, rows, site.columns, threads, left_out[name])
            for name, layer in site.layers.items()
        }
        row, column = np.nonzero(_covered(site, registry, available, rows))
        chosen = {name: days[:, row, column] for name, days in available.items()}
        for name in [name for name in site.layers if registry[name].role == "mask"]:
            # A mask without some dates of the series would not say which dates it masks.
            series = chosen.get(str(registry[name].mask_of), np.zeros((1, len(row)), bool))
            chosen[name] = np.logical_and(series, np.logical_or(chosen[name], ~series).all(axis=0))
        yield _Cells(
            site=np.full(len(row), number, np.int32),
            row=(row + start).astype(np.int32),
            column=column.astype(np.int32),
            presence={name: np.asarray(days.any(axis=0)) for name, days in chosen.items()},
            days={name: np.packbits(days, axis=0).T for name, days in chosen.items() if registry[name].has_time_axis},
        )


def _available(
    name: str,
    layer: Layer,
    rules: RasterRules,
    description: DatasetDescription,
    rows: range,
    columns: int,
    threads: Executor,
    left_out: Counter[bool],
) -> np.ndarray:
    """Mask of the days of a layer that patches can have, (days, rows, columns) bool.

    Windows that lack too many pixels are counted in ``left_out``, by whether they lack few; those without any are not.
    """
    size = layer.grid.size
    in_rows = (layer.boxes[:, 0] < rows.stop * size) & (layer.boxes[:, 2] > rows.start * size)
    has_fill = rules.nodata.fill is not None
    if name in description.labels:
        least = 1 if has_fill else size * size
    else:
        least = math.ceil(description.min_coverage * size * size - _ROUNDING) if has_fill else size * size
    available = np.zeros((len(layer.days), len(rows), columns), bool)
    for day in np.unique(layer.day_index[in_rows]).tolist():
        chosen = [layer.rasters[index] for index in np.flatnonzero(in_rows & (layer.day_index == day))]
        counts = count_valid(chosen, layer.grid, rules, rows, columns, threads)
        available[day] = counts >= least
        partial = counts[(counts > 0) & (counts < least)]
        almost_complete = int((partial >= _ALMOST_COMPLETE * size * size).sum())
        left_out.update({True: almost_complete, False: len(partial) - almost_complete})
    return available


def _covered(site: Site, registry: Registry, available: Mapping[str, np.ndarray], rows: range) -> np.ndarray:
    """Mask of the patches of a band: an input covers them, and they touch a raster of this site alone."""
    covered = np.zeros((len(rows), site.columns), bool)
    own = covered.copy()
    for name, layer in site.layers.items():
        if registry[name].is_input:
            covered |= available[name].any(axis=0)
            first = np.clip(layer.boxes[:, :2] // layer.grid.size, [rows.start, 0], [rows.stop, site.columns])
            last = np.clip(-(-layer.boxes[:, 2:] // layer.grid.size), [rows.start, 0], [rows.stop, site.columns])
            single = layer.is_of_one_site
            for (top, left), (bottom, right) in zip(first[single].tolist(), last[single].tolist()):
                own[top - rows.start : bottom - rows.start, left:right] = True
    return covered & own


def _join(parts: Sequence[_Cells], registry: Registry) -> _Cells:
    """Patches of all sites; modalities that a site lacks are absent."""
    series = [name for name in registry if registry[name].has_time_axis]
    widths = {
        name: max((part.days[name].shape[1] for part in parts if name in part.days), default=0) for name in series
    }
    counts = [len(part.site) for part in parts]

    def presence(name: str) -> np.ndarray:
        return np.concatenate([part.presence.get(name, np.zeros(count, bool)) for part, count in zip(parts, counts)])

    def days(name: str) -> np.ndarray:
        joined = np.zeros((sum(counts), widths[name]), np.uint8)
        for part, end in zip(parts, np.cumsum(counts).tolist()):
            if name in part.days:
                bits = part.days[name]
                joined[end - len(bits) : end, : bits.shape[1]] = bits
        return joined

    return _Cells(
        site=np.concatenate([part.site for part in parts]),
        row=np.concatenate([part.row for part in parts]),
        column=np.concatenate([part.column for part in parts]),
        presence={name: presence(name) for name in registry},
        days={name: days(name) for name in series},
    )


def _explain_uncovered(root: Path, found: Mapping[str, Sequence[FoundRaster]], registry: Registry) -> str:
    """Message about rasters that cover no patch."""
    files = [item.file for modality in registry.inputs for item in found[modality.name]]
    sides = [
        (file.width * file.pixel_width * file.scale, file.height * file.pixel_height * file.scale) for file in files
    ]
    largest = max(range(len(files)), key=lambda index: min(sides[index]))
    width, height = sides[largest]
    return (
        f"{root}: {len(files)} rasters cover no patch of {registry.patch_size:g} m; {files[largest].path} has "
        f"{width:.1f} x {height:.1f} m: give a smaller patch, or lower min_coverage if pixels are missing"
    )


def _notes(
    sites: Sequence[Site],
    cells: _Cells,
    found: Mapping[str, Sequence[FoundRaster]],
    registry: Registry,
    description: DatasetDescription,
    rules: Mapping[str, RasterRules],
    left_out: Mapping[str, Counter[bool]],
) -> list[str]:
    """Messages about rasters that are resampled, slow to cut, unused or of other dates, and about missing pixels."""
    notes = []
    for name, modality in registry.items():
        layers = [(site, site.layers[name]) for site in sites if name in site.layers]
        resampled = [(raster, site) for site, layer in layers for raster in layer.rasters if raster.is_resampled]
        if resampled:
            raster, site = resampled[0]
            method = "nearest neighbour" if modality.role == "label" else "bilinear"
            notes.append(
                f"{len(resampled)} rasters of {name} are resampled ({method}), e.g. {raster.file.path}: "
                f"{_explain_resampling(raster, site.layers[name].grid)}"
            )
        window_bytes = modality.size**2 * np.dtype(modality.dtype).itemsize * len(modality.bands)
        slow = [
            item.file
            for item in found[name]
            if item.file.window_bytes(modality.size) > max(_SLOW_BYTES, _SLOW_RATIO * window_bytes)
        ]
        if slow:
            file = slow[0]
            notes.append(
                f"{len(slow)} rasters of {name} are slow to cut: each patch decodes "
                f"{file.window_bytes(modality.size) / 1e6:.0f} MB, e.g. of {file.path}; write it in tiles: "
                f"gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER {file.path} NEW.tif"
            )
        if total := left_out[name].total():
            how = "lower min_coverage" if name in description.sensors else "add values to ignore"
            if name in description.sensors and rules[name].nodata.fill is None:
                how = "name a nodata value and lower min_coverage"
            notes.append(
                f"{counted(total, 'window')} of {name} left out because pixels are missing, in "
                f"{left_out[name][True]} of them at most {1 - _ALMOST_COMPLETE:.0%}; to keep them, {how}"
            )
        if found[name] and not cells.presence[name].any():
            notes.append(_explain_absent(name, sites, found[name], cells))
        if modality.role == "image" and modality.dates_table is not None:
            notes += [note for site, layer in layers if (note := _explain_dates(name, layer)) is not None][:1]
        if modality.role == "mask":
            notes += _explain_mask(name, str(modality.mask_of), sites)
    return notes


def _explain_resampling(raster: PlacedRaster, grid: PixelGrid) -> str:
    file = raster.file
    if not same_crs(file.crs, grid.crs):
        return f"it is in {file.crs}, the patches are in {grid.crs}"
    left, right, top, _ = grid_bounds(file.bounds, grid)
    if round(right) - round(left) != file.width:
        return f"its pixels of {file.pixel_width:g} do not fit pixels of {grid.pixel:g} in the patches"
    offsets = [abs(value - round(value)) for value in (left, top)]
    return f"its pixels lie {offsets[0]:.2f} and {offsets[1]:.2f} pixels off those of the patches"


def _explain_absent(name: str, sites: Sequence[Site], found: Sequence[FoundRaster], cells: _Cells) -> str:
    """Message about a sensor or label that no patch has: where its first raster and the patches lie."""
    file = found[0].file
    chosen = cells.site == cells.site[0]
    site, rows, columns = sites[cells.site[0]], cells.row[chosen], cells.column[chosen]
    left, right = (site.left + float(value) * site.side for value in (columns.min(), columns.max() + 1))
    bottom, top = (site.top - float(value) * site.side for value in (rows.max() + 1, rows.min()))
    return (
        f"no raster of {name} covers a patch: {file.path} spans {_describe_bounds(file.bounds, file.crs)}; patches "
        f"span {_describe_bounds((left, bottom, right, top), site.crs)}"
    )


def _describe_bounds(bounds: Bounds, crs: str) -> str:
    left, bottom, right, top = bounds
    return f"x {left:.0f} to {right:.0f}, y {bottom:.0f} to {top:.0f}{f' in {crs}' if crs else ''}"


def _explain_dates(name: str, layer: Layer) -> str | None:
    """Message about images of different dates that show the same ground; None if there are none."""
    boxes, dates = layer.boxes[:_MAX_COMPARED], layer.dates[:_MAX_COMPARED]
    height = np.minimum(boxes[:, None, 2], boxes[:, 2]) - np.maximum(boxes[:, None, 0], boxes[:, 0])
    width = np.minimum(boxes[:, None, 3], boxes[:, 3]) - np.maximum(boxes[:, None, 1], boxes[:, 1])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    overlaps = height.clip(0) * width.clip(0) > np.minimum(area, area[:, None]) / 2
    first, second = np.nonzero(overlaps & (dates != dates[:, None]))
    if not len(first):
        return None
    paths = [layer.rasters[index].file.path for index in (first[0], second[0])]
    return (
        f"{name}: {paths[0]} and {paths[1]} show the same ground at different dates, and patches take the first; make "
        "it a series, or name a field instead of date, such as {year}, to have patches of each"
    )


def _explain_mask(name: str, series: str, sites: Sequence[Site]) -> list[str]:
    """Message about dates of a series that its mask lacks."""
    lacking = 0
    for site in sites:
        if series in site.layers:
            known = site.layers[name].day_index if name in site.layers else np.zeros(0, np.int64)
            lacking += len(site.layers[series].days) - len(np.unique(known))
    if not lacking:
        return []
    return [f"{name}: {lacking} dates of {series} have no file; patches with these dates get no {name}"]
