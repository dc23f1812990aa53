"""What a model scores: confusion matrices by region, and the tables, files and pictures made of them."""

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
from bocage.finetune.evaluation.predict import complete_rows, readable_modalities
from bocage.finetune.models.segmentation import Segmentation
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.format.manifest import EVERY_SAMPLE, Manifest
from bocage.shards.read.dataset import evaluation_batches
from bocage.shards.read.patches import Patches, ShardPatches
from bocage.ssl.engine.parallel.distributed import rank_and_world
from bocage.ssl.evaluation.confusion import ConfusionMatrix, official_scores, strict_scores

Confusions = dict[str, ConfusionMatrix]
"""By label."""


def labelled_rows(
    patches: Patches, task: Segmentation, split: str, value: str, *, only: Sequence[str] | None = None
) -> np.ndarray:
    """Rows of one value of a split, (N,) int64, that have one of a model's labels and at least one of its modalities.

    With ``only``, at least one of these. For an official model they have all of its modalities, see ``complete_rows``.

    Raises:
        InputError: there is none.
    """
    rows = patches.split(split, value)
    known = [name for name in (*task.modalities, *task.labels) if name in patches.registry]
    held = {name: patches.held(name)[rows] for name in known}
    there = [
        np.any([held[name] for name in names if name in held] or [np.zeros(len(rows), bool)], axis=0)
        for names in (task.modalities if only is None else only, task.labels)
    ]
    rows = complete_rows(task, patches, rows[there[0] & there[1]])
    if len(rows) == 0:
        where = "all of them" if split == EVERY_SAMPLE else f"{split}={value}"
        wanted = " or ".join(task.labels)
        raise InputError(f"{patches.path}: no patch of {where} has {wanted} and one of the modalities")
    return rows


@torch.no_grad()
def confusion(
    task: Segmentation,
    manifest: Manifest,
    rows: np.ndarray,
    *,
    batch_size: int,
    workers: int,
    only: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Confusions:
    """Confusion matrices of whole patches, shared out over the ranks; the same on all of them. A collective call.

    They are of the labels that the shards hold.

    Args:
        task: the model, in evaluation mode.
        manifest: open shards.
        rows: (N,) int64, of these patches.
        batch_size, workers: of the reader.
        only: the modalities that the model may see; all when None.
        progress: called with the patches that this rank has done so far.
    """
    rank, world = rank_and_world()
    device = next(task.parameters()).device
    targets = {name: target for name, target in task.targets.items() if name in manifest.registry}
    matrices = {name: ConfusionMatrix(target.scheme) for name, target in targets.items()}
    batches = evaluation_batches(
        manifest,
        rows,
        readable_modalities(task, ShardPatches(manifest), labels=list(targets), only=only),
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


def sensor_sets(modalities: Sequence[str], hidden: Sequence[str] = ()) -> dict[str, list[str]]:
    """What a model may be left with: all but each of its sensors, and each alone; nothing of a single one.

    Args:
        modalities: that it sees.
        hidden: that it sees in none of the sets; their names tell so.
    """
    if len(modalities) < 2:
        return {}
    without = {
        f"without {' '.join([*hidden, name])}": [other for other in modalities if other != name] for name in modalities
    }
    return without | {f"only {name}": [name] for name in modalities}


def rows_with_all(patches: Patches, rows: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
    """Those of the rows, (N,) int64, that have each of the modalities: what is compared sees the same patches."""
    for name in modalities:
        rows = rows[patches.held(name)[rows]]
    return rows


def monitored(confusions: Confusions) -> dict[str, float]:
    """Scores to follow while training: with several labels their means, and those of each as ``miou/LABEL``."""
    found: dict[str, list[float]] = {"miou": [], "oa": [], "official_miou": [], "official_oa": []}
    # A label of which there is not a pixel has no score, and would count 0.
    confusions = {name: matrix for name, matrix in confusions.items() if matrix.total.any()} or confusions
    for matrix in confusions.values():
        strict, official = strict_scores(matrix.total, matrix.scheme), official_scores(matrix.total, matrix.scheme)
        for name, value in zip(found, (strict.miou, strict.oa, official.miou, official.oa), strict=True):
            found[name].append(value)
    scores = {name: float(np.mean(values)) for name, values in found.items()}
    if len(confusions) > 1:
        for name, values in found.items():
            scores |= {f"{name}/{label}": value for label, value in zip(confusions, values, strict=True)}
    return scores


def summary(matrix: ConfusionMatrix) -> dict[str, Any]:
    """All scores of one label: ``strict`` and ``official`` ones, ``domains`` (strict), and the ``confusion`` matrix."""
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
    """Write the tables of ``write_tables`` and a picture a matrix, ``confusions/PART_LABEL.png``."""
    for part, confusions in parts.items():
        for label, matrix in confusions.items():
            path = folder / "confusions" / f"{part.replace(' ', '_')}_{label}.png"
            draw_confusion(path, matrix.total, matrix.scheme, part)
    write_tables(folder, parts)


def write_tables(folder: Path, parts: Mapping[str, Confusions]) -> None:
    """Write ``confusions.parquet`` and ``scores.parquet``.

    The former has the pixels of each ``part``, ``label``, ``domain``, ``roi``, true and predicted class, without rows
    of no pixel: everything else follows from it. The latter has strict scores in percent by ``part``, ``label``,
    ``domain`` (``all`` for the whole) and ``class``.

    Args:
        folder: where.
        parts: by part of the split, or whatever was measured.
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
            for roi, cells in sorted(matrix.by_roi.items()):
                for truth, predicted in np.argwhere(cells):
                    pixels = int(cells[truth, predicted])
                    row = (part, label, matrix.domain(roi), roi, classes[truth], classes[predicted], pixels)
                    for key, value in zip(counts, row, strict=True):
                        counts[key].append(value)
            for domain, cells in {"all": matrix.total, **matrix.by_domain()}.items():
                found = asdict(strict_scores(cells, matrix.scheme))
                for name in found["iou"]:
                    figures = [found[kind][name] for kind in ("iou", "precision", "recall", "f1")]
                    row = (part, label, domain, name, *figures, int(cells[classes.index(name)].sum()))
                    for key, value in zip(scores, row, strict=True):
                        scores[key].append(value)
    for name, columns in (("confusions", counts), ("scores", scores)):
        with written_atomically(folder / f"{name}.parquet") as path:
            pq.write_table(pa.table(columns), path)


def region_matrices(folder: Path, part: str, label: str, scheme: ClassScheme) -> dict[str, np.ndarray]:
    """By region, the (classes, classes) int64 confusion matrix that ``write_tables`` wrote of a part and a label."""
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
