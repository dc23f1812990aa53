"""Grid of a map: the overlapping windows that a model reads, and the tiles that are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bocage.finetune.mapping.map_rasters import MapRaster
from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.errors import InputError

_BATCH_SIZE, _BATCH_WINDOW = 4, 512  # windows of a batch, and their side in pixels
_WINDOWS_PER_TILE = 8
_MIN_TILE_SIZE = 512  # pixels; tiles of small windows hold more of them, or there would be too many files
_OVERLAPS_PER_WINDOW = 8  # default overlap: 12.8 m for patches of 102.4 m


@dataclass(frozen=True)
class MapGrid:
    """Grid of a map. Lengths are in pixels of the map unless stated otherwise.

    Attributes:
        raster: raster that defines the coordinate system, the upper left corner and the extent.
        pixel: pixel size of the map, in units of the raster's coordinate system.
        width: width of the map.
        height: height of the map.
        window_size: side of a window.
        stride: distance between window starts; windows overlap by ``window_size - stride``, at most half a window.
        windows_per_tile: number of windows that start in a tile, along each side. Windows that reach into the tile from
            outside are computed too. Memory is proportional to this number.
    """

    raster: MapRaster
    pixel: float
    width: int
    height: int
    window_size: int
    stride: int
    windows_per_tile: int = _WINDOWS_PER_TILE

    @property
    def tile_size(self) -> int:
        """Side of a tile."""
        return self.windows_per_tile * self.stride

    @property
    def batch_size(self) -> int:
        """Default number of windows per batch: four of 512 px, more of smaller ones, at most a row of a tile."""
        return max(_BATCH_SIZE, min(_BATCH_SIZE * _BATCH_WINDOW**2 // self.window_size**2, self.windows_per_tile))

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Return the left and top coordinates of a pixel, in the coordinate system of the raster."""
        extent = self.raster.extent
        return extent.left + column * self.pixel, extent.top - row * self.pixel

    def tiles(self) -> list[tuple[int, int]]:
        """Return the row and column of every tile."""
        rows, columns = (math.ceil(length / self.tile_size) for length in (self.height, self.width))
        return [(row, column) for row in range(rows) for column in range(columns)]

    def window_start(self, index: int, length: int) -> int:
        """Return the first pixel of a window along an axis of ``length`` pixels.

        The last window is shifted to end with the axis, because models are trained on windows full of data.
        """
        return min(index * self.stride, max(0, length - self.window_size))

    def window_range(self, start: int, stop: int, length: int) -> range:
        """Return the indices of the windows that overlap the pixels ``start`` to ``stop`` of an axis of ``length``.

        As many windows as needed cover the axis.
        """
        count = max(1, math.ceil((length - (self.window_size - self.stride)) / self.stride))
        first = max(0, (start - self.window_size) // self.stride + 1)
        end = min(count, math.ceil(stop / self.stride))
        if end == count - 1 and self.window_start(end, length) < stop:  # the last window starts before index * stride
            end = count
        return range(first, end)


def plan_grid(task: Segmentation, raster: MapRaster, overlap: float | None = None) -> MapGrid:
    """Plan the grid of a map that covers the extent of ``raster``.

    Args:
        task: model; its labels define the pixel size of the map.
        raster: raster that defines the coordinate system and extent.
        overlap: overlap of adjacent windows, in metres; None for an eighth of a window.

    Raises:
        InputError: the overlap is negative or more than half a window.
    """
    overlap = task.patch_size / _OVERLAPS_PER_WINDOW if overlap is None else overlap
    if not 0 <= overlap <= task.patch_size / 2:
        raise InputError(f"--overlap {overlap:g} must be between 0 and {task.patch_size / 2:g} m, half a window")
    pixel = task.gsd * raster.scale
    extent, window_size = raster.extent, round(task.patch_size / task.gsd)
    width, height = (max(1, round(length / pixel)) for length in (extent.width, extent.height))
    stride = window_size - min(round(overlap / task.gsd), window_size // 2)
    windows_per_tile = max(_WINDOWS_PER_TILE, math.ceil(_MIN_TILE_SIZE / stride))
    return MapGrid(raster, pixel, width, height, window_size, stride, windows_per_tile)
