"""Read one GeoTIFF of a patch, from a file or a zip, and check it against the registry.

The reader depends on the modality, because measured times differ. For a series, GDAL's time grows with the square of
the number of dates: 35 ms for 91 dates of 10 bands, where tifffile takes 2 to 7 ms. Large images are faster with GDAL
(5.4 ms against 7.8 ms for an aerial image), labels with tifffile (2.3 ms against 3.6 ms).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from rasterio.io import MemoryFile

from bocage.shards.errors import counted
from bocage.shards.modality import Modality
from bocage.shards.source.flair_hub import zips
from bocage.shards.source.raster import LAMBERT_93, Raster, RasterError, gdal_reason

_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF and BigTIFF, in either byte order
_GSD_TOLERANCE = 0.01  # relative
_SMALL = 400_000  # bytes of an array below which opening a file takes longer than decoding it
_PROJECTED_CRS, _USER_DEFINED = 3072, 32767  # GeoTIFF key and value (OGC 19-008r4)
_RASTER_TYPE, _PIXEL_IS_POINT = 1025, 2


@dataclass(frozen=True)
class RasterSource:
    """File of one raster; ``str()`` gives its name for messages.

    Attributes:
        path: path of the GeoTIFF, or of the zip that holds it.
        member: member of the zip; None if ``path`` is the GeoTIFF.
    """

    path: Path
    member: zips.ZipMember | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member.name.decode('utf-8', 'replace')}"

    @property
    def container(self) -> Path:
        """Folder of the GeoTIFF, or the zip that holds it."""
        return self.path.parent if self.member is None else self.path

    def read_raster(self, modality: Modality) -> Raster:
        """Read the raster, see ``read_raster``.

        Raises:
            RasterError: the raster cannot be read, or contradicts ``modality``.
        """
        return read_raster(self, modality)

    def read(self) -> bytes:
        """Read the bytes of the GeoTIFF.

        Raises:
            RasterError: the file or the zip cannot be read, or the zip is refused.
        """
        try:
            return self.path.read_bytes() if self.member is None else zips.read(self.path, self.member)
        except zips.ZipError as error:
            raise RasterError(str(error)) from error
        except OSError as error:
            raise RasterError(f"{self}: cannot be read: {error.strerror}") from error


def read_raster(source: RasterSource, modality: Modality) -> Raster:
    """Read the raster of ``modality`` from ``source``.

    Raises:
        RasterError: the file cannot be read, some blocks were never written, its CRS is not Lambert-93, or its dtype,
            size, number of bands, pixel size or class values contradict ``modality``.
    """
    content = source.read()
    nbytes = len(modality.bands) * modality.size**2 * np.dtype(modality.dtype).itemsize
    is_large = modality.role == "image" and nbytes > _SMALL  # opening dominates for labels, which compress well
    try:
        _check_signature(content)
        reader = _read_gdal if is_large else _read_tifffile
        bands, pixel, crs, left, top, nodata = reader(content)
    # For a damaged file, tifffile and its codecs raise ValueError, IndexError, KeyError, struct.error,
    # ZeroDivisionError or codec errors.
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise RasterError(f"{source}: cannot be read: {gdal_reason(error)}") from error
    _check_crs(source, crs)
    _check_bands(source, modality, bands, pixel)
    if not (math.isfinite(left) and math.isfinite(top)):
        raise RasterError(f"{source}: its position ({left}, {top}) is not finite")
    if nodata is not None and bands.dtype.kind == "f":
        with np.errstate(over="ignore"):  # a nodata value beyond the dtype becomes infinity
            bands = np.where(bands == bands.dtype.type(nodata), bands.dtype.type(np.nan), bands)
    if modality.has_time_axis:
        bands = bands.reshape(-1, len(modality.bands), modality.size, modality.size)
    return Raster(np.ascontiguousarray(bands), crs, left, top, modality.patch_size, len(content))


_Read = tuple[np.ndarray, tuple[float, float], str, float, float, float | None]
"""Bands (N, H, W), pixel width and height, CRS, left, top, declared nodata value (one for all bands in a GeoTIFF)."""


def _read_gdal(content: bytes) -> _Read:
    with MemoryFile(content) as memory, memory.open() as source:
        pixel, crs, left, top = _georeference(source)
        bands = source.read()
        nodata = source.nodata
        is_tiled = source.block_shapes[0][1] < source.width
    # GDAL reads missing blocks as nodata or zeros. Without nodata and tiles, a missing block shows as rows of zeros.
    # Files with nodata or tiles are always checked.
    if is_tiled or nodata is not None or not bands.any(axis=2).all():
        with tifffile.TiffFile(BytesIO(content)) as file:
            _check_blocks(file.pages.first)
    return bands, pixel, crs, left, top, nodata


def _georeference(source: Any) -> tuple[tuple[float, float], str, float, float]:
    """Pixel width and height, CRS, left and top of an open rasterio dataset."""
    transform = source.transform
    if transform.b or transform.d:
        raise ValueError("its grid is rotated against north")
    return (transform.a, -transform.e), source.crs.to_string() if source.crs else "", transform.c, transform.f


def _check_signature(content: bytes) -> None:
    """Check that the content is a TIFF, because GDAL's own error would only mention a missing driver."""
    if not content:
        raise ValueError("it is empty")
    if not content.startswith(_SIGNATURES):
        raise ValueError(f"it begins with {content[:4]!r}, so it is no TIFF")


def _check_blocks(page: Any) -> None:
    """Check that every block has data; a killed writer may leave some without."""
    if 0 in page.databytecounts:
        raise ValueError("some of its blocks were never written")


def _read_tifffile(content: bytes) -> _Read:
    with tifffile.TiffFile(BytesIO(content)) as file:
        page = file.pages.first
        _check_blocks(page)
        bands = page.asarray(maxworkers=1)
        if page.axes == "YXS":
            bands = bands.transpose(2, 0, 1)
        elif page.axes == "YX":
            bands = bands[None]
        elif page.axes != "SYX":
            raise ValueError(f"its axes {page.axes} are not those of an image")
        declared = page.tags.get("GDAL_NODATA")
        nodata = None if declared is None else float(declared.value)
        scale, tie = page.tags.get("ModelPixelScaleTag"), page.tags.get("ModelTiepointTag")
        directory = page.tags.get("GeoKeyDirectoryTag")
    # Four numbers of header, then entries of four numbers: key, location of the value, count, value.
    entries = zip(*[iter(directory.value[4:])] * 4) if directory is not None else ()
    keys = {key: value for key, location, _, value in entries if location == 0}
    code = keys.get(_PROJECTED_CRS, _USER_DEFINED)
    if scale is None or tie is None or code == _USER_DEFINED:  # leave rare encodings to GDAL
        with MemoryFile(content) as memory, memory.open() as source:
            pixel, crs, left, top = _georeference(source)
        return bands, pixel, crs, left, top, nodata
    width, height, _ = scale.value
    column, row, _, easting, northing, _ = tie.value[:6]
    half_pixel = 0.5 if keys.get(_RASTER_TYPE) == _PIXEL_IS_POINT else 0.0
    left, top = easting - (column + half_pixel) * width, northing + (row + half_pixel) * height
    return bands, (width, height), f"EPSG:{code}", left, top, nodata


def _check_crs(source: RasterSource, crs: str) -> None:
    """Refuse other systems than Lambert-93; accept local systems and files without a code, which may be Lambert-93."""
    if crs.startswith("GEOG") or (crs.startswith("EPSG:") and crs not in LAMBERT_93):
        description = "geographic coordinates" if crs.startswith("GEOG") else f"coordinates in {crs}"
        raise RasterError(f"{source}: {description}, but patches are in Lambert-93 ({LAMBERT_93[0]})")


def _check_bands(source: RasterSource, modality: Modality, bands: np.ndarray, pixel: tuple[float, float]) -> None:
    expected, size = len(modality.bands), modality.size
    if bands.dtype != np.dtype(modality.dtype):
        raise RasterError(f"{source}: dtype {bands.dtype}, but {modality.name} is {modality.dtype}")
    if bands.shape[1:] != (size, size):
        height, width = bands.shape[1:]
        raise RasterError(f"{source}: {width} x {height} pixels, but {modality.name} has {size} x {size}")
    count = len(bands)
    if count % expected != 0 if modality.has_time_axis else count != expected:
        multiple = "a multiple of " if modality.has_time_axis else ""
        raise RasterError(f"{source}: {counted(count, 'band')}, but {modality.name} has {multiple}{expected}")
    # Test with "all are close", because NaN compares as False.
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
