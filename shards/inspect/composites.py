"""Stored arrays to pictures: true colour, radar composites, shaded relief, and the colours of classes."""

from __future__ import annotations

import numpy as np

from bocage.shards.classes import ClassScheme
from bocage.shards.modality import Modality

_RED_GREEN_BLUE = (650.0, 550.0, 460.0)  # nm
_TOLERANCE = 60.0  # nm: further off, a band does not pass for a colour
_STRETCH = (2.0, 98.0)  # percentiles shown as black and white


def colour_bands(modality: Modality) -> list[int] | None:
    """Indices of the bands nearest to red, green and blue, or None for a sensor that does not see these colours."""
    wavelengths = np.array([band.wavelength or np.inf for band in modality.bands])
    distances = [np.abs(wavelengths - wanted) for wanted in _RED_GREEN_BLUE]
    if any(distance.min() > _TOLERANCE for distance in distances):
        return None
    return [int(distance.argmin()) for distance in distances]


def date_pictures(frames: np.ndarray, modality: Modality, reference: np.ndarray) -> np.ndarray:
    """Pictures of the dates of one series, with one contrast for all, so that dates can be compared.

    An optical sensor is shown in true colour with one stretch for its three bands; a radar with both polarisations as
    red VV, green VH, blue VV - VH in decibels, stretched one by one; any other sensor by its first channel in grey.

    Args:
        frames: (T, C, H, W) float, values of the representation; NaN in holes.
        modality: the sensor.
        reference: (T,) bool, dates that set the contrast: cloudy ones should not.

    Returns:
        (T, H, W, 3) float in [0, 1]; holes are black.
    """
    quantities = [band.quantity for band in modality.bands]
    bands = colour_bands(modality)
    together: tuple[int, ...] = (0, 2, 3)  # axes over which the stretch is taken
    if modality.representation == "decibel" and {"backscatter_vv", "backscatter_vh"} <= set(quantities):
        vv, vh = (frames[:, quantities.index(name)] for name in ("backscatter_vv", "backscatter_vh"))
        shown = np.stack((vv, vh, vv - vh), axis=1)
    elif bands is not None:
        shown, together = frames[:, bands], (0, 1, 2, 3)
    else:
        shown = frames[:, [0, 0, 0]]
    measured = shown[reference]
    if not np.isfinite(measured).any(axis=together).all():
        return np.zeros((len(shown), *shown.shape[2:], 3), np.float32)
    low, high = np.nanpercentile(measured, _STRETCH, axis=together, keepdims=True)
    stretched = (shown - low) / np.maximum(high - low, 1e-6)
    return np.nan_to_num(stretched).clip(0.0, 1.0).transpose(0, 2, 3, 1)


def hillshade(heights: np.ndarray, gsd: float) -> np.ndarray:
    """Shaded relief in 0..1 of (H, W) heights in metres, light from the north-west at 45 degrees."""
    rows, columns = np.gradient(heights, gsd)
    normal = np.stack([-columns, rows, np.ones_like(heights)])  # rows grow to the south
    light = np.array([-0.5, 0.5, np.sqrt(0.5)])
    return np.clip(np.tensordot(light, normal, axes=1) / np.linalg.norm(normal, axis=0), 0, 1)


def palette(scheme: ClassScheme) -> np.ndarray:
    """(classes, 3) uint8, the official colours."""
    return np.array([tuple(bytes.fromhex(colour)) for colour in scheme.colours], np.uint8)
