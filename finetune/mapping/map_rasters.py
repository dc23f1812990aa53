"""Rasters of any size as inputs of a model: checked against each other, and read by ground windows."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import CRSError, RasterioError
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as reprojected

from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.dataset import days_since_may
from bocage.shards.source.rasters import gdal_reason

_FINER = 0.75  # of the pixel that a model reads: finer ones are averaged
_FAR = 20.0  # times: the largest values of some windows are not that far from the mean
_BESIDE = 1e-3  # pixels: nearer grids are one
_GDAL_TYPES = {"uint8": "Byte", "int16": "Int16", "uint16": "UInt16", "float32": "Float32"}
_TOLERANCE = 0.5  # pixels by which two coordinate systems may put the corners of a raster apart


@dataclass(frozen=True)
class Extent:
    """Ground that a raster covers: coordinate system, upper-left corner and sides, metres."""

    crs: CRS | None
    left: float
    top: float
    width: float
    height: float


class MapRaster:
    """One modality, or the quality mask of one, as a raster of any size and pixel.

    Args:
        name: the modality.
        path: a local file that GDAL opens: GeoTIFF, COG, VRT mosaic. One more band than asked for may be an alpha; of
            as many bands as asked for none is.
        bands: how many there are of each date.
        gsd: the pixel that the model reads, metres.
        dates: of a series, (T,) days since 1970-01-01; None for an image.
        counted: whether values are counts or classes, which must not be averaged, and whose nodata value is one.
        nodata_below: values under this are holes, whatever the file says.

    Raises:
        InputError: a file that is not a raster, is turned, is not in metres, has another number of bands, or bytes
            where the shards hold larger numbers of the modality.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        bands: int,
        gsd: float,
        dates: np.ndarray | None,
        *,
        counted: bool = False,
        nodata_below: float | None = None,
    ) -> None:
        self.name, self.path, self.gsd, self.dates, self._nodata_below = name, path, gsd, dates, nodata_below
        self._doubted = False
        self._shape = (bands,) if dates is None else (len(dates), bands)
        try:
            self._file = rasterio.open(path)
        except RasterioError as error:
            raise InputError(f"{name}={path}: cannot be opened as a raster: {gdal_reason(error)}") from error
        transform = self._file.transform
        if transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
            raise InputError(f"{path} is turned or has no georeference: write it north up, e.g. with gdalwarp")
        crs = self._file.crs
        if crs is not None and not (crs.is_projected and math.isclose(crs.linear_units_factor[1], 1.0)):
            raise InputError(f"{path} is in {_short(crs)}, not in metres: e.g. gdalwarp -t_srs EPSG:2154")
        wanted = math.prod(self._shape)
        alphas = [interpretation == ColorInterp.alpha for interpretation in self._file.colorinterp]
        # A mask inside or beside the file is no band, and is lost where a raster is seen through another grid.
        flags = self._file.mask_flag_enums[0]
        masked = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags and self._file.count == wanted
        if masked or any(alphas[:wanted]):
            # GDAL takes the fourth of four bands of bytes for an alpha unless it is told: it is infrared.
            alphas = [False] * self._file.count + [True] * masked
            self._file = _rewritten(self._file, mask_as_alpha=masked)
        if self._file.count != wanted and not (self._file.count == wanted + 1 and alphas[-1]):
            of = "" if dates is None else f" of {len(dates)} dates with {bands} bands each"
            raise InputError(f"{path} has {self._file.count} bands; {name} needs {wanted}{of}")
        if not counted:
            self._check_values()
        pixel = max(transform.a, -transform.e)
        self._resampling = Resampling.average if pixel < _FINER * gsd else Resampling.bilinear
        self._counted = counted
        if counted:
            self._resampling = Resampling.nearest
        self._bands = list(range(1, wanted + 1))
        # Where nothing else tells what is outside, an alpha band made for the window does; it comes last.
        self._has_alpha = self._file.count > wanted
        self._adds_alpha = self._file.nodata is None and not self._has_alpha

    def _check_values(self) -> None:
        """Raise ``InputError`` for bytes where models learn from larger whole numbers, or the other way round.

        Those are of other units for sure. Reals may be anything, and are taken as they are.
        """
        if self.name not in FLAIR_HUB:
            return
        stored, given = np.dtype(FLAIR_HUB[self.name].dtype), np.dtype(self._file.dtypes[0])
        if stored.kind != "f" and given.kind != "f" and (stored.itemsize == 1) != (given.itemsize == 1):
            raise InputError(
                f"{self.path} holds {given}, and models learn {self.name} from {stored}: bring it to those units, e.g. "
                f"gdal_translate -scale ... -ot {_GDAL_TYPES[str(stored)]}"
            )

    @property
    def extent(self) -> Extent:
        """What it covers."""
        bounds = self._file.bounds
        return Extent(self._file.crs, bounds.left, bounds.top, bounds.right - bounds.left, bounds.top - bounds.bottom)

    def overlaps(self, other: Extent) -> bool:
        """Whether it covers some of that ground."""
        own = self.extent
        across = own.left < other.left + other.width and own.left + own.width > other.left
        return across and own.top > other.top - other.height and own.top - own.height < other.top

    def check_crs(self, reference: MapRaster) -> None:
        """Check that both rasters' coordinate systems put this one at the same place.

        Raises:
            InputError: they do not, or one of the two rasters has none.
        """
        own, theirs = self._file.crs, reference._file.crs
        if own == theirs:
            return
        if own is None or theirs is None:
            which = self.path if own is None else reference.path
            raise InputError(f"{which} has no coordinate system and other rasters have: e.g. gdal_edit.py -a_srs")
        bounds = self._file.bounds
        xs, ys = [bounds.left, bounds.right], [bounds.top, bounds.bottom]
        try:
            moved = reprojected(own, theirs, xs, ys)
        except (CRSError, RasterioError) as error:
            raise InputError(f"{self.path}: {_short(own)} is not {_short(theirs)} of {reference.path}") from error
        shift = max(abs(a - b) for old, new in zip((xs, ys), moved[:2], strict=True) for a, b in zip(old, new))
        if shift > _TOLERANCE * self._file.transform.a:
            raise InputError(
                f"{self.path} is in {_short(own)} and {reference.path} in {_short(theirs)}, {shift:.3g} m apart: "
                "reproject one, e.g. with gdalwarp -t_srs"
            )

    def read(self, left: float, top: float, side: float) -> np.ndarray:
        """The ground window, (C, H, W) or (T, C, H, W) float32; NaN where the raster has no data or does not reach.

        Raises:
            InputError: the file cannot be read there.
        """
        pixels = round(side / self.gsd)
        settings: dict[str, Any] = {
            "crs": self._file.crs,
            "transform": Affine(self.gsd, 0.0, left, 0.0, -self.gsd, top),
            "width": pixels,
            "height": pixels,
            "resampling": Resampling.nearest if self._on_its_pixels(left, top) else self._resampling,
        }
        # Each band has its own holes: a date that is missing somewhere is not one where another is there.
        settings |= {"add_alpha": True} if self._adds_alpha else {"UNIFIED_SRC_NODATA": "PARTIAL"}
        if not self.overlaps(Extent(self._file.crs, left, top, side, side)):
            return np.full((*self._shape, pixels, pixels), np.nan, np.float32)
        try:
            with WarpedVRT(self._file, **settings) as view:
                stored = view.read(self._bands)
                if self._counted:
                    there = self._reached(left, top, pixels)
                elif self._has_alpha or self._adds_alpha:
                    there = view.read(view.count) > 0
                else:
                    # GDAL's own masks of a warped raster read it once more for each band: of a series of large blocks
                    # they take a hundred times as long as the values, which tell the same.
                    nodata = self._file.nodata
                    there = ~np.isnan(stored) if np.isnan(nodata) else stored != nodata
        except RasterioError as error:
            raise InputError(f"{self.path}: cannot be read: {gdal_reason(error)}") from error
        values = stored.astype(np.float32)
        values[~np.broadcast_to(there, values.shape)] = np.nan
        if self._nodata_below is not None:
            values[values < self._nodata_below] = np.nan
        return values.reshape(*self._shape, pixels, pixels)

    def doubt_units(self, values: np.ndarray, spec: InputSpec) -> None:
        """Say once, on stderr, that values of a window, of any shape, are far from all that the model has learned from.

        Reflectances from 0 to 1 where it read whole numbers, say, give a map without an error.
        """
        if self._doubted or spec.representation != "linear":
            return
        large, usual = float(np.nanmax(values, initial=-math.inf)), np.array(spec.mean)
        if not np.isfinite(large) or usual.min() <= 0 or usual.min() / _FAR < large < usual.max() * _FAR:
            return
        self._doubted = True
        print(
            f"bocage: {self.path}: values up to {large:.3g}, where the model has learned {self.name} from means of "
            f"{usual.min():.3g} to {usual.max():.3g}: are they in the same units?",
            file=sys.stderr,
        )

    def _on_its_pixels(self, left: float, top: float) -> bool:
        """Whether a grid with this corner has the raster's own pixels, which then need not be resampled."""
        transform = self._file.transform
        offsets = ((left - transform.c) / self.gsd, (top - transform.f) / self.gsd)
        same = math.isclose(transform.a, self.gsd, rel_tol=1e-6) and math.isclose(-transform.e, self.gsd, rel_tol=1e-6)
        return same and all(abs(offset - round(offset)) < _BESIDE for offset in offsets)

    def _reached(self, left: float, top: float, pixels: int) -> np.ndarray:
        """(pixels, pixels) bool: which pixels of a window have their centre in the raster."""
        extent, centres = self.extent, (np.arange(pixels) + 0.5) * self.gsd
        across = (left + centres >= extent.left) & (left + centres < extent.left + extent.width)
        down = (top - centres <= extent.top) & (top - centres > extent.top - extent.height)
        return np.outer(down, across)

    def describe(self) -> dict[str, Any]:
        """What tells this raster from another, for a resumed run."""
        files = [Path(name) for name in self._file.files] or [self.path]  # of a mosaic all that it names
        states = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
        return {
            "files": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
            "shape": [self._file.count, self._file.height, self._file.width],
            "dates": None if self.dates is None else self.dates.tolist(),
        }


def open_rasters(
    task: Segmentation, files: Mapping[str, Path], dates: Mapping[str, Path]
) -> tuple[dict[str, MapRaster], MapRaster]:
    """The rasters of a model's modalities and of the quality masks of its series, and the one that sets the grid.

    Args:
        task: the model.
        files: by name, at least one of the model's modalities.
        dates: by series, a text file with one date (YYYY-MM-DD) a line, in the order of the bands.

    Raises:
        InputError: names that the model does not read, dates that are missing or do not fit, or rasters in different
            coordinate systems; an official model needs all its modalities.
    """
    masks = {mask: series for series, mask in task.quality_masks.items()}
    if unknown := [name for name in files if name not in task.modalities and name not in masks]:
        read = ", ".join([*task.modalities, *masks])
        raise InputError(f"--raster {unknown[0]}: the model reads {read}")
    given = [name for name in task.modalities if name in files]
    if not given:
        raise InputError(f"--raster: give at least one of {', '.join(task.modalities)}")
    if task.model.official and (missing := [name for name in task.modalities if name not in files]):
        raise InputError(f"--raster {missing[0]}=FILE is missing: the official architecture needs all its sensors")
    if unused := [name for name in dates if name not in given or not task.model.encoder(name).spec.series]:
        raise InputError(f"--dates {unused[0]}: there is no raster of such a series")
    found = {}
    for name in given:
        spec = task.model.encoder(name).spec
        days = None
        if spec.series:
            if name not in dates:
                raise InputError(
                    f"--dates {name}=FILE is missing: a text file with one date a line, as bands have them"
                )
            days = read_dates(dates[name])
        found[name] = MapRaster(name, files[name], len(spec.bands), spec.gsd, days, nodata_below=spec.nodata_below)
    for mask, series in masks.items():
        if mask in files:
            if series not in found:
                raise InputError(f"--raster {mask}: it is the quality mask of {series}, of which there is no raster")
            bands = len(FLAIR_HUB[mask].bands)
            found[mask] = MapRaster(mask, files[mask], bands, found[series].gsd, found[series].dates, counted=True)
    reference = found[given[0]]
    if reference.extent.crs is None:
        print(f"bocage: {reference.path} has no coordinate system, and the map will have none", file=sys.stderr)
    for raster in found.values():
        raster.check_crs(reference)
        if not raster.overlaps(reference.extent):
            raise InputError(f"{raster.path} and {reference.path} do not overlap: they are of different places")
    return found, reference


def read_dates(path: Path) -> np.ndarray:
    """Days since 1970-01-01 of a text file with one date (YYYY-MM-DD) a line, (T,) int64.

    Raises:
        InputError: a file that cannot be read, or a line that is not a date.
    """
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    found = []
    for line in lines:
        try:
            found.append(date.fromisoformat(line).toordinal())
        except ValueError as error:
            raise InputError(f"{path}: {line!r} is not a date; one a line is expected, as 2021-05-15") from error
    return np.array(found, np.int64) - date(1970, 1, 1).toordinal()


def window_batch(
    rasters: Mapping[str, MapRaster], windows: Sequence[tuple[float, float]], side: float
) -> tuple[Batch, np.ndarray]:
    """Ground windows as a batch, holes of which are NaN.

    Args:
        rasters: by modality.
        windows: left and top of each, in the rasters' coordinates.
        side: of all, metres.

    Returns:
        The batch, and which samples have any data at all, (B,) bool.
    """
    values = {name: np.stack([raster.read(*at, side) for at in windows]) for name, raster in rasters.items()}
    count = len(windows)
    present = {name: torch.ones(count, dtype=torch.bool) for name in rasters}
    dates, padding = {}, {}
    for name, raster in rasters.items():
        if raster.dates is not None:
            dates[name] = torch.from_numpy(days_since_may(raster.dates)).expand(count, -1)
            padding[name] = torch.zeros(count, len(raster.dates), dtype=torch.bool)
    inputs = [name for name in rasters if name not in FLAIR_HUB or FLAIR_HUB[name].is_input]
    seen = np.any([np.isfinite(values[name]).reshape(count, -1).any(axis=1) for name in inputs], axis=0)
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
    return batch, seen


def valid_pixels(batch: Batch, inputs: Sequence[str], size: int) -> np.ndarray:
    """Where any of the inputs has data, on the grid of the maps: (B, size, size) bool."""
    found = np.zeros((len(batch), size, size), bool)
    for name in inputs:
        finite = torch.isfinite(batch.values[name])
        while finite.ndim > len("BHW"):
            finite = finite.any(dim=1)
        place = np.arange(size) * finite.shape[-1] // size
        found |= finite.numpy()[:, place][:, :, place]
    return found


def _rewritten(file: rasterio.DatasetReader, *, mask_as_alpha: bool = False) -> rasterio.DatasetReader:
    """The same bands, of which none is an alpha: as a GDAL virtual raster, for which rasterio has no call.

    With ``mask_as_alpha`` the mask of the file comes as one more band, which is.
    """
    kind = _GDAL_TYPES.get(file.dtypes[0])
    if kind is None:
        raise InputError(f"{file.name}: values of type {file.dtypes[0]} cannot be read")
    nodata = "" if file.nodata is None else f"<NoDataValue>{file.nodata!r}</NoDataValue>"
    name = html.escape(str(Path(file.name).resolve()))

    def band(number: int, source: str, inside: str) -> str:
        return (
            f'<VRTRasterBand dataType="{kind}" band="{number}">{inside}<SimpleSource>'
            f'<SourceFilename relativeToVRT="0">{name}</SourceFilename><SourceBand>{source}</SourceBand></SimpleSource>'
            "</VRTRasterBand>"
        )

    bands = [band(number, str(number), nodata) for number in file.indexes]
    if mask_as_alpha:
        bands.append(band(file.count + 1, "mask,1", "<ColorInterp>Alpha</ColorInterp>"))
    reference = "" if file.crs is None else f"<SRS>{html.escape(file.crs.to_wkt())}</SRS>"
    corners = ", ".join(repr(value) for value in file.transform.to_gdal())
    return rasterio.open(
        f'<VRTDataset rasterXSize="{file.width}" rasterYSize="{file.height}">{reference}'
        f"<GeoTransform>{corners}</GeoTransform>{''.join(bands)}</VRTDataset>"
    )


def _short(crs: CRS) -> str:
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.to_wkt().partition('"')[2].partition('"')[0]
