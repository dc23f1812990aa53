"""Rasterise the plan of a landscape: surface map, texture, heights, light and shadow of one patch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.landscape import Landscape, Shape
from bocage.shards.simulate.noise import TILE, generator, texture_tiles, tile_index

PATCH_SIZE = FLAIR_HUB.patch_size
"""Side of a patch on the ground, in metres."""

_BORDER = 64
"""Width of the border rendered around a patch, in pixels: objects there cast shadows into the patch."""

_TRAMLINE_SPACING = 18.0  # metres between the wheel tracks of sprayers in a crop


@dataclass(frozen=True)
class SunPosition:
    """Position of the sun: azimuth clockwise from north, and elevation, in radians."""

    azimuth: float
    elevation: float


@dataclass(frozen=True)
class GroundRasters:
    """Rasters of one patch.

    Attributes:
        pixel: pixel size, in metres.
        surface: indices into the palette, (N, N) int16.
        phase: fraction of the bright phase in 0..1, (N, N) float32.
        terrain: altitude of the terrain in metres, (N, N) float32.
        padded_height: height above the terrain in metres, with a border of ``_BORDER`` pixels on each side,
            (N + 2 * _BORDER, N + 2 * _BORDER) float32.
    """

    pixel: float
    surface: np.ndarray
    phase: np.ndarray
    terrain: np.ndarray
    padded_height: np.ndarray

    @property
    def height(self) -> np.ndarray:
        """Height above the terrain in metres, (N, N) float32."""
        return self.padded_height[_BORDER:-_BORDER, _BORDER:-_BORDER]

    def light(self, sun: SunPosition) -> np.ndarray:
        """Light relative to open flat ground, (N, N) float32: slopes, crowns and cast shadows."""
        y, x = -math.cos(sun.azimuth), math.sin(sun.azimuth)
        surface_height = self.padded_height
        slope = np.empty_like(surface_height)
        eastward = surface_height[1:-1, :-2] - surface_height[1:-1, 2:]
        southward = surface_height[:-2, 1:-1] - surface_height[2:, 1:-1]
        slope[1:-1, 1:-1] = eastward * x + southward * y
        relief = slope[_BORDER:-_BORDER, _BORDER:-_BORDER] / (2 * self.pixel)
        rows, columns = np.gradient(self.terrain[::8, ::8], 8 * self.pixel)
        hillside = np.repeat(np.repeat(-columns * x - rows * y, 8, axis=0), 8, axis=1)
        facing = 1.0 + np.clip((0.45 * relief + hillside) / math.tan(sun.elevation), -0.45, 0.35)
        return np.where(self._shadow(sun), 0.3, facing).astype(np.float32)

    def _shadow(self, sun: SunPosition) -> np.ndarray:
        """Cast shadows: whether an object towards the sun rises above the line of sight, (N, N) bool.

        At half resolution, this takes the running maximum of the heights towards the sun, each lowered by the slope of
        the sun's rays. The distance doubles in every step.
        """
        object_height = self.padded_height[::2, ::2]
        y, x = -math.cos(sun.azimuth), math.sin(sun.azimuth)
        drop = 2 * self.pixel * math.tan(sun.elevation)
        max_height = object_height
        for step in (1, 2, 4, 8, 16):
            down, right = round(step * y), round(step * x)
            shifted = np.full_like(max_height, -np.inf)
            height, width = max_height.shape
            shifted[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)] = max_height[
                max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)
            ]
            max_height = np.maximum(max_height, shifted - drop * math.hypot(down, right))
        shadow = (max_height > object_height + 0.4)[_BORDER // 2 : -_BORDER // 2, _BORDER // 2 : -_BORDER // 2]
        return np.repeat(np.repeat(shadow, 2, axis=0), 2, axis=1)


def _distance_inside_shape(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance inside the outline of a shape in metres, negative outside: (W,) x and (H,) y -> (H, W) float32."""
    points = shape.points.astype(np.float32)
    if shape.width > 0:
        start, along = points[0], points[1] - points[0]
        length = float(along @ along)
        right, down = x - start[0], (y - start[1])[:, None]
        if length < 1e-6:
            return shape.width / 2 - np.sqrt(right * right + down * down)
        position = np.clip((right * along[0] + down * along[1]) / length, 0.0, 1.0)
        return shape.width / 2 - np.hypot(right - position * along[0], down - position * along[1])
    result: np.ndarray | None = None
    centre = points.mean(0)
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        normal = np.array([start[1] - end[1], end[0] - start[0]], np.float32)
        length = float(np.hypot(*normal))
        if length < 1e-4:
            continue
        normal *= math.copysign(1.0, float((centre - start) @ normal)) / length
        distance = (x - start[0]) * normal[0] + ((y - start[1]) * normal[1])[:, None]
        result = distance if result is None else np.minimum(result, distance, out=result)
    assert result is not None
    return result - shape.inset


def _index_range(low: float, high: float, positions: np.ndarray) -> slice:
    first, last = np.searchsorted(positions, (low, high))
    return slice(int(first), int(last))


def rasterise_patch(
    landscape: Landscape, era: str, left: float, top: float, size: int, pixel: float, day: float, *names: object
) -> GroundRasters:
    """Rasterise one patch.

    Args:
        landscape: landscape of the ROI.
        era: ``now``, or ``then`` for the 1950s.
        left: x of the patch's upper-left corner, in metres from that of the ROI.
        top: y of the patch's upper-left corner, in metres from that of the ROI.
        size: side of the patch in pixels, an even number.
        pixel: pixel size, in metres.
        day: day of the year that the crop heights refer to.
        names: names that seed the textures; those of the ROI.
    """
    plan, palette = landscape.plans[era], landscape.palettes[era]
    steps = (np.arange(-_BORDER, size + _BORDER) + 0.5) * pixel
    x, y = (left + steps).astype(np.float32), (top + steps).astype(np.float32)
    outline = landscape.outline.at(y, x)
    surface = np.zeros(outline.shape, np.int16)
    roof_rise = np.zeros(outline.shape, np.float32)
    for shape in plan.shapes:
        reach = shape.width / 2 + 2.5 * shape.ragged
        (near_x, near_y), (far_x, far_y) = shape.points.min(0) - reach, shape.points.max(0) + reach
        box = _index_range(near_y, far_y, y), _index_range(near_x, far_x, x)
        if box[0].start >= box[0].stop or box[1].start >= box[1].stop:
            continue
        inside = _distance_inside_shape(shape, x[box[1]], y[box[0]])
        if shape.ragged:
            inside = inside + shape.ragged * outline[box]
        mask = inside > 0
        np.copyto(surface[box], shape.surface, where=mask)
        np.copyto(roof_rise[box], np.minimum(inside * shape.pitch, 2.6) if shape.pitch else 0.0, where=mask)

    shift = generator(*names, era, "texture").integers(0, TILE, 2)
    scale = max(1, round(pixel / 0.2))
    first_row, first_column = round(top / pixel) - _BORDER, round(left / pixel) - _BORDER
    rows, columns = tile_index(
        (first_row + np.arange(len(y))) * scale + shift[0], (first_column + np.arange(len(x))) * scale + shift[1]
    )
    phase = texture_tiles()[palette.texture[surface], rows, columns]
    _add_crop_rows(phase, surface, palette.row_spacing, palette.angle, palette.open_rows, x, y)
    phase = np.clip(0.5 + palette.contrast[surface] * (phase - 0.5), 0.0, 1.0)
    height = palette.heights(day)[surface]
    relief = np.where(palette.canopy[surface], height * np.minimum(1.25 * phase, 1.0), height + roof_rise)
    inner = slice(_BORDER, -_BORDER)
    coarse = np.arange(0, size + 8, 8) * pixel
    knots = landscape.terrain.at(top + coarse, left + coarse) * landscape.region.relief + landscape.altitude
    return GroundRasters(
        pixel=pixel,
        surface=surface[inner, inner],
        phase=phase[inner, inner],
        terrain=_upsample_linearly(knots, 8),
        padded_height=relief,
    )


def _upsample_linearly(knots: np.ndarray, factor: int) -> np.ndarray:
    """Interpolate (n + 1, n + 1) knots linearly to (n * factor, n * factor) values."""
    weight = ((np.arange(factor) + 0.5) / factor).astype(np.float32)
    lines = (knots[:-1, None] * (1 - weight)[:, None] + knots[1:, None] * weight[:, None]).reshape(-1, knots.shape[1])
    columns = lines[:, :-1, None] * (1 - weight) + lines[:, 1:, None] * weight
    return columns.reshape(len(lines), -1)


def _add_crop_rows(
    phase: np.ndarray,
    surface: np.ndarray,
    row_spacing: np.ndarray,
    angle: np.ndarray,
    open_rows: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> None:
    """Draw plant rows into the texture ``phase``, in place: sharp open rows, or faint drill rows in closed crops."""
    used = np.bincount(surface.ravel(), minlength=len(row_spacing)) > 0
    for index in np.flatnonzero(used & (row_spacing > 0)):
        where = surface == index
        lines = np.flatnonzero(where.any(1))
        stripes = np.flatnonzero(where.any(0))
        box = slice(lines[0], lines[-1] + 1), slice(stripes[0], stripes[-1] + 1)
        across = (x[box[1]] * -math.sin(angle[index])) + (y[box[0]] * math.cos(angle[index]))[:, None]
        wave = np.sin(across * (2 * math.pi / row_spacing[index]))
        if open_rows[index]:
            pattern = np.clip(0.5 + 0.9 * wave, 0.0, 1.0) * (0.7 + 0.4 * phase[box])
        else:
            tramlines = np.abs(across - _TRAMLINE_SPACING * np.rint(across / _TRAMLINE_SPACING)) < 0.35
            pattern = np.clip(phase[box] + 0.12 * wave - 0.5 * tramlines, 0.0, 1.0)
        np.copyto(phase[box], pattern, where=where[box])
