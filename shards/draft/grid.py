"""Choose the kind of a dataset of rasters, the size of its patches, and the pixels of its sensors and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bocage.shards.draft.names import FileGroup
from bocage.shards.draft.survey import RasterHeader, Survey
from bocage.shards.draft.yaml import Draft, Keys
from bocage.shards.errors import counted

_MAX_TILE = 1024  # pixels; larger files are cut into patches
_PATCH, _SMALLEST_PATCH = 512, 64  # pixels of a patch that is cut from rasters
_DEFAULT_TOLERANCE = 0.01
_MIXED = 0.3  # relative difference of pixels above which a sensor seems to have several resolutions
_OVERLAP = 0.2  # fraction of its side by which a raster may overlap another one of the same mosaic
_MAX_SHOWN = 5


@dataclass
class DraftItem:
    """Files of one sensor or label.

    Attributes:
        group: the files.
        found: headers of a sample of them.
        header: a usual header.
        name: name of the sensor or label.
    """

    group: FileGroup
    found: Survey
    header: RasterHeader
    name: str = ""


@dataclass(frozen=True)
class DraftGrid:
    """Size of the patches, and pixels of the sensors and labels.

    Attributes:
        is_tiled: whether every file is a patch.
        patch_pixels: side of a patch in pixels of the first sensor.
        side: side of a patch on the ground, in metres.
        pixels: side of a pixel on the ground in metres, by sensor and label.
        is_mosaic: whether the rasters of a site lie beside each other, so that patches may cross their edges.
    """

    is_tiled: bool
    patch_pixels: int
    side: float
    pixels: dict[str, float]
    is_mosaic: bool


def are_tiles(items: Sequence[DraftItem]) -> bool:
    """Whether the sampled files of each sensor and label are squares of one size that suits a patch."""
    sizes = [item.found.values(lambda header: (header.width, header.height)) for item in items]
    return all(len(counts) == 1 and all(wide == high <= _MAX_TILE for wide, high in counts) for counts in sizes)


def choose_grid(draft: Draft, items: Sequence[DraftItem]) -> DraftGrid:
    """Choose the grid from headers; what does not fit becomes a note of the draft.

    Args:
        draft: the draft.
        items: sensors, the finest first, then labels.
    """
    finest = items[0]
    is_tiled = are_tiles(items)
    pixels = {item.name: _measured_pixel(item, finest) for item in items}
    if is_tiled:
        patch_pixels = finest.header.width
    else:
        sides = sorted(min(header.width, header.height) for header in finest.found.headers.values())
        patch_pixels = _common_patch(sides[len(sides) // 2], list(pixels.values()))
        counts = finest.found.values(lambda header: (header.width, header.height))
        shown = ", ".join(f"{width} x {height}" for (width, height), _ in counts.most_common(_MAX_SHOWN))
        more = f" and {counted(len(counts) - _MAX_SHOWN, 'more size')}" if len(counts) > _MAX_SHOWN else ""
        draft.comments[("kind",)] = f"files of {shown}{more} px are cut into patches"
    side = patch_pixels * pixels[finest.name]
    for item in items:
        size = item.header.width if is_tiled else max(1, round(side / pixels[item.name]))
        exact = side / size
        if abs(exact / pixels[item.name] - 1) > _MIXED:
            draft.notes.append(
                f"{item.name}: {size} pixels of {pixels[item.name]:g} m do not make {side:g} m, the side of a patch"
            )
        elif not math.isclose(exact, pixels[item.name]):
            pixels[item.name] = float(f"{exact:.8g}")
    return DraftGrid(is_tiled, patch_pixels, side, pixels, not is_tiled and _is_mosaic(finest.found))


def describe_pixel(draft: Draft, item: DraftItem, pixel: float, keys: Keys) -> dict[str, Any]:
    """The keys ``pixel`` and, if the files need it, ``pixel_tolerance``.

    Args:
        draft: the draft, which gets a comment.
        item: the sensor or label.
        pixel: chosen side of a pixel, in metres.
        keys: keys of the sensor or label, for the comment.
    """
    values: dict[str, Any] = {"pixel": pixel}
    found = item.found.pixels
    if not found:
        draft.comments[(*keys, "pixel")] = "metres; the files have no position"
        return values
    needed = max(abs(found[0] - pixel), abs(found[-1] - pixel)) / pixel
    if needed > 0.4 * _DEFAULT_TOLERANCE:
        values["pixel_tolerance"] = min(0.99, math.ceil(100 * (1.25 * needed + 0.005)) / 100)
        draft.comments[(*keys, "pixel")] = f"{found[0]:.4g} to {found[-1]:.4g} m on the ground"
    if needed > _MIXED:
        draft.notes.append(
            f"{item.name}: pixels of {found[0]:.3g} to {found[-1]:.3g} m; describe each resolution as a sensor"
        )
    return values


def describe_position(draft: Draft, items: Sequence[DraftItem], pixel_keys: Sequence[str]) -> None:
    """Add the key ``crs`` if files lack it, and notes on positions that cannot be used.

    Args:
        draft: the draft.
        items: sensors.
        pixel_keys: keys ``pixel`` of sensors and labels.
    """
    headers = [header for item in items for header in item.found.headers.values()]
    draft.notes += sorted({header.problem for header in headers if header.problem})
    if all(header.pixel is None for header in headers):
        if not any(header.problem for header in headers):
            draft.notes.append(
                f"the files have no position; set {' and '.join(pixel_keys)} to the side of a pixel on the ground, in "
                "metres"
            )
    elif any(header.pixel is not None and not header.crs for header in headers):
        draft.values["crs"] = ""
        draft.comments[("crs",)] = "coordinate system of the files, such as EPSG:32631"
        draft.notes.append("files name no coordinate system; set crs")
    if systems := sorted({header.crs for header in headers if header.crs}):
        more = ", ..." if len(systems) > _MAX_SHOWN else ""
        draft.comments[("sensors",)] = f"files are in {', '.join(systems[:_MAX_SHOWN])}{more}"


def _measured_pixel(item: DraftItem, finest: DraftItem) -> float:
    """Pixel on the ground: the middle of the range, rounded if that changes little."""
    found = item.found.pixels
    if not found:  # without a position all rasters show the same ground
        return _measured_pixel(finest, finest) * finest.header.width / item.header.width if item is not finest else 1.0
    middle = (found[0] + found[-1]) / 2
    accepted = max(0.002, (found[-1] / middle - 1) / 5)
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 7))
    return next((value for value in rounded if abs(value / middle - 1) <= accepted), middle)


def _common_patch(largest: float, pixels: Sequence[float]) -> int:
    """Side of a patch in the first of ``pixels``, at most ``largest``, that is whole pixels of all."""
    most = min(_PATCH, max(_SMALLEST_PATCH, int(largest)))
    for step in (32, 16, 8, 4, 1):
        for count in range(most // step * step, 0, -step):
            counts = [count * pixels[0] / pixel for pixel in pixels]
            if all(round(count) >= 1 and abs(count - round(count)) < 0.005 for count in counts):
                return count
    return most


def _is_mosaic(found: Survey) -> bool:
    """Whether the sampled rasters have positions and hardly overlap others of their folder."""
    boxes: list[tuple[tuple[str, str], float, float, float, float]] = []
    for path, header in found.headers.items():
        if header.centre is None or header.pixel is None or not header.crs:
            return False
        (x, y), half = header.centre, header.pixel / 2
        box = (x - half * header.width, x + half * header.width, y - half * header.height, y + half * header.height)
        boxes.append(((header.crs, path.rpartition("/")[0]), *box))
    boxes.sort()
    for index, (site, left, right, bottom, top) in enumerate(boxes):
        for other_site, other_left, other_right, other_bottom, other_top in boxes[index + 1 :]:
            if other_site != site or other_left >= right:
                break
            across = min(right, other_right) - other_left
            along = min(top, other_top) - max(bottom, other_bottom)
            smallest = min(right - left, top - bottom, other_right - other_left, other_top - other_bottom)
            if min(across, along) > _OVERLAP * smallest:
                return False
    return True
