"""Reconstruction pictures: what was there, what the encoders saw, what the decoder made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bocage.shards.batch import Batch
from bocage.shards.composites import hillshade
from bocage.shards.files import written_atomically
from bocage.shards.modality import Modality
from bocage.shards.normalize import InputSpec
from bocage.ssl.masked import Masked, Reconstruction
from bocage.ssl.objective import Pretraining, View
from bocage.ssl.targets import from_units

_STRIP = 6  # dates shown of a series
_HIDDEN = 0.35  # grey level of what the encoder did not see


def _display(spec: InputSpec) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function (standardised values, reference) -> picture in 0..1; the reference sets the contrast for both."""
    channels = spec.channels
    if spec.representation == "relief":
        relief = channels.index("relief")
        return lambda values, _: hillshade(values[relief] * spec.std[relief], spec.gsd)
    colours = next(
        (names for names in (("R", "G", "B"), ("B4", "B3", "B2")) if set(names) <= set(channels)), (channels[0],)
    )
    index = [channels.index(name) for name in colours]

    def stretched(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
        low, high = np.percentile(reference[index], (2, 98))
        picture = np.clip((values[index] - low) / max(high - low, 1e-6), 0, 1)
        return picture.transpose(1, 2, 0) if len(index) == 3 else picture[0]

    return stretched


def _columns(
    modality: Modality, spec: InputSpec, view: View, item: Reconstruction, sample: int
) -> dict[str, list[np.ndarray]]:
    """Pictures of one modality by column title; a series gives one picture a date in each column."""
    given, mask = view.inputs[modality.name], view.masks[modality.name]
    restored = (item.prediction.float() * item.std + item.mean)[sample]
    show = _display(spec)
    if item.chosen is None:
        target = given.values[sample]
        assert mask.units is not None
        hidden = (mask.units | mask.whole[:, None, None])[sample]
        unit = modality.unit
        pixels = hidden.repeat_interleave(unit, 0).repeat_interleave(unit, 1)
        filled = torch.where(pixels, from_units(restored), target)
        reference = target.cpu().numpy()
        seen = show(reference, reference).copy()
        seen[pixels.cpu().numpy()] = _HIDDEN
        return {
            "target": [show(reference, reference)],
            "seen": [seen],
            "reconstruction": [show(filled.cpu().numpy(), reference)],
        }
    chosen = item.chosen[sample, :_STRIP]
    chosen = chosen[item.wanted[sample, :_STRIP].flatten(1).any(dim=1)]
    chosen = chosen[given.dates[sample, chosen].argsort()] if given.dates is not None else chosen
    place = {int(date): index for index, date in enumerate(item.chosen[sample].tolist())}
    targets = [given.values[sample, int(date)].cpu().numpy() for date in chosen]
    outputs = [from_units(restored[place[int(date)]]).cpu().numpy() for date in chosen]
    reference = np.concatenate(targets, axis=-1) if targets else np.zeros((len(modality.channels), 1, 1))
    return {
        "target": [show(values, reference) for values in targets],
        "reconstruction": [show(values, reference) for values in outputs],
    }


def _titled(modality: Modality, view: View, sample: int) -> str:
    whole = bool(view.masks[modality.name].whole[sample])
    absent = not bool(view.inputs[modality.name].present[sample])
    return modality.name + (" (absent)" if absent else " (hidden whole)" if whole else "")


def reconstruction_figure(task: Pretraining, objective: Masked, batch: Batch, sample: int) -> Figure:
    """One row a modality: target, what was seen, reconstruction; a series as a strip of its hidden dates.

    Args:
        task: gives the masked view of the batch.
        objective: its masked term.
        batch: on the task's device.
        sample: which sample of the batch to show.
    """
    with torch.no_grad():
        view = task.view(batch, oriented=False)
        items = objective.reconstruct(view)
    modalities = objective.modalities
    images = [modalities[name] for name, item in items.items() if item.chosen is None]
    series = [modalities[name] for name, item in items.items() if item.chosen is not None]
    figure = Figure(figsize=(9, 3 * len(images) + 2.2 * len(series)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(items), 1, height_ratios=[3] * len(images) + [2.2] * len(series), squeeze=False)
    for row, modality in zip(rows[:, 0], [*images, *series], strict=True):
        row.suptitle(_titled(modality, view, sample), fontsize=9)
        columns = _columns(modality, task.encoder(modality.name).spec, view, items[modality.name], sample)
        # Columns of an image stand side by side; the two strips of a series one above the other.
        strips = items[modality.name].chosen is not None
        height, width = (2, max(len(columns["target"]), 1)) if strips else (1, 3)
        grid = row.subplots(height, width, squeeze=False)
        for axis in grid.flat:
            axis.set_axis_off()
        for index, (title, pictures) in enumerate(columns.items()):
            for date, picture in enumerate(pictures):
                axis = grid[index, date] if strips else grid[0, index]
                axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                if date == 0:
                    axis.set_title(title, fontsize=8, loc="left")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
