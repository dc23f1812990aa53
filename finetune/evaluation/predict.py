"""Predict label maps: one GeoTIFF per patch and a picture of the first patches, or a table for patches of one pixel."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine

from bocage.finetune.evaluation.figures import Panel, draw_panels, render_rgb
from bocage.finetune.models.segmentation import Segmentation
from bocage.finetune.models.targets import Target
from bocage.shards.batch import Batch
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.composites import palette
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import required_modalities
from bocage.shards.read.patches import Patches, PatchLocation
from bocage.ssl.engine.parallel.distributed import is_main

logger = logging.getLogger(__name__)

TABLE_FILE = "predictions.csv"
"""Name of the table of predictions."""

_PREVIEW_PATCHES = 6  # rows of the picture


def write_prediction(
    path: Path, predicted: np.ndarray, scheme: ClassScheme, *, crs: str, left: float, top: float, side: float
) -> None:
    """Write a class map as a GeoTIFF with the scheme's colours and its class names as tags ``CLASS_0``, ``CLASS_1``...

    Args:
        path: output file; its folder must exist.
        predicted: (H, W) uint8 class values.
        scheme: classes of the map.
        crs: EPSG code or WKT; empty when the source has none.
        left: x coordinate of the upper-left corner, in the units of ``crs``.
        top: y coordinate of the upper-left corner, in the units of ``crs``.
        side: side of the map, in the units of ``crs``.

    Raises:
        InputError: ``crs`` cannot be parsed.
    """
    try:
        reference = CRS.from_user_input(crs) if crs else None
    except CRSError as error:
        raise InputError(f"{path.name}: coordinate system {crs!r} cannot be read: {error}") from error
    pixel = side / len(predicted)
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 1,
        "height": predicted.shape[0],
        "width": predicted.shape[1],
        "crs": reference,
        "transform": Affine(pixel, 0.0, left, 0.0, -pixel, top),
        "compress": "lzw",
    }
    colours = {value: (*map(int, colour), 255) for value, colour in enumerate(palette(scheme))}
    with atomic_write(path) as temporary, rasterio.open(temporary, "w", **profile) as file:
        file.write(predicted, 1)
        file.write_colormap(1, colours)
        file.set_band_description(1, scheme.name)
        file.update_tags(1, **{f"CLASS_{value}": name for value, name in enumerate(scheme.classes)})


def writes_table(patches: Patches) -> bool:
    """Whether predictions are a table: all patches are one pixel."""
    return all(modality.size == 1 for modality in patches.registry.values())


@contextmanager
def _prediction_table(
    path: Path, targets: dict[str, Target]
) -> Iterator[Callable[[PatchLocation, dict[str, np.ndarray]], None]]:
    """Write a CSV with a line per patch: key, position of the pixel, and class name and value of each label.

    Yields:
        Function that writes the line of a patch from its location and maps.
    """
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["key", "crs", "x", "y", *(title for name in targets for title in (name, f"{name}_value"))])

        def write(location: PatchLocation, maps: dict[str, np.ndarray]) -> None:
            half = location.side / 2 if location.crs else 0.0
            values = {name: int(maps[name][0, 0]) for name in targets}
            classes = [item for name, value in values.items() for item in (targets[name].scheme.classes[value], value)]
            lines.writerow([location.key, location.crs, location.left + half, location.top - half, *classes])

        yield write


def modalities_to_read(
    task: Segmentation, patches: Patches, *, labels: Sequence[str], inputs: Sequence[str] | None = None
) -> list[Modality]:
    """List the modalities to read for a model: its inputs that are stored, their quality masks, and the labels.

    Args:
        task: model.
        patches: patches of shards or of a tree.
        labels: label rasters to read.
        inputs: inputs to read; None means all inputs of the model.

    Raises:
        InputError: the patches have none of the model's inputs, or other bands than its encoders were trained on.
    """
    stored = [name for name in task.modalities if name in patches.registry and (inputs is None or name in inputs)]
    if not stored:
        raise InputError(f"{patches.path}: the model reads {', '.join(task.modalities)}; the shards hold none of them")
    for name in stored:
        check_bands(task.model.encoder(name).spec.bands, patches, name)
    return required_modalities(patches.registry, stored, list(labels))


def check_bands(bands: tuple[str, ...], patches: Patches | Manifest, name: str) -> None:
    """Check that patches store a modality with these bands, in this order.

    Raises:
        InputError: the stored bands differ.
    """
    stored = tuple(band.name for band in patches.registry[name].bands)
    if stored != bands:
        raise InputError(
            f"{patches.path}: {name} has the bands {', '.join(stored)}; its encoder reads {', '.join(bands)}"
        )


def predictable_rows(task: Segmentation, patches: Patches, rows: np.ndarray) -> np.ndarray:
    """Keep the rows, (N,) int64, whose patches the model can predict, and log how many are left out.

    A patch needs at least one of the model's sensors. Models of the official architecture need all of them.

    Raises:
        InputError: the model can predict none of the patches.
    """
    if not task.model.official:
        present = [patches.has_modality(name)[rows] for name in task.modalities if name in patches.registry]
        kept = rows[np.any(present, axis=0)] if present else rows
        if len(rows) and not len(kept):
            raise InputError(f"{patches.path}: no patch has one of {', '.join(task.modalities)}, which the model reads")
        if (dropped := len(rows) - len(kept)) and is_main():
            logger.warning("%d of %d patches left out: they have none of the model's sensors", dropped, len(rows))
        return kept
    if missing := [name for name in task.modalities if name not in patches.registry]:
        raise InputError(
            f"{patches.path} has no {', '.join(missing)}, and the official architecture cannot replace a missing "
            "sensor: use a model of bocage's own architecture"
        )
    kept = rows
    for name in task.modalities:
        kept = kept[patches.has_modality(name)[kept]]
    if len(kept) == 0:
        raise InputError(f"{patches.path}: no patch has all of {', '.join(task.modalities)}, which this model needs")
    if (dropped := len(rows) - len(kept)) and is_main():
        logger.warning(
            "%d of %d patches left out: they lack a sensor, and the official architecture cannot replace one",
            dropped,
            len(rows),
        )
    return kept


@dataclass(frozen=True)
class _PatchPrediction:
    """Prediction for one patch.

    Attributes:
        location: georeference of the patch.
        batch: batch that contains the patch.
        index: position of the patch in the batch.
        maps: (H, W) uint8 class values by label.
    """

    location: PatchLocation
    batch: Batch
    index: int
    maps: dict[str, np.ndarray]


def _predict(
    task: Segmentation, patches: Patches, rows: np.ndarray, modalities: list[Modality], batch_size: int, workers: int
) -> Iterator[_PatchPrediction]:
    """Yield the predictions of a model in evaluation mode, in the order of ``rows``, on the model's device."""
    device = next(task.parameters()).device
    for batch, locations in patches.batches(rows, modalities, batch_size=batch_size, workers=workers):
        maps = {name: values.cpu().numpy() for name, values in task.predict(batch.to(device)).items()}
        for index, location in enumerate(locations):
            yield _PatchPrediction(location, batch, index, {name: values[index] for name, values in maps.items()})


def predict_patches(
    task: Segmentation,
    patches: Patches,
    rows: np.ndarray,
    out: Path,
    *,
    batch_size: int = 4,
    workers: int = 0,
    device: torch.device | str = "cpu",
    preview: int = _PREVIEW_PATCHES,
    progress: Callable[[int], None] | None = None,
) -> Path | None:
    """Write one map per patch, and a picture of the first patches.

    The files are ``OUT/KEY.tif`` and ``OUT/panels.png``. A model with several labels writes ``OUT/LABEL/KEY.tif`` and
    ``OUT/LABEL/panels.png``. If patches are one pixel, the only file is ``OUT/predictions.csv``, with the position of
    each pixel, and its class by name and value for each label.

    Args:
        task: model; this function switches it to evaluation mode.
        patches: patches of shards or of a tree; they may lack some of the model's modalities and labels.
        rows: (N,) int64 rows of the patches, N >= 1; for a model of the official architecture from
            ``predictable_rows``.
        out: output folder, created when missing; files of the same name are replaced.
        batch_size: patches per batch.
        workers: DataLoader workers.
        device: device that runs the model.
        preview: number of patches in the picture; 0 writes no picture.
        progress: callback that receives the number of finished patches.

    Returns:
        Path of the first label's picture; None without a picture, or for a table. ``patches.skipped`` holds the
        patches that could not be read and have no map.

    Raises:
        InputError: ``rows`` is empty, the patches have none of the model's modalities, or ``out`` cannot be created.
    """
    if len(rows) == 0:
        raise InputError(f"{patches.path}: no patch to predict")
    is_table = writes_table(patches)
    labels = [name for name in task.labels if name in patches.registry and not is_table]
    modalities = modalities_to_read(task, patches, labels=labels)
    if missing := [name for name in task.modalities if name not in patches.registry]:
        logger.warning("%s has no %s: predicting without", patches.path, ", ".join(missing))
    folders = {name: out / name if len(task.targets) > 1 and not is_table else out for name in task.targets}
    for folder in folders.values():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot create the folder for the maps: {error.strerror}") from error
    task = task.to(device).eval()
    predictions = _predict(task, patches, rows, modalities, batch_size, workers)
    if is_table:
        with _prediction_table(out / TABLE_FILE, task.targets) as write_line:
            for done, prediction in enumerate(predictions, start=1):
                write_line(prediction.location, prediction.maps)
                if progress is not None:
                    progress(done + len(patches.skipped))
        return None
    panels: dict[str, list[Panel]] = {name: [] for name in task.targets}
    for done, prediction in enumerate(predictions, start=1):
        for name, target in task.targets.items():
            write_prediction(
                folders[name] / f"{prediction.location.key}.tif",
                prediction.maps[name],
                target.scheme,
                crs=prediction.location.crs,
                left=prediction.location.left,
                top=prediction.location.top,
                side=prediction.location.side,
            )
            if len(panels[name]) < preview:
                panels[name].append(_panel(prediction, modalities, target))
        if progress is not None:
            progress(done + len(patches.skipped))
    for name, target in task.targets.items():
        if panels[name]:
            draw_panels(folders[name] / "panels.png", panels[name], target.scheme, _title(target, task))
    first = task.labels[0]
    return folders[first] / "panels.png" if panels[first] else None


def draw_predictions(
    task: Segmentation, patches: Patches, rows: np.ndarray, folder: Path, name: str, *, batch_size: int
) -> dict[str, Path]:
    """Draw predictions of labelled patches, one picture ``FOLDER/NAME_LABEL.png`` per label.

    Args:
        task: model in evaluation mode.
        patches: patches of shards or of a tree.
        rows: (N,) int64 rows of the patches.
        folder: output folder, created when missing.
        name: first part of the file names.
        batch_size: patches per batch.

    Returns:
        Paths by ``predictions/LABEL``.
    """
    modalities = modalities_to_read(task, patches, labels=task.labels)
    panels: dict[str, list[Panel]] = {label: [] for label in task.targets}
    for prediction in _predict(task, patches, rows, modalities, batch_size, workers=0):
        for label, target in task.targets.items():
            panels[label].append(_panel(prediction, modalities, target))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {f"predictions/{label}": folder / f"{name}_{label}.png" for label in task.targets}
    for path, (label, target) in zip(paths.values(), task.targets.items(), strict=True):
        draw_panels(path, panels[label], target.scheme, _title(target, task))
    return paths


def _title(target: Target, task: Segmentation) -> str:
    return f"{target.scheme.name} from {', '.join(task.modalities)}"


def _panel(prediction: _PatchPrediction, modalities: list[Modality], target: Target) -> Panel:
    """Build a row of the picture, whose input is the first of the model's modalities that the patch has."""
    batch, index = prediction.batch, prediction.index
    key, predicted = batch.keys[index], prediction.maps[target.name]
    truth = None
    if target.name in batch.present and batch.present[target.name][index]:
        truth = target.truth(batch)[index].cpu().numpy()
    for modality in modalities:
        if not modality.is_input or not batch.present[modality.name][index]:
            continue
        values = batch.values[modality.name][index].cpu().numpy()
        if modality.has_time_axis:
            values = values[~batch.padding[modality.name][index].cpu().numpy()]
        if values.size:
            return Panel(key, render_rgb(values, modality), truth, predicted)
    return Panel(key, None, truth, predicted)
