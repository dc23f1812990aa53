"""Ground windows: draw them, check their size, and convert them to pixel slices of each modality."""

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


def lattice_step(modalities: Iterable[Modality]) -> float:
    """Smallest step, in metres, that is a whole number of pixels in every modality.

    For 0.2 m imagery it is 0.2 m, with SPOT 1.6 m, with the 10.24 m Sentinel series 51.2 m.
    """
    return math.lcm(*(round(modality.gsd * 1000) for modality in modalities)) / 1000


def valid_sides(modalities: Iterable[Modality]) -> list[float]:
    """Window sides, in metres and ascending, that can be cut from every modality without resampling."""
    step = round(lattice_step(modalities) * 1000)
    return [count * step / 1000 for count in range(1, round(PATCH_SIZE * 1000) // step + 1)]


def explain_mismatch(side: float, sides: Iterable[float]) -> str:
    """Reason why ``side`` is not one of ``sides`` (see ``valid_sides``); empty if it is one up to rounding."""
    if any(math.isclose(side, valid, abs_tol=1e-6) for valid in sides):
        return ""
    return f"wider than a patch of {PATCH_SIZE:g} m" if side > PATCH_SIZE else "not whole pixels in every modality"


def format_sides(sides: Sequence[float]) -> str:
    """Sides as text for a message: all of up to six, else the first three and the last."""
    if len(sides) <= 6:
        return f"{', '.join(f'{side:g}' for side in sides)} m"
    return f"{sides[0]:g}, {sides[1]:g}, {sides[2]:g}, ... {sides[-1]:g} m"


def check_side(side: float, modalities: Iterable[Modality]) -> None:
    """Check that a window of ``side`` metres can be cut from every modality without resampling.

    Raises:
        InputError: the window does not fit; the message lists the valid sides.
    """
    sides = valid_sides(modalities)
    if reason := explain_mismatch(side, sides):
        raise InputError(f"window={side:g}: {reason}; windows of these modalities are {format_sides(sides)} wide")


def draw_windows(seeds: Sequence[int], side: float, step: float) -> list[GroundWindow]:
    """Draw one random window per sample seed.

    Args:
        seeds: sample seeds, one per window; each seed determines its window.
        side: side of the windows, in metres.
        step: grid step of the window corners, in metres (see ``lattice_step``).
    """
    if math.isclose(side, PATCH_SIZE):
        return [WHOLE_PATCH] * len(seeds)
    positions = round((PATCH_SIZE - side) / step) + 1
    corners = integers(torch.tensor(seeds), "window", positions, 2).tolist()
    return [GroundWindow(left=column * step, top=row * step, side=side) for column, row in corners]


def pixel_slices(modality: Modality, window: GroundWindow) -> tuple[slice, slice]:
    """Row and column slices of a raster of ``modality`` that ``window`` covers."""
    left, top, side = (round(metres / modality.gsd) for metres in (window.left, window.top, window.side))
    return slice(top, top + side), slice(left, left + side)


def crop(array: np.ndarray, modality: Modality, window: GroundWindow) -> np.ndarray:
    """Crop ``array``, (..., H, W), to ``window``; the result is a view."""
    return array[..., *pixel_slices(modality, window)]
