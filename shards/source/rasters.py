"""Reading one GeoTIFF of a patch with the reader that is fastest for its layout, and checking it against the registry.

Measured: GDAL's cost for a series grows with the square of its dates (35 ms at 91 dates of 10 bands), tifffile reads
the same file in 2 to 7 ms; large images are faster through GDAL (5.4 ms against 7.8 for an aerial image), labels
through tifffile (2.3 against 3.6).
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import rasterio
import tifffile
from rasterio.io import MemoryFile

from bocage.shards.modality import Modality
from bocage.shards.source.raster_source import RasterError, RasterSource

_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # either byte order; the last two are BigTIFF's
_GSD_TOLERANCE = 0.01  # relative
_SMALL = 400_000  # bytes of an array under which opening a file costs more than decoding it
_PROJECTED_CRS, _USER_DEFINED = 3072, 32767  # GeoTIFF key and value (OGC 19-008r4)
_RASTER_TYPE, _PIXEL_IS_POINT = 1025, 2
# Lambert-93 over the realisations of RGF93, which are centimetres apart.
_LAMBERT_93 = ("EPSG:2154", "EPSG:9793", "EPSG:9794")


def gdal_reason(error: Exception) -> str:
    """Why a raster cannot be read, in one line; rasterio's errors point to GDAL's own words, which are their cause."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return " ".join(str(cause).split()) or type(error).__name__


class Raster(NamedTuple):
    """One raster of a patch.

    Attributes:
        array: (C, H, W) for images and labels, (T, C, H, W) for series and masks, in the modality's dtype. Pixels of a
            float raster that have its declared nodata value are NaN; integer rasters are as they are stored.
        crs: ``EPSG:2154`` where the file says so, else WKT; empty when the file has none. Some FLAIR-HUB rasters carry
            a local Lambert-93 without a code: compare coordinates, never these strings.
        left, top: outer corner of the upper-left pixel, in the CRS.
        stored_bytes: size of the GeoTIFF.
    """

    array: np.ndarray
    crs: str
    left: float
    top: float
    stored_bytes: int


def read(source: RasterSource, modality: Modality) -> Raster:
    """The raster of ``modality`` in the file ``source``.

    Raises:
        RasterError: the file cannot be read, blocks of it were never written, its coordinates are those of another
            system than Lambert-93, or its dtype, size, number of bands, pixel size or class values are not those of
            ``modality``.
    """
    content = source.read()
    nbytes = len(modality.bands) * modality.size**2 * np.dtype(modality.dtype).itemsize
    large = modality.role == "image" and nbytes > _SMALL  # labels compress to little: opening costs more
    try:
        _refuse_what_is_no_tiff(content)
        reader = _read_gdal if large else _read_tifffile
        bands, pixel, crs, left, top, nodata = reader(content)
    # tifffile and its codecs raise whatever their parsing meets in a damaged file: ValueError, IndexError, KeyError,
    # struct.error, ZeroDivisionError, codec errors; all of them mean the same here.
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise RasterError(f"{source}: cannot be read: {gdal_reason(error)}") from error
    _check_crs(source, crs)
    _check(source, modality, bands, pixel)
    if not (math.isfinite(left) and math.isfinite(top)):
        raise RasterError(f"{source}: its position ({left}, {top}) is no place")
    if nodata is not None and bands.dtype.kind == "f":
        with np.errstate(over="ignore"):  # a value beyond the dtype is infinity there
            bands = np.where(bands == bands.dtype.type(nodata), bands.dtype.type(np.nan), bands)
    if modality.has_dates:
        bands = bands.reshape(-1, len(modality.bands), modality.size, modality.size)
    return Raster(np.ascontiguousarray(bands), crs, left, top, len(content))


_Read = tuple[np.ndarray, tuple[float, float], str, float, float, float | None]
"""Bands (N, H, W), pixel width and height, CRS, left, top, declared nodata value (GeoTIFF has one for all bands)."""


def _read_gdal(content: bytes) -> _Read:
    with MemoryFile(content) as memory, memory.open() as source:
        pixel, crs, left, top = _georeference(source)
        bands = source.read()
        nodata = source.nodata
        tiled = source.block_shapes[0][1] < source.width
    # GDAL reads blocks that a file lacks as nodata or zeros: a row of zeros is suspect, and so is what cannot be told
    # from rows.
    if tiled or nodata is not None or not bands.any(axis=2).all():
        with tifffile.TiffFile(BytesIO(content)) as file:
            _refuse_holes(file.pages.first)
    return bands, pixel, crs, left, top, nodata


def _georeference(source: Any) -> tuple[tuple[float, float], str, float, float]:
    """Pixel width and height, CRS, left, top of an open dataset of rasterio."""
    transform = source.transform
    if transform.b or transform.d:
        raise ValueError("its grid is turned against north")
    return (transform.a, -transform.e), source.crs.to_string() if source.crs else "", transform.c, transform.f


def _refuse_what_is_no_tiff(content: bytes) -> None:
    """GDAL would say that it needs a driver."""
    if not content:
        raise ValueError("it is empty")
    if not content.startswith(_SIGNATURES):
        raise ValueError(f"it begins with {content[:4]!r}, which is no TIFF")


def _refuse_holes(page: Any) -> None:
    """A writer that was killed may leave blocks without data."""
    if 0 in page.databytecounts:
        raise ValueError("some of its blocks were never written")


def _read_tifffile(content: bytes) -> _Read:
    with tifffile.TiffFile(BytesIO(content)) as file:
        page = file.pages.first
        _refuse_holes(page)
        bands = page.asarray(maxworkers=1)
        if page.axes == "YXS":
            bands = bands.transpose(2, 0, 1)
        elif page.axes == "YX":
            bands = bands[None]
        elif page.axes != "SYX":
            raise ValueError(f"axes {page.axes} are not those of an image")
        declared = page.tags.get("GDAL_NODATA")
        nodata = None if declared is None else float(declared.value)
        scale, tie = page.tags.get("ModelPixelScaleTag"), page.tags.get("ModelTiepointTag")
        directory = page.tags.get("GeoKeyDirectoryTag")
    # Entries of four numbers after a header of four: key, where its value is, count, value.
    entries = zip(*[iter(directory.value[4:])] * 4) if directory is not None else ()
    keys = {key: value for key, place, _, value in entries if place == 0}
    code = keys.get(_PROJECTED_CRS, _USER_DEFINED)
    if scale is None or tie is None or code == _USER_DEFINED:  # the rare ways of saying it are GDAL's to understand
        with MemoryFile(content) as memory, memory.open() as source:
            pixel, crs, left, top = _georeference(source)
        return bands, pixel, crs, left, top, nodata
    width, height, _ = scale.value
    column, row, _, easting, northing, _ = tie.value[:6]
    centre = 0.5 if keys.get(_RASTER_TYPE) == _PIXEL_IS_POINT else 0.0
    left, top = easting - (column + centre) * width, northing + (row + centre) * height
    return bands, (width, height), f"EPSG:{code}", left, top, nodata


def _check_crs(source: RasterSource, crs: str) -> None:
    """A local system, a projected one without a code and none at all may be Lambert-93: positions will tell."""
    if crs.startswith("GEOG") or (crs.startswith("EPSG:") and crs not in _LAMBERT_93):
        named = "geographic coordinates" if crs.startswith("GEOG") else f"coordinates in {crs}"
        raise RasterError(f"{source}: {named}, but patches are in Lambert-93 ({_LAMBERT_93[0]})")


def _check(source: RasterSource, modality: Modality, bands: np.ndarray, pixel: tuple[float, float]) -> None:
    expected, size = len(modality.bands), modality.size
    if bands.dtype != np.dtype(modality.dtype):
        raise RasterError(f"{source}: dtype {bands.dtype}, but {modality.name} is {modality.dtype}")
    if bands.shape[1:] != (size, size):
        height, width = bands.shape[1:]
        raise RasterError(f"{source}: {width} x {height} pixels, but {modality.name} has {size} x {size}")
    count = len(bands)
    if count % expected != 0 if modality.has_dates else count != expected:
        multiple = "a multiple of " if modality.has_dates else ""
        raise RasterError(f"{source}: {count} bands, but {modality.name} has {multiple}{expected}")
    # Not "any is larger": a NaN is larger than nothing.
    if not all(abs(side - modality.gsd) <= _GSD_TOLERANCE * modality.gsd for side in pixel):
        raise RasterError(
            f"{source}: pixels of {pixel[0]:g} x {pixel[1]:g} m, but {modality.name} has {modality.gsd:g} m"
        )
    for band, values in zip(modality.bands, bands):
        if band.scheme is not None and values.max() >= len(band.scheme):
            raise RasterError(
                f"{source}: value {values.max()} in band {band.name}, but {band.scheme.name} has classes 0 to "
                f"{len(band.scheme) - 1}"
            )


def gdal_environment() -> rasterio.Env:
    """The context in which patches are read: little memory, one thread, no listing of folders."""
    return rasterio.Env(GDAL_CACHEMAX=64, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_NUM_THREADS=1)
