"""Probe frozen encoders with kNN or logistic regression on a few labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from bocage.finetune.evaluation.evaluate import Confusions, classification_report, write_results
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.probes.feature_cache import DenseFeatureCache, PatchTensorStore
from bocage.finetune.subsets.sampling import keys_digest
from bocage.finetune.train import build_task, split_rows
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.encoders.initialization import weights_digest
from bocage.ssl.evaluation.confusion import ConfusionMatrix
from bocage.ssl.evaluation.probe import (
    CONTROLS,
    PENALTIES,
    LabelledCells,
    default_cell,
    knn_probe,
    random_encoder,
    tuned_linear_probe,
)

ProbeKind = Literal["knn", "linear"]
PROBE_KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
MAX_TRAIN_CELLS = 2**17
"""Maximum number of training cells of a probe; more take longer without a useful gain."""

_NEIGHBOURS = 20
_CHUNK_PATCHES = 256  # patches whose features are in memory at once


def run_probe(
    config: FinetuneConfig,
    kind: ProbeKind,
    cache: Path,
    progress: Callable[[str, int, int], None] | None = None,
    controls: Sequence[str] = CONTROLS,
) -> dict[str, Any]:
    """Score the frozen initial encoders of a fine-tuning run with a probe.

    The probe uses the same training and evaluation patches as the run, and the same initial encoders: pretrained, or
    random with the run's seed. Features of several encoders are concatenated. The probe classifies ground cells, an
    eighth of a patch wide (``default_cell``), by their majority scored class. Its scores are comparable with those of
    other probes, but not with pixel scores. The penalty of ``linear`` is the best of ``PENALTIES`` on the validation
    patches, or, if these are scored because there are no test patches, on every fourth training patch.

    Writes ``metrics.json``, ``confusions.parquet``, ``scores.parquet`` and ``confusions/`` to ``config.output``, like
    ``finetune``.

    Args:
        config: fine-tuning configuration; the probe ignores its training options.
        kind: ``knn`` (20 nearest neighbours by cosine similarity) or ``linear`` (logistic regression).
        cache: folder of the feature cache (``DenseFeatureCache``).
        progress: callback that receives the encoder's name, its number of patches, and the number of finished patches.
        controls: what is scored in the same way beside the encoders: ``random``, encoders of the same architectures
            with random weights (seed 0), and ``raw``, raw inputs (``raw_features``).

    Returns:
        Contents of ``metrics.json``. ``controls`` has the strict mIoU of the controls, by part and label.
        ``penalties`` has the chosen penalty by label. ``train_cells`` has the number of training cells (``used``, at
        most 131,072), that of labelled cells in the training patches (``labelled``), and their side in metres
        (``side``).

    Raises:
        InputError: no training cell has a label, or an error of ``train.build_task`` or ``train.split_rows``.
    """
    if not config.output:
        raise InputError("output=PATH is missing: give a folder for the scores")
    manifest, output = open_shards(config.shards, config.cache), Path(config.output)
    torch.manual_seed(config.engine.seed)
    task = build_task(config, manifest).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task.to(device)
    rows = split_rows(config, ShardPatches(manifest), task)
    all_rows = np.unique(np.concatenate(list(rows.values())))
    loading: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.workers}
    cell = default_cell(next(iter(task.targets.values())).label)  # all labels of a model have one pixel size
    cells = DenseFeatureCache(cache, manifest, cell)
    keys = {part: manifest.column("key").take(indices).to_pylist() for part, indices in rows.items()}
    regions = {part: manifest.column("roi").take(indices).to_pylist() for part, indices in rows.items()}
    labels = {name: cells.labels(target, all_rows, **loading) for name, target in task.targets.items()}
    parts: dict[str, Confusions] = {name: {} for name in rows if name != "train"}
    control_miou: dict[str, dict[str, dict[str, float]]] = {}
    train_cells, penalties = {}, {}
    for source in ("", *controls):
        features: list[PatchTensorStore] = []
        for name in task.modalities:
            report = None if progress is None else partial(progress, f"{name} {source}".rstrip(), len(all_rows))
            encoder = task.model.encoder(name)
            features.append(
                cells.raw_features(encoder.spec, all_rows, progress=report, **loading)
                if source == "raw"
                else cells.features(
                    random_encoder(encoder) if source else encoder, all_rows, progress=report, **loading
                )
            )
        for label, target in task.targets.items():
            train, labelled = _labelled_cells(features, labels[label], keys["train"])
            validation = None
            chooses_penalty = kind == "linear" and {"valid", "test"} <= rows.keys()
            if chooses_penalty and (labels[label].read(keys["valid"]) >= 0).any():
                validation, _ = _labelled_cells(features, labels[label], keys["valid"])
            predict, penalty = _fit(kind, train, validation, target.scheme, device)
            if not source:
                train_cells[label] = {"used": len(train.labels), "labelled": labelled, "side": cell}
                penalties[label] = penalty
            for part, confusions in parts.items():
                matrix = ConfusionMatrix(target.scheme)
                for start in range(0, len(keys[part]), _CHUNK_PATCHES):
                    chunk = slice(start, start + _CHUNK_PATCHES)
                    _count(matrix, keys[part][chunk], regions[part][chunk], labels[label], features, predict)
                if source:
                    miou = classification_report(matrix)["strict"]["miou"]
                    control_miou.setdefault(source, {}).setdefault(part, {})[label] = miou
                else:
                    confusions[label] = matrix
    metrics: dict[str, Any] = {
        "recipe": config.recipe,
        "probe": kind,
        "shards": manifest.digest,
        "split": config.split,
        "train_cells": train_cells,
        "penalties": penalties,
        "controls": control_miou,
        "labels": {name: target.scheme_to_json() for name, target in task.targets.items()},
        "modalities": task.modalities,
        "pretrained": config.encoders,
        "weights": {name: weights_digest(source) for name, source in config.encoders.items()},
        "patches": {part: len(indices) for part, indices in rows.items()},
        "train_keys": keys_digest(keys["train"]),
        **{
            part: {name: classification_report(matrix) for name, matrix in confusions.items()}
            for part, confusions in parts.items()
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    write_results(output, parts)
    with atomic_write(output / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def _labelled_cells(
    features: Sequence[PatchTensorStore], labels: PatchTensorStore, keys: Sequence[str]
) -> tuple[LabelledCells, int]:
    """Read the labelled cells of patches.

    Returns:
        At most ``MAX_TRAIN_CELLS`` cells, taken at equal intervals, and the number of all labelled cells.
    """
    truth = labels.read(keys)
    labelled = (truth.flatten() >= 0).nonzero()[:, 0]
    count = len(labelled)
    if not count:
        raise InputError("no cell of the training patches has a scored class: increase train_fraction")
    if count > MAX_TRAIN_CELLS:
        labelled = labelled[torch.linspace(0, count - 1, MAX_TRAIN_CELLS).round().long()]
    patch_cells = truth[0].numel()
    chunks = []
    for start in range(0, len(keys), _CHUNK_PATCHES):
        first, end = start * patch_cells, (start + _CHUNK_PATCHES) * patch_cells
        index = labelled[(labelled >= first) & (labelled < end)] - first
        chunks.append(_feature_vectors(features, keys[start : start + _CHUNK_PATCHES])[index])
    return LabelledCells(torch.cat(chunks), truth.flatten()[labelled].long(), labelled // patch_cells), count


def _fit(
    kind: ProbeKind, train: LabelledCells, validation: LabelledCells | None, scheme: ClassScheme, device: torch.device
) -> tuple[Callable[[torch.Tensor], torch.Tensor], float | None]:
    """Fit a probe on a device.

    Returns:
        Function from features (N, C) to classes (N,) on the CPU; and the chosen penalty, None for ``knn``.
    """
    train = train.to(device)
    if kind == "linear":
        chosen_on = None if validation is None else validation.to(device)
        classify, penalty = tuned_linear_probe(train, chosen_on, scheme, PENALTIES)
        return lambda queries: classify(queries.to(device)).cpu(), penalty
    return lambda queries: knn_probe(train, queries.to(device), len(scheme), _NEIGHBOURS).cpu(), None


def _feature_vectors(features: Sequence[PatchTensorStore], keys: Sequence[str]) -> torch.Tensor:
    """Read the feature vectors of all cells of the patches ``keys``, concatenated over encoders: (N, C) float32."""
    return torch.cat([item.read(keys) for item in features], dim=1).movedim(1, -1).flatten(0, 2).float()


def _count(
    matrix: ConfusionMatrix,
    keys: Sequence[str],
    regions: Sequence[str],
    labels: PatchTensorStore,
    features: Sequence[PatchTensorStore],
    predict: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Add the predictions for the labelled cells of patches to a confusion matrix, by region."""
    truth = labels.read(keys)
    region_of_cell = np.repeat(np.array(regions), truth[0].numel())
    truth = truth.flatten().long()
    labelled = (truth >= 0).nonzero()[:, 0]
    truth, region_of_cell = truth[labelled], region_of_cell[labelled.numpy()]
    predicted = predict(_feature_vectors(features, keys)[labelled])
    for name in np.unique(region_of_cell):
        in_region = torch.from_numpy(region_of_cell == name)
        matrix.update(truth[in_region].view(1, 1, -1), predicted[in_region].view(1, 1, -1), [str(name)])
