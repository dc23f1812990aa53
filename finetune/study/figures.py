"""Figures of a study, for light and dark pages: curves over the share of labels, differences, classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bocage.finetune.study.results import Analysis

# Markers and dashes tell starts apart without any colour.
_SIZE = (5.2, 4.0)  # inches, of what stands two a row
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-")


@dataclass(frozen=True)
class Theme:
    """Colours of a page, and of starts: those of Okabe & Ito, told apart by the colour-blind."""

    ink: str
    grid: str
    paper: str
    starts: tuple[str, ...]


LIGHT = Theme(
    "#1b1f24", "#d5dae0", "#ffffff", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
)
DARK = Theme(
    "#e6e9ee", "#3a424d", "#14181d", ("#56B4E9", "#F0803C", "#2CC79A", "#E39BC4", "#F0B93C", "#4A96D9", "#AAAAAA")
)


def percent(share: float) -> str:
    """A share of labels as a reader writes it: ``0.1 %``, ``50 %``."""
    return f"{100 * share:.3g} %"


def svg(figure: Figure) -> bytes:
    """A figure as SVG without the date, so that the same results give the same bytes."""
    out = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bocage"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    return out.getvalue()


def png(figure: Figure, theme: Theme) -> bytes:
    """A figure as PNG on the page's colour."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor=theme.paper, metadata={"Software": None})
    return out.getvalue()


def _figure(theme: Theme, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.tick_params(colors=theme.ink, which="both", labelsize=9)
    for side, spine in axis.spines.items():
        spine.set_color(theme.ink)
        spine.set_visible(side in ("left", "bottom"))
    for label in (axis.title, axis.xaxis.label, axis.yaxis.label):
        label.set_color(theme.ink)
    return figure, axis


def _shares_axis(axis: Axes, shares: Sequence[float], theme: Theme) -> None:
    axis.set_xscale("log")
    axis.set_xticks(shares, [percent(share) for share in shares])
    axis.xaxis.set_minor_locator(NullLocator())
    if len(shares) > 1:
        axis.set_xlim(shares[0] / 1.35, shares[-1] * 1.35)
    axis.set_xlabel("labelled patches")
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)


def _legend(figure: Figure, axis: Axes, theme: Theme) -> None:
    handles, names = axis.get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.ink)


def draw_curves(analysis: Analysis, mode: str, theme: Theme) -> Figure:
    """Score of a mode over the share of labels, a line a start, with 95 % bands."""
    figure, axis = _figure(theme, *_SIZE)
    starts = list(analysis.study.starts)
    shares: set[float] = set()
    for (start, other), curve in analysis.curves.items():
        if other != mode:
            continue
        number = starts.index(start) % len(theme.starts)
        points = sorted(curve)
        shares.update(points)
        intervals = np.array([curve[share].interval for share in points])
        colour = theme.starts[number]
        if len(points) > 1:
            axis.fill_between(points, intervals[:, 0], intervals[:, 1], color=colour, alpha=0.18, linewidth=0)
        else:
            axis.vlines(points, intervals[:, 0], intervals[:, 1], color=colour)
        values = [curve[share].value for share in points]
        axis.plot(points, values, color=colour, marker=_MARKERS[number], linestyle=_DASHES[number], label=start)
    _shares_axis(axis, sorted(shares), theme)
    axis.set_title(mode, fontsize=11)
    axis.set_ylabel("mIoU (%)")
    _legend(figure, axis, theme)
    return figure


def draw_differences(analysis: Analysis, mode: str, theme: Theme) -> Figure:
    """Differences of a mode to the reference at each share, with 95 % intervals."""
    figure, axis = _figure(theme, *_SIZE)
    starts = list(analysis.study.starts)
    found = [(start, curve) for (start, other), curve in analysis.differences.items() if other == mode]
    shares = sorted({share for _, curve in found for share in curve})
    axis.axhline(0, color=theme.ink, linewidth=1)
    for place, (start, curve) in enumerate(found):
        number = starts.index(start) % len(theme.starts)
        aside = 1.06 ** (place - (len(found) - 1) / 2)
        for share, difference in curve.items():
            low, high = difference.estimate.interval
            axis.vlines(share * aside, low, high, color=theme.starts[number], linewidth=1.6)
        axis.plot(
            [share * aside for share in curve],
            [difference.estimate.value for difference in curve.values()],
            color=theme.starts[number],
            marker=_MARKERS[number],
            linestyle="none",
            label=start,
        )
    _shares_axis(axis, shares, theme)
    axis.set_title(mode, fontsize=11)
    axis.set_ylabel(f"mIoU above {analysis.study.reference} (points)")
    _legend(figure, axis, theme)
    return figure


def draw_classes(analysis: Analysis, mode: str, theme: Theme) -> Figure:
    """IoU of every class above the reference, a column a start and share, a row a class; of one start, IoU itself."""
    study = analysis.study
    curves = {start: curve for (start, other), curve in analysis.curves.items() if other == mode}
    others = [start for start in curves if start != study.reference]
    common = {share for start in others for share in curves[start] if share in curves.get(study.reference, {})}
    compared = bool(common)
    columns, cells = [], []
    for start in others if compared else list(curves):
        for share in curves[start]:
            if compared and share not in common:
                continue
            values = analysis.classes(start, mode, share)
            if compared:
                values = values - analysis.classes(study.reference, mode, share)
            columns.append(f"{start}\n{percent(share)}")
            cells.append(values)
    table = np.stack(cells, axis=1)
    names = [analysis.scheme.classes[value] for value in analysis.scheme.scored]
    kept = ~np.isnan(table).all(axis=1)
    table, names = table[kept], [name for name, there in zip(names, kept, strict=True) if there]
    figure, axis = _figure(theme, 0.62 * len(columns) + 2.2, 0.3 * len(names) + 1.3)
    most = max(5.0, float(np.nanmax(np.abs(table)))) if compared else 100.0
    axis.imshow(table, cmap="PuOr" if compared else "viridis", vmin=-most if compared else 0, vmax=most, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=7)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            pale = abs(value) < 0.6 * most if compared else value > 60
            text = f"{value:+.0f}" if compared else f"{value:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="#1b1f24" if pale else "white")
    return figure
