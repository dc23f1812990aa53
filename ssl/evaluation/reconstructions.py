"""Reconstruction pictures: what was there, what the encoders saw, what the decoder made of it."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.inspect.composites import date_pictures, hillshade
from bocage.shards.modality import Modality
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.objectives.masked import MaskedReconstruction, Reconstruction
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.objectives.pixel_targets import from_units

_HIDDEN_DATES, _SEEN_DATES = 5, 3  # shown of a series
_SHADED = 5  # pixels along a side that are averaged before heights are shaded
_HIDDEN = 0.35  # grey level of what the encoder did not see
_HEIGHTS = {"image": 3.0, "series": 3.3}  # inches of a modality's rows
_HEAD = 0.4  # inches
_DAY_ZERO = date(2021, 5, 15)  # of an ordinary year


def _shown(values: torch.Tensor, valid: torch.Tensor, spec: InputSpec, modality: Modality) -> np.ndarray:
    """(2, T, C, H, W) targets and reconstructions, standardised, as pictures (2, T, H, W, 3) of one contrast.

    Heights are shaded; optical sensors are shown in true colour, radar in decibels, as ``date_pictures`` has it.
    """
    shape = (1, 1, -1, 1, 1)
    physical = values.cpu() * torch.tensor(spec.std).view(shape) + torch.tensor(spec.mean).view(shape)
    if spec.representation == "relief":
        heights = physical[:, :, spec.channels.index("relief")]
        # Slopes between single pixels are noise, in what was measured and more so in what is made up.
        coarse = F.avg_pool2d(heights, _SHADED, stride=1, padding=_SHADED // 2, count_include_pad=False).numpy()
        shades = np.stack([[hillshade(item, spec.gsd) for item in items] for items in coarse])
        return np.repeat(shades[..., None], 3, axis=-1)
    frames = torch.where(valid.cpu(), physical, torch.nan).flatten(0, 1).numpy()
    reference = np.arange(len(frames)) < len(frames) // 2  # targets set the contrast
    pictures = date_pictures(frames, modality, reference)
    return pictures.reshape(*values.shape[:2], *pictures.shape[1:])


def _of_image(
    modality: Modality, spec: InputSpec, view: EncodedBatch, item: Reconstruction, sample: int
) -> list[np.ndarray]:
    """Target, what was seen, reconstruction: one picture each."""
    given, mask = view.inputs[modality.name], view.masks[modality.name]
    assert mask.units is not None
    hidden = (mask.units | mask.whole[:, None, None])[sample]
    hidden = hidden.repeat_interleave(modality.unit, 0).repeat_interleave(modality.unit, 1)
    target, restored = given.values[sample], from_units(_restored(item)[sample])
    values = torch.stack([target, torch.where(hidden, restored, target)])[:, None]
    target_shown, restored_shown = _shown(values, given.valid[sample], spec, modality)[:, 0]
    seen = target_shown.copy()
    seen[hidden.cpu().numpy()] = _HIDDEN
    return [target_shown, seen, restored_shown]


def _of_series(
    modality: Modality, spec: InputSpec, view: EncodedBatch, item: Reconstruction, sample: int
) -> tuple[list[np.ndarray], list[str]]:
    """Target, what was seen, reconstruction: (T, H, W, 3) each, and the days of the T dates."""
    given, mask = view.inputs[modality.name], view.masks[modality.name]
    assert item.chosen is not None and given.dates is not None and given.padding is not None
    places = mask.places(given.padding, given.values.shape[-1])[sample]
    wanted = item.wanted[sample].flatten(1).any(dim=1)
    chosen = item.chosen[sample][wanted][:_HIDDEN_DATES]
    seen = (~places.flatten(1).any(dim=1) & ~given.padding[sample]).nonzero()[:, 0]
    evenly = torch.linspace(0, len(seen) - 1, min(_SEEN_DATES, len(seen))).round().long().to(seen.device)
    dates = torch.cat([chosen, seen[evenly]])
    dates = dates[given.dates[sample, dates].argsort(stable=True)]
    target, hidden = given.values[sample, dates], places[dates][:, None]
    restored = target.clone()
    order = {int(day): index for index, day in enumerate(item.chosen[sample].tolist())}
    outputs = from_units(_restored(item)[sample])
    for index, day in enumerate(dates.tolist()):
        if day in order:
            restored[index] = torch.where(hidden[index], outputs[order[day]], target[index])
    if not len(dates):
        return [np.zeros((0, 1, 1, 3))] * 3, []
    target_shown, restored_shown = _shown(torch.stack([target, restored]), given.valid[sample, dates], spec, modality)
    seen_shown = np.where(hidden[:, 0, :, :, None].cpu().numpy(), _HIDDEN, target_shown)
    days = [_DAY_ZERO + timedelta(days=int(day)) for day in given.dates[sample, dates]]
    return [target_shown, seen_shown, restored_shown], [f"{day.day} {day:%b}" for day in days]


def _restored(item: Reconstruction) -> torch.Tensor:
    """Predictions with the normalisation of their targets undone."""
    return item.prediction.float() * item.std + item.mean


def _titled(modality: Modality, view: EncodedBatch, sample: int) -> str:
    whole = bool(view.masks[modality.name].whole[sample])
    absent = not bool(view.inputs[modality.name].present[sample])
    radar = ", VV, VH, VV - VH" if modality.representation == "decibel" else ""
    return modality.name + radar + (" (absent)" if absent else " (hidden whole)" if whole else "")


def _draw(axis: Axes, picture: np.ndarray, title: str = "", side: str = "") -> None:
    axis.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8, loc="left")
    axis.text(-0.06, 0.5, side, fontsize=8, rotation=90, ha="right", va="center", transform=axis.transAxes)


def reconstruction_figure(
    task: PretrainingModel, objective: MaskedReconstruction, batch: Batch, sample: int, step: int
) -> Figure:
    """One row a modality: target, what was seen, reconstruction; of a series as strips of hidden and seen dates.

    Of a series at most five hidden and three seen dates are shown. What was seen is pasted into the reconstruction.

    Args:
        task: gives the masked view of the batch.
        objective: its masked term.
        batch: on the task's device.
        sample: which sample of the batch to show.
        step: of training, for the title.
    """
    with torch.no_grad():
        view = task.view(batch, oriented=False)
        items = objective.reconstruct(view)
    modalities = sorted((objective.modalities[name] for name in items), key=lambda item: item.role == "series")
    heights = [_HEIGHTS[item.role] for item in modalities]
    figure = Figure(figsize=(9, sum(heights) + _HEAD), layout="constrained")
    FigureCanvasAgg(figure)
    head, *rows = figure.subfigures(len(items) + 1, 1, height_ratios=[_HEAD, *heights], squeeze=False)[:, 0]
    metres = float(batch.windows[sample, 2])
    about = "grey was hidden; what was seen is pasted into the reconstruction"
    head.text(0.01, 0.5, f"{batch.keys[sample]}, {metres:g} m, step {step}: {about}", fontsize=9, va="center")
    names = ("target", "seen", "reconstruction")
    for row, modality in zip(rows, modalities, strict=True):
        row.suptitle(_titled(modality, view, sample), fontsize=9)
        spec, item = task.encoder(modality.name).spec, items[modality.name]
        if item.chosen is None:
            grid = row.subplots(1, 3, squeeze=False)
            for index, picture in enumerate(_of_image(modality, spec, view, item, sample)):
                _draw(grid[0, index], picture, names[index])
        else:
            strips, days = _of_series(modality, spec, view, item, sample)
            grid = row.subplots(3, max(len(days), 1), squeeze=False)
            for index, strip in enumerate(strips):
                for place, picture in enumerate(strip):
                    title, side = "" if index else days[place], "" if place else names[index]
                    _draw(grid[index, place], picture, title, side)
        for axis in grid.flat:
            axis.set_axis_off()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
