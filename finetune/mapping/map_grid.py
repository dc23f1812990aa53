"""The grid of a map: its windows and its tiles, in pixels of the map."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bocage.finetune.mapping.rasters import MapRaster
from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.errors import InputError
from bocage.shards.modality import PATCH_SIZE


@dataclass(frozen=True)
class MapGrid:
    """The grid of a map, its windows and its tiles, in pixels of the map.

    Attributes:
        raster: sets coordinate system and corner.
        gsd: pixel of the map, metres.
        width, height: of the map.
        size: side of a window.
        step: from one window to the next; windows overlap by ``size - step``, at most half of them.
        across: windows that begin in a tile, along a side. More are computed for its borders, and memory is in
            proportion.
    """

    raster: MapRaster
    gsd: float
    width: int
    height: int
    size: int
    step: int
    across: int = 8

    @property
    def tile(self) -> int:
        """Side of a tile."""
        return self.across * self.step

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Left and top of a pixel, in the raster's coordinates."""
        extent = self.raster.extent
        return extent.left + column * self.gsd, extent.top - row * self.gsd

    def tiles(self) -> list[tuple[int, int]]:
        """Row and column of every tile."""
        rows, columns = (math.ceil(length / self.tile) for length in (self.height, self.width))
        return [(row, column) for row in range(rows) for column in range(columns)]

    def begin(self, number: int, length: int) -> int:
        """The first pixel of a window of an axis of ``length``: a step after the one before it.

        The last one ends with the axis: what a model has learned from are windows full of data.
        """
        return min(number * self.step, max(0, length - self.size))

    def windows(self, start: int, stop: int, length: int) -> range:
        """Numbers of the windows that reach pixels from ``start`` to ``stop`` of an axis of ``length``.

        A window covers ``size`` pixels; there are as many as it takes to cover the axis.
        """
        count = max(1, math.ceil((length - (self.size - self.step)) / self.step))
        first = max(0, (start - self.size) // self.step + 1)
        end = min(count, math.ceil(stop / self.step))
        if end == count - 1 and self.begin(end, length) < stop:  # the last one begins earlier than by steps
            end = count
        return range(first, end)


def plan_map(task: Segmentation, raster: MapRaster, overlap: float) -> MapGrid:
    """The plan of a map over all that ``raster`` covers.

    Args:
        task: the model; maps have the pixel of its labels.
        raster: sets the grid.
        overlap: metres by which windows overlap.

    Raises:
        InputError: an overlap of more than half a window, or negative.
    """
    if not 0 <= overlap <= PATCH_SIZE / 2:
        raise InputError(f"--overlap {overlap:g}: it must be between 0 and {PATCH_SIZE / 2:g} m, half a window")
    extent, size = raster.extent, round(PATCH_SIZE / task.gsd)
    width, height = (max(1, round(length / task.gsd)) for length in (extent.width, extent.height))
    return MapGrid(raster, task.gsd, width, height, size, size - round(overlap / task.gsd))
