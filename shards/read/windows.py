"""Ground windows: draw them, check their size, and convert them to pixel slices of each modality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bocage.shards.batch import GroundWindow
from bocage.shards.counter_rng import integers
from bocage.shards.errors import InputError
from bocage.shards.modality import Modality

_TOLERANCE = 1e-3  # metres; users give sides in whole millimetres


def whole_patch(modality: Modality) -> GroundWindow:
    """Window of a whole patch."""
    return GroundWindow(left=0.0, top=0.0, side=modality.patch_size)


def _lattice(modalities: Iterable[Modality]) -> tuple[float, int]:
    """Side of a patch, in metres, and the number of lattice steps in it.

    The largest number of equal steps that are whole pixels in every modality is the greatest common divisor of the
    sizes in pixels, which is exact for pixels of any size.
    """
    listed = list(modalities)
    return listed[0].patch_size, math.gcd(*(modality.size for modality in listed))


def lattice_step(modalities: Iterable[Modality]) -> float:
    """Smallest step, in metres, that divides the patch and is a whole number of pixels in every modality.

    In FLAIR-HUB it is 0.2 m for 0.2 m imagery, 1.6 m with SPOT, 51.2 m with the 10.24 m Sentinel series.
    """
    patch_size, steps = _lattice(modalities)
    return patch_size / steps


def valid_sides(modalities: Iterable[Modality]) -> list[float]:
    """Window sides, in metres and ascending, that can be cut from every modality without resampling."""
    patch_size, steps = _lattice(modalities)
    return [count * patch_size / steps for count in range(1, steps + 1)]


def explain_mismatch(side: float, sides: Sequence[float]) -> str:
    """Reason why ``side`` is not one of ``sides`` (see ``valid_sides``); empty if it is one to the millimetre."""
    if any(math.isclose(side, valid, abs_tol=_TOLERANCE) for valid in sides):
        return ""
    return f"wider than a patch of {sides[-1]:g} m" if side > sides[-1] else "not whole pixels in every modality"


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


def draw_windows(seeds: Sequence[int], side: float, modalities: Sequence[Modality]) -> list[GroundWindow]:
    """Draw one random window per sample seed.

    Args:
        seeds: sample seeds, one per window; each seed determines its window.
        side: side of the windows, in metres, one of ``valid_sides``.
        modalities: modalities that the window is cut from; its corners are whole pixels in each.
    """
    patch_size, steps = _lattice(modalities)
    step = patch_size / steps
    positions = round((patch_size - side) / step) + 1
    if positions == 1:
        return [whole_patch(modalities[0])] * len(seeds)
    corners = integers(torch.tensor(seeds), "window", positions, 2).tolist()
    return [GroundWindow(left=column * step, top=row * step, side=side) for column, row in corners]


def pixel_slices(modality: Modality, window: GroundWindow) -> tuple[slice, slice]:
    """Row and column slices of a raster of ``modality`` that ``window`` covers."""
    left, top, side = (round(metres / modality.gsd) for metres in (window.left, window.top, window.side))
    return slice(top, top + side), slice(left, left + side)


def crop(array: np.ndarray, modality: Modality, window: GroundWindow) -> np.ndarray:
    """Crop ``array``, (..., H, W), to ``window``; the result is a view."""
    return array[..., *pixel_slices(modality, window)]
