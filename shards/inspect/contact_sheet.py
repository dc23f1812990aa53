"""Draw contact sheets of patches: composites, shaded relief, date strips, radar in decibels, classes.

A dataset may have any sensors. An image without the colours red, green and blue is drawn in grey, band by band. Patches
of one pixel are drawn as curves over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.dates import AutoDateLocator
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import AutoLocator

from bocage.shards.errors import InputError, counted
from bocage.shards.files import atomic_write
from bocage.shards.format.codec import CodecError, decode
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.composites import (
    colour_bands,
    has_both_polarisations,
    hillshade,
    palette,
    series_composites,
)
from bocage.shards.modality import Band, Modality, Registry
from bocage.shards.preprocess.normalize import represent
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.raster import RasterError, gdal_environment

# Inches.
_WIDTH, _MARGIN, _TOP = 12.0, 0.25, 0.62
_COLUMNS, _GAP, _TITLE = 4, 0.22, 0.24  # large pictures per row, gap between them, height of a title
_SIDE = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS
_DATES = 10  # dates of a series, spread evenly
_SCALE = 0.42  # height of the colour bar below a picture
_STRETCH = (2.0, 98.0)
_NEAR_INFRARED = 840.0  # nm
_GREY_BANDS = 4  # bands of an image without colours that are drawn, each in grey
_LEGEND_GAP, _LEGEND_ROW = 0.12, 0.19  # gap above a legend, and height of a line
_CURVE_HEIGHT, _CURVE_AXIS = 1.5, 0.35  # of the curves of a series of one pixel, and of the dates below them
_LEGEND_WIDTH = 1.1  # of the names of bands beside the curves
_STRIP_SIDE = (_WIDTH - 2 * _MARGIN - (_DATES - 1) * 0.08) / _DATES  # of the pictures of a series


@dataclass(frozen=True)
class _Sample:
    """One patch with its rasters.

    Attributes:
        key: key of the patch.
        roi: region of interest.
        arrays: rasters of the patch, by modality.
        dates: days since 1970-01-01 of series, by modality; empty or missing if unknown.
    """

    key: str
    roi: str
    arrays: dict[str, np.ndarray]
    dates: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Row:
    """One row of the sheet: its height in inches, and a function that draws it at a distance from the top."""

    height: float
    draw: Callable[[_Page, float], None]


def save_sheet(figure: Figure, path: Path) -> None:
    """Save a contact sheet as PNG, and create its folder.

    Raises:
        InputError: ``path`` cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def contact_sheet(manifest: Manifest, row: int) -> Figure:
    """Draw one sample of shards: images, then a row of dates for each series, then labels with a legend.

    Args:
        manifest: an open manifest of local or remote shards.
        row: row of the sample.

    Raises:
        InputError: an array of the sample is damaged, or contradicts its modality.
    """
    index = manifest.index
    dates = {item.name: index.dates(item.name, row) for item in manifest.registry.by_role("series")}
    return _draw(manifest.registry, [_Sample(index.key(row), index.roi(row), _read_arrays(manifest, row), dates)])


def catalogue_sheet(catalogue: Catalogue, indices: Sequence[int], count: int) -> Figure:
    """Draw patches that are not in shards yet, each as ``contact_sheet`` does.

    Args:
        catalogue: source of the patches.
        indices: indices of patches, the preferred ones first.
        count: number of patches to draw; those that cannot be read are left out.

    Raises:
        InputError: none of the patches can be read.
    """
    samples: list[_Sample] = []
    problem: RasterError | None = None
    with gdal_environment():
        for index in indices:
            patch = catalogue.patch(index)
            try:
                arrays = {
                    name: source.read_raster(catalogue.registry[name]).array for name, source in patch.sources.items()
                }
            except RasterError as error:
                problem = error
                continue
            samples.append(_Sample(patch.key, patch.roi, arrays, patch.dates))
            if len(samples) == count:
                break
    if not samples:
        raise InputError(f"none of {counted(len(indices), 'patch')} can be drawn, e.g. {problem}")
    return _draw(catalogue.registry, samples)


def _draw(registry: Registry, samples: Sequence[_Sample]) -> Figure:
    """Draw samples below each other."""
    rows = [row for sample in samples for row in _rows(registry, sample)]
    page = _Page(sum(row.height for row in rows) + _MARGIN)
    top = 0.0
    for row in rows:
        row.draw(page, top)
        top += row.height
    return page.figure


def _rows(registry: Registry, sample: _Sample) -> list[_Row]:
    """Rows of one sample. Images and labels share a row if they fit and there is no series."""
    extent = registry.patch_size

    def draw_title(page: _Page, top: float) -> None:
        page.text(_MARGIN, top + 0.12, sample.key, fontsize=13, weight="bold")
        ground = f"{sample.roi}, {extent:g} m x {extent:g} m, north up"
        page.text(_MARGIN, top + 0.38, ground, fontsize=9, color="#444444")

    title = _Row(_TOP, draw_title)
    if all(item.size == 1 for item in registry.values()):
        return [title, *_pixel_rows(registry, sample)]
    images = [
        _Cell(_SCALE, tile.draw)
        for item in registry.by_role("image")
        for tile in _image_tiles(item, sample.arrays.get(item.name))
    ]
    series = [
        _Row(_strip_height(item), partial(_draw_series, sample=sample, modality=item))
        for item in registry.by_role("series")
    ]
    labels = [
        _label_cell(item, index, sample.arrays.get(item.name))
        for item in registry.labels
        for index in range(len(item.bands))
    ]
    if not series and len(images) + len(labels) <= _COLUMNS:
        return [title, *_grid([*images, *labels])]
    return [title, *_grid(images), *series, *_grid(labels)]


def _pixel_rows(registry: Registry, sample: _Sample) -> list[_Row]:
    """Rows of a patch of one pixel: a line with its single values and classes, then the curves of each series."""
    texts = []
    for item in (*registry.by_role("image"), *registry.labels):
        array = sample.arrays.get(item.name)
        for index, band in enumerate(item.bands):
            value = "missing" if array is None else f"{array[index, 0, 0]:g}"
            if array is not None and band.scheme is not None:
                value = band.scheme.classes[min(int(array[index, 0, 0]), len(band.scheme) - 1)]
            texts.append(f"{item.name} {band.name}: {value}" if band.name != item.name else f"{item.name}: {value}")

    def draw_texts(page: _Page, top: float) -> None:
        page.text(_MARGIN, top + 0.02, ", ".join(texts), fontsize=9)

    curves = [
        _Row(_TITLE + _CURVE_HEIGHT + _CURVE_AXIS, partial(_draw_curves, sample=sample, modality=item))
        for item in registry.by_role("series")
    ]
    return [_Row(_TITLE + 0.1, draw_texts), *curves]


def _draw_curves(page: _Page, top: float, sample: _Sample, modality: Modality) -> None:
    """Draw the channels of a series of one pixel over its dates."""
    array = sample.arrays.get(modality.name)
    axis = page.axes(_MARGIN + 0.4, top + _TITLE, _WIDTH - 2 * _MARGIN - 0.4 - _LEGEND_WIDTH, _CURVE_HEIGHT)
    if array is None or len(array) == 0:
        page.text(_MARGIN, top + 0.05, modality.name, fontsize=8.5)
        _draw_missing(axis, "missing" if array is None else "no date")
        return
    values = represent(array, modality.representation, modality.nodata_below, modality.nodata_above)[:, :, 0, 0]
    title = f"{modality.name}: {counted(len(array), 'date')}{', dB' if _is_radar(modality) else ''}"
    if any(band.quantity == "other" for band in modality.bands):  # of different units
        limits = [_limits(channel, (0.0, 100.0)) for channel in values.T]
        values = np.stack([(channel - low) / (high - low) for channel, (low, high) in zip(values.T, limits)], axis=1)
        title += ", each band scaled to its range"
    page.text(_MARGIN, top + 0.05, title, fontsize=8.5)
    days = sample.dates.get(modality.name, np.empty(0, np.int32))
    times = days.astype("datetime64[D]") if len(days) == len(array) else np.arange(1, len(array) + 1)
    for number, (name, channel) in enumerate(zip(modality.channels, values.T)):
        colour = colormaps["turbo"](0.1 + 0.8 * number / max(1, len(modality.channels) - 1))
        axis.plot(times, channel, marker=".", markersize=4, linewidth=1, color=colour, label=name)
    axis.xaxis.set_major_locator(AutoDateLocator() if len(days) == len(array) else AutoLocator())
    axis.yaxis.set_major_locator(AutoLocator())
    axis.tick_params(labelsize=7, length=2)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), fontsize=7, frameon=False, labelspacing=0.3)


@dataclass(frozen=True)
class _Cell:
    """A large picture: the height of what is below it, in inches, and a function that draws it at left and top."""

    below: float
    draw: Callable[[_Page, float, float], None]


def _grid(cells: Sequence[_Cell]) -> list[_Row]:
    """Rows of large pictures."""
    rows = []
    for start in range(0, len(cells), _COLUMNS):
        part = cells[start : start + _COLUMNS]

        def draw(page: _Page, top: float, part: Sequence[_Cell] = part) -> None:
            for column, cell in enumerate(part):
                cell.draw(page, _MARGIN + column * (_SIDE + _GAP), top + _TITLE)

        rows.append(_Row(_TITLE + _SIDE + max(cell.below for cell in part), draw))
    return rows


def _label_cell(modality: Modality, index: int, array: np.ndarray | None) -> _Cell:
    fractions = _class_fractions(modality.bands[index], array, index)
    draw = partial(_draw_label, modality=modality, index=index, array=array, fractions=fractions)
    return _Cell(_LEGEND_GAP + len(fractions) * _LEGEND_ROW, draw)


class _Page:
    """Figure with positions in inches from its upper left corner."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        FigureCanvasAgg(self.figure)
        self._height = height

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / _WIDTH, 1 - (top + height) / self._height, width / _WIDTH, height / self._height)
        axis = self.figure.add_axes(box)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="#888888", linewidth=0.5)
        return axis

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        self.figure.text(left / _WIDTH, 1 - top / self._height, text, va="top", **style)


class _Tile:
    """One large picture: (H, W, 3) in [0, 1], or (H, W) with a colour bar in ``unit``; None if it is missing."""

    def __init__(self, title: str, picture: np.ndarray | None, note: str = "", unit: str = "") -> None:
        self._title, self._picture, self._note, self._unit = title, picture, note, unit

    def draw(self, page: _Page, left: float, top: float) -> None:
        axis = page.axes(left, top, _SIDE, _SIDE)
        axis.set_title(self._title, fontsize=8.5, loc="left", pad=3)
        if self._picture is None:
            _draw_missing(axis)
            return
        if self._unit:
            low, high = _limits(self._picture, (0.0, 100.0))
            image = axis.imshow(self._picture, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            _draw_scale(page, image, self._unit, left, top + _SIDE + 0.07, _SIDE - 0.2)
        else:
            axis.imshow(self._picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            page.text(left, top + _SIDE + 0.05, self._note, fontsize=7, color="#444444")


def _read_arrays(manifest: Manifest, row: int) -> dict[str, np.ndarray]:
    index, arrays = manifest.index, {}
    shard = int(index.shard[row])
    for name, modality in manifest.registry.items():
        length = int(index.length[name][row])
        if length == 0:
            continue
        try:
            array = decode(manifest.files.read(shard, int(index.offset[name][row]), length))
        except CodecError as error:
            raise InputError(
                f"{manifest.files.name(shard)}: {name} of {index.key(row)} is damaged: {error}; run `bocage verify`"
            ) from error
        if array.shape != modality.shape(len(array) if array.ndim else 0) or array.dtype != np.dtype(modality.dtype):
            raise InputError(
                f"{manifest.files.name(shard)}: {name} of {index.key(row)} is {array.dtype} of {array.shape}, but "
                f"{name} is {modality.dtype} of {modality.shape(len(array) if array.ndim else 0)}"
            )
        arrays[name] = array
    return arrays


def _represent(array: np.ndarray, modality: Modality) -> np.ndarray:
    return represent(array, modality.representation, modality.nodata_below, modality.nodata_above)


def _image_tiles(modality: Modality, array: np.ndarray | None) -> list[_Tile]:
    quantities = [band.quantity for band in modality.bands]
    note = f"{modality.gsd:g} m, {modality.size} x {modality.size} px, {modality.dtype}"
    if "surface_height" in quantities and "terrain_height" in quantities:
        return _height_tiles(modality, array, quantities, note)
    names = [band.name for band in modality.bands]
    shown = None if array is None else _represent(array, modality)
    if has_both_polarisations(modality):
        picture = None if shown is None else series_composites(shown[None], modality, np.array([True]))[0]
        return [_Tile(f"{modality.name}: VV, VH, VV - VH in dB", picture, note)]
    colours = colour_bands(modality)
    if colours is None:
        composites = [[band, band, band] for band in range(min(len(names), _GREY_BANDS))]
        titles = [f"{modality.name}: {name}" for name in names]
    else:
        composites = [colours]
        wavelengths = [band.wavelength or 0.0 for band in modality.bands]
        infrared = int(np.argmin(np.abs(np.array(wavelengths) - _NEAR_INFRARED)))
        if infrared not in colours:
            composites.append([infrared, *colours[:2]])
        titles = [f"{modality.name}: {' '.join(names[k] for k in bands)}" for bands in composites]
    pictures = [None if shown is None else _stretch(shown[bands], bands == colours) for bands in composites]
    return [_Tile(title, picture, note) for title, picture in zip(titles, pictures)]


def _height_tiles(modality: Modality, array: np.ndarray | None, quantities: list[Any], note: str) -> list[_Tile]:
    titles = [f"{modality.name}: {content}" for content in ("surface, shaded", "terrain, shaded", "surface - terrain")]
    if array is None:
        return [_Tile(title, None) for title in titles]
    heights = represent(array, "linear", modality.nodata_below, modality.nodata_above).astype(np.float64)
    surface, terrain = (heights[quantities.index(name)] for name in ("surface_height", "terrain_height"))
    shaded = [np.nan_to_num(hillshade(values, modality.gsd)) for values in (surface, terrain)]
    return [
        _Tile(titles[0], shaded[0], f"{_format_range(surface)}, {note}"),
        _Tile(titles[1], shaded[1], f"{_format_range(terrain)}, {note}"),
        _Tile(titles[2], surface - terrain, unit="m"),
    ]


def _format_range(values: np.ndarray) -> str:
    if not np.isfinite(values).any():
        return "no height"
    return f"{np.nanmin(values):.1f} to {np.nanmax(values):.1f} m"


def _stretch(bands: np.ndarray, common: bool = False) -> np.ndarray:
    """Stretch (3, H, W) to (H, W, 3) in [0, 1] between the 2nd and 98th percentile of each band; nodata is black.

    ``common`` uses the percentiles of all bands together, which keeps true colours.
    """
    axes = (0, 1, 2) if common else (1, 2)
    if not np.isfinite(bands).any(axis=axes).all():
        return np.zeros((*bands.shape[1:], 3), np.float32)
    low, high = np.nanpercentile(bands, _STRETCH, axis=axes, keepdims=True)
    stretched = np.clip((bands - low) / np.maximum(high - low, 1e-6), 0, 1)
    return np.nan_to_num(stretched).transpose(1, 2, 0)


def _limits(values: np.ndarray, percentiles: tuple[float, float] = _STRETCH) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, percentiles)
    return float(low), float(max(high, low + 1e-3))


def _is_radar(modality: Modality) -> bool:
    return modality.representation == "decibel" and modality.bands[0].quantity.startswith("backscatter")


def _strip_height(modality: Modality) -> float:
    return _TITLE + _STRIP_SIDE + (0.62 if _is_radar(modality) else 0.28)


def _draw_series(page: _Page, top: float, sample: _Sample, modality: Modality) -> None:
    """Draw a strip of dates."""
    array, side = sample.arrays.get(modality.name), _STRIP_SIDE
    if array is None or len(array) == 0:
        page.text(_MARGIN, top + 0.05, f"{modality.name}", fontsize=8.5)
        _draw_missing(
            page.axes(_MARGIN, top + _TITLE, _WIDTH - 2 * _MARGIN, side), "missing" if array is None else "no date"
        )
        return
    days = sample.dates.get(modality.name, np.empty(0, np.int32))
    chosen = np.unique(np.linspace(0, len(array) - 1, min(_DATES, len(array))).astype(int))
    title = f"{modality.name}: {len(chosen)} of {counted(len(array), 'date')}, {modality.gsd:g} m"
    shown = represent(array[chosen], modality.representation, modality.nodata_below, modality.nodata_above)
    if _is_radar(modality):
        page.text(_MARGIN, top + 0.05, f"{title}, {modality.bands[0].name} in dB", fontsize=8.5)
        low, high = _limits(shown[:, 0][array[chosen, 0] > 0])  # zeros at the edge of a swath are nodata
    else:
        colours = colour_bands(modality) or [0]
        names = " ".join(modality.bands[k].name for k in colours)
        page.text(_MARGIN, top + 0.05, f"{title}, {names}, one stretch for all dates", fontsize=8.5)
        pictures = series_composites(shown, modality, _clear_dates(shown))
    for column, index in enumerate(chosen):
        left = _MARGIN + column * (side + 0.08)
        axis = page.axes(left, top + _TITLE, side, side)
        if _is_radar(modality):
            image = axis.imshow(shown[column, 0], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        else:
            axis.imshow(pictures[column], interpolation="nearest")
        day = str(days[index].astype("datetime64[D]")) if len(days) == len(array) else f"step {index + 1}"
        axis.set_xlabel(day, fontsize=7.5, labelpad=2)
    if _is_radar(modality):
        _draw_scale(page, image, f"{modality.bands[0].name}, dB", _MARGIN, top + _TITLE + side + 0.24, 3.0)


def _clear_dates(frames: np.ndarray) -> np.ndarray:
    """The darker half of the dates, (T,) bool: bright clouds and snow must not determine the contrast."""
    brightness = np.nan_to_num(frames, nan=np.inf).reshape(len(frames), -1).mean(axis=1)
    return brightness <= np.median(brightness)


def _class_fractions(band: Band, array: np.ndarray | None, index: int) -> list[tuple[int, float]]:
    """Class values with their fraction of the pixels, the most frequent first."""
    if array is None or band.scheme is None:
        return []
    values, counts = np.unique(array[index], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(values[k]), float(counts[k] / counts.sum())) for k in order if values[k] < len(band.scheme)]


def _draw_label(
    page: _Page,
    left: float,
    top: float,
    *,
    modality: Modality,
    index: int,
    array: np.ndarray | None,
    fractions: list[tuple[int, float]],
) -> None:
    scheme = modality.schemes[index]
    axis = page.axes(left, top, _SIDE, _SIDE)
    axis.set_title(f"{scheme.name} ({modality.gsd:g} m)", fontsize=8.5, loc="left", pad=3)
    if array is None:
        _draw_missing(axis)
        return
    axis.imshow(palette(scheme)[np.minimum(array[index], len(scheme) - 1)], interpolation="nearest")
    handles = [
        Patch(facecolor=f"#{scheme.colours[value]}", edgecolor="#888888", linewidth=0.5) for value, _ in fractions
    ]
    names = [f"{scheme.classes[value]}  {fraction:.1%}" for value, fraction in fractions]
    axis.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.0, -0.02),
        fontsize=7,
        frameon=False,
        borderaxespad=0.0,
        borderpad=0.2,
        handlelength=1.4,
        labelspacing=0.35,
    )


def _draw_missing(axis: Axes, text: str = "missing") -> None:
    axis.set_facecolor("#f2f2f2")
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, color="#777777", transform=axis.transAxes)


def _draw_scale(page: _Page, image: ScalarMappable, unit: str, left: float, top: float, width: float) -> None:
    axis = page.axes(left, top, width, 0.09)
    bar = page.figure.colorbar(image, cax=axis, orientation="horizontal")
    bar.ax.tick_params(labelsize=7, length=2, pad=1)
    bar.outline.set_linewidth(0.5)
    page.text(left + width + 0.06, top - 0.02, unit, fontsize=7)
