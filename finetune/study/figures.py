"""Draw the figures of a study for light and dark pages: learning curves, differences and classes."""

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

_SIZE = (5.2, 4.0)  # inches; two figures fit side by side
# Markers and dashes distinguish initializations without colour.
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-")


@dataclass(frozen=True)
class Theme:
    """Colours of a page, and the colour-blind safe palette of Okabe & Ito for the initializations."""

    ink: str
    grid: str
    paper: str
    palette: tuple[str, ...]


LIGHT = Theme(
    "#1b1f24", "#d5dae0", "#ffffff", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
)
DARK = Theme(
    "#e6e9ee", "#3a424d", "#14181d", ("#56B4E9", "#F0803C", "#2CC79A", "#E39BC4", "#F0B93C", "#4A96D9", "#AAAAAA")
)


def percent(fraction: float) -> str:
    """Format a fraction in percent: ``0.1 %``, ``50 %``."""
    return f"{100 * fraction:.3g} %"


def svg(figure: Figure) -> bytes:
    """Render a figure as SVG without a date, so that equal results give equal bytes."""
    out = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bocage"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    return out.getvalue()


def png(figure: Figure, theme: Theme) -> bytes:
    """Render a figure as PNG on the page's background colour."""
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


def _fractions_axis(axis: Axes, fractions: Sequence[float], theme: Theme) -> None:
    axis.set_xscale("log")
    axis.set_xticks(fractions, [percent(fraction) for fraction in fractions])
    axis.xaxis.set_minor_locator(NullLocator())
    if len(fractions) > 1:
        axis.set_xlim(fractions[0] / 1.35, fractions[-1] * 1.35)
    axis.set_xlabel("labelled patches")
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)


def _legend(figure: Figure, axis: Axes, theme: Theme) -> None:
    handles, names = axis.get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.ink)


def draw_curves(analysis: Analysis, mode: str, theme: Theme) -> Figure:
    """Draw the learning curves of a mode, one line per initialization, with 95 % bands."""
    figure, axis = _figure(theme, *_SIZE)
    initializations = list(analysis.study.initializations)
    fractions: set[float] = set()
    for (initialization, curve_mode), curve in analysis.curves.items():
        if curve_mode != mode:
            continue
        style = initializations.index(initialization) % len(theme.palette)
        points = sorted(curve)
        fractions.update(points)
        intervals = np.array([curve[fraction].interval for fraction in points])
        colour = theme.palette[style]
        if len(points) > 1:
            axis.fill_between(points, intervals[:, 0], intervals[:, 1], color=colour, alpha=0.18, linewidth=0)
        else:
            axis.vlines(points, intervals[:, 0], intervals[:, 1], color=colour)
        values = [curve[fraction].value for fraction in points]
        axis.plot(points, values, color=colour, marker=_MARKERS[style], linestyle=_DASHES[style], label=initialization)
    _fractions_axis(axis, sorted(fractions), theme)
    axis.set_title(mode, fontsize=11)
    axis.set_ylabel("mIoU (%)")
    _legend(figure, axis, theme)
    return figure


def draw_differences(analysis: Analysis, mode: str, theme: Theme) -> Figure:
    """Draw the differences of a mode to the reference by fraction, with 95 % intervals."""
    figure, axis = _figure(theme, *_SIZE)
    initializations = list(analysis.study.initializations)
    curves = [(name, curve) for (name, curve_mode), curve in analysis.differences.items() if curve_mode == mode]
    fractions = sorted({fraction for _, curve in curves for fraction in curve})
    axis.axhline(0, color=theme.ink, linewidth=1)
    for position, (initialization, curve) in enumerate(curves):
        style = initializations.index(initialization) % len(theme.palette)
        dodge = 1.06 ** (position - (len(curves) - 1) / 2)  # keeps markers of the same fraction apart
        for fraction, difference in curve.items():
            low, high = difference.estimate.interval
            axis.vlines(fraction * dodge, low, high, color=theme.palette[style], linewidth=1.6)
        axis.plot(
            [fraction * dodge for fraction in curve],
            [difference.estimate.value for difference in curve.values()],
            color=theme.palette[style],
            marker=_MARKERS[style],
            linestyle="none",
            label=initialization,
        )
    _fractions_axis(axis, fractions, theme)
    axis.set_title(mode, fontsize=11)
    axis.set_ylabel(f"mIoU above {analysis.study.reference} (points)")
    _legend(figure, axis, theme)
    return figure


def draw_classes(analysis: Analysis, mode: str, theme: Theme) -> Figure:
    """Draw a heat map of class IoU, with a row per class and a column per initialization and fraction.

    Values are differences to the reference. Without another initialization to compare, they are the IoU itself.
    """
    study = analysis.study
    curves = {name: curve for (name, curve_mode), curve in analysis.curves.items() if curve_mode == mode}
    others = [name for name in curves if name != study.reference]
    common = {fraction for name in others for fraction in curves[name] if fraction in curves.get(study.reference, {})}
    is_difference = bool(common)
    columns, column_values = [], []
    for initialization in others if is_difference else list(curves):
        for fraction in curves[initialization]:
            if is_difference and fraction not in common:
                continue
            values = analysis.class_iou(initialization, mode, fraction)
            if is_difference:
                values = values - analysis.class_iou(study.reference, mode, fraction)
            columns.append(f"{initialization}\n{percent(fraction)}")
            column_values.append(values)
    table = np.stack(column_values, axis=1)
    names = [analysis.scheme.classes[value] for value in analysis.scheme.scored]
    defined = ~np.isnan(table).all(axis=1)
    table, names = table[defined], [name for name, is_defined in zip(names, defined, strict=True) if is_defined]
    figure, axis = _figure(theme, 0.62 * len(columns) + 2.2, 0.3 * len(names) + 1.3)
    limit = max(5.0, float(np.nanmax(np.abs(table)))) if is_difference else 100.0
    colour_map, lowest = ("PuOr", -limit) if is_difference else ("viridis", 0.0)
    axis.imshow(table, cmap=colour_map, vmin=lowest, vmax=limit, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=7)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            light = abs(value) < 0.6 * limit if is_difference else value > 60
            text = f"{value:+.0f}" if is_difference else f"{value:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="#1b1f24" if light else "white")
    return figure
