"""A model and patches to label maps: one GeoTIFF a patch, and a picture of some of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine

from bocage.finetune.evaluation.figures import Panel, draw_panels, render
from bocage.finetune.models.segmentation import Segmentation
from bocage.finetune.models.targets import Target
from bocage.shards.batch import Batch
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.composites import palette
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import wanted_modalities
from bocage.shards.read.patches import Patches, PatchLocation
from bocage.ssl.engine.parallel.distributed import is_main

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


def readable_modalities(
    task: Segmentation, patches: Patches, *, labels: Sequence[str], only: Sequence[str] | None = None
) -> list[Modality]:
    """What to read of patches for a model: its modalities that are there, their quality masks, these labels.

    With ``only``, of its modalities no others than these.

    Raises:
        InputError: the shards hold none of its modalities, or bands other than those it was trained on.
    """
    here = [name for name in task.modalities if name in patches.registry and (only is None or name in only)]
    if not here:
        raise InputError(f"{patches.path}: the model reads {', '.join(task.modalities)}; the shards hold none of them")
    for name in here:
        check_bands(task.model.encoder(name).spec.bands, patches, name)
    return wanted_modalities(patches.registry, here, list(labels))


def check_bands(bands: tuple[str, ...], patches: Patches | Manifest, name: str) -> None:
    """Check that patches hold these bands of a modality, in this order.

    Raises:
        InputError: they hold others.
    """
    stored = tuple(band.name for band in patches.registry[name].bands)
    if stored != bands:
        raise InputError(
            f"{patches.path}: {name} has the bands {', '.join(stored)}; its encoder reads {', '.join(bands)}"
        )


def complete_rows(task: Segmentation, patches: Patches, rows: np.ndarray) -> np.ndarray:
    """Those of the ``rows``, (N,) int64, that a model can predict: with one of its sensors, an official one with all.

    How many are left out is told on stderr.

    Raises:
        InputError: it can predict none.
    """
    if not task.model.official:
        held = [patches.held(name)[rows] for name in task.modalities if name in patches.registry]
        kept = rows[np.any(held, axis=0)] if held else rows
        if len(rows) and not len(kept):
            raise InputError(f"{patches.path}: no patch has one of {', '.join(task.modalities)}, which the model reads")
        if (left := len(rows) - len(kept)) and is_main():
            print(f"bocage: {left} of {len(rows)} patches left out: they have none of the sensors", file=sys.stderr)
        return kept
    if missing := [name for name in task.modalities if name not in patches.registry]:
        raise InputError(
            f"{patches.path} has no {', '.join(missing)}, and the official architecture has no stand-in for a missing "
            "sensor; use a model of bocage's own architecture"
        )
    kept = rows
    for name in task.modalities:
        kept = kept[patches.held(name)[kept]]
    if len(kept) == 0:
        raise InputError(f"{patches.path}: no patch has all of {', '.join(task.modalities)}, which this model needs")
    if (left := len(rows) - len(kept)) and is_main():
        print(
            f"bocage: {left} of {len(rows)} patches left out: they lack a sensor, and the official architecture has no "
            "stand-in for one",
            file=sys.stderr,
        )
    return kept


@dataclass(frozen=True)
class _Predicted:
    """One patch: where it lies, what was read of it, and by label its (H, W) uint8 class values."""

    place: PatchLocation
    batch: Batch
    index: int
    maps: dict[str, np.ndarray]


def _predicted(
    task: Segmentation, patches: Patches, rows: np.ndarray, modalities: list[Modality], batch_size: int, workers: int
) -> Iterator[_Predicted]:
    """Predictions of a model in evaluation mode, on its own device, in the order of ``rows``."""
    device = next(task.parameters()).device
    for batch, places in patches.batches(rows, modalities, batch_size=batch_size, workers=workers):
        maps = {name: values.cpu().numpy() for name, values in task.predict(batch.to(device)).items()}
        for index, place in enumerate(places):
            yield _Predicted(place, batch, index, {name: values[index] for name, values in maps.items()})


def predict_patches(
    task: Segmentation,
    patches: Patches,
    rows: np.ndarray,
    out: Path,
    *,
    batch_size: int = 4,
    workers: int = 0,
    device: torch.device | str = "cpu",
    preview: int = _PANELS,
    progress: Callable[[int], None] | None = None,
) -> Path | None:
    """Write a map for every row and a picture of the first of them.

    They are ``OUT/KEY.tif`` and ``OUT/panels.png``, or, of a model of several labels, ``OUT/LABEL/KEY.tif`` and
    ``OUT/LABEL/panels.png``.

    Args:
        task: the model; put into evaluation mode.
        patches: of shards or a tree. Modalities and labels that they lack are done without.
        rows: (N,) int64, of these patches, at least one; for an official model, ``complete_rows``.
        out: folder, made when missing; files of the same name are replaced.
        batch_size, workers: of the reader.
        device: where the model runs.
        preview: rows of the picture; 0 for none.
        progress: called with the number of patches done so far.

    Returns:
        The path of the picture, of the first label.

    Raises:
        InputError: no rows, shards that hold none of the modalities (an official model needs them all in a patch), or
            an ``out`` that cannot be a folder.
    """
    if len(rows) == 0:
        raise InputError(f"{patches.path}: no patch to predict")
    labels = [name for name in task.labels if name in patches.registry]
    modalities = readable_modalities(task, patches, labels=labels)
    if missing := [name for name in task.modalities if name not in patches.registry]:
        print(f"bocage: {patches.path} has no {', '.join(missing)}: predicting without", file=sys.stderr)
    folders = {name: out / name if len(task.targets) > 1 else out for name in task.targets}
    for folder in folders.values():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made a folder for the maps: {error.strerror}") from error
    task = task.to(device).eval()
    panels: dict[str, list[Panel]] = {name: [] for name in task.targets}
    for done, found in enumerate(_predicted(task, patches, rows, modalities, batch_size, workers), start=1):
        for name, target in task.targets.items():
            write_prediction(
                folders[name] / f"{found.place.key}.tif",
                found.maps[name],
                target.scheme,
                crs=found.place.crs,
                left=found.place.left,
                top=found.place.top,
                gsd=target.label.gsd,
            )
            if len(panels[name]) < preview:
                panels[name].append(_panel(found, modalities, target))
        if progress is not None:
            progress(done)
    for name, target in task.targets.items():
        if panels[name]:
            draw_panels(folders[name] / "panels.png", panels[name], target.scheme, _title(target, task))
    return folders[task.labels[0]] / "panels.png" if preview else None


def draw_patches(
    task: Segmentation, patches: Patches, rows: np.ndarray, folder: Path, name: str, *, batch_size: int
) -> dict[str, Path]:
    """Draw predictions of some labelled patches, by label as ``FOLDER/NAME_LABEL.png``, in evaluation mode.

    ``rows`` are (N,) int64; the paths are by name, ``predictions/LABEL``.
    """
    modalities = readable_modalities(task, patches, labels=task.labels)
    panels: dict[str, list[Panel]] = {label: [] for label in task.targets}
    for found in _predicted(task, patches, rows, modalities, batch_size, workers=0):
        for label, target in task.targets.items():
            panels[label].append(_panel(found, modalities, target))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {f"predictions/{label}": folder / f"{name}_{label}.png" for label in task.targets}
    for path, (label, target) in zip(paths.values(), task.targets.items(), strict=True):
        draw_panels(path, panels[label], target.scheme, _title(target, task))
    return paths


def _title(target: Target, task: Segmentation) -> str:
    return f"{target.scheme.name} from {', '.join(task.modalities)}"


def _panel(found: _Predicted, modalities: list[Modality], target: Target) -> Panel:
    """The first of the model's modalities that the sample has is the one shown."""
    batch, index = found.batch, found.index
    key, predicted = batch.keys[index], found.maps[target.name]
    truth = None
    if target.name in batch.present and batch.present[target.name][index]:
        truth = target.truth(batch)[index].cpu().numpy()
    for modality in modalities:
        if not modality.is_input or not batch.present[modality.name][index]:
            continue
        values = batch.values[modality.name][index].cpu().numpy()
        if modality.has_dates:
            values = values[~batch.padding[modality.name][index].cpu().numpy()]
        if values.size:
            return Panel(key, render(values, modality), truth, predicted)
    return Panel(key, None, truth, predicted)
