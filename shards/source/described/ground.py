"""Coordinate systems and grids of rasters, and ground distances in any projected coordinate system."""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache

import rasterio
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.warp import transform

from bocage.shards.errors import InputError

_STEP = 1000.0  # side, in metres of the CRS, over which the scale of a projection is measured
_CACHE_GRID = 5000.0  # metres; the scale of a projection hardly changes within such a cell
# WGS 84 (NIMA TR8350.2): semi-major axis in metres, and squared eccentricity.
_SEMI_MAJOR, _ECCENTRICITY_2 = 6_378_137.0, 6.694379990141e-3


@lru_cache(maxsize=64)
def parse_crs(text: str) -> CRS:
    """Coordinate reference system from an EPSG code or WKT.

    Raises:
        InputError: the text names no coordinate reference system.
    """
    try:
        with rasterio.Env():
            return CRS.from_user_input(text)
    except (CRSError, ValueError) as error:
        raise InputError(f"crs {text!r}: not a coordinate reference system; give a code such as EPSG:32631") from error


@lru_cache(maxsize=256)
def horizontal_crs(text: str) -> str:
    """Coordinate system without that of the heights, as an EPSG code if it has one, else WKT; empty for an empty text.

    Raises:
        InputError: the text names no coordinate reference system.
    """
    if not text:
        return ""
    system = parse_crs(text)
    content = system.to_dict(projjson=True)
    if content.get("type") == "CompoundCRS":
        system = parse_crs(json.dumps(content["components"][0]))
    return system.to_string()


@lru_cache(maxsize=256)
def same_crs(first: str, second: str) -> bool:
    """Whether two coordinate systems are the same; the texts may differ."""
    return first == second or bool(first and second and parse_crs(first) == parse_crs(second))


def crs_name(text: str) -> str:
    """Short name of a coordinate system: its code, such as ``EPSG:2154``, or a hash of its WKT; empty for none."""
    return text if text.startswith("EPSG:") or not text else f"crs-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def explain_rotation(transform: Affine) -> str:
    """Why the rows of a grid do not run from west to east, the first in the north; empty if they do."""
    if transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
        return "its grid is rotated or flipped against north: rewrite it, e.g. with gdalwarp"
    return ""


def explain_pixels(transform: Affine) -> str:
    """Why the grid of a raster cannot be used: it is rotated, or its pixels are not square; empty if it can."""
    if not (problem := explain_rotation(transform)) and not math.isclose(transform.a, -transform.e, rel_tol=1e-3):
        return f"pixels of {transform.a:g} x {-transform.e:g} are not square: rewrite it, e.g. with gdalwarp"
    return problem


def metres_per_unit(crs: str, x: float, y: float) -> float:
    """Ground metres per unit of a projected CRS near a point: 1 for UTM, cos(latitude) for web maps (EPSG:3857).

    Args:
        crs: EPSG code or WKT of a projected system.
        x, y: coordinates of the point, in the CRS.

    Raises:
        InputError: the CRS is unknown or has no projection, or the point is outside its area.
    """
    unit = parse_crs(crs)
    if not (unit.is_projected or unit.is_geographic):
        raise InputError(
            f"coordinates in {crs}, not a projected coordinate system: set one, e.g. with gdal_edit.py -a_srs, or "
            "reproject, e.g. with gdalwarp -t_srs"
        )
    if not unit.is_projected:
        raise InputError(f"coordinates in degrees ({crs}): reproject, e.g. with gdalwarp -t_srs {utm_crs(x, y)}")
    cell = _CACHE_GRID / unit.linear_units_factor[1]
    # The scale at the centre of a cell serves the whole cell.
    return _scale(crs, (math.floor(x / cell) + 0.5) * cell, (math.floor(y / cell) + 0.5) * cell)


@lru_cache(maxsize=4096)
def _scale(crs: str, x: float, y: float) -> float:
    step = _STEP / parse_crs(crs).linear_units_factor[1]
    longitudes, latitudes = transform(parse_crs(crs), CRS.from_epsg(4326), [x, x + step, x], [y, y, y + step])
    if not all(map(math.isfinite, (*longitudes, *latitudes))):
        raise InputError(f"coordinates ({x:.0f}, {y:.0f}) are outside the area of {crs}")
    latitude = math.radians(latitudes[0])
    curvature = 1.0 - _ECCENTRICITY_2 * math.sin(latitude) ** 2
    meridian = _SEMI_MAJOR * (1.0 - _ECCENTRICITY_2) / curvature**1.5
    parallel = _SEMI_MAJOR / math.sqrt(curvature) * math.cos(latitude)

    def distance(index: int) -> float:
        east = math.radians(longitudes[index] - longitudes[0]) * parallel
        north = math.radians(latitudes[index] - latitudes[0]) * meridian
        return math.hypot(east, north)

    return math.sqrt(distance(1) * distance(2)) / step


def ground_block(crs: str, x: float, y: float, scale: float, side: float) -> str:
    """Name of the ground block of a point: CRS, and column and row counted from its origin, such as ``32631_12_-3``.

    Args:
        crs: EPSG code or WKT; empty if unknown.
        x, y: coordinates of the point, in the CRS.
        scale: ground metres per unit of the CRS.
        side: side of a block, in metres.
    """
    block = f"{math.floor(x * scale / side)}_{math.floor(y * scale / side)}"
    return f"{crs_name(crs).removeprefix('EPSG:')}_{block}" if crs else block


def utm_crs(longitude: float, latitude: float) -> str:
    """EPSG code of the UTM zone of a point, given in degrees."""
    zone = min(60, max(1, math.floor((longitude + 180.0) / 6.0) + 1))
    return f"EPSG:{(32600 if latitude >= 0 else 32700) + zone}"
