"""Draw the attention over dates of each patch, and write a table of all dates."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.composites import series_composites
from bocage.shards.modality import Modality
from bocage.ssl.encoders.utae import UTAE
from bocage.ssl.evaluation.attention import DateAttention, compute_attention
from bocage.ssl.evaluation.reconstructions import save_figure

TABLE_FILE = "attention.csv"

_COLUMNS = ("key", "date", "attention", "used", "cloud_or_snow_percent", "effective_dates")

_TOP_DATES = 6  # shown large, with an attention map
_BAR_COLOUR, _TOP_COLOUR, _UNUSED_COLOUR, _NAN_COLOUR = "#9ebcda", "#2b6ca3", "#d95f02", "#e4e4e4"

# Sizes in inches. Each date is a column with the same position and width in all panels.
_PAGE_WIDTH, _LEFT, _PANEL_WIDTH = 10.91, 0.8, 9.4
_COLORBAR_LEFT, _COLORBAR_WIDTH = _LEFT + _PANEL_WIDTH + 0.1, 0.1
_THUMBNAIL_SIDES = (0.27, 0.6)  # minimum and maximum
_GAP = 0.03  # between thumbnails
_LABEL_SPACING = 0.13  # minimum distance between two date labels
_HEAD_HEIGHT, _MIN_HEADS_HEIGHT, _MAX_HEADS_HEIGHT = 0.13, 0.9, 2.3
_BARS_HEIGHT, _CLOUDS_HEIGHT, _MAP_SIDE = 1.7, 0.13, 1.3


def write_attention(
    encoder: UTAE,
    manifest: Manifest,
    rows: np.ndarray,
    out: Path,
    *,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``OUT/KEY.png`` for each patch, and ``OUT/attention.csv`` with a line per patch and date.

    Columns: ``key``; ``date``, the calendar day; ``attention``, mean over heads and pixels; ``used``, ``no`` at dates
    masked because of clouds or snow; ``cloud_or_snow_percent``, empty without a quality mask; ``effective_dates`` of
    the patch.

    Args:
        encoder, manifest, rows, batch_size, device: see ``compute_attention``.
        out: output folder, created if missing; files with the same names are replaced.
        progress: callback that receives the number of finished patches.

    Returns:
        Path of the table.

    Raises:
        InputError: ``out`` cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: the folder cannot be created: {error.strerror}") from error
    modality = manifest.registry[encoder.spec.modality]
    table = out / TABLE_FILE
    with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        patches = compute_attention(encoder, manifest, rows, batch_size=batch_size, device=device)
        for done, patch in enumerate(patches, start=1):
            save_figure(attention_figure(patch, modality), out / f"{patch.key}.png")
            writer.writerows(_table_lines(patch))
            if progress is not None:
                progress(done)
    return table


def _table_lines(item: DateAttention) -> Iterator[tuple[str, ...]]:
    effective = f"{item.effective_dates:.3f}"
    for index, day in enumerate(item.days):
        cloud_or_snow = "" if item.cloud_or_snow is None else f"{item.cloud_or_snow[index]:.1f}"
        used = "yes" if item.used[index] else "no"
        yield item.key, str(day), f"{item.by_date[index]:.6f}", used, cloud_or_snow, effective


class _Page:
    """Figure that is filled from top to bottom, with sizes in inches."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(_PAGE_WIDTH, height))
        FigureCanvasAgg(self.figure)
        self._height = height
        self._top = height  # upper edge of the free space

    def axes(self, height: float, left: float = _LEFT, width: float = _PANEL_WIDTH) -> Axes:
        """Add axes at the top of the free space, without consuming it."""
        box = (left / _PAGE_WIDTH, (self._top - height) / self._height, width / _PAGE_WIDTH, height / self._height)
        return self.figure.add_axes(box)

    def text(self, x: float, text: str, **style: Any) -> None:
        """Add text at the top of the free space, ``x`` inches from the left."""
        self.figure.text(x / _PAGE_WIDTH, self._top / self._height, text, va="top", **style)

    def move_down(self, height: float) -> None:
        """Consume the upper ``height`` inches of the free space."""
        self._top -= height


def attention_figure(item: DateAttention, modality: Modality) -> Figure:
    """Draw the attention of a patch.

    From top to bottom: thumbnails of all dates, in staggered rows; mean attention per date, with the interquartile
    range of the heads; cloud or snow; attention per head; and the dates with the most attention, with their maps. Dates
    masked from the encoder have an orange frame and a cross. Dates are equally spaced columns, not a time axis.

    Args:
        item: attention of a patch with at least one date.
        modality: sensor of the series, which sets the colours.
    """
    count, heads = len(item.days), len(item.attention)
    column = _PANEL_WIDTH / count
    side = float(np.clip(column - _GAP, *_THUMBNAIL_SIDES))
    levels = math.ceil((side + _GAP) / column)
    thumbnails_height = levels * (side + _GAP)
    heads_height = min(max(heads * _HEAD_HEIGHT, _MIN_HEADS_HEIGHT), _MAX_HEADS_HEIGHT)
    clouds_height = 0.0 if item.cloud_or_snow is None else _CLOUDS_HEIGHT + 0.06
    used = np.flatnonzero(item.used)
    top = used[np.argsort(-item.by_date[used], kind="stable")][:_TOP_DATES]

    height = 0.5 + thumbnails_height + 0.35 + _BARS_HEIGHT + 0.08 + clouds_height + heads_height + 0.95 + 0.2
    page = _Page(height + 2 * _MAP_SIDE + 0.25)
    page.move_down(0.1)
    page.text(_LEFT, f"{item.key}   {modality.name}", fontsize=11, weight="bold")
    page.move_down(0.2)
    page.text(
        _LEFT,
        f"dates used: {len(used)} of {count}, heads: {heads}, effective number of dates: {item.effective_dates:.1f}",
        fontsize=8.5,
    )
    page.move_down(0.2)
    pictures = series_composites(item.frames, modality, item.used)
    _draw_thumbnails(page.axes(thumbnails_height), pictures, item.used, top, side, levels)
    page.move_down(thumbnails_height + 0.35)
    _draw_bars(_with_columns(page.axes(_BARS_HEIGHT), count), item, top)
    page.move_down(_BARS_HEIGHT + 0.08)
    if item.cloud_or_snow is not None:
        _draw_clouds(_with_columns(page.axes(_CLOUDS_HEIGHT), count), item.cloud_or_snow)
        page.move_down(clouds_height)
    image = _draw_heads(_with_columns(page.axes(heads_height), count), item, heads_height)
    _draw_colorbar(page, heads_height, image)
    page.move_down(heads_height + 0.95)
    _draw_maps(page, item, pictures, top)
    return page.figure


def _with_columns(axis: Axes, count: int) -> Axes:
    axis.set_xlim(-0.5, count - 0.5)
    axis.set_xticks([])
    return axis


def _draw_thumbnails(
    axis: Axes, pictures: np.ndarray, used: np.ndarray, top_dates: np.ndarray, side: float, levels: int
) -> None:
    """Draw thumbnails above their columns; dates alternate between ``levels`` rows, so that they do not overlap."""
    count = len(pictures)
    half = side / (_PANEL_WIDTH / count) / 2
    for index, picture in enumerate(pictures):
        top = index % levels * (side + _GAP)
        left, right = index - half, index + half
        box = (left, right, top + side, top)
        image = axis.imshow(picture, extent=box, aspect="auto", interpolation="nearest")
        image.set_clip_on(False)  # the outer thumbnails are wider than their columns
        colour = _TOP_COLOUR if index in top_dates else None if used[index] else _UNUSED_COLOUR
        if colour is not None:
            frame = Rectangle((left, top), 2 * half, side, fill=False, edgecolor=colour, linewidth=1.4, clip_on=False)
            axis.add_patch(frame)
    axis.set_axis_off()
    # imshow changed the limits to those of the last picture.
    axis.set(xlim=(-0.5, count - 0.5), ylim=(levels * (side + _GAP), 0.0))


def _draw_bars(axis: Axes, item: DateAttention, top_dates: np.ndarray) -> None:
    by_date, by_head = item.by_date, item.by_head
    used = np.flatnonzero(item.used)
    # Heads often attend to different dates, so their full range would dwarf the means. The panel below shows it.
    low, high = np.quantile(by_head, (0.25, 0.75), axis=0)
    colours = [_TOP_COLOUR if index in top_dates else _BAR_COLOUR for index in used]
    axis.bar(used, by_date[used], width=0.8, color=colours)
    axis.vlines(used, low[used], high[used], color="#333333", linewidth=1.0)
    axis.axhline(1 / len(used), color="black", linestyle=":", linewidth=0.8)
    tops = np.maximum(by_date, high)
    axis.set_ylim(0.0, 1.12 * tops.max())
    unused = np.flatnonzero(~item.used)
    axis.plot(unused, np.zeros(len(unused)), "x", color=_UNUSED_COLOUR, markersize=4, clip_on=False, zorder=3)
    for rank, index in enumerate(top_dates, start=1):
        axis.annotate(
            str(rank),
            (index, tops[index]),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            weight="bold",
            color=_TOP_COLOUR,
        )
    axis.set_ylabel("attention", fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(color=_BAR_COLOUR, label="mean over heads and pixels"),
        Patch(color=_TOP_COLOUR, label="most attended dates"),
        Line2D([], [], color="#333333", linewidth=1.0, label="middle half of the heads"),
        Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="even attention"),
    ]
    if len(unused):
        label = "left out: less than 95 % clear of clouds and snow"
        handles.append(Line2D([], [], color=_UNUSED_COLOUR, marker="x", linestyle="", label=label))
    axis.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(handles),
        fontsize=7.5,
        frameon=False,
        borderaxespad=0.1,
        borderpad=0.2,
    )


def _draw_clouds(axis: Axes, cloud_or_snow: np.ndarray) -> None:
    axis.pcolormesh(
        np.arange(len(cloud_or_snow) + 1) - 0.5, [0, 1], cloud_or_snow[None], cmap="Greys", vmin=0.0, vmax=100.0
    )
    axis.set_yticks([])
    axis.set_ylabel("cloud, snow", fontsize=7, rotation=0, ha="right", va="center")
    axis.text(len(cloud_or_snow) - 0.5, 0.5, " black: 100 %", va="center", fontsize=6.5)


def _draw_heads(axis: Axes, item: DateAttention, height: float) -> ScalarMappable:
    """Draw the attention of each head per date, with the calendar days below; ``height`` in inches."""
    heads, count = item.by_head.shape
    edges = np.arange(count + 1) - 0.5, np.arange(heads + 1) + 0.5
    image = axis.pcolormesh(*edges, np.where(item.used, item.by_head, np.nan), cmap="viridis", vmin=0.0)
    axis.set_facecolor(_NAN_COLOUR)
    axis.invert_yaxis()
    axis.set_yticks(range(1, heads + 1, math.ceil(heads * _LABEL_SPACING / height)))
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylabel("head", fontsize=8)
    _label_days(axis, item.days)
    return image


def _label_days(axis: Axes, days: np.ndarray) -> None:
    """Label the columns with calendar days, skipping some if there is no room."""
    step = math.ceil(_LABEL_SPACING * len(days) / _PANEL_WIDTH)
    ticks = range(0, len(days), step)
    axis.set_xticks(ticks, [str(days[tick]) for tick in ticks], rotation=90, fontsize=7)
    axis.tick_params(axis="x", length=2)


def _draw_colorbar(page: _Page, height: float, image: ScalarMappable) -> None:
    axis = page.axes(height, _COLORBAR_LEFT, _COLORBAR_WIDTH)
    page.figure.colorbar(image, cax=axis).ax.tick_params(labelsize=7)


def _draw_maps(page: _Page, item: DateAttention, pictures: np.ndarray, top_dates: np.ndarray) -> None:
    """Draw the dates with the most attention, and below them the mean attention of the heads at each pixel."""
    maps = item.attention[:, top_dates].mean(axis=0)
    page.move_down(0.2)
    space = (_PANEL_WIDTH - _TOP_DATES * _MAP_SIDE) / (_TOP_DATES - 1)
    for rank, index in enumerate(top_dates):
        above = page.axes(_MAP_SIDE, _LEFT + rank * (_MAP_SIDE + space), _MAP_SIDE)
        above.imshow(pictures[index], aspect="auto", interpolation="nearest")
        above.set_title(f"{rank + 1}:  {item.days[index]}   {100 * item.by_date[index]:.1f} %", fontsize=8)
        _hide_frame(above, "date" if rank == 0 else "")
    page.move_down(_MAP_SIDE + 0.05)
    for rank in range(len(top_dates)):
        below = page.axes(_MAP_SIDE, _LEFT + rank * (_MAP_SIDE + space), _MAP_SIDE)
        image = below.imshow(
            maps[rank], aspect="auto", vmin=0.0, vmax=maps.max(), cmap="magma", interpolation="nearest"
        )
        _hide_frame(below, "attention" if rank == 0 else "")
    _draw_colorbar(page, _MAP_SIDE, image)


def _hide_frame(axis: Axes, label: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(label, fontsize=8)
