"""Read headers and contents of a sample of rasters, to draft a description of their dataset."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import rasterio
from rasterio.errors import RasterioError
from rasterio.windows import Window

from bocage.shards.errors import InputError
from bocage.shards.source.described.ground import explain_pixels, metres_per_unit, parse_crs
from bocage.shards.source.described.rasters import open_raster, sidecar_environment
from bocage.shards.source.raster import RasterError, is_integer

HEADERS = 200
"""Files of a sensor or label whose headers are read, about."""

_IMAGES, _LABELS = 20, 200  # files whose values are read
_MAX_VALUES = 256  # distinct values of labels that are counted; more are no classes
_WINDOW = 512  # pixels; larger rasters are read in their corners and centre
_DEGREE = 111_320.0  # metres, at the equator

Item = TypeVar("Item")


@dataclass(frozen=True)
class RasterHeader:
    """Header of a raster.

    Attributes:
        width, height: size in pixels.
        dtypes: dtype of each band.
        crs: coordinate system; empty if the file has none.
        pixel: side of a pixel on the ground, in metres; None without a position.
        centre: ground coordinates of the centre, in metres; None without a position.
        nodata: value that the file declares as nodata.
        colours: colour interpretation of each band, such as ``red``.
        descriptions: description of each band; empty texts if it has none.
        problem: why the position cannot be used; empty if it can.
    """

    width: int
    height: int
    dtypes: tuple[str, ...]
    crs: str
    pixel: float | None
    centre: tuple[float, float] | None
    nodata: float | None
    colours: tuple[str, ...]
    descriptions: tuple[str, ...]
    problem: str = ""

    @property
    def bands(self) -> int:
        """Number of bands."""
        return len(self.dtypes)


@dataclass(frozen=True)
class ImageValues:
    """Values of a sample of images.

    Attributes:
        files: number of files that were read.
        lowest, highest: finite range of each band, without the declared nodata value; NaN for a band without values.
        nan: number of files with NaN.
        infinite: number of files with infinite values.
        few: distinct values of each band if they are at most two, else None; for alpha bands.
    """

    files: int
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    nan: int
    infinite: int
    few: tuple[frozenset[float] | None, ...]


@dataclass(frozen=True)
class LabelValues:
    """Values of a sample of label rasters.

    Attributes:
        files: number of files that were read.
        pixels: pixels of each value in band 1; empty if there are more values than classes can be.
        examples: first file with each value.
    """

    files: int
    pixels: dict[int, int]
    examples: dict[int, str]

    def share(self, value: int) -> float:
        """Fraction of the pixels that have a value."""
        return self.pixels.get(value, 0) / max(sum(self.pixels.values()), 1)


@dataclass(frozen=True)
class Survey:
    """Headers of a sample of the files of a sensor or label.

    Attributes:
        root: source folder.
        paths: all files, relative to it.
        headers: headers that could be read, by path.
        unreadable: message for each file that could not.
    """

    root: Path
    paths: tuple[str, ...]
    headers: dict[str, RasterHeader]
    unreadable: tuple[str, ...]

    def values(self, get: Callable[[RasterHeader], Item]) -> Counter[Item]:
        """Number of headers with each value."""
        return Counter(get(header) for header in self.headers.values())

    def usual(self, get: Callable[[RasterHeader], Item]) -> Item:
        """The most frequent value."""
        return self.values(get).most_common(1)[0][0]

    @property
    def pixels(self) -> list[float]:
        """Sides of the pixels on the ground, in metres, sorted."""
        return sorted(header.pixel for header in self.headers.values() if header.pixel is not None)


def sample_evenly(paths: Sequence[str], count: int) -> list[str]:
    """About ``count`` paths, evenly spaced, with some of every folder if there are fewer folders than ``count``."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    if len(folders) > count:
        return _spread(paths, count)
    each = math.ceil(count / len(folders))
    return sorted(path for folder in folders.values() for path in _spread(folder, each))


def _spread(items: Sequence[str], count: int) -> list[str]:
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))
    return [items[place] for place in places]


def survey(root: Path, paths: Sequence[str]) -> Survey:
    """Read the headers of a sample of files.

    Args:
        root: source folder.
        paths: paths relative to it.
    """
    headers, unreadable = {}, []
    for path in sample_evenly(paths, HEADERS):
        try:
            headers[path] = read_header(root / path)
        except RasterError as error:
            unreadable.append(str(error))
    return Survey(root, tuple(paths), headers, tuple(unreadable))


def read_header(path: Path) -> RasterHeader:
    """Read the header of a raster, and of the world file beside it.

    Raises:
        RasterError: the file cannot be opened.
    """
    with sidecar_environment(), open_raster(path) as file:
        crs = file.crs.to_string() if file.crs else ""
        pixel, centre, problem = _position(file, crs)
        return RasterHeader(
            width=file.width,
            height=file.height,
            dtypes=tuple(file.dtypes),
            crs=crs,
            pixel=pixel,
            centre=centre,
            nodata=file.nodata,
            colours=tuple(colour.name for colour in file.colorinterp),
            descriptions=tuple(text or "" for text in file.descriptions),
            problem=problem,
        )


def _position(file: rasterio.DatasetReader, crs: str) -> tuple[float | None, tuple[float, float] | None, str]:
    """Pixel and centre on the ground, and why they cannot be used."""
    transform = file.transform
    if transform.is_identity:
        return None, None, ""
    if problem := explain_pixels(transform):
        return None, None, problem
    x, y = transform.c + transform.a * file.width / 2, transform.f + transform.e * file.height / 2
    if crs and parse_crs(crs).is_geographic:
        problem = "coordinates are in degrees: reproject the files, e.g. with gdalwarp -t_srs EPSG:326ZZ (UTM)"
        return transform.a * _DEGREE * math.cos(math.radians(y)), None, problem
    try:
        scale = metres_per_unit(crs, x, y) if crs else 1.0
    except InputError as error:
        return transform.a, None, str(error)
    return transform.a * scale, (x * scale, y * scale), ""


def read_images(found: Survey) -> ImageValues:
    """Read the values of a sample of images whose headers were read."""
    bands = found.usual(lambda header: header.bands)
    lowest, highest = np.full(bands, np.inf), np.full(bands, -np.inf)
    distinct: list[set[float] | None] = [set() for _ in range(bands)]
    files = nan = infinite = 0
    usable = [path for path, header in found.headers.items() if header.bands == bands]
    for _, values in _read_sample(found, usable, _IMAGES, list(range(1, bands + 1))):
        files += 1
        is_nan, is_infinite = (
            (np.isnan(values.data), np.isinf(values.data)) if values.dtype.kind == "f" else (np.False_, np.False_)
        )
        nan += bool(np.any(is_nan))
        infinite += bool(np.any(is_infinite))
        valid = ~(np.ma.getmaskarray(values) | is_nan | is_infinite)
        for band in range(bands):
            measured = values.data[band][valid[band]]
            if measured.size:
                lowest[band] = min(lowest[band], measured.min())
                highest[band] = max(highest[band], measured.max())
            known = distinct[band]
            if known is not None:
                known.update(np.unique(measured)[:3].tolist())
                distinct[band] = known if len(known) <= 2 else None
    empty = ~np.isfinite(lowest)
    lowest[empty] = highest[empty] = np.nan
    few = tuple(None if values is None else frozenset(values) for values in distinct)
    return ImageValues(files, tuple(lowest.tolist()), tuple(highest.tolist()), nan, infinite, few)


def read_labels(found: Survey) -> LabelValues:
    """Count the values of band 1 of a sample of label rasters whose headers were read."""
    pixels: Counter[int] = Counter()
    examples: dict[int, str] = {}
    files = 0
    integers = [path for path, header in found.headers.items() if is_integer(header.dtypes[0])]
    for path, values in _read_sample(found, integers, _LABELS, [1]):
        files += 1
        distinct, counts = np.unique(values.data, return_counts=True)
        if len(distinct) > _MAX_VALUES:
            return LabelValues(files, {}, {})
        pixels.update(dict(zip(map(int, distinct), map(int, counts))))
        examples = dict.fromkeys(map(int, distinct), path) | examples
        if len(pixels) > _MAX_VALUES:
            return LabelValues(files, {}, {})
    return LabelValues(files, dict(sorted(pixels.items())), examples)


def _read_sample(
    found: Survey, paths: Sequence[str], count: int, bands: list[int]
) -> Iterable[tuple[str, np.ma.MaskedArray[tuple[int, ...], np.dtype[np.generic]]]]:
    """Paths of a sample of files with their values, (bands, pixels), masked where they are declared nodata."""
    for path in sample_evenly(paths, count):
        try:
            with sidecar_environment(), open_raster(found.root / path) as file:
                windows = [file.read(bands, window=window) for window in _windows(file.width, file.height)]
                nodata = file.nodata
        except (RasterError, RasterioError):  # sharding names the file
            continue
        values = np.concatenate([window.reshape(len(bands), -1) for window in windows], axis=1)
        is_nodata = np.zeros(values.shape, bool)
        if nodata is not None and not math.isnan(nodata):
            is_nodata = values == nodata
        yield path, np.ma.MaskedArray(values, mask=is_nodata)


def _windows(width: int, height: int) -> list[Window]:
    """The whole raster, or its corners and centre if it is large."""
    if width * height <= 4 * _WINDOW * _WINDOW:
        return [Window(0, 0, width, height)]
    columns, rows = min(_WINDOW, width), min(_WINDOW, height)
    places = [
        (0, 0),
        (width - columns, 0),
        ((width - columns) // 2, (height - rows) // 2),
        (0, height - rows),
        (width - columns, height - rows),
    ]
    return [Window(left, top, columns, rows) for left, top in places]
