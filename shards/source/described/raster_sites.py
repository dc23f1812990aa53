"""Group rasters of any size into sites, and place them on the grid of the patches of their site.

A site is the rasters with the same fields in their file names and the same coordinate system. Its patches lie on one
grid, which is the pixel grid of its finest sensor: this sensor is not resampled. Of the corners of these pixels, the
grid starts at the first that is also a corner of the other sensors' pixels, so that rasters whose grids fit together
are not resampled either. Where this would lose many patches at the edges, the others are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bocage.shards.errors import InputError
from bocage.shards.modality import Registry
from bocage.shards.source.described.ground import same_crs
from bocage.shards.source.described.raster_windows import (
    Bounds,
    PixelGrid,
    PlacedRaster,
    RasterFile,
    bounds_in,
    grid_bounds,
    place_raster,
)
from bocage.shards.source.described.rasters import ALIGNMENT
from bocage.shards.source.report import CatalogueReport

_ROUNDING = 1e-6  # patches or pixels by which coordinates may differ for rounding
_MAX_LOSS = 0.1  # part of the rows or columns of patches that may be lost to avoid resampling


@dataclass(frozen=True)
class FoundRaster:
    """A raster with the fields of its name, without the date, and its day: days since 1970-01-01, 0 without a date."""

    file: RasterFile
    fields: dict[str, str]
    day: int


@dataclass(frozen=True)
class Layer:
    """The rasters of one sensor or label in a site, in the order in which they fill a patch.

    Attributes:
        grid: pixel grid.
        rasters: rasters whose pixels lie on the grid, then those that are resampled, each by name.
        boxes: row, column, last row and last column (exclusive) of each raster, (rasters, 4) int64.
        days: days of the series, sorted; for an image or label, (0,).
        day_index: index into ``days`` of each raster, (rasters,) int64.
        dates: day of each raster of an image, (rasters,) int32.
        is_of_one_site: whether each raster has all fields and the coordinate system of the site, (rasters,) bool.
    """

    grid: PixelGrid
    rasters: tuple[PlacedRaster, ...]
    boxes: np.ndarray
    days: np.ndarray
    day_index: np.ndarray
    dates: np.ndarray
    is_of_one_site: np.ndarray

    def hits(self, row: int, column: int) -> np.ndarray:
        """Indices of the rasters whose boxes overlap a patch."""
        size = self.grid.size
        top, left = row * size, column * size
        overlaps = (self.boxes[:, 0] < top + size) & (self.boxes[:, 2] > top)
        return np.flatnonzero(overlaps & (self.boxes[:, 1] < left + size) & (self.boxes[:, 3] > left))


@dataclass(frozen=True)
class Site:
    """Rasters that share a grid of patches.

    Attributes:
        fields: fields that name the site.
        crs: coordinate system; empty if unknown.
        has_position: whether the rasters are georeferenced.
        left, top: upper-left corner of patch (0, 0).
        side: side of a patch, in units of the CRS.
        scale: ground metres per unit of the CRS.
        rows, columns: number of rows and columns of patches.
        layers: rasters by sensor or label.
    """

    fields: dict[str, str]
    crs: str
    has_position: bool
    left: float
    top: float
    side: float
    scale: float
    rows: int
    columns: int
    layers: dict[str, Layer]


def make_sites(found: Mapping[str, Sequence[FoundRaster]], registry: Registry, report: CatalogueReport) -> list[Site]:
    """Group the rasters into sites, and place them on the grids of the sites.

    The finest sensor that a place has defines its site. Rasters of other sensors and labels belong to every site
    with which the fields of their names agree.

    Raises:
        InputError: the rasters of a site have no common position.
    """
    drafts = _draft_sites(found, registry)
    layers: list[dict[str, list[FoundRaster]]] = [{} for _ in drafts]
    for name in registry:
        without_site = []
        for item, numbers in zip(found[name], _matching_sites(name, found[name], drafts)):
            for number in numbers:
                layers[number].setdefault(name, []).append(item)
            if not numbers:
                without_site.append(str(item.file.path))
        if without_site:
            report.add_without_input(name, without_site)
    return [_place_site(draft, rasters, registry) for draft, rasters in zip(drafts, layers)]


@dataclass(frozen=True)
class _Draft:
    """A site before its grid is known: the rasters of its finest sensor, which have the same fields and CRS."""

    sensor: str
    fields: dict[str, str]
    rasters: list[FoundRaster]

    @property
    def crs(self) -> str:
        """Coordinate system of the rasters."""
        return self.rasters[0].file.crs


def _draft_sites(found: Mapping[str, Sequence[FoundRaster]], registry: Registry) -> list[_Draft]:
    """Sites of the input sensors, from the finest to the coarsest."""
    drafts: list[_Draft] = []
    for modality in sorted(registry.inputs, key=lambda modality: modality.gsd):
        rasters = found[modality.name]
        new: dict[tuple[tuple[str, str], ...], list[_Draft]] = {}
        for item, numbers in zip(rasters, _matching_sites(modality.name, rasters, drafts)):
            if numbers:
                continue
            same_fields = new.setdefault(tuple(item.fields.items()), [])
            draft = next((draft for draft in same_fields if same_crs(draft.crs, item.file.crs)), None)
            if draft is None:
                same_fields.append(_Draft(modality.name, item.fields, [item]))
            else:
                draft.rasters.append(item)
        drafts += [draft for same_fields in new.values() for draft in same_fields]
    return drafts


def _matching_sites(name: str, rasters: Sequence[FoundRaster], drafts: Sequence[_Draft]) -> Iterator[list[int]]:
    """Numbers of the sites that each raster of a sensor or label belongs to."""
    # All names of a sensor have the same fields, so that the sites of a sensor can be looked up by the common ones.
    tables: dict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = {}
    fields = rasters[0].fields if rasters else {}
    for number, draft in enumerate(drafts):
        if draft.sensor != name:
            common = tuple(field for field in draft.fields if field in fields)
            values = tuple(draft.fields[field] for field in common)
            tables.setdefault(common, {}).setdefault(values, []).append(number)
    own = {id(item): number for number, draft in enumerate(drafts) if draft.sensor == name for item in draft.rasters}
    for item in rasters:
        numbers = [
            number
            for common, table in tables.items()
            for number in table.get(tuple(item.fields[field] for field in common), [])
        ]
        yield [*numbers, own[id(item)]] if id(item) in own else numbers


def _place_site(draft: _Draft, rasters: Mapping[str, Sequence[FoundRaster]], registry: Registry) -> Site:
    """Choose the grid of a site and place its rasters on it."""
    first = draft.rasters[0].file
    size = registry[draft.sensor].size
    side = size * first.pixel_width
    for name, items in rasters.items():
        for item in items:
            _check_position(draft, item.file)
        _check_without_position(name, items, draft, registry)
    own = [
        item.file.bounds
        for name in rasters
        if registry[name].is_input
        for item in rasters[name]
        if _is_of_one_site(item, draft)
    ]
    lefts, bottoms, rights, tops = zip(*own)
    extent = (min(lefts), min(bottoms), max(rights), max(tops))
    rasters = {
        name: [item for item in items if _overlaps(item.file, draft.crs, extent)] for name, items in rasters.items()
    }
    rasters = {name: items for name, items in rasters.items() if items}
    left, top = _align_origin(draft, size, [(registry[name].size, items[0].file) for name, items in rasters.items()])
    first_column, last_column, first_row, last_row = (
        math.floor(value + _ROUNDING) if is_first else math.ceil(value - _ROUNDING)
        for value, is_first in zip(grid_bounds(extent, PixelGrid(draft.crs, left, top, side, 1)), (True, False) * 2)
    )
    left, top = left + first_column * side, top - first_row * side
    site = Site(
        fields=draft.fields,
        crs=draft.crs,
        has_position=first.has_position,
        left=left,
        top=top,
        side=side,
        scale=first.scale,
        rows=last_row - first_row,
        columns=last_column - first_column,
        layers={},
    )
    for modality in (*registry.inputs, *registry.by_role("mask"), *registry.by_role("label")):
        name = modality.name
        if name in rasters:
            series = site.layers.get(modality.mask_of or "")
            grid = PixelGrid(draft.crs, left, top, side, modality.size)
            site.layers[name] = _make_layer(rasters[name], grid, draft, modality.has_time_axis, series)
    return site


def _overlaps(file: RasterFile, crs: str, extent: Bounds) -> bool:
    """Whether a raster overlaps bounds in a coordinate system."""
    left, bottom, right, top = bounds_in(file, crs)
    return left < extent[2] and right > extent[0] and bottom < extent[3] and top > extent[1]


def _is_of_one_site(item: FoundRaster, draft: _Draft) -> bool:
    """Whether a raster belongs to one site only, because it has all of its fields and its coordinate system."""
    return draft.fields.keys() <= item.fields.keys() and same_crs(item.file.crs, draft.crs)


def _check_position(draft: _Draft, file: RasterFile) -> None:
    first = draft.rasters[0].file
    if file.has_position != first.has_position:
        without, other = (file, first) if first.has_position else (first, file)
        raise InputError(
            f"{without.path}: has no position, but {other.path}, of the same site, has one; add a world file"
        )
    if bool(file.crs) != bool(first.crs):
        without, other = (file, first) if first.crs else (first, file)
        raise InputError(
            f"{without.path}: has no coordinate system, but {other.path}, of the same site, is in {other.crs}; set crs "
            "in the description"
        )


def _check_without_position(name: str, items: Sequence[FoundRaster], draft: _Draft, registry: Registry) -> None:
    """Check that rasters without a position are one a date, and as large as the image.

    Raises:
        InputError: they are not.
    """
    first = draft.rasters[0].file
    if first.has_position:
        return
    days: dict[int, RasterFile] = {}
    for item in items:
        other = days.setdefault(item.day, item.file)
        if other is not item.file:
            raise InputError(
                f"{other.path} and {item.file.path}: have no position, so that both would show the same ground; name "
                f"a field that separates them in files of {name}, or write world files"
            )
        expected = [round(side * registry[name].size / registry[draft.sensor].size) for side in first.shape]
        if list(item.file.shape) != expected:
            raise InputError(
                f"{item.file.path}: {item.file.width} x {item.file.height} pixels without a position, but "
                f"{expected[1]} x {expected[0]} cover {first.path}"
            )


def _align_origin(draft: _Draft, size: int, others: Sequence[tuple[int, RasterFile]]) -> tuple[float, float]:
    """Corner of a pixel of the finest sensor that is also a corner of as many other sensors' pixels as possible.

    Args:
        draft: rasters of the finest sensor.
        size: side of its patches, in pixels.
        others: side of a patch in pixels, and first raster, of each sensor and label; the first ones have priority.
    """
    first = draft.rasters[0].file
    bounds = np.array([item.file.bounds for item in draft.rasters])
    pixel = first.pixel_width
    x, y = first.left + np.arange(size) * pixel, first.top - np.arange(size) * pixel  # all offsets within a patch
    x = _without_loss(x, bounds[:, 0].min(), bounds[:, 2].max(), size * pixel)
    y = _without_loss(y, bounds[:, 1].min(), bounds[:, 3].max(), size * pixel)
    for other_size, other in others:
        if other is not first and other.has_position and same_crs(first.crs, other.crs):
            other_pixel = size * pixel / other_size
            x, y = _nearest(x, other.left, other_pixel), _nearest(y, other.top, other_pixel)
    return float(x[0]), float(y[0])


def _without_loss(corners: np.ndarray, start: float, end: float, side: float) -> np.ndarray:
    """Corners with which at most a tenth of the complete rows or columns of patches between two coordinates is lost."""
    complete = np.floor((end - corners) / side + _ROUNDING) - np.ceil((start - corners) / side - _ROUNDING)
    return corners[complete >= complete.max() - _MAX_LOSS * abs(complete.max())]


def _nearest(corners: np.ndarray, start: float, pixel: float) -> np.ndarray:
    """Corners that are nearest to those of pixels that start at a coordinate; all corners if none is near."""
    positions = (corners - start) / pixel
    misfits = np.abs(positions - np.round(positions))
    return corners[misfits <= misfits.min() + _ROUNDING] if misfits.min() <= ALIGNMENT else corners


def _make_layer(
    items: Sequence[FoundRaster], grid: PixelGrid, draft: _Draft, has_time_axis: bool, series: Layer | None
) -> Layer:
    """Place the rasters of a sensor or label; those of a mask on the days of its series."""
    placed = sorted(
        ((place_raster(item.file, grid), item) for item in items),
        key=lambda pair: pair[0].is_resampled,
    )
    days = np.unique([item.day for item in items]) if has_time_axis else np.zeros(1, np.int64)
    if series is not None:
        days = series.days
        placed = [pair for pair in placed if pair[1].day in days]
    rasters = tuple(raster for raster, _ in placed)
    boxes = [(item.row, item.column, item.row + item.height, item.column + item.width) for item in rasters]
    dates = np.array([item.day for _, item in placed], np.int32)
    return Layer(
        grid=grid,
        rasters=rasters,
        boxes=np.array(boxes, np.int64).reshape(-1, 4),
        days=days,
        day_index=np.searchsorted(days, dates) if has_time_axis else np.zeros(len(dates), np.int64),
        dates=dates,
        is_of_one_site=np.array([_is_of_one_site(item, draft) for _, item in placed], bool),
    )
