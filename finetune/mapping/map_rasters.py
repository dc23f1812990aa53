"""Input rasters of any size: open them, check them against each other, and read ground windows.

Sizes are in metres on the ground. Coordinates are in units of a raster's coordinate system, which may differ from
ground metres: by 1 / cos(latitude) in web maps (EPSG:3857), or because the unit is a foot.
"""

from __future__ import annotations

import html
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as reprojected

from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError, counted
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.dataset import days_since_may
from bocage.shards.source.described.ground import explain_rotation, metres_per_unit
from bocage.shards.source.raster import gdal_reason

logger = logging.getLogger(__name__)

_AVERAGE_BELOW = 0.75  # rasters with pixels finer than this fraction of the model's pixel are averaged
_UNIT_FACTOR = 20.0  # a window's maximum that differs from the training means by this factor suggests other units
_GRID_TOLERANCE = 1e-3  # offset in pixels below which two grids are the same
_SAME_SCALE = 0.01  # difference from a metre below which a unit counts as one: sharding accepts it in pixel sizes too
_GDAL_TYPES = {"uint8": "Byte", "int16": "Int16", "uint16": "UInt16", "float32": "Float32"}
_CRS_TOLERANCE = 0.5  # largest distance, in pixels, between a raster's corners in two coordinate systems


@dataclass(frozen=True)
class Extent:
    """Extent of a raster: coordinate system, upper left corner and sides, in its units."""

    crs: CRS | None
    left: float
    top: float
    width: float
    height: float


class MapRaster:
    """Raster of one modality, or of its quality mask, with any size and pixel size.

    A raster without georeference has the pixels of the model, and its corner at 0, 0 of an unknown coordinate system.

    Args:
        name: name of the modality.
        path: local file that GDAL can open: GeoTIFF, COG or VRT mosaic. If it has one band more than expected, the last
            band may be an alpha band; otherwise no band is taken for one.
        bands: number of bands per date; None for a quality mask, whose bands the file decides.
        gsd: pixel size that the model reads, in metres.
        dates: dates of a series, (T,) days since 1970-01-01; None for an image.
        scale: units of the coordinate system per metre, the same for all rasters of a map; None for that at the centre
            of this raster.
        is_quality_mask: whether the raster is a quality mask. Its values are never interpolated, and the nodata value
            of the file counts as a value.
        nodata_below, nodata_above: limits beyond which values are nodata, whatever the file declares.

    Attributes:
        scale: units of the coordinate system per metre on the ground.
        is_georeferenced: whether the file has a coordinate system or a position.

    Raises:
        InputError: the file is not a raster, is rotated, is not projected, or has the wrong number of bands.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        bands: int | None,
        gsd: float,
        dates: np.ndarray | None,
        *,
        scale: float | None = None,
        is_quality_mask: bool = False,
        nodata_below: float | None = None,
        nodata_above: float | None = None,
    ) -> None:
        self.name, self.path, self.gsd, self.dates = name, path, gsd, dates
        self._nodata_below, self._nodata_above = nodata_below, nodata_above
        self.is_quality_mask = is_quality_mask
        self._warned = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                self._file = rasterio.open(path)
        except RasterioError as error:
            raise InputError(f"{name}={path}: cannot be opened as a raster: {gdal_reason(error)}") from error
        self.is_georeferenced = not (self._file.transform.is_identity and self._file.crs is None)
        if not self.is_georeferenced:
            logger.warning(
                "%s has no georeference: its pixels count as %g m, as those of the model, and the map has no "
                "coordinate system",
                path,
                gsd,
            )
            self._file = _as_vrt(self._file, transform=Affine(gsd, 0.0, 0.0, 0.0, -gsd, 0.0), keep_alpha=True)
        transform = self._file.transform
        if problem := explain_rotation(transform):
            raise InputError(f"{path}: {problem}")
        self.scale = _units_per_metre(path, self._file) if scale is None else scale
        if bands is None:
            bands = self._file.count if dates is None else max(1, self._file.count // max(1, len(dates)))
        self._shape = (bands,) if dates is None else (len(dates), bands)
        expected = math.prod(self._shape)
        alphas = [interpretation == ColorInterp.alpha for interpretation in self._file.colorinterp]
        # A mask inside or next to the file is not a band, and a WarpedVRT on another grid would ignore it.
        flags = self._file.mask_flag_enums[0]
        masked = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags and self._file.count == expected
        if masked or any(alphas[:expected]):
            # By default GDAL takes the fourth of four 8-bit bands for an alpha band, but here it is near infrared.
            alphas = [False] * self._file.count + [True] * masked
            self._file = _as_vrt(self._file, mask_as_alpha=masked)
        if self._file.count != expected and not (self._file.count == expected + 1 and alphas[-1]):
            series = "" if dates is None else f" ({len(dates)} dates with {bands} bands each)"
            remedy = "choose bands, e.g. with gdal_translate -b 1 -b 2"
            if self._file.count < expected:
                remedy = "give a raster with all of them"
            raise InputError(
                f"{path} has {counted(self._file.count, 'band')}; {name} needs {expected}{series}: {remedy}"
            )
        self._pixel = gsd * self.scale  # of the model, in units of the coordinate system
        pixel = max(transform.a, -transform.e)
        self._resampling = Resampling.average if pixel < _AVERAGE_BELOW * self._pixel else Resampling.bilinear
        if is_quality_mask:
            self._resampling = Resampling.nearest
        self._bands = list(range(1, expected + 1))
        # Without nodata value or alpha band, the WarpedVRT adds an alpha band (the last one) to mark pixels outside.
        self._has_alpha = self._file.count > expected
        self._adds_alpha = self._file.nodata is None and not self._has_alpha

    def check_dtype(self, spec: InputSpec) -> None:
        """Check the dtype against FLAIR-HUB's, if the model reads a modality of FLAIR-HUB.

        8-bit integers where models are trained on wider ones, or the other way round, are surely in other units. Floats
        may be in any unit and are accepted. Models of other datasets do not know the dtype of their input;
        ``warn_about_units`` compares the values.

        Raises:
            InputError: the integers are of the other kind.
        """
        official = next((item for item in FLAIR_HUB.inputs if item.name == self.name), None)
        if official is None or (spec.gsd, spec.bands) != (official.gsd, tuple(band.name for band in official.bands)):
            return
        trained, actual = np.dtype(official.dtype), np.dtype(self._file.dtypes[0])
        if trained.kind != "f" and actual.kind != "f" and (trained.itemsize == 1) != (actual.itemsize == 1):
            raise InputError(
                f"{self.path} has {actual} values, and models of {self.name} are trained on {trained}: convert it to "
                f"those units, e.g. with gdal_translate -scale ... -ot {_GDAL_TYPES[str(trained)]}"
            )

    @property
    def extent(self) -> Extent:
        """Extent of the raster."""
        bounds = self._file.bounds
        return Extent(self._file.crs, bounds.left, bounds.top, bounds.right - bounds.left, bounds.top - bounds.bottom)

    def overlaps(self, other: Extent) -> bool:
        """Return whether the raster overlaps an extent."""
        own = self.extent
        horizontally = own.left < other.left + other.width and own.left + own.width > other.left
        return horizontally and own.top > other.top - other.height and own.top - own.height < other.top

    def check_crs(self, reference: MapRaster) -> None:
        """Check that this raster lies at the same coordinates in both rasters' coordinate systems.

        Raises:
            InputError: the raster lies elsewhere, or only one of the two rasters has a coordinate system.
        """
        own, theirs = self._file.crs, reference._file.crs
        if own == theirs:
            return
        if own is None or theirs is None:
            which = self.path if own is None else reference.path
            raise InputError(
                f"{which} has no coordinate system, but other rasters have one: set it, e.g. with gdal_edit.py -a_srs"
            )
        bounds = self._file.bounds
        xs, ys = [bounds.left, bounds.right], [bounds.top, bounds.bottom]
        try:
            moved = reprojected(own, theirs, xs, ys)
        except (CRSError, RasterioError) as error:
            raise InputError(
                f"{self.path} is in {_crs_name(own)}, which cannot be compared with {_crs_name(theirs)} of "
                f"{reference.path}"
            ) from error
        shift = max(abs(a - b) for old, new in zip((xs, ys), moved[:2], strict=True) for a, b in zip(old, new))
        if shift > _CRS_TOLERANCE * self._file.transform.a:
            raise InputError(
                f"{self.path} is in {_crs_name(own)} and {reference.path} in {_crs_name(theirs)}, which differ by "
                f"{shift:.3g} m here: reproject one, e.g. with gdalwarp -t_srs"
            )

    def read(self, left: float, top: float, side: float, count: int = 1) -> np.ndarray:
        """Read a ground window, (C, H, W) or (T, C, H, W) float32, with NaN for nodata and outside the raster.

        Several windows side by side make one wide window, W = ``count`` H.

        Args:
            left: left coordinate of the window.
            top: top coordinate of the window.
            side: side of the window, in metres.
            count: number of windows side by side, of which ``left`` and ``top`` are the first.

        Raises:
            InputError: the file cannot be read.
        """
        pixels = round(side / self.gsd)
        settings: dict[str, Any] = {
            "crs": self._file.crs,
            "transform": Affine(self._pixel, 0.0, left, 0.0, -self._pixel, top),
            "width": count * pixels,
            "height": pixels,
            "resampling": Resampling.nearest if self._is_aligned(left, top) else self._resampling,
        }
        # PARTIAL: every band has its own nodata pixels, so a gap of one date is not a gap of the others.
        settings |= {"add_alpha": True} if self._adds_alpha else {"UNIFIED_SRC_NODATA": "PARTIAL"}
        height = side * self.scale
        if not self.overlaps(Extent(self._file.crs, left, top, count * height, height)):
            return np.full((*self._shape, pixels, count * pixels), np.nan, np.float32)
        try:
            with WarpedVRT(self._file, **settings) as view:
                stored = view.read(self._bands)
                if self.is_quality_mask:
                    valid = self._pixels_inside(left, top, pixels, count * pixels)
                elif self._has_alpha or self._adds_alpha:
                    valid = view.read(view.count) > 0
                else:
                    # Compare with the nodata value: GDAL's masks of a warped raster read it again for each band, which
                    # takes a hundred times as long for a series with large blocks.
                    nodata = self._file.nodata
                    valid = ~np.isnan(stored) if np.isnan(nodata) else stored != nodata
        except RasterioError as error:
            raise InputError(f"{self.path}: cannot be read: {gdal_reason(error)}") from error
        values = stored.astype(np.float32)
        values[~np.broadcast_to(valid, values.shape)] = np.nan
        if self._nodata_below is not None:
            values[values < self._nodata_below] = np.nan
        if self._nodata_above is not None:
            values[values > self._nodata_above] = np.nan
        return values.reshape(*self._shape, pixels, count * pixels)

    def warn_about_units(self, values: np.ndarray, spec: InputSpec) -> None:
        """Log one warning if a window's values, of any shape, are far from those that the model was trained on.

        Otherwise reflectances from 0 to 1, say, would silently give a wrong map where the model expects integers.
        """
        if self._warned or spec.representation != "linear":
            return
        maximum, means = float(np.nanmax(values, initial=-math.inf)), np.array(spec.mean)
        lowest, highest = means.min() / _UNIT_FACTOR, means.max() * _UNIT_FACTOR
        if not np.isfinite(maximum) or means.min() <= 0 or lowest < maximum < highest:
            return
        self._warned = True
        logger.warning(
            f"{self.path}: values are up to {maximum:.3g}, but the model was trained on {self.name} with means of "
            f"{means.min():.3g} to {means.max():.3g}: are they in the same units?"
        )

    def _is_aligned(self, left: float, top: float) -> bool:
        """Return whether the raster's pixels coincide with a grid at this corner, so that no resampling is needed."""
        transform = self._file.transform
        offsets = ((left - transform.c) / self._pixel, (top - transform.f) / self._pixel)
        same = all(math.isclose(pixel, self._pixel, rel_tol=1e-6) for pixel in (transform.a, -transform.e))
        return same and all(abs(offset - round(offset)) < _GRID_TOLERANCE for offset in offsets)

    def _pixels_inside(self, left: float, top: float, height: int, width: int) -> np.ndarray:
        """Return the mask (height, width) of window pixels whose centre lies inside the raster."""
        extent = self.extent
        x, y = left + (np.arange(width) + 0.5) * self._pixel, top - (np.arange(height) + 0.5) * self._pixel
        columns = (x >= extent.left) & (x < extent.left + extent.width)
        rows = (y <= extent.top) & (y > extent.top - extent.height)
        return np.outer(rows, columns)

    def fingerprint(self) -> dict[str, Any]:
        """Return the files, shape and dates of the raster, by which a resumed map recognises it."""
        files = [Path(name) for name in self._file.files] or [self.path]  # a mosaic lists all its files
        states = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
        return {
            "files": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
            "shape": [self._file.count, self._file.height, self._file.width],
            "dates": None if self.dates is None else self.dates.tolist(),
        }


def open_rasters(
    task: Segmentation, files: Mapping[str, Path], dates: Mapping[str, Path]
) -> tuple[dict[str, MapRaster], MapRaster]:
    """Open the rasters of a model's modalities and of the quality masks of its series.

    Args:
        task: model.
        files: raster files by modality or quality mask, with at least one modality of the model.
        dates: text files by series, with one date (YYYY-MM-DD) per line, in the order of the bands.

    Returns:
        Rasters by name, and the one that defines the grid of the map: the first modality of the model.

    Raises:
        InputError: a name is not an input of the model, dates are missing or do not fit, rasters have different
            coordinate systems or do not overlap, or a modality of an official model is missing.
    """
    masks = {mask: series for series, mask in task.quality_masks.items()}
    if unknown := [name for name in files if name not in task.modalities and name not in masks]:
        inputs = ", ".join([*task.modalities, *masks])
        raise InputError(f"--raster {unknown[0]}: not an input of the model; its inputs are {inputs}")
    modalities = [name for name in task.modalities if name in files]
    if not modalities:
        raise InputError(f"--raster: give at least one of {', '.join(task.modalities)}")
    if task.model.official and (missing := [name for name in task.modalities if name not in files]):
        raise InputError(f"--raster {missing[0]}=FILE is missing: an official model needs all its modalities")
    if unused := [name for name in dates if name not in modalities or not task.model.encoder(name).spec.series]:
        raise InputError(f"--dates {unused[0]}: no --raster has a time series of this name")
    rasters: dict[str, MapRaster] = {}
    for name in modalities:
        spec = task.model.encoder(name).spec
        days = None
        if spec.series:
            if name not in dates:
                raise InputError(
                    f"--dates {name}=FILE is missing: give a text file with one date per line, in the bands' order"
                )
            days = read_dates(dates[name])
        rasters[name] = MapRaster(
            name,
            files[name],
            len(spec.bands),
            spec.gsd,
            days,
            scale=rasters[modalities[0]].scale if rasters else None,
            nodata_below=spec.nodata_below,
            nodata_above=spec.nodata_above,
        )
        rasters[name].check_dtype(spec)
    for mask, series in masks.items():
        if mask in files:
            if series not in rasters:
                raise InputError(f"--raster {mask} is the quality mask of {series}: give --raster {series}=FILE too")
            sensor = rasters[series]
            rasters[mask] = MapRaster(
                mask, files[mask], None, sensor.gsd, sensor.dates, scale=sensor.scale, is_quality_mask=True
            )
    reference = rasters[modalities[0]]
    if reference.extent.crs is None and reference.is_georeferenced:
        logger.warning(f"{reference.path} has no coordinate system, so the map will have none")
    for raster in rasters.values():
        raster.check_crs(reference)
        if not raster.overlaps(reference.extent):
            raise InputError(f"{raster.path} and {reference.path} do not overlap: give rasters of the same area")
    return rasters, reference


def read_dates(path: Path) -> np.ndarray:
    """Read a text file with one date (YYYY-MM-DD) per line as days since 1970-01-01, (T,) int64.

    Raises:
        InputError: the file cannot be read, or a line is not a date.
    """
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    days = []
    for line in lines:
        try:
            days.append(date.fromisoformat(line).toordinal())
        except ValueError as error:
            raise InputError(f"{path}: {line!r} is not a date; write one per line, e.g. 2021-05-15") from error
    return np.array(days, np.int64) - date(1970, 1, 1).toordinal()


def window_batch(
    rasters: Mapping[str, MapRaster], windows: Sequence[tuple[float, float]], side: float
) -> tuple[Batch, np.ndarray]:
    """Read ground windows as a batch, with NaN for nodata.

    Windows side by side are read at once: models of series of one pixel have windows of one pixel.

    Args:
        rasters: rasters by modality.
        windows: left and top coordinates of each window.
        side: side of the windows, in metres.

    Returns:
        The batch, and (B,) bool: whether a sample has any data.
    """
    values = {name: _read_windows(raster, windows, side) for name, raster in rasters.items()}
    count = len(windows)
    present = {name: torch.ones(count, dtype=torch.bool) for name in rasters}
    dates, padding = {}, {}
    for name, raster in rasters.items():
        if raster.dates is not None:
            dates[name] = torch.from_numpy(days_since_may(raster.dates)).expand(count, -1)
            padding[name] = torch.zeros(count, len(raster.dates), dtype=torch.bool)
    inputs = [name for name, raster in rasters.items() if not raster.is_quality_mask]
    has_data = np.any([np.isfinite(values[name]).reshape(count, -1).any(axis=1) for name in inputs], axis=0)
    batch = Batch(
        keys=[f"{left:.2f} {top:.2f}" for left, top in windows],
        rois=[""] * count,
        seeds=torch.zeros(count, dtype=torch.int64),
        sample_ids=torch.zeros(count, dtype=torch.int64),
        windows=torch.tensor([[0.0, 0.0, side]]).expand(count, -1),
        values={name: torch.from_numpy(array) for name, array in values.items()},
        present=present,
        dates=dates,
        padding=padding,
    )
    return batch, has_data


def _read_windows(raster: MapRaster, windows: Sequence[tuple[float, float]], side: float) -> np.ndarray:
    """Read ground windows, (B, C, H, W) or (B, T, C, H, W) float32; adjacent ones in a single access."""
    step = side * raster.scale
    is_adjacent = [
        math.isclose(right[0] - left[0], step, rel_tol=1e-6) and right[1] == left[1]
        for left, right in pairwise(windows)
    ]
    starts = [0, *(index for index, adjacent in enumerate(is_adjacent, start=1) if not adjacent)]
    parts = []
    for start, end in pairwise([*starts, len(windows)]):
        strip = raster.read(*windows[start], side, end - start)
        windows_of_strip = strip.reshape(*strip.shape[:-1], end - start, strip.shape[-2])
        parts.append(np.moveaxis(windows_of_strip, -2, 0))
    return np.concatenate(parts)


def _units_per_metre(path: Path, file: rasterio.DatasetReader) -> float:
    """Units of a raster's coordinate system per metre on the ground, at its centre; 1 if they differ by less than 1 %.

    Raises:
        InputError: the coordinate system is not projected.
    """
    crs, bounds = file.crs, file.bounds
    if crs is None:
        return 1.0
    try:
        metres = metres_per_unit(crs.to_string(), (bounds.left + bounds.right) / 2, (bounds.top + bounds.bottom) / 2)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return 1.0 if abs(1 / metres - 1) < _SAME_SCALE else 1 / metres


def valid_pixels(batch: Batch, inputs: Sequence[str], size: int) -> np.ndarray:
    """Return the mask (B, size, size) of map pixels where any of the inputs has data."""
    valid = np.zeros((len(batch), size, size), bool)
    for name in inputs:
        finite = torch.isfinite(batch.values[name])
        while finite.ndim > len("BHW"):
            finite = finite.any(dim=1)
        nearest = np.arange(size) * finite.shape[-1] // size
        valid |= finite.numpy()[:, nearest][:, :, nearest]
    return valid


def _as_vrt(
    file: rasterio.DatasetReader,
    *,
    transform: Affine | None = None,
    keep_alpha: bool = False,
    mask_as_alpha: bool = False,
) -> rasterio.DatasetReader:
    """Open the bands through a GDAL virtual raster (VRT). The XML is written here because rasterio has no call for it.

    Args:
        file: raster with the bands.
        transform: affine transform to declare; None keeps that of the file.
        keep_alpha: whether an alpha band stays one; otherwise no band is declared as alpha.
        mask_as_alpha: whether the mask of the file becomes an additional alpha band.
    """
    dtype = _GDAL_TYPES.get(file.dtypes[0])
    if dtype is None:
        raise InputError(f"{file.name} has {file.dtypes[0]} values: convert it to one of {', '.join(_GDAL_TYPES)}")
    nodata = "" if file.nodata is None else f"<NoDataValue>{file.nodata!r}</NoDataValue>"
    name = html.escape(str(Path(file.name).resolve()))

    def band(number: int, source: str, properties: str) -> str:
        return (
            f'<VRTRasterBand dataType="{dtype}" band="{number}">{properties}<SimpleSource>'
            f'<SourceFilename relativeToVRT="0">{name}</SourceFilename><SourceBand>{source}</SourceBand></SimpleSource>'
            "</VRTRasterBand>"
        )

    alpha = "<ColorInterp>Alpha</ColorInterp>"
    bands = [
        band(number, str(number), nodata + alpha * (keep_alpha and interpretation == ColorInterp.alpha))
        for number, interpretation in zip(file.indexes, file.colorinterp)
    ]
    if mask_as_alpha:
        bands.append(band(file.count + 1, "mask,1", alpha))
    reference = "" if file.crs is None else f"<SRS>{html.escape(file.crs.to_wkt())}</SRS>"
    corners = ", ".join(repr(value) for value in (transform or file.transform).to_gdal())
    return rasterio.open(
        f'<VRTDataset rasterXSize="{file.width}" rasterYSize="{file.height}">{reference}'
        f"<GeoTransform>{corners}</GeoTransform>{''.join(bands)}</VRTDataset>"
    )


def _crs_name(crs: CRS) -> str:
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.to_wkt().partition('"')[2].partition('"')[0]
