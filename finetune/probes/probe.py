"""Probes as runs of their own: what frozen features tell of labels, taught with few, without training any encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.evaluation.evaluate import Confusions, classification_report, write_results
from bocage.finetune.probes.feature_cache import PatchTensorStore, DenseFeatureCache
from bocage.finetune.subsets.sampling import keys_digest
from bocage.finetune.train import build_task, split_rows
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.encoders.initialization import weights_digest
from bocage.ssl.evaluation.confusion import ConfusionMatrix
from bocage.ssl.evaluation.probe import LabelledCells, knn_probe, linear_probe

ProbeKind = Literal["knn", "linear"]
PROBE_KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
CELL_SIZE = 12.8
"""Side of the cells that are told apart, metres."""

_NEIGHBOURS, _PENALTY = 20, 1e-3
MAX_TRAIN_CELLS = 2**17
"""That teach a probe: more take longer than what they tell is worth."""

_PATCHES = 256  # whose features are in memory at once


def run_probe(
    config: FinetuneConfig, kind: ProbeKind, cache: Path, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Measure what the encoders of a fine-tuning run tell before any training.

    The patches are those that the run would learn from and be measured on, its encoders those that it would start with:
    pretrained ones or random ones of its seed. Features of several encoders stand side by side. Figures are of cells of
    12.8 m, whose label is the commonest scored class: not those of pixels, but comparable with each other.

    Leaves ``metrics.json``, ``confusions.parquet``, ``scores.parquet`` and ``confusions/`` in ``config.output``, as
    ``finetune`` does.

    Args:
        config: the run; what it says of training is not read.
        kind: 20 nearest neighbours by cosine, or logistic regression.
        cache: folder of features (``features.DenseFeatures``).
        progress: called with the name of an encoder, of how many patches, and how many are done.

    Returns:
        The contents of ``metrics.json``; under ``taught`` how many labelled cells it learned from, of how many: at most
        131,072, so that probes of large shares of a large dataset learn from as many.

    Raises:
        InputError: see ``train.build_task`` and ``train.split_rows``; no labelled cell to learn from.
    """
    if not config.output:
        raise InputError("output=PATH is missing: give a folder for the scores")
    manifest, output = open_shards(config.shards, config.cache), Path(config.output)
    torch.manual_seed(config.engine.seed)
    task = build_task(config, manifest).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task.to(device)
    rows = split_rows(config, ShardPatches(manifest), task)
    every = np.unique(np.concatenate(list(rows.values())))
    reading: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.workers}
    dense = DenseFeatureCache(cache, manifest, CELL_SIZE)
    features: list[PatchTensorStore] = []
    for name in task.modalities:
        told = None if progress is None else partial(progress, name, len(every))
        features.append(dense.features(task.model.encoder(name), every, progress=told, **reading))
    keys = {part: manifest.column("key").take(indices).to_pylist() for part, indices in rows.items()}
    parts: dict[str, Confusions] = {name: {} for name in rows if name != "train"}
    taught = {}
    for label, target in task.targets.items():
        labels = dense.labels(target, every, **reading)
        train, there = _labelled_cells(features, labels, keys["train"])
        taught[label] = {"cells": len(train.labels), "of": there}
        predicted = _fitted(kind, train, len(target.scheme), device)
        for part, confusions in parts.items():
            regions = manifest.column("roi").take(rows[part]).to_pylist()
            confusions[label] = ConfusionMatrix(target.scheme)
            for start in range(0, len(regions), _PATCHES):
                some = slice(start, start + _PATCHES)
                _count(confusions[label], keys[part][some], regions[some], labels, features, predicted)
    metrics: dict[str, Any] = {
        "recipe": config.recipe,
        "probe": kind,
        "shards": manifest.digest,
        "split": config.split,
        "taught": taught,
        "labels": {name: target.scheme_to_json() for name, target in task.targets.items()},
        "modalities": task.modalities,
        "pretrained": config.encoders,
        "weights": {name: weights_digest(source) for name, source in config.encoders.items()},
        "patches": {part: len(indices) for part, indices in rows.items()},
        "train_keys": keys_digest(keys["train"]),
        **{part: {name: classification_report(matrix) for name, matrix in found.items()} for part, found in parts.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_results(output, parts)
    with atomic_write(output / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def _labelled_cells(features: Sequence[PatchTensorStore], labels: PatchTensorStore, keys: Sequence[str]) -> tuple[LabelledCells, int]:
    """The labelled cells of some patches, and how many there are: of very many some are taken, spread evenly."""
    truth = labels.read(keys)
    known = (truth.flatten() >= 0).nonzero()[:, 0]
    there = len(known)
    if not there:
        raise InputError("no cell of the training patches has a scored class: take a larger train_fraction")
    if there > MAX_TRAIN_CELLS:
        known = known[torch.linspace(0, there - 1, MAX_TRAIN_CELLS).round().long()]
    cells = truth[0].numel()
    chosen = []
    for start in range(0, len(keys), _PATCHES):
        here = known[(known >= start * cells) & (known < (start + _PATCHES) * cells)]
        chosen.append(_vectors(features, keys[start : start + _PATCHES])[here - start * cells])
    return LabelledCells(torch.cat(chosen), truth.flatten()[known].long()), there


def _fitted(
    kind: ProbeKind, train: LabelledCells, classes: int, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What tells classes (N,) of features (N, C), learned and computed on a device."""
    train = LabelledCells(train.features.to(device), train.labels.to(device))
    if kind == "linear":
        told = linear_probe(train, classes, _PENALTY)
        return lambda queries: told(queries.to(device)).cpu()
    return lambda queries: knn_probe(train, queries.to(device), classes, _NEIGHBOURS).cpu()


def _vectors(features: Sequence[PatchTensorStore], keys: Sequence[str]) -> torch.Tensor:
    """Features of all cells of patches, those of all encoders side by side, (N, C) float32."""
    return torch.cat([item.read(keys) for item in features], dim=1).movedim(1, -1).flatten(0, 2).float()


def _count(
    matrix: ConfusionMatrix,
    keys: Sequence[str],
    regions: Sequence[str],
    labels: PatchTensorStore,
    features: Sequence[PatchTensorStore],
    predicted: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Add the labelled cells of patches to a matrix, those of each region apart."""
    truth = labels.read(keys)
    names = np.repeat(np.array(regions), truth[0].numel())
    truth = truth.flatten().long()
    known = (truth >= 0).nonzero()[:, 0]
    answers = predicted(_vectors(features, keys)[known])
    for name in np.unique(names):
        here = torch.from_numpy(names[known.numpy()] == name)
        matrix.update(truth[known][here].view(1, 1, -1), answers[here].view(1, 1, -1), [str(name)])
