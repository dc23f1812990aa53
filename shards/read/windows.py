"""Ground windows that are whole pixels in every modality, and the pixels they cover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bocage.shards.batch import GroundWindow
from bocage.shards.counter_rng import integers
from bocage.shards.errors import InputError
from bocage.shards.modality import PATCH_SIZE, Modality

WHOLE_PATCH = GroundWindow(left=0.0, top=0.0, side=PATCH_SIZE)


def lattice(modalities: Iterable[Modality]) -> float:
    """The smallest step, in metres, that is a whole number of pixels in every modality.

    0.2 m imagery alone gives 0.2 m; with SPOT it is 1.6 m; with the 10.24 m Sentinel series it is 51.2 m.
    """
    return math.lcm(*(round(modality.gsd * 1000) for modality in modalities)) / 1000


def valid_sides(modalities: Iterable[Modality]) -> list[float]:
    """The sides of windows, in metres and ascending, that can be cut from every modality without resampling."""
    step = round(lattice(modalities) * 1000)
    return [count * step / 1000 for count in range(1, round(PATCH_SIZE * 1000) // step + 1)]


def explain_mismatch(side: float, sides: Iterable[float]) -> str:
    """Why ``side`` is none of the ``valid_sides``; empty when it is one, rounding aside."""
    if any(math.isclose(side, valid, abs_tol=1e-6) for valid in sides):
        return ""
    return f"wider than a patch of {PATCH_SIZE:g} m" if side > PATCH_SIZE else "not whole pixels in every modality"


def shown_sides(sides: Sequence[float]) -> str:
    """Sides for a message: all of a few, the first and last of many."""
    if len(sides) <= 6:
        return f"{', '.join(f'{side:g}' for side in sides)} m"
    return f"{sides[0]:g}, {sides[1]:g}, {sides[2]:g}, ... {sides[-1]:g} m"


def check_side(side: float, modalities: Iterable[Modality]) -> None:
    """Check that a window of ``side`` metres can be cut from every modality without resampling.

    Raises:
        InputError: it cannot; the message gives the sides that can.
    """
    sides = valid_sides(modalities)
    if why := explain_mismatch(side, sides):
        raise InputError(f"window={side:g}: {why}; windows of these modalities are {shown_sides(sides)} wide")


def draw_windows(seeds: Sequence[int], side: float, step: float) -> list[GroundWindow]:
    """The windows of ``side`` metres that the samples with these seeds see, on the lattice of ``step`` metres."""
    if math.isclose(side, PATCH_SIZE):
        return [WHOLE_PATCH] * len(seeds)
    positions = round((PATCH_SIZE - side) / step) + 1
    drawn = integers(torch.tensor(seeds), "window", positions, 2).tolist()
    return [GroundWindow(left=column * step, top=row * step, side=side) for column, row in drawn]


def pixel_slices(modality: Modality, window: GroundWindow) -> tuple[slice, slice]:
    """Rows and columns of a raster of ``modality`` under ``window``."""
    left, top, side = (round(metres / modality.gsd) for metres in (window.left, window.top, window.side))
    return slice(top, top + side), slice(left, left + side)


def crop(array: np.ndarray, modality: Modality, window: GroundWindow) -> np.ndarray:
    """The pixels of ``array`` (..., H, W) under ``window``; a view."""
    return array[..., *pixel_slices(modality, window)]
