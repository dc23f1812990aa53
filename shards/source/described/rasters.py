"""Read rasters of a described dataset and check them against their description."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.windows import Window

from bocage.shards.errors import InputError
from bocage.shards.modality import Modality
from bocage.shards.source.described.description import DatasetDescription, LabelDescription, SensorDescription
from bocage.shards.source.described.ground import explain_pixels, horizontal_crs, metres_per_unit, same_crs
from bocage.shards.source.described.nodata import Nodata
from bocage.shards.source.raster import WHOLE_PNG, Raster, RasterError, corner_distance, gdal_reason, is_integer

ALIGNMENT = 0.02
"""Pixels by which rasters may lie apart that count as one grid, and are not resampled."""

_MAX_SHOWN = 5  # values in a message


@dataclass(frozen=True)
class RasterRules:
    """What the files of one sensor or label must be like, and how they become arrays of the shards.

    Attributes:
        bands: positions of the bands to read, from 0.
        file_bands: number of bands of a file; 0 accepts any.
        dtype: type of the values of the files; None accepts any integer type, for labels.
        pixel: side of a pixel on the ground, in metres.
        pixel_tolerance: relative difference from ``pixel`` that is accepted.
        crs: coordinate system of files without one; may be empty.
        nodata: which values are missing, and the value stored for them.
        stored_values: class number in the shards of each value, for labels.
    """

    bands: tuple[int, ...]
    file_bands: int
    dtype: str | None
    pixel: float
    pixel_tolerance: float
    crs: str
    nodata: Nodata
    stored_values: Mapping[int, int] | None = None


def sensor_rules(sensor: SensorDescription, description: DatasetDescription) -> RasterRules:
    """Rules for the files of a sensor."""
    return RasterRules(
        bands=sensor.used_indices,
        file_bands=len(sensor.bands),
        dtype=sensor.dtype,
        pixel=sensor.pixel,
        pixel_tolerance=sensor.pixel_tolerance,
        crs=description.crs,
        nodata=sensor.missing,
    )


def label_rules(label: LabelDescription, description: DatasetDescription) -> RasterRules:
    """Rules for the files of a label."""
    return RasterRules(
        bands=(label.band - 1,),
        file_bands=0,
        dtype=None,
        pixel=label.pixel,
        pixel_tolerance=label.pixel_tolerance,
        crs=description.crs,
        nodata=Nodata(fill=label.stored_values[label.ignore[0]] if label.ignore else None),
        stored_values=label.stored_values,
    )


def raster_rules(description: DatasetDescription) -> dict[str, RasterRules]:
    """Rules for the files of each sensor and label."""
    rules = {name: sensor_rules(sensor, description) for name, sensor in description.sensors.items()}
    return rules | {name: label_rules(label, description) for name, label in description.labels.items()}


@dataclass(frozen=True)
class GeoPosition:
    """Position of a raster.

    Attributes:
        crs: coordinate system, without that of heights; empty if unknown.
        left, top: upper-left corner, in the CRS.
        pixel: side of a pixel, in units of the CRS.
        scale: ground metres per unit of the CRS.
        is_known: whether the file is georeferenced; otherwise it lies at 0, 0 with the pixels of the description.
    """

    crs: str
    left: float
    top: float
    pixel: float
    scale: float
    is_known: bool


def open_raster(path: Path) -> rasterio.DatasetReader:
    """Open a raster; the caller closes it. World files beside it are read.

    Raises:
        RasterError: the file cannot be opened.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # PNG and JPEG need no position
            return rasterio.open(path)
    except RasterioError as error:
        raise RasterError(f"{path}: cannot be read: {gdal_reason(error)}") from error


def sidecar_environment() -> rasterio.Env:
    """GDAL settings under which world files are found by name, without listing the folder, and PNG files are whole."""
    return rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE", **WHOLE_PNG)


def position_of(path: Path, file: rasterio.DatasetReader, rules: RasterRules) -> GeoPosition:
    """Position of an open raster.

    A file without georeference lies at 0, 0 of an unknown CRS, with the pixels of the description.

    Raises:
        RasterError: the raster is rotated, has pixels that are not square, is not in a projected CRS, or has pixels of
            another size than described.
    """
    transform, is_known = file.transform, not file.transform.is_identity
    if is_known and (problem := explain_pixels(transform)):
        raise RasterError(f"{path}: {problem}")
    centre_x = transform.c + transform.a * file.width / 2
    centre_y = transform.f + transform.e * file.height / 2
    try:
        crs = horizontal_crs(file.crs.to_string() if file.crs and is_known else rules.crs)
        scale = metres_per_unit(crs, centre_x, centre_y) if crs and is_known else 1.0
    except InputError as error:
        raise RasterError(f"{path}: {error}") from error
    if not is_known:
        return GeoPosition(crs, 0.0, 0.0, rules.pixel, scale, is_known)
    pixel = transform.a * scale
    if abs(pixel - rules.pixel) > rules.pixel_tolerance * rules.pixel:
        raise RasterError(
            f"{path}: pixels of {pixel:.4g} m on the ground, but the description has {rules.pixel:g} m with a "
            f"pixel_tolerance of {rules.pixel_tolerance:g}"
        )
    return GeoPosition(crs, transform.c, transform.f, transform.a, scale, is_known)


def check_file(path: Path, file: rasterio.DatasetReader, rules: RasterRules) -> None:
    """Check the bands and the dtype of an open raster.

    Raises:
        RasterError: they contradict the description.
    """
    if rules.file_bands and file.count != rules.file_bands:
        raise RasterError(
            f"{path}: {file.count} bands, but the description has {rules.file_bands}; name bands to leave out as unused"
        )
    if max(rules.bands) >= file.count:
        raise RasterError(f"{path}: {file.count} bands, but the description names band {max(rules.bands) + 1}")
    found = {file.dtypes[index] for index in rules.bands}
    if rules.dtype is not None and found != {rules.dtype}:
        raise RasterError(f"{path}: dtype {', '.join(sorted(found))}, but the description has {rules.dtype}")
    if rules.dtype is None and not all(map(is_integer, found)):
        raise RasterError(f"{path}: dtype {', '.join(sorted(found))}, but classes are integers")


def find_alpha(file: rasterio.DatasetReader, rules: RasterRules) -> int:
    """Number of the alpha band of a raster, from 1; 0 without one. A band that the description uses is none."""
    bands = enumerate(file.colorinterp)
    return next((i + 1 for i, kind in bands if kind == ColorInterp.alpha and i not in rules.bands), 0)


def has_mask(file: rasterio.DatasetReader, rules: RasterRules) -> bool:
    """Whether a mask inside or beside a raster, which is no band, marks missing pixels."""
    flags = file.mask_flag_enums[rules.bands[0]]
    return MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags


def read_hidden(
    file: rasterio.DatasetReader, rules: RasterRules, alpha: int, is_masked: bool, window: Window | None = None
) -> np.ndarray | None:
    """Read which pixels an alpha band or a mask hides, (H, W) bool; None for none.

    Args:
        file: open raster.
        rules: rules of the sensor or label.
        alpha: number of the alpha band, from 1; 0 without one.
        is_masked: whether the raster has a mask.
        window: part of the raster; None for the whole.
    """
    if alpha:
        hidden: np.ndarray = file.read(alpha, window=window) == 0
    elif is_masked:
        hidden = file.read_masks(rules.bands[0] + 1, window=window) == 0
    else:
        return None
    return hidden if hidden.any() else None


def find_declared(file: rasterio.DatasetReader, rules: RasterRules) -> float | None:
    """Nodata value that a raster declares, in its dtype; None if no pixel can have it, or if it is a class."""
    first = rules.bands[0]
    value, dtype = file.nodatavals[first], np.dtype(file.dtypes[first])
    if value is None or (rules.stored_values is not None and value in rules.stored_values):
        return None
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # a value beyond the dtype becomes infinity
            return float(dtype.type(value))
    limits = np.iinfo(dtype)
    return int(value) if float(value).is_integer() and limits.min <= value <= limits.max else None


def convert(where: object, values: np.ndarray, rules: RasterRules, declared: float | None) -> np.ndarray:
    """Check the values of a raster, (C, H, W), and convert those of labels to class numbers.

    Args:
        where: file, for messages.
        values: values of the chosen bands.
        rules: rules of the sensor or label.
        declared: nodata value that the file declares, if any.

    Raises:
        RasterError: the values are NaN, infinite, nodata or classes that the description does not name.
    """
    if rules.stored_values is not None:
        return _class_numbers(where, values, rules.stored_values)
    if values.dtype.kind == "f":
        if np.isinf(values).any():
            raise RasterError(f"{where}: infinite values; replace them by NaN or a nodata value")
        if not rules.nodata.accepts_nan and np.isnan(values).any():
            raise RasterError(f"{where}: NaN values; if they mark missing pixels, add .nan to nodata")
    is_named = (
        declared is None or math.isnan(declared) or rules.nodata.is_missing(np.array(declared, values.dtype)).all()
    )
    if not is_named and (values == declared).any():
        raise RasterError(
            f"{where}: declares {declared:g} as nodata and holds it; if it marks missing pixels, add it to nodata"
        )
    return values


def _class_numbers(where: object, values: np.ndarray, stored: Mapping[int, int]) -> np.ndarray:
    """Class number of each value, (C, H, W) uint8."""
    found, inverse = np.unique(values, return_inverse=True)
    unknown = [int(value) for value in found if int(value) not in stored]
    if unknown:
        shown = ", ".join(map(str, unknown[:_MAX_SHOWN])) + (", ..." if len(unknown) > _MAX_SHOWN else "")
        what = f"values {shown} are neither classes" if len(unknown) > 1 else f"value {shown} is neither a class"
        raise RasterError(f"{where}: {what} nor ignored; add to classes or ignore")
    numbers = np.array([stored[int(value)] for value in found], np.uint8)
    return numbers[inverse].reshape(values.shape)


@dataclass(frozen=True)
class TileSource:
    """One raster of a patch that is a file, or a series that is a file for each date.

    Attributes:
        paths: the file; for a series, the files in the order of the dates.
        rules: rules of the sensor or label.
        problem: why the patch cannot be used, if that is known before; reading raises it.
    """

    paths: tuple[Path, ...]
    rules: RasterRules
    problem: str = ""

    def __str__(self) -> str:
        return str(self.paths[0]) + (f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else "")

    @property
    def container(self) -> Path:
        """Folder of the first file."""
        return self.paths[0].parent

    def read_raster(self, modality: Modality) -> Raster:
        """Read the raster, or stack the dates of a series.

        Raises:
            RasterError: a file cannot be read, contradicts the description, or lies elsewhere than the first date; or
                the patch has a problem.
        """
        if self.problem:
            raise RasterError(self.problem)
        with sidecar_environment():
            rasters = [_read_tile(path, self.rules, modality) for path in self.paths]
        if not modality.has_time_axis:
            return rasters[0]
        first = next((number for number, raster in enumerate(rasters) if raster.has_position), 0)
        reference = rasters[first]
        for path, raster in zip(self.paths, rasters):
            is_near = corner_distance(raster, reference) <= ALIGNMENT * reference.side / modality.size
            if raster.has_position and not (is_near and same_crs(raster.crs, reference.crs)):
                raise RasterError(f"{path}: lies elsewhere than {self.paths[first]}, of the same series")
        array = np.stack([raster.array for raster in rasters])
        return reference._replace(array=array, stored_bytes=sum(raster.stored_bytes for raster in rasters))


def _read_tile(path: Path, rules: RasterRules, modality: Modality) -> Raster:
    with open_raster(path) as file:
        check_file(path, file, rules)
        size = modality.size
        if (file.width, file.height) != (size, size):
            raise RasterError(
                f"{path}: {file.width} x {file.height} pixels, but a patch of {modality.name} has {size} x {size}"
            )
        position = position_of(path, file, rules)
        try:
            values = file.read([index + 1 for index in rules.bands])
            hidden = read_hidden(file, rules, find_alpha(file, rules), has_mask(file, rules))
        except RasterioIOError as error:
            raise RasterError(f"{path}: cannot be read: {gdal_reason(error)}") from error
        declared = find_declared(file, rules)
    if hidden is None:
        array = np.ascontiguousarray(convert(path, values, rules, declared))
    elif rules.nodata.fill is None:
        how = "name a nodata value, e.g. nodata: [0]" if rules.stored_values is None else "add a value to ignore"
        raise RasterError(f"{path}: {hidden.sum()} pixels are transparent or masked; {how} to store them as missing")
    else:
        array = np.full(values.shape, rules.nodata.fill, modality.dtype)
        array[:, ~hidden] = convert(path, values[:, ~hidden], rules, declared)
    side = size * position.pixel
    place = (position.crs, position.left, position.top, side)
    return Raster(array, *place, path.stat().st_size, position.is_known)
