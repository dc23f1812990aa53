"""Read patches as windows of rasters of any size, on one pixel grid for each sensor and site."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio
from rasterio import Affine
from rasterio.enums import Interleaving, Resampling
from rasterio.errors import RasterioError
from rasterio.warp import reproject, transform_bounds
from rasterio.windows import Window

from bocage.shards.modality import Modality
from bocage.shards.source.described.ground import parse_crs, same_crs
from bocage.shards.source.described.rasters import (
    ALIGNMENT,
    RasterRules,
    check_file,
    convert,
    find_alpha,
    find_declared,
    has_mask,
    open_raster,
    position_of,
    read_hidden,
    sidecar_environment,
)
from bocage.shards.source.raster import Raster, RasterError, gdal_reason

_MAX_OPEN = 128  # datasets that a thread keeps open; a process may open 1,024 files by default
_WARP_TOLERANCE = 0.02  # pixels by which GDAL may approximate the position of a resampled pixel
_KERNEL = 3  # pixels of a raster around those that resampling needs, with one for approximate positions
_PICTURES = ("PNG", "JPEG", "GIF", "BMP", "WEBP")  # formats that are decoded from their beginning up to a window
_ANY_CRS = "EPSG:32631"  # stands for two equal systems, of which GDAL may not know any

Box = tuple[int, int, int, int]
"""Row, column, height and width, in pixels."""

Bounds = tuple[float, float, float, float]
"""Left, bottom, right and top, in units of a coordinate system."""


@dataclass(frozen=True)
class RasterFile:
    """A raster of any size: its position, and what marks its missing pixels.

    Attributes:
        path: path of the file.
        crs: coordinate system; empty if unknown.
        has_position: whether the file is georeferenced; otherwise it lies at 0, 0 with the pixels of the description.
        left, top: upper-left corner, in the CRS.
        pixel_width, pixel_height: sides of a pixel, in units of the CRS.
        scale: ground metres per unit of the CRS.
        width, height: size in pixels.
        block: height and width of the blocks that are read as a whole.
        alpha: number of the alpha band, from 1; 0 without one.
        has_mask: whether a mask, which is no band, marks missing pixels.
        declared: nodata value of the file; None if it has none, or if it is a class of a label.
        dtype: type of the values of the used bands.
        bytes_per_pixel: size of the file divided by its pixels.
        decoded_bytes: bytes that decoding a pixel of a block gives: those of all bands if they are interleaved.
        driver: GDAL's name of the format.
        version: hash of the paths, times and sizes of the file, its sidecars and the sources of a virtual raster.
    """

    path: Path
    crs: str
    has_position: bool
    left: float
    top: float
    pixel_width: float
    pixel_height: float
    scale: float
    width: int
    height: int
    block: tuple[int, int]
    alpha: int
    has_mask: bool
    declared: float | None
    dtype: str
    bytes_per_pixel: float
    decoded_bytes: int
    driver: str
    version: str

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return self.height, self.width

    def window_bytes(self, size: int) -> int:
        """Bytes that are decoded, on average, to read a window of ``size`` pixels."""
        if self.driver in _PICTURES:
            return self.height * self.width * self.decoded_bytes
        height = min(self.height, size + self.block[0] - 1)
        width = min(self.width, size + self.block[1] - 1)
        return height * width * self.decoded_bytes

    @property
    def bounds(self) -> Bounds:
        """Bounds in the CRS."""
        right, bottom = self.left + self.width * self.pixel_width, self.top - self.height * self.pixel_height
        return self.left, bottom, right, self.top


def describe_raster(path: Path, file: rasterio.DatasetReader, rules: RasterRules) -> RasterFile:
    """Check an open raster and describe it.

    Raises:
        RasterError: the raster contradicts the description, or has no grid that is parallel to its coordinates.
    """
    check_file(path, file, rules)
    position = position_of(path, file, rules)
    if not position.is_known and file.gcps[0]:
        raise RasterError(f"{path}: has ground control points but no grid: rewrite it with gdalwarp")
    first = rules.bands[0]
    alpha = find_alpha(file, rules)
    decoded = range(file.count) if file.interleaving == Interleaving.pixel else rules.bands
    return RasterFile(
        path=path,
        crs=position.crs,
        has_position=position.is_known,
        left=position.left,
        top=position.top,
        pixel_width=position.pixel,
        pixel_height=-file.transform.e if position.is_known else position.pixel,
        scale=position.scale,
        width=file.width,
        height=file.height,
        block=file.block_shapes[first],
        alpha=alpha,
        has_mask=not alpha and has_mask(file, rules),
        declared=find_declared(file, rules),
        dtype=file.dtypes[first],
        bytes_per_pixel=path.stat().st_size / (file.width * file.height),
        decoded_bytes=sum(np.dtype(file.dtypes[index]).itemsize for index in decoded),
        driver=file.driver,
        version=_version(path, file.files),
    )


def _version(path: Path, files: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in (os.path.abspath(path), *files):
        with suppress(OSError):  # a source of a virtual raster may be missing
            status = os.stat(name)
            digest.update(f"{name} {status.st_mtime_ns} {status.st_size}\n".encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class PixelGrid:
    """The pixels of one sensor over one site; patch (0, 0) has the upper-left corner of the grid.

    Attributes:
        crs: coordinate system; empty if unknown.
        left, top: upper-left corner, in the CRS.
        side: side of a patch, in units of the CRS.
        size: side of a patch, in pixels.
    """

    crs: str
    left: float
    top: float
    side: float
    size: int

    @property
    def pixel(self) -> float:
        """Side of a pixel, in units of the CRS."""
        return self.side / self.size

    def transform(self, row: int, column: int) -> Affine:
        """Affine transform from pixels, counted from a row and a column, to coordinates."""
        return Affine(self.pixel, 0, self.left + column * self.pixel, 0, -self.pixel, self.top - row * self.pixel)


@dataclass(frozen=True)
class PlacedRaster:
    """A raster on a pixel grid.

    Attributes:
        file: the raster.
        is_resampled: whether its pixels do not lie on those of the grid.
        row, column, height, width: pixels of the grid that it covers; if it is resampled, their bounding box.
    """

    file: RasterFile
    is_resampled: bool
    row: int
    column: int
    height: int
    width: int

    def overlap(self, box: Box) -> Box | None:
        """Part of a box that the raster may cover; None if they do not overlap."""
        row, column = max(self.row, box[0]), max(self.column, box[1])
        height = min(self.row + self.height, box[0] + box[2]) - row
        width = min(self.column + self.width, box[1] + box[3]) - column
        return (row, column, height, width) if height > 0 and width > 0 else None


def place_raster(file: RasterFile, grid: PixelGrid) -> PlacedRaster:
    """Find the pixels of a grid that a raster covers."""
    if not file.has_position:
        return PlacedRaster(file, False, 0, 0, file.height, file.width)
    is_same = same_crs(file.crs, grid.crs)
    if is_same:
        left, right, top, bottom = grid_bounds(file.bounds, grid)
        rounded = [round(value) for value in (left, right, top, bottom)]
        is_aligned = all(abs(a - b) <= ALIGNMENT for a, b in zip((left, right, top, bottom), rounded))
        if is_aligned and (rounded[1] - rounded[0], rounded[3] - rounded[2]) == (file.width, file.height):
            return PlacedRaster(file, False, rounded[2], rounded[0], file.height, file.width)
    left, right, top, bottom = grid_bounds(bounds_in(file, grid.crs), grid)
    row, column = math.floor(top), math.floor(left)
    return PlacedRaster(file, True, row, column, math.ceil(bottom) - row, math.ceil(right) - column)


def bounds_in(file: RasterFile, crs: str) -> Bounds:
    """Bounds of a raster in a coordinate system; infinite outside its area."""
    return file.bounds if same_crs(file.crs, crs) else _project_bounds(file.crs, crs, file.bounds)


@lru_cache(maxsize=4096)
def _project_bounds(source: str, target: str, bounds: Bounds) -> Bounds:
    left, bottom, right, top = transform_bounds(source, target, *bounds)
    return left, bottom, right, top


def grid_bounds(bounds: Bounds, grid: PixelGrid) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of bounds, in pixels of a grid."""
    left, bottom, right, top = bounds
    return (
        (left - grid.left) / grid.pixel,
        (right - grid.left) / grid.pixel,
        (grid.top - top) / grid.pixel,
        (grid.top - bottom) / grid.pixel,
    )


def has_holes(file: RasterFile, rules: RasterRules) -> bool:
    """Whether pixels inside a raster may be missing."""
    return bool(file.alpha) or file.has_mask or file.declared is not None or bool(rules.nodata)


def read_window(
    raster: PlacedRaster, grid: PixelGrid, rules: RasterRules, box: Box
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a box inside the bounds of a raster.

    A pixel is missing if a mask hides it or no band has a value. If the description names no nodata value to store, a
    pixel is also missing if only some of its bands have a value.

    Args:
        raster: raster on the grid.
        grid: pixel grid of the sensor.
        rules: rules of the sensor or label.
        box: part of the grid; see ``PlacedRaster.overlap``.

    Returns:
        values: values of the used bands, (C, H, W); where a band has none, a nodata value of the description.
        valid: mask of the pixels that are not missing, (H, W) bool; None if none is missing.

    Raises:
        RasterError: the raster cannot be read.
    """
    with _open_dataset(raster.file) as dataset:
        if raster.is_resampled:
            return _read_resampled(dataset, raster.file, grid, rules, box)
        window = _window(raster, box)
        values = dataset.read([index + 1 for index in rules.bands], window=window)
        if not has_holes(raster.file, rules):
            return values, None
        hidden = read_hidden(dataset, rules, raster.file.alpha, raster.file.has_mask, window)
    valid = _valid(_missing(values, raster.file, rules), hidden, rules)
    if raster.file.declared is not None and rules.nodata and rules.nodata.fill is not None:
        unnamed = rules.nodata.is_missing(values, raster.file.declared) & ~rules.nodata.is_missing(values)
        values[unnamed] = rules.nodata.fill
    return values, valid


def read_valid(raster: PlacedRaster, grid: PixelGrid, rules: RasterRules, box: Box) -> np.ndarray | None:
    """Read which pixels of a box inside the bounds of a raster are not missing; see ``read_window``."""
    if not raster.is_resampled and not has_holes(raster.file, rules):
        return None
    with _open_dataset(raster.file) as dataset:
        if raster.is_resampled:
            # One band at a time, because boxes of counts are large.
            bands = (_resample_bands(dataset, raster.file, grid, rules, box, [index])[0] for index in rules.bands)
            return _valid(map(np.isnan, bands), None, rules)
        window = _window(raster, box)
        hidden = read_hidden(dataset, rules, raster.file.alpha, raster.file.has_mask, window)
        bands = (dataset.read(index + 1, window=window) for index in rules.bands)
        return _valid(_missing(bands, raster.file, rules), hidden, rules)


def _window(raster: PlacedRaster, box: Box) -> Window:
    row, column, height, width = box
    return Window(column - raster.column, row - raster.row, width, height)


def _missing(bands: Iterable[np.ndarray], file: RasterFile, rules: RasterRules) -> Iterator[np.ndarray]:
    """Mask of the missing pixels of each band; none if no value marks them."""
    if file.declared is not None or rules.nodata:
        for band in bands:
            yield rules.nodata.is_missing(band, file.declared)


def _valid(missing: Iterable[np.ndarray], hidden: np.ndarray | None, rules: RasterRules) -> np.ndarray | None:
    """Mask of the valid pixels, (H, W) bool, from the missing ones of each band and the hidden ones; None for all."""
    lost: np.ndarray | None = None
    for band in missing:
        if lost is None:
            lost = band
        elif rules.nodata.fill is None:
            lost = lost | band
        else:
            lost = lost & band
        if rules.nodata.fill is not None and not lost.any():
            break
    if hidden is not None:
        lost = hidden if lost is None else lost | hidden
    return None if lost is None or not lost.any() else ~lost


def _read_resampled(
    dataset: rasterio.DatasetReader, file: RasterFile, grid: PixelGrid, rules: RasterRules, box: Box
) -> tuple[np.ndarray, np.ndarray | None]:
    """Resample a box of a raster; see ``read_window``."""
    bands = _resample_bands(dataset, file, grid, rules, box, rules.bands)
    missing = np.isnan(bands)
    valid = _valid(missing, None, rules)
    is_label = rules.stored_values is not None
    bands[missing] = 0 if is_label or rules.nodata.fill is None else rules.nodata.fill
    dtype = np.dtype(file.dtype)
    return bands.astype(dtype) if dtype.kind == "f" else np.floor(bands + 0.5).astype(dtype), valid


def _resample_bands(
    dataset: rasterio.DatasetReader,
    file: RasterFile,
    grid: PixelGrid,
    rules: RasterRules,
    box: Box,
    indices: Sequence[int],
) -> np.ndarray:
    """Resample bands, by their positions from 0, to a box of the grid, (C, H, W) float; NaN marks missing pixels.

    Missing pixels become NaN before: GDAL leaves out a single nodata value, and would blend others into neighbours.

    Raises:
        RasterError: the raster holds values that the description does not name.
    """
    is_label = rules.stored_values is not None
    kind = np.float64 if is_label else np.float32  # hold all values of labels, and of the dtypes of sensors, exactly
    target = np.full((len(indices), *box[2:]), np.nan, kind)
    window = _source_window(file, grid, box)
    if window is None:
        return target
    values = dataset.read([index + 1 for index in indices], window=window)
    valid = ~rules.nodata.is_missing(values, file.declared)
    hidden = read_hidden(dataset, rules, file.alpha, file.has_mask, window)
    if hidden is not None:
        valid &= ~hidden
    source = np.full(values.shape, np.nan, kind)
    source[valid] = values[valid] if is_label else convert(file.path, values[valid], rules, None)
    is_same = same_crs(file.crs, grid.crs)
    left, top = file.left + window.col_off * file.pixel_width, file.top - window.row_off * file.pixel_height
    # A call takes a millisecond at least, so one resamples all bands, unless some pixels are missing: GDAL would take
    # those of one band for missing in all.
    parts = [slice(None)] if valid.all() else [slice(band, band + 1) for band in range(len(indices))]
    for part in parts:
        reproject(
            source[part],
            target[part],
            src_transform=Affine(file.pixel_width, 0, left, 0, -file.pixel_height, top),
            src_crs=parse_crs(grid.crs or _ANY_CRS) if is_same else parse_crs(file.crs),
            src_nodata=None if valid[part].all() else np.nan,  # GDAL takes twice the time to look for NaN
            dst_transform=grid.transform(*box[:2]),
            dst_crs=parse_crs(grid.crs or _ANY_CRS),
            init_dest_nodata=False,
            resampling=Resampling.nearest if is_label else Resampling.bilinear,
            tolerance=_WARP_TOLERANCE,
        )
    return target


def _source_window(file: RasterFile, grid: PixelGrid, box: Box) -> Window | None:
    """Pixels of a raster that resampling to a box of the grid needs; None for none."""
    row, column, height, width = box
    left, top = grid.left + column * grid.pixel, grid.top - row * grid.pixel
    right, bottom = left + width * grid.pixel, top - height * grid.pixel
    if not same_crs(file.crs, grid.crs):
        bounds = (left, bottom, right, top)
        left, bottom, right, top = _project_bounds(grid.crs, file.crs, bounds)
    first_column, last_column = (left - file.left) / file.pixel_width, (right - file.left) / file.pixel_width
    first_row, last_row = (file.top - top) / file.pixel_height, (file.top - bottom) / file.pixel_height
    # The kernel of bilinear interpolation reaches a pixel, or as many as fall into one of the grid.
    margin = _KERNEL * max(1.0, (last_column - first_column) / width, (last_row - first_row) / height)
    first_column, first_row = max(0, math.floor(first_column - margin)), max(0, math.floor(first_row - margin))
    last_column = min(file.width, math.ceil(last_column + margin))
    last_row = min(file.height, math.ceil(last_row + margin))
    if first_column >= last_column or first_row >= last_row:
        return None
    return Window(first_column, first_row, last_column - first_column, last_row - first_row)


@contextmanager
def _open_dataset(file: RasterFile) -> Iterator[rasterio.DatasetReader]:
    """Dataset of a raster; errors of reading it name it."""
    try:
        yield _datasets.get(file)
    except RasterioError as error:
        raise RasterError(f"{file.path}: cannot be read: {gdal_reason(error)}") from error


class _Datasets(threading.local):
    """Open datasets of a thread: those used last, and none whose file has changed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, tuple[tuple[int, int], rasterio.DatasetReader]] = OrderedDict()

    def get(self, file: RasterFile) -> rasterio.DatasetReader:
        """Open dataset of a raster.

        Raises:
            RasterError: the file cannot be opened, or has another position or size than when it was described.
        """
        path = file.path
        try:
            status = os.stat(path)
        except OSError as error:
            raise RasterError(f"{path}: cannot be read: {error.strerror}") from error
        version = (status.st_mtime_ns, status.st_size)
        known = self._open.pop(path, None)
        if known is not None and known[0] != version:
            known[1].close()
            known = None
        dataset = open_raster(path) if known is None else known[1]
        if known is None:
            corner = (dataset.transform.c, dataset.transform.f) if file.has_position else (file.left, file.top)
            if (dataset.width, dataset.height, *corner) != (file.width, file.height, file.left, file.top):
                raise RasterError(f"{path}: has changed since its position was read; run the same command again")
        self._open[path] = (version, dataset)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1][1].close()
        return dataset


_datasets = _Datasets()


@dataclass(frozen=True)
class WindowSource:
    """One raster of a patch that is cut from rasters of any size.

    Attributes:
        grid: pixel grid of the sensor.
        rules: rules of the sensor or label.
        frames: rasters of the image or label; for a series, those of each date. The first valid pixel counts.
        row, column: position of the patch, in patches.
    """

    grid: PixelGrid
    rules: RasterRules
    frames: tuple[tuple[PlacedRaster, ...], ...]
    row: int
    column: int

    def __str__(self) -> str:
        rasters = [raster for frame in self.frames for raster in frame]
        more = f" and {len(rasters) - 1} more" if len(rasters) > 1 else ""
        return f"{rasters[0].file.path}{more} ({self._place})"

    @property
    def _place(self) -> str:
        return f"row {self.row}, column {self.column} of the patches"

    @property
    def _box(self) -> Box:
        size = self.grid.size
        return self.row * size, self.column * size, size, size

    @property
    def container(self) -> Path:
        """Folder of the first raster."""
        return self.frames[0][0].file.path.parent

    def read_raster(self, modality: Modality) -> Raster:
        """Read the window, or stack the dates of a series.

        Raises:
            RasterError: a raster cannot be read, or holds values that the description does not name.
        """
        with sidecar_environment():
            arrays = [self._read_frame(frame, modality) for frame in self.frames]
        grid = self.grid
        left, top = grid.left + self.column * grid.side, grid.top - self.row * grid.side
        array = np.stack(arrays) if modality.has_time_axis else arrays[0]
        return Raster(array, grid.crs, left, top, grid.side, self._stored_bytes())

    def _stored_bytes(self) -> int:
        """Bytes of the files, in proportion to the pixels of the window."""
        parts = [(raster.file, raster.overlap(self._box)) for frame in self.frames for raster in frame]
        return round(sum(file.bytes_per_pixel * part[2] * part[3] for file, part in parts if part is not None))

    def _read_frame(self, frame: tuple[PlacedRaster, ...], modality: Modality) -> np.ndarray:
        """Read one date, (C, H, W) in the modality's dtype."""
        box = self._box
        shape = modality.shape()[-3:]
        fill = self.rules.nodata.fill
        array = np.full(shape, 0 if fill is None else fill, modality.dtype)
        missing = np.ones(shape[1:], bool)
        for raster in frame:
            part = raster.overlap(box)
            if part is None:
                continue
            values, valid = read_window(raster, self.grid, self.rules, part)
            where = f"{raster.file.path} ({self._place})"
            if valid is None and part == box and missing.all():
                return np.ascontiguousarray(convert(where, values, self.rules, None))
            rows = slice(part[0] - box[0], part[0] - box[0] + part[2])
            columns = slice(part[1] - box[1], part[1] - box[1] + part[3])
            taken = missing[rows, columns] if valid is None else missing[rows, columns] & valid
            if taken.any():
                array[:, rows, columns][:, taken] = convert(where, values[:, taken], self.rules, None)
                missing[rows, columns] &= ~taken
        if fill is None and missing.any():
            raise RasterError(f"{self}: {missing.sum()} pixels have no data, though they had when the run began")
        return array
