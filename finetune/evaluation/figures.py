"""Draw pictures of predictions in the official colours, and of confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bocage.shards.classes import ClassScheme
from bocage.shards.files import atomic_write
from bocage.shards.inspect.composites import colour_bands, palette
from bocage.shards.modality import Modality
from bocage.shards.preprocess.normalize import represent

_STRETCH_PERCENTILES = (2.0, 98.0)  # shown as black and white
_PANEL_INCHES = 2.6


@dataclass
class Panel:
    """One patch of the picture, shown as a row.

    Attributes:
        key: key of the patch.
        image: (H, W, 3) float in [0, 1]; None when the patch has no image.
        truth: (H, W) class values; None without a label.
        predicted: (H, W) class values.
    """

    key: str
    image: np.ndarray | None
    truth: np.ndarray | None
    predicted: np.ndarray


def render_rgb(values: np.ndarray, modality: Modality) -> np.ndarray:
    """Convert stored values to an RGB picture, (H, W, 3) float in [0, 1].

    A series is reduced to the median over its dates. A sensor without colour bands is shown by its first band, in
    grey. Each band is stretched between its 2nd and 98th percentile; the bands of a single pixel are stretched
    together, which shows its colour.

    Args:
        values: (C, H, W), or (T, C, H, W) of a series without padded dates.
        modality: modality of the values.
    """
    values = represent(values, "linear", modality.nodata_below, modality.nodata_above)
    if values.ndim == 4:
        # Without a valid date, a pixel has no median, which nanmedian would warn of.
        has_value = np.isfinite(values).any(axis=0)
        values = np.where(has_value, np.nanmedian(np.where(has_value, values, 0.0), axis=0), np.nan)
    image = values[colour_bands(modality) or [0, 0, 0]]
    if not np.isfinite(image).any():
        return np.zeros((*image.shape[1:], 3), np.float32)
    axes = (1, 2) if image[0].size > 1 else (0, 1, 2)
    low, high = (np.nanpercentile(image, q, axis=axes, keepdims=True) for q in _STRETCH_PERCENTILES)
    stretched = (image - low) / np.maximum(high - low, 1e-6)
    return np.nan_to_num(stretched).clip(0.0, 1.0).transpose(1, 2, 0)


def draw_panels(path: Path, panels: Sequence[Panel], scheme: ClassScheme, title: str) -> None:
    """Write a PNG with one row per panel (input, label, prediction, error) and a legend of the classes in it.

    In the error column, correct pixels are grey, wrong ones red and unscored ones white.
    """
    colours = palette(scheme)
    columns = ("input", "label", "prediction", "error")
    figure = Figure(figsize=(_PANEL_INCHES * len(columns), _PANEL_INCHES * len(panels) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), len(columns), squeeze=False)
    shown: set[int] = set()
    for panel, row in zip(panels, axes, strict=True):
        errors = None if panel.truth is None else _errors(panel.truth, panel.predicted, scheme)
        maps = [panel.truth, panel.predicted]
        shown.update(*(np.unique(values).tolist() for values in maps if values is not None))
        pictures = [panel.image, *(None if values is None else colours[values] for values in maps), errors]
        for axis, picture in zip(row, pictures, strict=True):
            axis.set(xticks=[], yticks=[])
            if picture is None:
                axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes)
            else:
                axis.imshow(picture, interpolation="nearest")
        row[0].set_ylabel(panel.key, fontsize=6)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    handles = [Patch(facecolor=f"#{scheme.colours[value]}", edgecolor="grey") for value in sorted(shown)]
    names = [scheme.classes[value] for value in sorted(shown)]
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=7)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _errors(truth: np.ndarray, predicted: np.ndarray, scheme: ClassScheme) -> np.ndarray:
    """Return the error column of a panel, (H, W, 3) uint8."""
    correct, wrong = np.array([[205, 205, 205], [200, 30, 30]], np.uint8)
    picture = np.where((truth == predicted)[..., None], correct, wrong)
    picture[np.isin(truth, scheme.unscored)] = 255
    return picture


def draw_confusion(path: Path, matrix: np.ndarray, scheme: ClassScheme, title: str) -> None:
    """Write a PNG of a confusion matrix normalised by true class, in percent.

    Rows are the scored classes in the ground truth. Columns are these classes and all others predicted for them.
    Nothing is written when the matrix has no scored pixel.

    Args:
        path: output file; its folder is created.
        matrix: (classes, classes) pixel counts, [truth, prediction].
        scheme: classes of the matrix.
        title: title of the figure.
    """
    rows = [value for value in scheme.scored if matrix[value].any()]
    if not rows:
        return
    columns = rows + [value for value in range(len(scheme)) if value not in rows and matrix[rows, value].any()]
    counts = matrix[np.ix_(rows, columns)].astype(np.float64)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 0.34
    figure = Figure(figsize=(side * len(columns) + 3.0, side * len(rows) + 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(columns)), [scheme.classes[value] for value in columns], rotation=90, fontsize=7)
    frequencies = 100 * counts.sum(axis=1) / max(counts.sum(), 1)
    names = [f"{scheme.classes[value]} ({share:.1f} %)" for value, share in zip(rows, frequencies, strict=True)]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.set(xlabel="predicted", ylabel="truth (share of pixels)")
    for row, column in np.argwhere(percent >= 0.5):
        value = percent[row, column]
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color="w" if value > 55 else "k")
    axis.set_title(f"{scheme.name}, {title}: percent of the true class", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
