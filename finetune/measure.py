"""What a model scores: confusion matrices by region, and the tables, files and pictures made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bocage.finetune.predict import readable_modalities
from bocage.finetune.task import Segmentation
from bocage.shards.files import written_atomically
from bocage.shards.manifest import Manifest
from bocage.shards.stream import evaluation_batches
from bocage.ssl.engine.distributed import rank_and_world
from bocage.ssl.metrics import ConfusionMatrix, official_scores, strict_scores

Confusions = dict[str, ConfusionMatrix]
"""By label."""


@torch.no_grad()
def confusion(task: Segmentation, manifest: Manifest, rows: np.ndarray, *, batch_size: int, workers: int) -> Confusions:
    """Confusion matrices of whole patches, shared out over the ranks; the same on all of them. A collective call."""
    rank, world = rank_and_world()
    device = next(task.parameters()).device
    matrices = {name: ConfusionMatrix(target.scheme) for name, target in task.targets.items()}
    batches = evaluation_batches(
        manifest,
        rows,
        readable_modalities(task, manifest, labels=task.labels),
        batch_size=batch_size,
        workers=workers,
        rank=rank,
        world=world,
    )
    for batch in batches:
        moved = batch.to(device)
        predicted = task.predict(moved)
        for name, target in task.targets.items():
            matrices[name].update(target.truth(moved), predicted[name], batch.rois, batch.present[name])
    return {name: matrix.merged() for name, matrix in matrices.items()}


def monitored(confusions: Confusions) -> dict[str, float]:
    """Scores to follow while training: with several labels their means, and those of each as ``miou/LABEL``."""
    found: dict[str, list[float]] = {"miou": [], "oa": [], "official_miou": [], "official_oa": []}
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


def write_tables(folder: Path, parts: Mapping[str, Confusions]) -> None:
    """Write ``confusions.parquet`` and ``scores.parquet``.

    The former has the pixels of each ``part``, ``label``, ``domain``, ``roi``, true and predicted class, without rows
    of no pixel: everything else follows from it. The latter has strict scores in percent by ``part``, ``label``,
    ``domain`` (``all`` for the whole) and ``class``.

    Args:
        folder: where.
        parts: by part of the split, what was measured.
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
