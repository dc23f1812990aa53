"""Attention over dates as a picture of each patch and one table of all dates."""

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
from bocage.shards.files import written_atomically
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.composites import date_pictures
from bocage.shards.modality import Modality
from bocage.ssl.encoders.utae import UTAE
from bocage.ssl.evaluation.attention import DateAttention, attend
from bocage.ssl.evaluation.reconstructions import save_figure

TABLE_FILE = "attention.csv"

_COLUMNS = ("key", "date", "attention", "used", "cloud_or_snow_percent", "effective_dates")

_FIRST = 6  # dates shown large, with a map
_BAR, _FIRST_BAR, _LEFT_OUT, _NO_VALUE = "#9ebcda", "#2b6ca3", "#d95f02", "#e4e4e4"

# Inches. Dates are columns of the same place and width in every row, so that they stand under each other.
_WIDTH, _LEFT, _ACROSS = 10.91, 0.8, 9.4
_SCALE_LEFT, _SCALE_WIDTH = _LEFT + _ACROSS + 0.1, 0.1
_THUMBNAIL = (0.27, 0.6)  # least and greatest side
_GAP = 0.03  # between thumbnails
_LABEL = 0.13  # least distance of two date labels
_HEAD = (0.13, 0.9, 2.3)  # height of a head; least and greatest height of all
_BARS, _TRACK, _MAP = 1.7, 0.13, 1.3  # heights of the bars, of the track of clouds and of a map


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
    """Write ``OUT/KEY.png`` for every row and one table, ``OUT/attention.csv``, with a line for each patch and date.

    Columns: ``key``; ``date``, the calendar day; ``attention``, mean over heads and pixels; ``used``, ``no`` where
    clouds or snow kept the date from the encoder; ``cloud_or_snow_percent``, empty without a quality mask;
    ``effective_dates``, of the patch.

    Args:
        encoder, manifest, batch_size, device: as for ``attend``.
        rows: (N,) int64, as for ``attend``.
        out: folder, made when missing; files of the same name are replaced.
        progress: called with the number of patches done so far.

    Returns:
        The path of the table.

    Raises:
        InputError: ``out`` cannot be a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a folder for the pictures: {error.strerror}") from error
    modality = manifest.registry[encoder.spec.modality]
    table = out / TABLE_FILE
    with written_atomically(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(_COLUMNS)
        for done, item in enumerate(attend(encoder, manifest, rows, batch_size=batch_size, device=device), start=1):
            save_figure(attention_figure(item, modality), out / f"{item.key}.png")
            lines.writerows(_lines(item))
            if progress is not None:
                progress(done)
    return table


def _lines(item: DateAttention) -> Iterator[tuple[str, ...]]:
    effective = f"{item.effective_dates:.3f}"
    for index, day in enumerate(item.days):
        unclear = "" if item.unclear is None else f"{item.unclear[index]:.1f}"
        used = "yes" if item.used[index] else "no"
        yield item.key, str(day), f"{item.by_date[index]:.6f}", used, unclear, effective


class _Page:
    """A figure that is filled from the top, in inches."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasAgg(self.figure)
        self._height = height
        self._top = height  # of what is still free

    def axes(self, height: float, left: float = _LEFT, width: float = _ACROSS) -> Axes:
        """Axes at the top of what is free, which stays free for others beside them."""
        box = (left / _WIDTH, (self._top - height) / self._height, width / _WIDTH, height / self._height)
        return self.figure.add_axes(box)

    def text(self, x: float, text: str, **style: Any) -> None:
        """Text whose upper edge is at the top of what is free, ``x`` inches from the left."""
        self.figure.text(x / _WIDTH, self._top / self._height, text, va="top", **style)

    def down(self, height: float) -> None:
        """Leave the uppermost ``height`` inches of what is free."""
        self._top -= height


def attention_figure(item: DateAttention, modality: Modality) -> Figure:
    """The attention picture of a patch.

    From above: every date as a thumbnail, in as many staggered rows as they need; the mean attention on each date, with
    the middle half of the heads; how cloudy it was; the attention of each head; and the dates of most attention with
    their maps. Dates that were kept from the encoder are framed in orange and crossed out. Columns stand for dates one
    by one, not for time.

    Args:
        item: of a patch with at least one date.
        modality: its sensor, for the colours.
    """
    count, heads = len(item.days), len(item.attention)
    column = _ACROSS / count
    side = float(np.clip(column - _GAP, *_THUMBNAIL))
    levels = math.ceil((side + _GAP) / column)
    strip = levels * (side + _GAP)
    each, least, greatest = _HEAD
    grid = min(max(heads * each, least), greatest)
    track = 0.0 if item.unclear is None else _TRACK + 0.06
    used = np.flatnonzero(item.used)
    first = used[np.argsort(-item.by_date[used], kind="stable")][:_FIRST]

    page = _Page(0.5 + strip + 0.35 + _BARS + 0.08 + track + grid + 0.95 + 0.2 + 2 * _MAP + 0.25)
    page.down(0.1)
    page.text(_LEFT, f"{item.key}   {modality.name}", fontsize=11, weight="bold")
    page.down(0.2)
    page.text(
        _LEFT,
        f"dates used: {len(used)} of {count}, heads: {heads}, effective number of dates: {item.effective_dates:.1f}",
        fontsize=8.5,
    )
    page.down(0.2)
    pictures = date_pictures(item.frames, modality, item.used)
    _draw_strip(page.axes(strip), pictures, item.used, first, side, levels)
    page.down(strip + 0.35)
    _draw_bars(_columns(page.axes(_BARS), count), item, first)
    page.down(_BARS + 0.08)
    if item.unclear is not None:
        _draw_track(_columns(page.axes(_TRACK), count), item.unclear)
        page.down(track)
    image = _draw_heads(_columns(page.axes(grid), count), item, grid)
    _draw_scale(page, grid, image)
    page.down(grid + 0.95)
    _draw_maps(page, item, pictures, first)
    return page.figure


def _columns(axis: Axes, count: int) -> Axes:
    axis.set_xlim(-0.5, count - 0.5)
    axis.set_xticks([])
    return axis


def _draw_strip(
    axis: Axes, pictures: np.ndarray, used: np.ndarray, first: np.ndarray, side: float, levels: int
) -> None:
    """Thumbnails above their columns: dates go round the ``levels``, so that neighbours do not overlap."""
    count = len(pictures)
    half = side / (_ACROSS / count) / 2
    for index, picture in enumerate(pictures):
        top = index % levels * (side + _GAP)
        left, right = index - half, index + half
        box = (left, right, top + side, top)
        image = axis.imshow(picture, extent=box, aspect="auto", interpolation="nearest")
        image.set_clip_on(False)  # the first and last ones are wider than their columns
        colour = _FIRST_BAR if index in first else None if used[index] else _LEFT_OUT
        if colour is not None:
            frame = Rectangle((left, top), 2 * half, side, fill=False, edgecolor=colour, linewidth=1.4, clip_on=False)
            axis.add_patch(frame)
    axis.set_axis_off()
    # imshow has fitted the limits to its last picture.
    axis.set(xlim=(-0.5, count - 0.5), ylim=(levels * (side + _GAP), 0.0))


def _draw_bars(axis: Axes, item: DateAttention, first: np.ndarray) -> None:
    by_date, by_head = item.by_date, item.by_head
    used = np.flatnonzero(item.used)
    # Heads often stand on different dates: their whole range would dwarf the means, and the grid below shows it.
    low, high = np.quantile(by_head, (0.25, 0.75), axis=0)
    colours = [_FIRST_BAR if index in first else _BAR for index in used]
    axis.bar(used, by_date[used], width=0.8, color=colours)
    axis.vlines(used, low[used], high[used], color="#333333", linewidth=1.0)
    axis.axhline(1 / len(used), color="black", linestyle=":", linewidth=0.8)
    tops = np.maximum(by_date, high)
    axis.set_ylim(0.0, 1.12 * tops.max())
    left_out = np.flatnonzero(~item.used)
    axis.plot(left_out, np.zeros(len(left_out)), "x", color=_LEFT_OUT, markersize=4, clip_on=False, zorder=3)
    for rank, index in enumerate(first, start=1):
        axis.annotate(
            str(rank),
            (index, tops[index]),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            weight="bold",
            color=_FIRST_BAR,
        )
    axis.set_ylabel("attention", fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(color=_BAR, label="mean over heads and pixels"),
        Patch(color=_FIRST_BAR, label="most attended dates"),
        Line2D([], [], color="#333333", linewidth=1.0, label="middle half of the heads"),
        Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="even attention"),
    ]
    if len(left_out):
        why = "left out: less than 95 % clear of clouds and snow"
        handles.append(Line2D([], [], color=_LEFT_OUT, marker="x", linestyle="", label=why))
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


def _draw_track(axis: Axes, unclear: np.ndarray) -> None:
    axis.pcolormesh(np.arange(len(unclear) + 1) - 0.5, [0, 1], unclear[None], cmap="Greys", vmin=0.0, vmax=100.0)
    axis.set_yticks([])
    axis.set_ylabel("cloud, snow", fontsize=7, rotation=0, ha="right", va="center")
    axis.text(len(unclear) - 0.5, 0.5, " black: 100 %", va="center", fontsize=6.5)


def _draw_heads(axis: Axes, item: DateAttention, height: float) -> ScalarMappable:
    """Attention of each head on each date, above the calendar days; ``height`` in inches."""
    heads, count = item.by_head.shape
    edges = np.arange(count + 1) - 0.5, np.arange(heads + 1) + 0.5
    image = axis.pcolormesh(*edges, np.where(item.used, item.by_head, np.nan), cmap="viridis", vmin=0.0)
    axis.set_facecolor(_NO_VALUE)
    axis.invert_yaxis()
    axis.set_yticks(range(1, heads + 1, math.ceil(heads * _LABEL / height)))
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylabel("head", fontsize=8)
    _label_days(axis, item.days)
    return image


def _label_days(axis: Axes, days: np.ndarray) -> None:
    """Calendar days below the columns, as many as fit."""
    step = math.ceil(_LABEL * len(days) / _ACROSS)
    places = range(0, len(days), step)
    axis.set_xticks(places, [str(days[place]) for place in places], rotation=90, fontsize=7)
    axis.tick_params(axis="x", length=2)


def _draw_scale(page: _Page, height: float, image: ScalarMappable) -> None:
    axis = page.axes(height, _SCALE_LEFT, _SCALE_WIDTH)
    page.figure.colorbar(image, cax=axis).ax.tick_params(labelsize=7)


def _draw_maps(page: _Page, item: DateAttention, pictures: np.ndarray, first: np.ndarray) -> None:
    """Dates of most attention: the picture and, below it, the mean attention of the heads at each pixel."""
    maps = item.attention[:, first].mean(axis=0)
    page.down(0.2)
    space = (_ACROSS - _FIRST * _MAP) / (_FIRST - 1)
    for rank, index in enumerate(first):
        above = page.axes(_MAP, _LEFT + rank * (_MAP + space), _MAP)
        above.imshow(pictures[index], aspect="auto", interpolation="nearest")
        above.set_title(f"{rank + 1}:  {item.days[index]}   {100 * item.by_date[index]:.1f} %", fontsize=8)
        _frame(above, "date" if rank == 0 else "")
    page.down(_MAP + 0.05)
    for rank in range(len(first)):
        below = page.axes(_MAP, _LEFT + rank * (_MAP + space), _MAP)
        image = below.imshow(
            maps[rank], aspect="auto", vmin=0.0, vmax=maps.max(), cmap="magma", interpolation="nearest"
        )
        _frame(below, "attention" if rank == 0 else "")
    _draw_scale(page, _MAP, image)


def _frame(axis: Axes, label: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(label, fontsize=8)
