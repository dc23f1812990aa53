"""Write GeoTIFFs in Lambert-93, and GeoPackages with one row per patch."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyogrio
import tifffile

from bocage.shards.files import atomic_write
from bocage.shards.simulate.ground import PATCH_SIZE

CRS = "EPSG:2154"
"""Projection of all rasters: Lambert-93."""

_CITATION = "RGF93 v1 / Lambert-93|"
_STRIP_BYTES = 16_384


def _geokeys(code: int) -> tuple[int, ...]:
    """GeoKeyDirectory tag (GeoTIFF 1.1) of a projected coordinate system in metres."""
    keys = ((1024, 0, 1, 1), (1025, 0, 1, 1), (1026, 34737, len(_CITATION), 0), (3072, 0, 1, code), (3076, 0, 1, 9001))
    return (1, 1, 0, len(keys), *(number for key in keys for number in key))


def write_raster(path: Path, bands: np.ndarray, gsd: float, left: float, top: float) -> None:
    """Write a GeoTIFF.

    Args:
        path: path of the file, which is written atomically.
        bands: values, (bands, H, W); stored interleaved by pixel (GDAL's default) with LZW compression.
        gsd: pixel size, in metres.
        left: Lambert-93 x of the upper-left corner, in metres.
        top: Lambert-93 y of the upper-left corner, in metres.
    """
    count, height, width = bands.shape
    pixels = np.ascontiguousarray(np.moveaxis(bands, 0, -1)) if count > 1 else bands[0]
    keys = _geokeys(int(CRS.removeprefix("EPSG:")))
    tags = [
        (33550, "d", 3, (gsd, gsd, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, left, top, 0.0), True),
        (34735, "H", len(keys), keys, True),
        (34737, "s", 0, _CITATION, True),
    ]
    row_bytes = width * count * bands.itemsize
    with atomic_write(path) as temporary:
        tifffile.imwrite(
            temporary,
            pixels,
            photometric="minisblack",
            planarconfig="contig" if count > 1 else None,
            extrasamples=(0,) * (count - 1) if count > 1 else None,
            compression="lzw",
            rowsperstrip=min(height, max(1, _STRIP_BYTES // row_bytes)),
            extratags=tags,
            metadata=None,
            software=False,
            maxworkers=1,
        )


def _outline_wkb(left: float, top: float) -> bytes:
    """Outline of a patch as well-known binary (WKB)."""
    right, bottom = left + PATCH_SIZE, top - PATCH_SIZE
    ring = (left, top, right, top, right, bottom, left, bottom, left, top)
    return struct.pack("<BIII10d", 1, 3, 1, 5, *ring)


def write_table(path: Path, corners: Sequence[tuple[float, float]], columns: dict[str, Sequence[str]]) -> None:
    """Write a GeoPackage with text columns and patch outlines into its default layer.

    Args:
        path: path of the file, which is written atomically.
        corners: (left, top) of every patch, in Lambert-93 metres.
        columns: text values by column name, in the order of ``corners``.
    """
    geometry = np.array([_outline_wkb(*corner) for corner in corners], dtype=object)
    content = io.BytesIO()
    pyogrio.raw.write(
        content,
        geometry,
        [np.array(values, dtype=object) for values in columns.values()],
        np.array(list(columns), dtype=object),
        driver="GPKG",
        layer=path.stem,
        geometry_type="Polygon",
        crs=CRS,
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())
