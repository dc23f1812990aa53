"""Count the valid pixels of patches, by the extents of rasters and by their content where pixels may be missing.

Counts that took a second or more of reading are kept in ``$XDG_CACHE_HOME/bocage/coverage`` (``~/.cache``), so that a
resumed run, or each slice of a run, need not read the rasters again.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from rasterio.warp import transform

from bocage.shards.files import atomic_write
from bocage.shards.source.described.ground import same_crs
from bocage.shards.source.described.raster_windows import Box, PixelGrid, PlacedRaster, has_holes, read_valid
from bocage.shards.source.described.rasters import RasterRules, sidecar_environment
from bocage.shards.source.raster import RasterError, gdal_environment

_CHUNK_PIXELS = 4 << 20  # large chunks share few blocks of a file, which would be decoded twice
_MAX_THREADS = 4
_MARGIN = 2.0  # pixels of a resampled raster that may lack neighbours, or lie where GDAL approximates positions
_WORTH_KEEPING = 1.0  # seconds of reading


def counting_threads() -> ThreadPoolExecutor:
    """Threads for ``count_valid``; GDAL decodes without holding Python's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    return ThreadPoolExecutor(min(_MAX_THREADS, cores or 1))


def count_valid(
    rasters: Sequence[PlacedRaster], grid: PixelGrid, rules: RasterRules, rows: range, columns: int, threads: Executor
) -> np.ndarray:
    """Count the pixels of each patch that at least one raster holds.

    Patches inside a raster without missing pixels are complete, and nothing is read for them. The others are read in
    chunks of bounded size. A patch that cannot be read counts as complete, so that writing it reports the error.

    Args:
        rasters: rasters of one sensor, date and site.
        grid: pixel grid of the sensor.
        rules: rules of the sensor.
        rows: rows of patches.
        columns: number of columns of patches.
        threads: threads that read the chunks.

    Returns:
        Pixels with data, (rows, columns) int64.
    """
    size = grid.size
    counts = np.zeros((len(rows), columns), np.int64)
    touched = np.zeros(counts.shape, bool)
    for raster in rasters:
        covered = _covered_patches(raster, grid, rows, columns)
        if covered is None:
            continue
        part = np.s_[covered[0] - rows.start : covered[1] - rows.start, covered[2] : covered[3]]
        touched[part] = True
        if not has_holes(raster.file, rules):
            counts[part][_complete_patches(raster, grid, covered)] = size * size
    undecided = touched & (counts < size * size)
    if not undecided.any():
        return counts
    kept = _kept_file(rasters, grid, rules, rows, columns)
    if (known := _read_counts(kept, counts.shape)) is not None:
        return known
    start = time.monotonic()
    is_readable = True
    chunks = list(_chunks(undecided, rasters, size))
    boxes = [(rows.start + row, column, height, width) for row, column, height, width in chunks]
    for chunk, (counted, was_read) in zip(
        chunks, threads.map(lambda box: _count_chunk(rasters, grid, rules, box), boxes)
    ):
        part = np.s_[chunk[0] : chunk[0] + chunk[2], chunk[1] : chunk[1] + chunk[3]]
        counts[part] = np.where(undecided[part], counted, counts[part])
        is_readable &= was_read
    if is_readable and time.monotonic() - start >= _WORTH_KEEPING:
        with suppress(OSError):  # the next run reads again
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept, concurrent=True) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, counts=counts)
    return counts


def _kept_file(rasters: Sequence[PlacedRaster], grid: PixelGrid, rules: RasterRules, rows: range, columns: int) -> Path:
    """File of the counts, named by a hash of all that they depend on."""
    digest = hashlib.sha256(repr((grid, rules, rows, columns, *rasters)).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "bocage" / "coverage" / f"{digest.hexdigest()[:32]}.npz"


def _read_counts(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Counts of a file; None if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            counts: np.ndarray = content["counts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return counts if counts.shape == shape and counts.dtype == np.int64 else None


def _covered_patches(
    raster: PlacedRaster, grid: PixelGrid, rows: range, columns: int
) -> tuple[int, int, int, int] | None:
    """First and last row (exclusive), first and last column of the patches that a raster touches; None for none."""
    size = grid.size
    first, last = max(rows.start, raster.row // size), min(rows.stop, -(-(raster.row + raster.height) // size))
    left, right = max(0, raster.column // size), min(columns, -(-(raster.column + raster.width) // size))
    return (first, last, left, right) if first < last and left < right else None


def _complete_patches(raster: PlacedRaster, grid: PixelGrid, patches: tuple[int, int, int, int]) -> np.ndarray:
    """Mask of the patches that lie inside a raster, (rows, columns) bool."""
    first, last, left, right = patches
    size = grid.size
    if not raster.is_resampled:
        rows, columns = np.arange(first, last) * size, np.arange(left, right) * size
        inside_rows = (rows >= raster.row) & (rows + size <= raster.row + raster.height)
        inside_columns = (columns >= raster.column) & (columns + size <= raster.column + raster.width)
        return inside_rows[:, None] & inside_columns
    # All corners of the patch lie inside. The edges of a patch are straight in any projection to a small part of a
    # pixel, which the margin covers.
    row, column = np.mgrid[first : last + 1, left : right + 1]
    x, y = grid.left + column * grid.side, grid.top - row * grid.side
    file = raster.file
    if not same_crs(file.crs, grid.crs):
        flat = transform(grid.crs, file.crs, x.ravel(), y.ravel())
        x, y = (np.asarray(values).reshape(row.shape) for values in flat)
    column_px, row_px = (x - file.left) / file.pixel_width, (file.top - y) / file.pixel_height
    inside = (column_px >= _MARGIN) & (column_px <= file.width - _MARGIN)
    inside &= (row_px >= _MARGIN) & (row_px <= file.height - _MARGIN)
    return inside[:-1, :-1] & inside[:-1, 1:] & inside[1:, :-1] & inside[1:, 1:]


def _chunks(undecided: np.ndarray, rasters: Sequence[PlacedRaster], size: int) -> Iterator[Box]:
    """Boxes of patches that cover the undecided ones: two blocks high, as wide as the chunk size allows."""
    if not undecided.any():
        return
    block = max(raster.file.block[0] for raster in rasters)
    limit = max(1, _CHUNK_PIXELS // (size * size))  # patches of a chunk
    height = min(max(1, math.ceil(2 * block / size)), max(1, math.isqrt(limit)))
    width = max(1, limit // height)
    for row in range(0, len(undecided), height):
        band = undecided[row : row + height]
        edges = np.flatnonzero(np.diff(band.any(axis=0), prepend=False, append=False))
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist()):
            for column in range(start, end, width):
                yield row, column, len(band), min(width, end - column)


def _count_chunk(
    rasters: Sequence[PlacedRaster], grid: PixelGrid, rules: RasterRules, patches: Box
) -> tuple[np.ndarray, bool]:
    """Valid pixels of the patches of a box, (rows, columns) int64, and whether all of them could be read."""
    row, column, height, width = patches
    size = grid.size
    box = (row * size, column * size, height * size, width * size)
    valid = np.zeros(box[2:], bool)
    try:
        with gdal_environment(), sidecar_environment():
            for raster in rasters:
                part = raster.overlap(box)
                if part is None:
                    continue
                top, left = part[0] - box[0], part[1] - box[1]
                target = valid[top : top + part[2], left : left + part[3]]
                if not target.all():
                    found = read_valid(raster, grid, rules, part)
                    target |= True if found is None else found
    except RasterError:
        counts = np.full((height, width), size * size)
        if height * width > 1:
            for index in np.ndindex(height, width):
                [[counts[index]]], _ = _count_chunk(rasters, grid, rules, (row + index[0], column + index[1], 1, 1))
        return counts, False
    return np.count_nonzero(valid.reshape(height, size, width, size), axis=(1, 3)), True
