"""One raster of a patch in memory, its errors, and the GDAL settings under which rasters are read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import rasterio

from bocage.shards.errors import InputError

# Lambert-93 on three realisations of RGF93, which differ by centimetres.
LAMBERT_93 = ("EPSG:2154", "EPSG:9793", "EPSG:9794")


class RasterError(InputError):
    """A raster that is unreadable or contradicts the registry; the message names the file and the value."""


class Raster(NamedTuple):
    """One raster of a patch.

    Attributes:
        array: (C, H, W) for images and labels, (T, C, H, W) for series and masks, in the modality's dtype. Pixels with
            the declared nodata value are NaN in float rasters, and unchanged in integer rasters.
        crs: ``EPSG:2154`` if the file has this code, else WKT; empty if the file has no CRS. Some FLAIR-HUB rasters
            have a local Lambert-93 without a code: compare coordinates, never these strings.
        left: x coordinate of the outer corner of the upper-left pixel, in the CRS.
        top: y coordinate of this corner.
        side: side of the raster, in units of the CRS.
        stored_bytes: bytes of the files that were read.
        has_position: whether the position is known; otherwise the raster takes that of the others of its patch.
    """

    array: np.ndarray
    crs: str
    left: float
    top: float
    side: float
    stored_bytes: int
    has_position: bool = True


def corner_distance(first: Raster, second: Raster) -> float:
    """Largest distance along an axis between the same corners of two rasters of one CRS, in its units."""
    left, top, side = first.left - second.left, first.top - second.top, first.side - second.side
    return max(abs(left), abs(top), abs(left + side), abs(top - side))


def is_integer(dtype: str) -> bool:
    """Whether a dtype of rasterio is that of integers or booleans; NumPy does not know GDAL's ``complex_int16``."""
    return not dtype.startswith("complex") and np.dtype(dtype).kind in "iub"


def gdal_reason(error: Exception) -> str:
    """Why a raster cannot be read, in one line; the cause of a rasterio error holds GDAL's own message."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return " ".join(str(cause).split()) or type(error).__name__


def may_be_same_crs(first: str, second: str) -> bool:
    """Whether two ``Raster.crs`` do not contradict each other: only EPSG codes can, and Lambert-93 has several."""
    codes = {first, second}
    return len(codes) == 1 or codes <= set(LAMBERT_93) or not all(code.startswith("EPSG:") for code in codes)


WHOLE_PNG = {"GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO"}
"""GDAL settings under which a PNG file that is cut off is an error. By default its missing rows are read as 0."""


def gdal_environment() -> rasterio.Env:
    """GDAL settings for reading patches: small cache, one thread, no listing of folders."""
    return rasterio.Env(GDAL_CACHEMAX=64, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_NUM_THREADS=1)
