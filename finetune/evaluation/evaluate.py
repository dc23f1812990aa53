"""Compute confusion matrices by region, and write the scores, tables and pictures derived from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from bocage.finetune.evaluation.figures import draw_confusion
from bocage.finetune.evaluation.predict import modalities_to_read, predictable_rows
from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import EVERY_SAMPLE, Manifest
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.read.patches import Patches, ShardPatches
from bocage.ssl.engine.parallel.distributed import rank_and_world
from bocage.ssl.evaluation.confusion import ConfusionMatrix, official_scores, strict_scores

Confusions = dict[str, ConfusionMatrix]
"""Confusion matrices by label."""


def labelled_rows(
    patches: Patches, task: Segmentation, split: str, value: str, *, modalities: Sequence[str] | None = None
) -> np.ndarray:
    """Select the patches of a split that have a label and an input of the model.

    Args:
        patches: patches of shards or of a tree.
        task: model to evaluate.
        split: split column, or ``all``.
        value: value of the split.
        modalities: inputs of which a patch needs at least one; None means all inputs of the model. A model of the
            official architecture needs all of its inputs, see ``predictable_rows``.

    Returns:
        (N,) int64 rows.

    Raises:
        InputError: no patch qualifies.
    """
    rows = patches.split(split, value)
    stored = [name for name in (*task.modalities, *task.labels) if name in patches.registry]
    present = {name: patches.has_modality(name)[rows] for name in stored}
    has_input, has_label = (
        np.any([present[name] for name in names if name in present] or [np.zeros(len(rows), bool)], axis=0)
        for names in (task.modalities if modalities is None else modalities, task.labels)
    )
    rows = predictable_rows(task, patches, rows[has_input & has_label])
    if len(rows) == 0:
        subset = "the shards" if split == EVERY_SAMPLE else f"{split}={value}"
        labels = " or ".join(task.labels)
        raise InputError(f"{patches.path}: no patch of {subset} has both {labels} and one of the modalities")
    return rows


@torch.no_grad()
def compute_confusions(
    task: Segmentation,
    manifest: Manifest,
    rows: np.ndarray,
    *,
    batch_size: int,
    workers: int,
    modalities: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Confusions:
    """Compute the confusion matrix of each label on whole patches; a collective call.

    Ranks split the patches and all of them return the merged matrices. Labels that the shards lack are left out.

    Args:
        task: model in evaluation mode.
        manifest: manifest of the shards.
        rows: (N,) int64 rows of the patches.
        batch_size: patches per batch.
        workers: DataLoader workers.
        modalities: inputs that the model reads; None means all of its inputs.
        progress: callback that receives the number of patches this rank has finished.
    """
    rank, world = rank_and_world()
    device = next(task.parameters()).device
    targets = {name: target for name, target in task.targets.items() if name in manifest.registry}
    matrices = {name: ConfusionMatrix(target.scheme) for name, target in targets.items()}
    batches = evaluation_batches(
        manifest,
        rows,
        modalities_to_read(task, ShardPatches(manifest), labels=list(targets), inputs=modalities),
        batch_size=batch_size,
        workers=workers,
        rank=rank,
        world=world,
    )
    done = 0
    for batch in batches:
        moved = batch.to(device)
        predicted = task.predict(moved)
        for name, target in targets.items():
            matrices[name].update(target.truth(moved), predicted[name], batch.rois, batch.present[name])
        done += len(batch)
        if progress is not None:
            progress(done)
    return {name: matrix.merged() for name, matrix in matrices.items()}


def sensor_ablations(modalities: Sequence[str], excluded: Sequence[str] = ()) -> dict[str, list[str]]:
    """List the sets of inputs for a sensor ablation: all but one, and each one alone.

    Args:
        modalities: inputs of the model.
        excluded: inputs that all sets lack; the names of the leave-one-out sets contain them.

    Returns:
        Modalities by name of the set (``without A``, ``only A``); empty for fewer than two inputs.
    """
    if len(modalities) < 2:
        return {}
    leave_one_out = {
        f"without {' '.join([*excluded, name])}": [other for other in modalities if other != name]
        for name in modalities
    }
    return leave_one_out | {f"only {name}": [name] for name in modalities}


def rows_with_all_modalities(patches: Patches, rows: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
    """Keep the rows, (N,) int64, whose patches have all of the modalities, so that ablations compare equal patches."""
    for name in modalities:
        rows = rows[patches.has_modality(name)[rows]]
    return rows


def scalar_metrics(confusions: Confusions) -> dict[str, float]:
    """Return the scalar scores to log: means over labels, and with several labels also ``miou/LABEL`` for each."""
    by_metric: dict[str, list[float]] = {"miou": [], "oa": [], "official_miou": [], "official_oa": []}
    # A label without any pixel would count as 0 in the mean.
    confusions = {name: matrix for name, matrix in confusions.items() if matrix.total.any()} or confusions
    for matrix in confusions.values():
        strict, official = strict_scores(matrix.total, matrix.scheme), official_scores(matrix.total, matrix.scheme)
        for name, value in zip(by_metric, (strict.miou, strict.oa, official.miou, official.oa), strict=True):
            by_metric[name].append(value)
    scores = {name: float(np.mean(values)) for name, values in by_metric.items()}
    if len(confusions) > 1:
        for name, values in by_metric.items():
            scores |= {f"{name}/{label}": value for label, value in zip(confusions, values, strict=True)}
    return scores


def classification_report(matrix: ConfusionMatrix) -> dict[str, Any]:
    """Return all scores of one label as JSON: ``strict``, ``official``, ``domains`` (strict) and ``confusion``."""
    domains = {}
    for domain, counts in matrix.by_domain().items():
        scores = strict_scores(counts, matrix.scheme)
        domains[domain] = {"miou": scores.miou, "oa": scores.oa, "pixels": int(counts.sum()), "iou": scores.iou}
    return {
        "strict": strict_scores(matrix.total, matrix.scheme).to_json(),
        "official": official_scores(matrix.total, matrix.scheme).to_json(),
        "domains": domains,
        "confusion": matrix.total.tolist(),
    }


def write_results(folder: Path, parts: Mapping[str, Confusions]) -> None:
    """Write the tables of ``write_tables`` and one picture per confusion matrix, ``confusions/PART_LABEL.png``."""
    for part, confusions in parts.items():
        for label, matrix in confusions.items():
            path = folder / "confusions" / f"{part.replace(' ', '_')}_{label}.png"
            draw_confusion(path, matrix.total, matrix.scheme, part)
    write_tables(folder, parts)


def write_tables(folder: Path, parts: Mapping[str, Confusions]) -> None:
    """Write ``confusions.parquet`` and ``scores.parquet``.

    ``confusions.parquet`` counts pixels by ``part``, ``label``, ``domain``, ``roi``, true class and predicted class;
    zero counts have no row. All other scores can be computed from it. ``scores.parquet`` has strict scores in percent
    by ``part``, ``label``, ``domain`` (``all`` for the total) and ``class``.

    Args:
        folder: output folder.
        parts: confusion matrices by part of the split, or by set of sensors.
    """
    counts: dict[str, list[Any]] = {
        key: [] for key in ("part", "label", "domain", "roi", "truth", "predicted", "pixels")
    }
    scores: dict[str, list[Any]] = {
        key: [] for key in ("part", "label", "domain", "class", "iou", "precision", "recall", "f1", "pixels")
    }
    for part, confusions in parts.items():
        for label, matrix in confusions.items():
            classes = matrix.scheme.classes
            for roi, pixel_counts in sorted(matrix.by_roi.items()):
                for truth, predicted in np.argwhere(pixel_counts):
                    pixels = int(pixel_counts[truth, predicted])
                    row = (part, label, matrix.domain(roi), roi, classes[truth], classes[predicted], pixels)
                    for key, value in zip(counts, row, strict=True):
                        counts[key].append(value)
            for domain, pixel_counts in {"all": matrix.total, **matrix.by_domain()}.items():
                strict = asdict(strict_scores(pixel_counts, matrix.scheme))
                for name in strict["iou"]:
                    values = [strict[metric][name] for metric in ("iou", "precision", "recall", "f1")]
                    row = (part, label, domain, name, *values, int(pixel_counts[classes.index(name)].sum()))
                    for key, value in zip(scores, row, strict=True):
                        scores[key].append(value)
    for name, columns in (("confusions", counts), ("scores", scores)):
        with atomic_write(folder / f"{name}.parquet") as path:
            pq.write_table(pa.table(columns), path)


def read_region_matrices(folder: Path, part: str, label: str, scheme: ClassScheme) -> dict[str, np.ndarray]:
    """Read one part and label of ``confusions.parquet``: (classes, classes) int64 confusion matrices by region."""
    table = pq.read_table(folder / "confusions.parquet")
    table = table.filter(pc.and_(pc.equal(table["part"], part), pc.equal(table["label"], label)))
    value = {name: index for index, name in enumerate(scheme.classes)}
    truth, predicted = (
        np.array([value[name] for name in table[key].to_pylist()], np.int64) for key in ("truth", "predicted")
    )
    names, region = np.unique(np.array(table["roi"].to_pylist(), str), return_inverse=True)
    counts = np.zeros((len(names), len(scheme), len(scheme)), np.int64)
    np.add.at(counts, (region, truth, predicted), table["pixels"].to_numpy())
    return {str(name): counts[index] for index, name in enumerate(names)}
