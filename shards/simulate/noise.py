"""Random numbers and random fields of the simulator: named generators, smooth fields, tiling textures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

TILE = 1024
"""Side of a tiling texture, pixels of 0.2 m."""

TEXTURES = ("flat", "grain", "patches", "broadleaf crowns", "conifer crowns")
"""Names of the tiling textures, in the order of ``tiles``."""


def generator(*names: object) -> np.random.Generator:
    """A generator that depends on ``names`` only, so that nothing depends on the order in which things are drawn."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def interpolate(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Coarse grids at fractional positions, by smoothstep interpolation.

    Args:
        grid: (..., n, m) values at whole positions.
        rows, columns: (H,) and (W,) positions inside the grid, in grid cells.

    Returns:
        (..., H, W) float32.
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
    """Sums of octaves of value noise over a square of ground, standard deviation about 1 in the first octave.

    Args:
        random: where the noise comes from.
        origin: least coordinate (row and column) of the square, metres; ``side``: its side.
        cell: metres between the knots of the first octave; each next octave has half the cell and ``roughness`` times
            the amplitude.
        octaves: how many.
        roughness: see ``cell``.
        shape: of a stack of independent fields; () for one field.
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
        """The fields at ground positions (metres): (H,) rows and (W,) columns -> ``(*shape, H, W)`` float32."""
        octaves = (
            interpolate(knots, (rows - self._origin) / cell, (columns - self._origin) / cell)
            for cell, knots in self._octaves
        )
        total = next(octaves)
        for octave in octaves:
            total += octave
        return total


def _periodic(random: np.random.Generator, cell: int) -> np.ndarray:
    """Value noise that tiles: (TILE, TILE) float32, about standard normal."""
    count = TILE // cell
    grid = np.pad(random.standard_normal((count, count)), ((0, 1), (0, 1)), mode="wrap")
    positions = np.arange(TILE) / cell
    return interpolate(grid, positions, positions)


def _crowns(random: np.random.Generator, cell: int, sharpness: float) -> np.ndarray:
    """Tree crowns on a jittered grid that tiles: 0 in the gaps, up to 1 at the tops, (TILE, TILE) float32."""
    count = TILE // cell
    offsets = random.uniform(0.15, 0.85, (count, count, 2)).astype(np.float32)
    radii = cell * random.uniform(0.55, 0.95, (count, count)).astype(np.float32)
    tops = random.uniform(0.6, 1.0, (count, count)).astype(np.float32)
    position = np.arange(TILE, dtype=np.float32)
    here = np.arange(TILE) // cell
    result = np.zeros((TILE, TILE), np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            cells = np.ix_((here + down) % count, (here + right) % count)
            y = position[:, None] - (here[:, None] + down + offsets[..., 0][cells]) * cell
            x = position[None, :] - (here[None, :] + right + offsets[..., 1][cells]) * cell
            distance = np.sqrt(y * y + x * x) / radii[cells]
            np.maximum(result, tops[cells] * (1.0 - np.clip(distance, 0, 1) ** sharpness), out=result)
    return result


def _unit(field: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 0.25 * field / field.std(), 0.0, 1.0).astype(np.float32)


@cache
def tiles() -> np.ndarray:
    """The textures of ``TEXTURES`` in 0..1, the same in every scene, shifted by it: (T, TILE, TILE) float32."""
    random = generator("textures")
    fine = _periodic(random, 2) + 0.8 * random.standard_normal((TILE, TILE)).astype(np.float32)
    patches = _periodic(random, 64) + 0.7 * _periodic(random, 16) + 0.6 * fine
    grain = fine + 0.8 * _periodic(random, 8) + 0.5 * _periodic(random, 32)
    flecks = 0.5 * (_unit(fine + _periodic(random, 4)) - 0.5)
    return np.stack(
        (
            np.full((TILE, TILE), 0.5, np.float32),
            _unit(grain),
            _unit(patches),
            np.clip(_crowns(random, 32, 2.2) + flecks, 0.0, 1.0),
            np.clip(_crowns(random, 16, 1.0) * 1.1 + flecks, 0.0, 1.0),
        )
    ).astype(np.float32)


def window(rows: Sequence[int] | np.ndarray, columns: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indexes (H, 1) and (1, W) into a tiling texture for H rows and W columns, pixels of any size or sign."""
    return np.asarray(rows)[:, None] % TILE, np.asarray(columns)[None, :] % TILE
