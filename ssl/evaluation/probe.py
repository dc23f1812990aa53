"""Probes: what frozen features already tell of the land cover of each cell of the ground, while encoders pretrain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bocage.shards.batch import Batch
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import PATCH_SIZE
from bocage.shards.preprocess.inputs import EncoderInput, encoder_inputs, wanted_modalities
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.engine.parallel.distributed import all_gather_object, rank_and_world
from bocage.ssl.evaluation.confusion import ConfusionMatrix, strict_scores
from bocage.ssl.objectives.model import PretrainingModel

_SHARPNESS = 0.07  # of the votes of neighbours, as in DINO (arXiv 2104.14294)
_ITERATIONS = 100
_MOST_CELLS = 2**18  # of each part: more take longer than what they tell is worth


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Probes of frozen features, made at each evaluation (``engine.evaluate_every``).

    Attributes:
        label: the label raster, e.g. ``AERIAL_LABEL-COSIA``; empty makes none.
        level: which of its bands, from 1.
        train: value of the split whose patches teach the probes.
        test: value of the split that they are measured on.
        patches: of each of the two, spread evenly.
        cell: side of a cell, metres, rounded so that cells divide a patch; its label is the commonest scored class.
        neighbours: whose votes decide in kNN.
        penalty: on the squared weights of the linear probe.

    Raises:
        ValueError: a number out of its range, or more cells than are feasible.
    """

    label: str = ""
    level: int = 1
    train: str = "train"
    test: str = "valid"
    patches: int = 64
    cell: float = 12.8
    neighbours: int = 20
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        for key in ("level", "patches", "neighbours"):
            if getattr(self, key) < 1:
                raise ValueError(f"probe.{key}={getattr(self, key)} must be at least 1")
        if not 0 < self.cell <= PATCH_SIZE / 2:
            raise ValueError(f"probe.cell={self.cell} must be positive, and at most half a patch of {PATCH_SIZE} m")
        cells = self.patches * round(PATCH_SIZE / self.cell) ** 2
        if cells > _MOST_CELLS:
            raise ValueError(
                f"probe.cell={self.cell} makes {cells} cells of probe.patches={self.patches}: at most {_MOST_CELLS} "
                "are feasible"
            )
        if not self.penalty >= 0:
            raise ValueError(f"probe.penalty={self.penalty} must not be negative")


@dataclass(frozen=True)
class LabelledCells:
    """Labelled cells of some patches as one encoder sees them.

    Attributes:
        features: (N, C) float32.
        labels: (N,) int64.
    """

    features: torch.Tensor
    labels: torch.Tensor


class Probe:
    """kNN and a linear probe on the dense features of every encoder of a task.

    Features are all maps of an encoder, averaged over cells of the ground or interpolated to them, each normalised over
    its channels. Figures are those of whole patches that the encoders see unmasked.

    Args:
        manifest: of the shards.
        config: what to probe.
        split: column of the shards.

    Raises:
        InputError: a label that the shards do not have, or no patch with it in one of the parts.
    """

    def __init__(self, manifest: Manifest, config: ProbeConfig, split: str) -> None:
        self.manifest, self.config = manifest, config
        registry = manifest.registry
        if config.label not in registry or registry[config.label].role != "label":
            raise InputError(
                f"probe.label={config.label} is not a label of {manifest.path}; labels: "
                f"{', '.join(modality.name for modality in registry.labels) or 'none'}; probe.label= makes no probes"
            )
        self.label = registry[config.label]
        if config.level > len(self.label.schemes):
            raise InputError(f"probe.level={config.level}: {config.label} has levels 1 to {len(self.label.schemes)}")
        labelled = manifest.column(f"length.{config.label}").to_numpy() > 0
        self.rows = []
        for key, value in (("train", config.train), ("test", config.test)):
            rows = manifest.split(split, value)
            rows = rows[labelled[rows]]
            if not len(rows):
                raise InputError(
                    f"probe.{key}={value}: no patch of {split} there has {config.label}; probe.label= makes no probes"
                )
            chosen = np.linspace(0, len(rows) - 1, min(config.patches, len(rows))).round().astype(np.int64)
            self.rows.append(rows[chosen])

    @property
    def scheme(self) -> ClassScheme:
        """The classes that are told apart."""
        return self.label.schemes[self.config.level - 1]

    def figures(self, task: PretrainingModel, batch_size: int, workers: int) -> dict[str, float]:
        """Strict mIoU of both probes for each encoder, in percent, and IoU by class of the linear one; all ranks call.

        Names are ``knn_miou/MODALITY``, ``linear_miou/MODALITY`` and ``linear_iou/MODALITY/CLASS``. Encoders that no
        patch of one part has the input of are left out.
        """
        train, test = (self._cells(task, rows, batch_size, workers) for rows in self.rows)
        figures: dict[str, float] = {}
        for name in task.encoders:
            if name not in train or name not in test:
                continue
            with torch.autocast("cpu", enabled=False):  # features are of the run's precision, probes of them are not
                near = knn_probe(train[name], test[name].features, len(self.scheme), self.config.neighbours)
                linear = linear_probe(train[name], len(self.scheme), self.config.penalty)(test[name].features)
            figures[f"knn_miou/{name}"] = self._scores(test[name].labels, near)[0]
            figures[f"linear_miou/{name}"], by_class = self._scores(test[name].labels, linear)
            figures.update({f"linear_iou/{name}/{cls}": value for cls, value in by_class.items()})
        return figures

    def _scores(self, truth: torch.Tensor, predicted: torch.Tensor) -> tuple[float, dict[str, float]]:
        matrix = ConfusionMatrix(self.scheme)
        matrix.update(truth.view(1, 1, -1), predicted.view(1, 1, -1), ["all"])
        scores = strict_scores(matrix.total, self.scheme)
        return scores.miou, scores.iou

    def _cells(
        self, task: PretrainingModel, rows: np.ndarray, batch_size: int, workers: int
    ) -> dict[str, LabelledCells]:
        """Cells of all ranks' patches by encoder, in the order of ``rows``; the same on all ranks."""
        rank, world = rank_and_world()
        modalities = wanted_modalities(self.manifest.registry, list(task.encoders), [self.label.name])
        own: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in task.encoders}
        device = next(task.parameters()).device
        for batch in evaluation_batches(
            self.manifest, rows, modalities, batch_size=batch_size, workers=workers, rank=rank, world=world
        ):
            for name, key, features, labels in self._of_batch(task, batch.to(device)):
                own[name][key] = (features, labels)
        everyones: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in task.encoders}
        for ranks in all_gather_object(own):
            for name, patches in ranks.items():
                everyones[name].update(patches)
        keys = self.manifest.column("key").take(rows).to_pylist()
        found = {}
        for name, patches in everyones.items():
            parts = [patches[key] for key in keys if key in patches]
            if sum(len(labels) for _, labels in parts):
                found[name] = LabelledCells(
                    torch.from_numpy(np.concatenate([features for features, _ in parts])),
                    torch.from_numpy(np.concatenate([labels for _, labels in parts])),
                )
        return found

    @torch.no_grad()
    def _of_batch(self, task: PretrainingModel, batch: Batch) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        """Name of the encoder, key of the patch, features and labels of its labelled cells."""
        specs = {name: task.encoder(name).spec for name in task.encoders}
        inputs = encoder_inputs(batch, specs, task.quality_masks, oriented=False)
        cells = max(1, round(float(batch.windows[0, 2]) / self.config.cell))
        labels = majority_class(batch.values[self.label.name][:, self.config.level - 1], self.scheme, cells)
        labels[~batch.present[self.label.name]] = -1
        found = []
        for name, given in inputs.items():
            rows, features = present_features(task.encoder(name), given, cells)
            for index, row in enumerate(rows.tolist()):
                known = labels[row].flatten() >= 0
                vectors = features[index].flatten(1).T[known].float().cpu().numpy()
                found.append((name, batch.keys[row], vectors, labels[row].flatten()[known].cpu().numpy()))
        return found


def present_features(encoder: Encoder, given: EncoderInput, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples have the sensor, (R,) int64, and their ``cell_features``, (R, sum of widths, cells, cells)."""
    rows = given.present.nonzero()[:, 0]
    if not len(rows):
        return rows, given.values.new_empty(0, sum(encoder.widths), cells, cells)
    dates = None if given.dates is None else given.dates[rows]
    padding = None if given.padding is None else given.padding[rows]
    return rows, cell_features(encoder, given.values[rows], dates, padding, cells)


def cell_features(
    encoder: Encoder, values: torch.Tensor, dates: torch.Tensor | None, padding: torch.Tensor | None, cells: int
) -> torch.Tensor:
    """All maps of an encoder on a grid of ``cells`` x ``cells``: (B, sum of widths, cells, cells)."""
    parts = []
    for features in encoder.features(values, dates, padding):
        normed = F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)
        if min(features.shape[-2:]) >= cells:
            parts.append(F.adaptive_avg_pool2d(normed, cells))
        else:
            parts.append(F.interpolate(normed, size=(cells, cells), mode="bilinear", align_corners=False))
    return torch.cat(parts, dim=1)


def majority_class(labels: torch.Tensor, scheme: ClassScheme, cells: int) -> torch.Tensor:
    """The commonest scored class of each cell, (B, cells, cells) int64; -1 where no pixel is of one.

    Args:
        labels: (B, H, W) class values.
        scheme: the classes.
        cells: cells along a side.
    """
    batch, side = labels.shape[0], labels.shape[-1]
    place = torch.arange(side, device=labels.device) * cells // side
    cell = (place[:, None] * cells + place[None]).expand(batch, -1, -1)
    sample = torch.arange(batch, device=labels.device)[:, None, None]
    classes = len(scheme)
    index = (sample * cells * cells + cell) * classes + labels.long().clamp(0, classes - 1)
    counts = torch.bincount(index.flatten(), minlength=batch * cells * cells * classes).view(batch, cells, cells, -1)
    counts[..., list(scheme.unscored)] = 0
    highest, chosen = counts.max(dim=-1)
    return torch.where(highest > 0, chosen, -1)


def knn_probe(train: LabelledCells, queries: torch.Tensor, classes: int, neighbours: int) -> torch.Tensor:
    """Classes (N,) by the weighted votes of the nearest training cells, by cosine (Wu et al., arXiv 1805.01978)."""
    known = F.normalize(train.features, dim=1)
    count = min(neighbours, len(known))
    predicted = []
    for part in F.normalize(queries, dim=1).split(1024):
        similarity, index = (part @ known.T).topk(count, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, train.labels[index], (similarity / _SHARPNESS).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted) if predicted else torch.empty(0, dtype=torch.int64)


def linear_probe(train: LabelledCells, classes: int, penalty: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multinomial logistic regression on standardised features, fitted by L-BFGS from zero.

    Linear classifier probes are of Alain & Bengio, arXiv 1610.01644.

    Returns:
        What tells the classes (N,) of features (N, C).
    """
    mean, std = train.features.mean(dim=0), train.features.std(dim=0, correction=0).clamp_min(1e-6)
    values = (train.features - mean) / std
    with torch.enable_grad():
        weight = torch.zeros(classes, values.shape[1], device=values.device, requires_grad=True)
        bias = torch.zeros(classes, device=values.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(values @ weight.T + bias, train.labels) + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    slopes, constants = weight.detach().T, bias.detach()
    return lambda features: ((features - mean) / std @ slopes + constants).argmax(dim=1)
