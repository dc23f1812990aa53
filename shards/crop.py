"""Ground windows that are whole pixels in every modality, and the pixels they cover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bocage.shards.batch import GroundWindow
from bocage.shards.draws import integers
from bocage.shards.errors import InputError
from bocage.shards.modality import PATCH_SIZE, Modality

WHOLE_PATCH = GroundWindow(left=0.0, top=0.0, side=PATCH_SIZE)


def lattice(modalities: Iterable[Modality]) -> float:
    """The smallest step, in metres, that is a whole number of pixels in every modality.

    0.2 m imagery alone gives 0.2 m; with SPOT it is 1.6 m; with the 10.24 m Sentinel series it is 51.2 m.
    """
    return math.lcm(*(round(modality.gsd * 1000) for modality in modalities)) / 1000


def check_side(side: float, modalities: Iterable[Modality]) -> None:
    """Raise ``InputError`` unless a window of ``side`` metres can be cut from every modality without resampling."""
    step = round(lattice(modalities) * 1000)
    sides = [count * step / 1000 for count in range(1, round(PATCH_SIZE * 1000) // step + 1)]
    if not any(math.isclose(side, valid, abs_tol=1e-6) for valid in sides):
        shown = ", ".join(f"{valid:g}" for valid in (sides if len(sides) <= 6 else [*sides[:2], *sides[-2:]]))
        raise InputError(
            f"window={side:g}: not a whole number of pixels in every modality; valid sides for these modalities are "
            f"multiples of {step / 1000:g} m up to {PATCH_SIZE:g} m ({shown})"
        )


def draw_windows(seeds: Sequence[int], side: float, step: float) -> list[GroundWindow]:
    """The windows of ``side`` metres that the samples with these seeds see, on the lattice of ``step`` metres."""
    if math.isclose(side, PATCH_SIZE):
        return [WHOLE_PATCH] * len(seeds)
    positions = round((PATCH_SIZE - side) / step) + 1
    drawn = integers(torch.tensor(seeds), "window", positions, 2).tolist()
    return [GroundWindow(left=column * step, top=row * step, side=side) for column, row in drawn]


def pixels(modality: Modality, window: GroundWindow) -> tuple[slice, slice]:
    """Rows and columns of a raster of ``modality`` under ``window``."""
    left, top, side = (round(metres / modality.gsd) for metres in (window.left, window.top, window.side))
    return slice(top, top + side), slice(left, left + side)


def crop(array: np.ndarray, modality: Modality, window: GroundWindow) -> np.ndarray:
    """The pixels of ``array`` (..., H, W) under ``window``; a view."""
    return array[..., *pixels(modality, window)]
