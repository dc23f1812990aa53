"""Seeded random generators, smooth random fields and tiling textures of the simulator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

TILE = 1024
"""Side of a tiling texture, in pixels of 0.2 m."""

TEXTURES = ("flat", "grain", "patches", "broadleaf crowns", "conifer crowns")
"""Names of the textures, in the order of ``texture_tiles``."""


def generator(*names: object) -> np.random.Generator:
    """Random generator seeded by ``names`` alone, so that results do not depend on the order of the calls."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def interpolate(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Interpolate coarse grids at fractional positions, with smoothstep weights.

    Args:
        grid: values at integer positions, (..., n, m).
        rows: row positions in grid cells, (H,).
        columns: column positions in grid cells, (W,).

    Returns:
        values: interpolated values, (..., H, W) float32.
    """

    def weights(positions: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        low = np.clip(np.floor(positions).astype(np.intp), 0, count - 2)
        fraction = np.clip(positions - low, 0.0, 1.0)
        return low, (fraction * fraction * (3.0 - 2.0 * fraction)).astype(np.float32)

    grid = grid.astype(np.float32)
    low, weight = weights(rows, grid.shape[-2])
    lines = grid[..., low, :] * (1.0 - weight)[:, None] + grid[..., low + 1, :] * weight[:, None]
    low, weight = weights(columns, grid.shape[-1])
    return lines[..., low] * (1.0 - weight) + lines[..., low + 1] * weight


class SmoothField:
    """Sum of octaves of value noise over a square of ground; the first has a standard deviation of about 1.

    Args:
        random: random generator.
        origin: smallest row and column coordinate of the square, in metres.
        side: side of the square, in metres.
        cell: distance between the knots of the first octave, in metres; each further octave halves it.
        octaves: number of octaves.
        roughness: factor on the amplitude from one octave to the next.
        shape: shape of a stack of independent fields; () for one field.
    """

    def __init__(
        self,
        random: np.random.Generator,
        origin: float,
        side: float,
        *,
        cell: float,
        octaves: int,
        roughness: float,
        shape: tuple[int, ...] = (),
    ) -> None:
        self._origin = origin
        self._octaves = []
        amplitude = 1.0
        for _ in range(octaves):
            count = int(side / cell) + 3
            knots = random.standard_normal((*shape, count, count), np.float32)
            self._octaves.append((cell, np.float32(amplitude) * knots))
            cell, amplitude = cell / 2, amplitude * roughness

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Values at ground positions in metres, (H,) rows and (W,) columns -> ``(*shape, H, W)`` float32."""
        octaves = (
            interpolate(knots, (rows - self._origin) / cell, (columns - self._origin) / cell)
            for cell, knots in self._octaves
        )
        total = next(octaves)
        for octave in octaves:
            total += octave
        return total


def _periodic_noise(random: np.random.Generator, cell: int) -> np.ndarray:
    """Periodic value noise, (TILE, TILE) float32, about standard normal."""
    count = TILE // cell
    grid = np.pad(random.standard_normal((count, count)), ((0, 1), (0, 1)), mode="wrap")
    positions = np.arange(TILE) / cell
    return interpolate(grid, positions, positions)


def _tree_crowns(random: np.random.Generator, cell: int, sharpness: float) -> np.ndarray:
    """Periodic tree crowns on a jittered grid, (TILE, TILE) float32: 0 in the gaps, up to 1 at the tops."""
    count = TILE // cell
    offsets = random.uniform(0.15, 0.85, (count, count, 2)).astype(np.float32)
    radii = cell * random.uniform(0.55, 0.95, (count, count)).astype(np.float32)
    tops = random.uniform(0.6, 1.0, (count, count)).astype(np.float32)
    position = np.arange(TILE, dtype=np.float32)
    cell_index = np.arange(TILE) // cell
    result = np.zeros((TILE, TILE), np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            cells = np.ix_((cell_index + down) % count, (cell_index + right) % count)
            y = position[:, None] - (cell_index[:, None] + down + offsets[..., 0][cells]) * cell
            x = position[None, :] - (cell_index[None, :] + right + offsets[..., 1][cells]) * cell
            distance = np.sqrt(y * y + x * x) / radii[cells]
            np.maximum(result, tops[cells] * (1.0 - np.clip(distance, 0, 1) ** sharpness), out=result)
    return result


def _rescale_to_unit(field: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 0.25 * field / field.std(), 0.0, 1.0).astype(np.float32)


@cache
def texture_tiles() -> np.ndarray:
    """The textures of ``TEXTURES``, (T, TILE, TILE) float32 in 0..1. Every scene shifts the same textures."""
    random = generator("textures")
    fine = _periodic_noise(random, 2) + 0.8 * random.standard_normal((TILE, TILE)).astype(np.float32)
    patches = _periodic_noise(random, 64) + 0.7 * _periodic_noise(random, 16) + 0.6 * fine
    grain = fine + 0.8 * _periodic_noise(random, 8) + 0.5 * _periodic_noise(random, 32)
    flecks = 0.5 * (_rescale_to_unit(fine + _periodic_noise(random, 4)) - 0.5)
    return np.stack(
        (
            np.full((TILE, TILE), 0.5, np.float32),
            _rescale_to_unit(grain),
            _rescale_to_unit(patches),
            np.clip(_tree_crowns(random, 32, 2.2) + flecks, 0.0, 1.0),
            np.clip(_tree_crowns(random, 16, 1.0) * 1.1 + flecks, 0.0, 1.0),
        )
    ).astype(np.float32)


def tile_index(rows: Sequence[int] | np.ndarray, columns: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (H, 1) and (1, W) into a tiling texture for H rows and W columns, which may be any integers."""
    return np.asarray(rows)[:, None] % TILE, np.asarray(columns)[None, :] % TILE
