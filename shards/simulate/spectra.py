"""Reflectance spectra of the simulated materials, 400-2500 nm.

The shapes resemble public spectral libraries (USGS Spectral Library 7, Kokaly et al. 2017; ECOSTRESS, Meerdink et al.
2019): a red edge and water bands for leaves, iron-red soils, flat asphalt, dark water. The values are our own.
"""

from __future__ import annotations

import numpy as np

_NODES = (400, 450, 490, 550, 600, 650, 680, 705, 740, 783, 850, 1000, 1200, 1450, 1650, 1950, 2200, 2500)

# Reflectance in percent at the nodes.
_SPECTRA: dict[str, tuple[float, ...]] = {
    "crop leaf": (3, 3.5, 4, 8.5, 6, 4.2, 3.8, 10, 32, 42, 45, 45, 41, 16, 26, 9, 13, 7),
    "grass leaf": (3.5, 4.5, 5, 9.5, 8, 6, 5.5, 12, 28, 35, 38, 39, 37, 17, 26, 10, 14, 8),
    "broad leaf": (2.5, 3, 3.5, 6.5, 5, 3.5, 3, 8, 26, 34, 37, 38, 35, 13, 21, 7, 10, 5),
    "needle": (2, 2.5, 2.8, 4.5, 3.6, 2.8, 2.5, 5, 14, 18, 20, 21, 19, 7, 11, 4, 5.5, 3),
    "olive leaf": (5, 6, 6.5, 10, 9.5, 8, 7.5, 12, 22, 26, 28, 30, 29, 15, 22, 10, 13, 8),
    "shrub leaf": (3, 4, 4.5, 7.2, 7, 6, 5.5, 9, 20, 25, 28, 30, 28, 15, 22, 10, 14, 8),
    "straw": (8, 11, 14, 20, 25, 29, 31, 32, 34, 36, 38, 42, 44, 36, 42, 27, 32, 24),
    "dry grass": (6, 8, 10, 15, 19, 22, 23, 25, 28, 30, 32, 35, 37, 30, 36, 23, 28, 20),
    "litter": (3, 4, 5, 7, 9, 10, 11, 12, 14, 16, 18, 21, 24, 20, 25, 17, 20, 14),
    "yellow flower": (4, 5, 7, 26, 30, 26, 22, 26, 38, 44, 46, 46, 42, 20, 30, 12, 17, 10),
    "violet flower": (9, 12, 12, 9, 10, 12, 13, 17, 28, 33, 36, 37, 34, 18, 26, 12, 16, 10),
    "brown soil": (4, 6, 7, 10, 13, 15, 16, 17, 18, 20, 22, 26, 30, 28, 34, 25, 30, 25),
    "chalk soil": (9, 13, 15, 20, 25, 28, 29, 30, 31, 33, 35, 39, 42, 39, 45, 34, 40, 34),
    "red soil": (4, 5, 6, 9, 15, 20, 21, 22, 24, 25, 26, 30, 35, 33, 40, 30, 36, 30),
    "rock": (10, 12, 14, 17, 19, 21, 21, 22, 22, 23, 24, 26, 28, 28, 30, 26, 28, 24),
    "gravel": (13, 16, 18, 22, 25, 27, 28, 28, 29, 30, 31, 33, 35, 33, 36, 31, 34, 29),
    "asphalt": (6, 7, 8, 9, 10, 10.5, 11, 11, 11.5, 12, 12.5, 14, 15, 16, 17, 16, 17, 16),
    "concrete": (16, 19, 21, 24, 26, 27, 28, 28, 28, 29, 29, 30, 31, 29, 31, 27, 29, 25),
    "clay tile": (5, 6, 7, 10, 17, 23, 25, 26, 27, 28, 29, 31, 33, 34, 36, 33, 35, 30),
    "slate": (6, 6.5, 7, 7.5, 7.8, 8, 8, 8.2, 8.5, 9, 9, 10, 11, 11, 12, 12, 13, 12),
    "steel roof": (24, 28, 31, 34, 35, 36, 36, 36, 36, 36, 36, 34, 32, 30, 29, 27, 26, 24),
    "greenhouse": (24, 27, 29, 32, 32, 31, 31, 32, 38, 42, 44, 43, 40, 31, 34, 24, 27, 20),
    "clear water": (3.5, 4, 4, 4.2, 2.8, 1.8, 1.6, 1.4, 1, 0.8, 0.6, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1),
    "turbid water": (4.5, 5.5, 6.5, 9, 8, 6, 5.5, 5, 3, 2.5, 2, 1, 0.4, 0.2, 0.2, 0.1, 0.1, 0.1),
    "pool water": (20, 30, 34, 30, 12, 6, 5, 4, 3, 2, 2, 1, 0.5, 0.3, 0.3, 0.2, 0.2, 0.2),
    "snow": (88, 90, 90, 89, 88, 86, 85, 84, 83, 81, 78, 64, 40, 6, 10, 2, 5, 3),
    "cloud": (66, 68, 68, 68, 68, 68, 68, 68, 68, 68, 68, 66, 62, 44, 50, 30, 38, 30),
}

MATERIALS = tuple(_SPECTRA)
"""Names of the materials, in the order of the rows of ``spectra``."""

_TABLE = np.array([_SPECTRA[name] for name in MATERIALS], dtype=np.float64) / 100.0


def spectra(wavelengths: list[float]) -> np.ndarray:
    """Reflectance of all M materials at W ``wavelengths`` in nm, (M, W) float64 in 0..1; constant beyond the nodes."""
    return np.stack([np.interp(wavelengths, _NODES, row) for row in _TABLE])


def spectrum(material: str, wavelengths: list[float]) -> np.ndarray:
    """Reflectance of one material at W ``wavelengths`` in nm, (W,) float64 in 0..1."""
    return np.interp(wavelengths, _NODES, _TABLE[MATERIALS.index(material)])
