"""Render stored arrays as pictures: true colour, radar composites, shaded relief, and class colours."""

from __future__ import annotations

import numpy as np

from bocage.shards.classes import ClassScheme
from bocage.shards.modality import Modality

_RED_GREEN_BLUE = (650.0, 550.0, 460.0)  # nm
_TOLERANCE = 60.0  # nm; largest distance of a band from the wavelength of a colour
_STRETCH = (2.0, 98.0)  # percentiles rendered as black and white


def colour_bands(modality: Modality) -> list[int] | None:
    """Indices of the bands nearest to red, green and blue; None for a sensor without these colours."""
    wavelengths = np.array([band.wavelength or np.inf for band in modality.bands])
    distances = [np.abs(wavelengths - wavelength) for wavelength in _RED_GREEN_BLUE]
    if any(distance.min() > _TOLERANCE for distance in distances):
        return None
    return [int(distance.argmin()) for distance in distances]


def has_both_polarisations(modality: Modality) -> bool:
    """Whether the sensor is a radar in decibels with the polarisations VV and VH, shown as VV, VH and VV - VH."""
    quantities = {band.quantity for band in modality.bands}
    return modality.representation == "decibel" and {"backscatter_vv", "backscatter_vh"} <= quantities


def series_composites(frames: np.ndarray, modality: Modality, reference: np.ndarray) -> np.ndarray:
    """Render the dates of one series with a common contrast, so that dates can be compared.

    An optical sensor is rendered in true colour, with one stretch for its three bands. A radar with both polarisations
    is rendered as red VV, green VH, blue VV - VH in decibels, each with its own stretch. Any other sensor is rendered
    in grey from its first channel.

    Args:
        frames: (T, C, H, W) float, values of the representation; NaN for nodata.
        modality: the sensor.
        reference: (T,) bool, dates that determine the contrast; leave cloudy dates out.

    Returns:
        (T, H, W, 3) float in [0, 1]; nodata is black.
    """
    quantities = [band.quantity for band in modality.bands]
    bands = colour_bands(modality)
    stretch_axes: tuple[int, ...] = (0, 2, 3)
    if has_both_polarisations(modality):
        vv, vh = (frames[:, quantities.index(name)] for name in ("backscatter_vv", "backscatter_vh"))
        channels = np.stack((vv, vh, vv - vh), axis=1)
    elif bands is not None:
        channels, stretch_axes = frames[:, bands], (0, 1, 2, 3)
    else:
        channels = frames[:, [0, 0, 0]]
    measured = channels[reference]
    if not np.isfinite(measured).any(axis=stretch_axes).all():
        return np.zeros((len(channels), *channels.shape[2:], 3), np.float32)
    low, high = np.nanpercentile(measured, _STRETCH, axis=stretch_axes, keepdims=True)
    stretched = (channels - low) / np.maximum(high - low, 1e-6)
    return np.nan_to_num(stretched).clip(0.0, 1.0).transpose(0, 2, 3, 1)


def hillshade(heights: np.ndarray, gsd: float) -> np.ndarray:
    """Shaded relief of heights, (H, W) in metres, lit from the north-west at 45 degrees; returns (H, W) in [0, 1]."""
    if min(heights.shape) < 2:
        return np.full(heights.shape, np.sqrt(0.5))  # a single row or column has no slope
    rows, columns = np.gradient(heights, gsd)
    normal = np.stack([-columns, rows, np.ones_like(heights)])  # row numbers increase to the south
    light = np.array([-0.5, 0.5, np.sqrt(0.5)])
    return np.clip(np.tensordot(light, normal, axes=1) / np.linalg.norm(normal, axis=0), 0, 1)


def palette(scheme: ClassScheme) -> np.ndarray:
    """Official colours of the classes, (classes, 3) uint8."""
    return np.array([tuple(bytes.fromhex(colour)) for colour in scheme.colours], np.uint8)
