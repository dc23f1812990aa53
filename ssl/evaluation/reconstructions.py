"""Draw reconstruction pictures: target, visible part and prediction of each modality."""

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
from bocage.shards.files import atomic_write
from bocage.shards.inspect.composites import has_both_polarisations, hillshade, series_composites
from bocage.shards.modality import Modality
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.objectives.masked import MaskedReconstruction, Reconstruction
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.objectives.targets import from_units

_MASKED_DATES, _VISIBLE_DATES = 5, 3  # maximum shown of a series
_SMOOTHING = 5  # side of the window in pixels over which heights are averaged before shading
_TARGET, _VISIBLE = "target", "visible"  # titles
_MASK_GREY = 0.35  # grey level of masked pixels
_ROW_HEIGHTS = {"image": 3.0, "series": 4.4}  # inches, by role of the modality
_TITLE_HEIGHT = 0.4  # inches
_DAY_ZERO = date(2021, 5, 15)  # of any year that is not a leap year


def _render(values: torch.Tensor, valid: torch.Tensor, spec: InputSpec, modality: Modality) -> np.ndarray:
    """Render standardised targets and predictions, (N, T, C, H, W), as (N, T, H, W, 3) pictures with one contrast.

    The targets are the first of the N.

    Heights are shaded; other sensors are composites as in ``series_composites`` (true colour, or radar in decibels).
    """
    shape = (1, 1, -1, 1, 1)
    physical = values.cpu() * torch.tensor(spec.std).view(shape) + torch.tensor(spec.mean).view(shape)
    if spec.representation == "relief":
        heights = physical[:, :, spec.channels.index("relief")]
        # Slopes between single pixels are noisy in targets and noisier in reconstructions.
        smooth = F.avg_pool2d(heights, _SMOOTHING, stride=1, padding=_SMOOTHING // 2, count_include_pad=False).numpy()
        shades = np.stack([[hillshade(surface, spec.gsd) for surface in surfaces] for surfaces in smooth])
        return np.repeat(shades[..., None], 3, axis=-1)
    frames = torch.where(valid.cpu(), physical, torch.nan).flatten(0, 1).numpy()
    reference = np.arange(len(frames)) < len(values[0])  # targets set the contrast
    pictures = series_composites(frames, modality, reference)
    return pictures.reshape(*values.shape[:2], *pictures.shape[1:])


def _image_pictures(
    modality: Modality, spec: InputSpec, encoded: EncodedBatch, items: dict[str, Reconstruction], sample: int
) -> dict[str, np.ndarray]:
    """Return the pictures of an image, (H, W, 3) each, by title."""
    inputs, mask = encoded.inputs[modality.name], encoded.masks[modality.name]
    assert mask.units is not None
    masked = (mask.units | mask.dropped[:, None, None])[sample]
    masked = masked.repeat_interleave(modality.unit, 0).repeat_interleave(modality.unit, 1)
    target = inputs.values[sample]
    predictions = {
        title: torch.where(masked, prediction[sample], target)
        for title, prediction in _predictions(items, target.shape[-1]).items()
    }
    values = torch.stack([target, *predictions.values()])[:, None]
    target_picture, *pictures = _render(values, inputs.valid[sample], spec, modality)[:, 0]
    visible_picture = target_picture.copy()
    visible_picture[masked.cpu().numpy()] = _MASK_GREY
    return {_TARGET: target_picture, _VISIBLE: visible_picture, **dict(zip(predictions, pictures, strict=True))}


def _series_pictures(
    modality: Modality, spec: InputSpec, encoded: EncodedBatch, items: dict[str, Reconstruction], sample: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the pictures of a series, (T, H, W, 3) each, by title, and the days of the T dates."""
    inputs, mask, reconstruction = encoded.inputs[modality.name], encoded.masks[modality.name], items["pixels"]
    assert reconstruction.date_indices is not None and inputs.dates is not None and inputs.padding is not None
    pixel_mask = mask.pixel_mask(inputs.padding, inputs.values.shape[-1])[sample]
    predicted = reconstruction.loss_mask[sample].flatten(1).any(dim=1)
    masked_dates = reconstruction.date_indices[sample][predicted][:_MASKED_DATES]
    visible_dates = (~pixel_mask.flatten(1).any(dim=1) & ~inputs.padding[sample]).nonzero()[:, 0]
    spaced = torch.linspace(0, len(visible_dates) - 1, min(_VISIBLE_DATES, len(visible_dates))).round().long()
    dates = torch.cat([masked_dates, visible_dates[spaced.to(visible_dates.device)]])
    dates = dates[inputs.dates[sample, dates].argsort(stable=True)]
    target, masked = inputs.values[sample, dates], pixel_mask[dates][:, None]
    prediction_of_date = {
        date_index: index for index, date_index in enumerate(reconstruction.date_indices[sample].tolist())
    }
    predictions = {}
    for title, prediction in _predictions(items, target.shape[-1]).items():
        restored = target.clone()
        for index, date_index in enumerate(dates.tolist()):
            if date_index in prediction_of_date:
                values = prediction[sample, prediction_of_date[date_index]]
                restored[index] = torch.where(masked[index], values, target[index])
        predictions[title] = restored
    if not len(dates):
        return dict.fromkeys((_TARGET, _VISIBLE, *predictions), np.zeros((0, 1, 1, 3))), []
    values = torch.stack([target, *predictions.values()])
    target_pictures, *pictures = _render(values, inputs.valid[sample, dates], spec, modality)
    visible_pictures = np.where(masked[:, 0, :, :, None].cpu().numpy(), _MASK_GREY, target_pictures)
    days = [_DAY_ZERO + timedelta(days=int(day)) for day in inputs.dates[sample, dates]]
    by_title = {_TARGET: target_pictures, _VISIBLE: visible_pictures, **dict(zip(predictions, pictures, strict=True))}
    return by_title, [f"{day.day} {day:%b}" for day in days]


def _predictions(items: dict[str, Reconstruction], side: int) -> dict[str, torch.Tensor]:
    """Return predicted standardised values, (..., C, side, side), by title.

    Normalised pixels lack the mean and the standard deviation of their unit. They are drawn twice: with those of the
    visible units, which the model could know, and with those of the target, which it could not.
    """
    predictions = {}
    if "statistics" in items:
        prediction = items["statistics"].prediction.float()
        means = from_units(prediction[..., : prediction.shape[-3] // 2, :, :])
        repeats = side // means.shape[-1]
        predictions["prediction: means of cells"] = means.repeat_interleave(repeats, -1).repeat_interleave(repeats, -2)
    if "pixels" in items:
        item = items["pixels"]
        prediction = item.prediction.float()
        if (item.std == 1).all():
            predictions["prediction"] = from_units(prediction)
        else:
            mean, std = item.visible_mean_and_std()
            predictions["prediction"] = from_units(prediction * std + mean)
            predictions["prediction, with mean and contrast of the target"] = from_units(
                prediction * item.std + item.mean
            )
    return predictions


def _row_title(modality: Modality, encoded: EncodedBatch, sample: int) -> str:
    dropped = bool(encoded.masks[modality.name].dropped[sample])
    absent = not bool(encoded.inputs[modality.name].present[sample])
    radar = ", VV, VH, VV - VH" if has_both_polarisations(modality) else ""
    return modality.name + radar + (" (absent)" if absent else " (fully masked)" if dropped else "")


def _wrapped(label: str) -> str:
    return label.replace(", ", ",\n").replace(": ", ":\n")


def _draw_picture(axis: Axes, picture: np.ndarray, title: str = "", row_label: str = "") -> None:
    axis.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8, loc="left")
    axis.text(-0.06, 0.5, row_label, fontsize=8, rotation=90, ha="right", va="center", transform=axis.transAxes)


def reconstruction_figure(
    model: PretrainingModel, objective: MaskedReconstruction, batch: Batch, sample: int, step: int
) -> Figure:
    """Draw target, visible part and prediction of each modality, one row per modality.

    A series shows at most five masked and three visible dates. Visible pixels are pasted into the predictions.

    Args:
        model: pretraining model, which masks and encodes the batch.
        objective: masked reconstruction objective of the model.
        batch: batch on the model's device.
        sample: index of the sample to draw.
        step: training step, for the title.
    """
    with torch.no_grad():
        encoded = model.encode_batch(batch, augment=False)
        reconstructions = objective.reconstruct(encoded)
    modalities = sorted(
        (objective.modalities[name] for name in reconstructions), key=lambda item: item.role == "series"
    )
    heights = [_ROW_HEIGHTS[modality.role] for modality in modalities]
    figure = Figure(figsize=(9, sum(heights) + _TITLE_HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    subfigures = figure.subfigures(len(modalities) + 1, 1, height_ratios=[_TITLE_HEIGHT, *heights], squeeze=False)
    title, *rows = subfigures[:, 0]
    metres = float(batch.windows[sample, 2])
    legend = "masked pixels are grey; visible pixels are pasted into the predictions"
    title.text(0.01, 0.5, f"{batch.keys[sample]}, {metres:g} m, step {step}: {legend}", fontsize=9, va="center")
    for row, modality in zip(rows, modalities, strict=True):
        row.suptitle(_row_title(modality, encoded, sample), fontsize=9)
        spec, items = model.encoder(modality.name).spec, reconstructions[modality.name]
        if modality.role == "image":
            pictures = _image_pictures(modality, spec, encoded, items, sample)
            grid = row.subplots(1, len(pictures), squeeze=False)
            for column, (label, picture) in enumerate(pictures.items()):
                _draw_picture(grid[0, column], picture, label)
        else:
            strips, days = _series_pictures(modality, spec, encoded, items, sample)
            grid = row.subplots(len(strips), max(len(days), 1), squeeze=False)
            for line, (label, strip) in enumerate(strips.items()):
                for column, picture in enumerate(strip):
                    _draw_picture(
                        grid[line, column], picture, "" if line else days[column], "" if column else _wrapped(label)
                    )
        for axis in grid.flat:
            axis.set_axis_off()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure as PNG, atomically; folders are created.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
