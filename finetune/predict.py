"""A model and shards to label maps: one GeoTIFF a patch, and a picture of some of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine

from bocage.finetune.pictures import Panel, draw_panels, render
from bocage.finetune.task import Segmentation
from bocage.shards.batch import Batch
from bocage.shards.classes import ClassScheme
from bocage.shards.composites import palette
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.inputs import wanted_modalities
from bocage.shards.manifest import Manifest
from bocage.shards.modality import Modality
from bocage.shards.stream import evaluation_batches

_PANELS = 6  # rows of the picture


def write_prediction(
    path: Path, predicted: np.ndarray, scheme: ClassScheme, *, crs: str, left: float, top: float, gsd: float
) -> None:
    """Write a class map as a GeoTIFF with the scheme's colours; class names are tags ``CLASS_0``, ``CLASS_1``, ...

    Args:
        path: the file; its folder must exist.
        predicted: (H, W) uint8 class values.
        scheme: the classes.
        crs: EPSG code or WKT; empty when the source had none.
        left, top: upper-left corner in the units of ``crs``.
        gsd: side of a pixel, metres.

    Raises:
        InputError: a ``crs`` that cannot be read.
    """
    try:
        reference = CRS.from_user_input(crs) if crs else None
    except CRSError as error:
        raise InputError(f"{path.name}: coordinate system {crs!r} cannot be read: {error}") from error
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 1,
        "height": predicted.shape[0],
        "width": predicted.shape[1],
        "crs": reference,
        "transform": Affine(gsd, 0.0, left, 0.0, -gsd, top),
        "compress": "lzw",
    }
    colours = {value: (*map(int, colour), 255) for value, colour in enumerate(palette(scheme))}
    with written_atomically(path) as temporary, rasterio.open(temporary, "w", **profile) as file:
        file.write(predicted, 1)
        file.write_colormap(1, colours)
        file.set_band_description(1, scheme.name)
        file.update_tags(1, **{f"CLASS_{value}": name for value, name in enumerate(scheme.classes)})


def readable_modalities(task: Segmentation, manifest: Manifest, *, labels: bool) -> list[Modality]:
    """What to read from these shards for a model: its modalities that are there, their quality masks, its label.

    Raises:
        InputError: the shards hold none of its modalities, or bands other than those it was trained on.
    """
    here = [name for name in task.modalities if name in manifest.registry]
    if not here:
        raise InputError(f"{manifest.path}: the model reads {', '.join(task.modalities)}; the shards hold none of them")
    for name in here:
        check_bands(task.model.encoder(name).spec.bands, manifest, name)
    return wanted_modalities(manifest.registry, here, [task.label.name] if labels else [])


def check_bands(bands: tuple[str, ...], manifest: Manifest, name: str) -> None:
    """Raise ``InputError`` unless the shards hold these bands of a modality, in this order."""
    stored = tuple(band.name for band in manifest.registry[name].bands)
    if stored != bands:
        raise InputError(
            f"{manifest.path}: {name} has the bands {', '.join(stored)}; its encoder reads {', '.join(bands)}"
        )


def complete_rows(task: Segmentation, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Those of the ``rows`` that a model can predict: an official one needs every sensor, and says what it leaves out.

    Raises:
        InputError: it can predict none.
    """
    if not task.model.official:
        return rows
    if missing := [name for name in task.modalities if name not in manifest.registry]:
        raise InputError(
            f"{manifest.path} has no {', '.join(missing)}, and the official architecture has no stand-in for a missing "
            "sensor; use a model of bocage's own architecture"
        )
    kept = rows
    for name in task.modalities:
        kept = kept[manifest.column(f"length.{name}").to_numpy()[kept] > 0]
        if manifest.registry[name].has_dates:
            counts = pc.fill_null(pc.list_value_length(manifest.column(f"dates.{name}")), 0).to_numpy()
            kept = kept[counts[kept] > 0]
    if len(kept) == 0:
        raise InputError(f"{manifest.path}: no patch has all of {', '.join(task.modalities)}, which this model needs")
    if left := len(rows) - len(kept):
        print(
            f"bocage: {left} of {len(rows)} patches left out: they lack a sensor, and the official architecture has no "
            "stand-in for one",
            file=sys.stderr,
        )
    return kept


def predict_patches(
    task: Segmentation,
    manifest: Manifest,
    rows: np.ndarray,
    out: Path,
    *,
    batch_size: int = 4,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``OUT/KEY.tif`` for every row and a picture of the first of them, ``OUT/panels.png``.

    Args:
        task: the model; put into evaluation mode.
        manifest: open shards. Modalities and labels that they lack are done without.
        rows: manifest rows, at least one; for an official model, ``complete_rows``.
        out: folder, made when missing; files of the same name are replaced.
        batch_size, workers: of the reader.
        device: where the model runs.
        progress: called with the number of patches done so far.

    Returns:
        The path of the picture.

    Raises:
        InputError: no rows, shards that hold none of the modalities (an official model needs them all in a patch), or
            an ``out`` that cannot be a folder.
    """
    if len(rows) == 0:
        raise InputError(f"{manifest.path}: no patch to predict")
    labelled = task.label.name in manifest.registry
    modalities = readable_modalities(task, manifest, labels=labelled)
    if missing := [name for name in task.modalities if name not in manifest.registry]:
        print(f"bocage: {manifest.path} has no {', '.join(missing)}: predicting without", file=sys.stderr)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a folder for the maps: {error.strerror}") from error
    task = task.to(device).eval()
    panels: list[Panel] = []
    done = 0
    for batch in evaluation_batches(manifest, rows, modalities, batch_size=batch_size, workers=workers):
        predicted = task.predict(batch.to(device)).cpu().numpy()
        for index, key in enumerate(batch.keys):
            row = manifest.row(int(rows[done + index]))
            write_prediction(
                out / f"{key}.tif",
                predicted[index],
                task.scheme,
                crs=row["crs"] or "",
                left=row["left"],
                top=row["top"],
                gsd=task.label.gsd,
            )
            if len(panels) < _PANELS:
                panels.append(_panel(batch, index, modalities, task, predicted[index]))
        done += len(batch)
        if progress is not None:
            progress(done)
    picture = out / "panels.png"
    draw_panels(picture, panels, task.scheme, f"{task.scheme.name} from {', '.join(task.modalities)}")
    return picture


def _panel(batch: Batch, index: int, modalities: list[Modality], task: Segmentation, predicted: np.ndarray) -> Panel:
    """The first of the model's modalities that the sample has is the one shown."""
    name = task.label.name
    truth = None
    if name in batch.present and batch.present[name][index]:
        truth = task.truth(batch)[index].cpu().numpy()
    for modality in modalities:
        if not modality.is_input or not batch.present[modality.name][index]:
            continue
        values = batch.values[modality.name][index].cpu().numpy()
        if modality.has_dates:
            values = values[~batch.padding[modality.name][index].cpu().numpy()]
        if values.size:
            return Panel(batch.keys[index], render(values, modality), truth, predicted)
    return Panel(batch.keys[index], None, truth, predicted)
