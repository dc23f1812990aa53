"""From plans to rasters: surface map, texture, heights, light and shadow of one patch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bocage.shards.simulate.landscape import Landscape, Shape
from bocage.shards.simulate.noise import TILE, generator, tiles, window

_BORDER = 64
"""Pixels rendered around a patch, so that objects outside cast their shadows in."""

_TRAMLINES = 18.0  # metres between the wheel tracks that sprayers leave in a crop


@dataclass(frozen=True)
class Sun:
    """Where the sun stands: azimuth clockwise from north and elevation, radians."""

    azimuth: float
    elevation: float


@dataclass(frozen=True)
class Ground:
    """Rasters of one patch, all (N, N) at ``pixel`` metres.

    Attributes:
        surface: int16 index into the palette.
        phase: float32, share of the bright phase, 0..1.
        terrain: float32 metres above sea level.
        top: float32 metres, height of what stands on the terrain, with the border of ``_BORDER`` pixels around.
    """

    pixel: float
    surface: np.ndarray
    phase: np.ndarray
    terrain: np.ndarray
    top: np.ndarray

    @property
    def height(self) -> np.ndarray:
        """(N, N) float32 metres above the terrain."""
        return self.top[_BORDER:-_BORDER, _BORDER:-_BORDER]

    def light(self, sun: Sun) -> np.ndarray:
        """Direct and diffuse light relative to open flat ground, (N, N) float32: slopes, crowns and cast shadows."""
        y, x = -math.cos(sun.azimuth), math.sin(sun.azimuth)
        top = self.top
        slope = np.empty_like(top)
        slope[1:-1, 1:-1] = (top[1:-1, :-2] - top[1:-1, 2:]) * x + (top[:-2, 1:-1] - top[2:, 1:-1]) * y
        relief = slope[_BORDER:-_BORDER, _BORDER:-_BORDER] / (2 * self.pixel)
        rows, columns = np.gradient(self.terrain[::8, ::8], 8 * self.pixel)
        hillside = np.repeat(np.repeat(-columns * x - rows * y, 8, axis=0), 8, axis=1)
        facing = 1.0 + np.clip((0.45 * relief + hillside) / math.tan(sun.elevation), -0.45, 0.35)
        return np.where(self._shadow(sun), 0.3, facing).astype(np.float32)

    def _shadow(self, sun: Sun) -> np.ndarray:
        """Where something between here and the sun rises above the line of sight, (N, N) bool.

        The running maximum of heights along the way to the sun, lowered by the sun's slope, is built by doubling the
        distance, at half resolution.
        """
        top = self.top[::2, ::2]
        y, x = -math.cos(sun.azimuth), math.sin(sun.azimuth)
        drop = 2 * self.pixel * math.tan(sun.elevation)
        reach = top
        for step in (1, 2, 4, 8, 16):
            down, right = round(step * y), round(step * x)
            moved = np.full_like(reach, -np.inf)
            height, width = reach.shape
            moved[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)] = reach[
                max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)
            ]
            reach = np.maximum(reach, moved - drop * math.hypot(down, right))
        shadow = (reach > top + 0.4)[_BORDER // 2 : -_BORDER // 2, _BORDER // 2 : -_BORDER // 2]
        return np.repeat(np.repeat(shadow, 2, axis=0), 2, axis=1)


def _inside(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance inside the outline of a shape, metres, negative outside: (W,) and (H,) positions -> (H, W) float32."""
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


def _span(low: float, high: float, positions: np.ndarray) -> slice:
    first, last = np.searchsorted(positions, (low, high))
    return slice(int(first), int(last))


def rasterise(
    scene: Landscape, era: str, left: float, top: float, size: int, pixel: float, day: float, *names: object
) -> Ground:
    """The ground of one patch.

    Args:
        scene: the ROI.
        era: ``now`` or ``then``.
        left, top: the patch's upper-left corner, metres from the ROI's.
        size: pixels along a side, even; ``pixel``: metres.
        day: day of the year on which crops have the heights wanted.
        names: what textures depend on (the ROI).
    """
    plan, palette = scene.plans[era], scene.palettes[era]
    steps = (np.arange(-_BORDER, size + _BORDER) + 0.5) * pixel
    x, y = (left + steps).astype(np.float32), (top + steps).astype(np.float32)
    outline = scene.outline.at(y, x)
    surface = np.zeros(outline.shape, np.int16)
    rise = np.zeros(outline.shape, np.float32)
    for shape in plan.shapes:
        reach = shape.width / 2 + 2.5 * shape.ragged
        (near_x, near_y), (far_x, far_y) = shape.points.min(0) - reach, shape.points.max(0) + reach
        box = _span(near_y, far_y, y), _span(near_x, far_x, x)
        if box[0].start >= box[0].stop or box[1].start >= box[1].stop:
            continue
        inside = _inside(shape, x[box[1]], y[box[0]])
        if shape.ragged:
            inside = inside + shape.ragged * outline[box]
        mask = inside > 0
        np.copyto(surface[box], shape.surface, where=mask)
        np.copyto(rise[box], np.minimum(inside * shape.pitch, 2.6) if shape.pitch else 0.0, where=mask)

    shift = generator(*names, era, "texture").integers(0, TILE, 2)
    scale = max(1, round(pixel / 0.2))
    first_row, first_column = round(top / pixel) - _BORDER, round(left / pixel) - _BORDER
    rows, columns = window(
        (first_row + np.arange(len(y))) * scale + shift[0], (first_column + np.arange(len(x))) * scale + shift[1]
    )
    phase = tiles()[palette.texture[surface], rows, columns]
    _plant_rows(phase, surface, palette.row, palette.angle, palette.open_rows, x, y)
    phase = np.clip(0.5 + palette.contrast[surface] * (phase - 0.5), 0.0, 1.0)
    height = palette.heights(day)[surface]
    relief = np.where(palette.canopy[surface], height * np.minimum(1.25 * phase, 1.0), height + rise)
    inner = slice(_BORDER, -_BORDER)
    coarse = np.arange(0, size + 8, 8) * pixel
    knots = scene.terrain.at(top + coarse, left + coarse) * scene.region.relief + scene.altitude
    return Ground(
        pixel=pixel,
        surface=surface[inner, inner],
        phase=phase[inner, inner],
        terrain=_stretch(knots, 8),
        top=relief,
    )


def _stretch(knots: np.ndarray, factor: int) -> np.ndarray:
    """Linear interpolation of (n + 1, n + 1) knots to (n * factor, n * factor)."""
    weight = ((np.arange(factor) + 0.5) / factor).astype(np.float32)
    lines = (knots[:-1, None] * (1 - weight)[:, None] + knots[1:, None] * weight[:, None]).reshape(-1, knots.shape[1])
    columns = lines[:, :-1, None] * (1 - weight) + lines[:, 1:, None] * weight
    return columns.reshape(len(lines), -1)


def _plant_rows(
    phase: np.ndarray,
    surface: np.ndarray,
    row: np.ndarray,
    angle: np.ndarray,
    open_rows: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> None:
    """Put rows into the texture, in place: sharp ones between open ground, faint drill rows in closed crops."""
    used = np.bincount(surface.ravel(), minlength=len(row)) > 0
    for index in np.flatnonzero(used & (row > 0)):
        where = surface == index
        lines = np.flatnonzero(where.any(1))
        stripes = np.flatnonzero(where.any(0))
        box = slice(lines[0], lines[-1] + 1), slice(stripes[0], stripes[-1] + 1)
        across = (x[box[1]] * -math.sin(angle[index])) + (y[box[0]] * math.cos(angle[index]))[:, None]
        wave = np.sin(across * (2 * math.pi / row[index]))
        if open_rows[index]:
            pattern = np.clip(0.5 + 0.9 * wave, 0.0, 1.0) * (0.7 + 0.4 * phase[box])
        else:
            tramlines = np.abs(across - _TRAMLINES * np.rint(across / _TRAMLINES)) < 0.35
            pattern = np.clip(phase[box] + 0.12 * wave - 0.5 * tramlines, 0.0, 1.0)
        np.copyto(phase[box], pattern, where=where[box])
