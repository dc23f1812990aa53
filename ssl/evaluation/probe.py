"""Evaluate frozen encoders during pretraining: kNN and linear probes of labels on ground cells.

Scores stand beside those of two controls: an encoder with random weights, and raw inputs (``raw_features``). Features
that do not beat both have learned nothing that the probed classes need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from bocage.shards.batch import Batch
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import EncoderInput, encoder_inputs, required_modalities
from bocage.shards.read.dataset import evaluation_batches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.engine.parallel.distributed import all_gather_object, rank_and_world
from bocage.ssl.evaluation.confusion import ConfusionMatrix, strict_scores
from bocage.ssl.evaluation.raw_features import raw_cell_features
from bocage.ssl.objectives.model import PretrainingModel

FeatureExtractor = Callable[[EncoderInput, int], tuple[torch.Tensor, torch.Tensor]]
"""Function from the input of an encoder and a number of cells to the rows that have it and their features."""

CONTROLS = ("random", "raw")
"""Features that those of an encoder are compared with: random weights, and raw inputs."""

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""L2 penalties that linear probes try."""

_HELD_OUT = 4  # every fourth training patch is held out to choose the penalty of a linear probe
_TEMPERATURE = 0.07  # of the kNN votes, as in DINO (arXiv 2104.14294)
_LBFGS_ITERATIONS = 100
_CELLS_PER_PATCH = 8  # default number of cells along a side of a patch: cells of 12.8 m in FLAIR-HUB
_MAX_CELLS = 2**18  # per subset; more take too long at each evaluation


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Probes of frozen features, fitted at each evaluation (``engine.evaluate_every``).

    Attributes:
        label: name of the label raster, e.g. ``AERIAL_LABEL-COSIA`` in FLAIR-HUB; empty disables the probes.
        level: band of the label raster, from 1.
        train: value of the split whose patches train the probes.
        test: value of the split whose patches test them.
        patches: number of patches for each of the two, evenly spaced.
        cell: side of a ground cell, in metres, rounded so that cells divide a patch; null for ``default_cell``. The
            label of a cell is its most frequent scored class.
        neighbours: number of neighbours in kNN.
        penalties: L2 penalties on the weights of the linear probe; the best on held-out training patches is used.

    Raises:
        ValueError: a value is out of range.
    """

    label: str = ""
    level: int = 1
    train: str = "train"
    test: str = "valid"
    patches: int = 64
    cell: float | None = None
    neighbours: int = 20
    penalties: list[float] = field(default_factory=lambda: list(PENALTIES))

    def __post_init__(self) -> None:
        for key in ("level", "patches", "neighbours"):
            if getattr(self, key) < 1:
                raise ValueError(f"probe.{key}={getattr(self, key)} must be at least 1")
        if self.cell is not None and not 0 < self.cell < math.inf:
            raise ValueError(f"probe.cell={self.cell} must be a positive number of metres")
        if not self.penalties or not min(self.penalties) >= 0:
            raise ValueError(f"probe.penalties={self.penalties}: give at least one, none of them negative")


def default_cell(label: Modality) -> float:
    """Side of a ground cell, in metres: an eighth of a patch, or a pixel of the label raster where that is larger."""
    return label.patch_size / min(_CELLS_PER_PATCH, label.size)


@dataclass(frozen=True)
class LabelledCells:
    """Features of one encoder at labelled cells.

    Attributes:
        features: features of the cells, (N, C) float32.
        labels: class values, (N,) int64.
        patches: number of the patch of each cell, (N,) int64.
    """

    features: torch.Tensor
    labels: torch.Tensor
    patches: torch.Tensor

    def select(self, chosen: torch.Tensor) -> LabelledCells:
        """Cells at indices, or where a mask is True."""
        return LabelledCells(self.features[chosen], self.labels[chosen], self.patches[chosen])

    def to(self, device: torch.device) -> LabelledCells:
        """The same cells on a device."""
        return LabelledCells(*(values.to(device) for values in (self.features, self.labels, self.patches)))

    def columns(self, start: int, stop: int) -> LabelledCells:
        """The same cells with a part of their features."""
        return LabelledCells(self.features[:, start:stop], self.labels, self.patches)


class Probe:
    """kNN and linear probe on the dense features of all encoders of a pretraining model.

    The features of a cell are all maps of an encoder, each normalised over its channels and averaged over the cell or
    interpolated to it. The probes use full patches without masks.

    Args:
        manifest: manifest of the shards.
        config: configuration of the probes.
        split: split column of the shards.

    Raises:
        InputError: the shards do not have the label, the train or test subset has no patch with it, cells are smaller
            than its pixels or larger than a patch, or there would be too many cells.
    """

    def __init__(self, manifest: Manifest, config: ProbeConfig, split: str) -> None:
        self.manifest, self.config = manifest, config
        registry = manifest.registry
        if config.label not in registry or registry[config.label].role != "label":
            labels = ", ".join(modality.name for modality in registry.labels) or "none"
            raise InputError(
                f"probe.label={config.label} is not a label of {manifest.path}; labels: {labels}; "
                "probe.label= disables the probes"
            )
        self.label = registry[config.label]
        if config.level > len(self.label.schemes):
            raise InputError(f"probe.level={config.level}: {config.label} has levels 1 to {len(self.label.schemes)}")
        self.cell = config.cell or default_cell(self.label)
        smallest, largest = self.label.gsd, registry.patch_size
        if not smallest <= self.cell <= largest:
            raise InputError(
                f"probe.cell={self.cell:g}: use a side between a pixel of {config.label}, {smallest:g} m, and a patch, "
                f"{largest:g} m"
            )
        cells = config.patches * _cells_per_side(registry.patch_size, self.cell) ** 2
        if cells > _MAX_CELLS:
            raise InputError(
                f"probe.cell={self.cell:g} gives {cells} cells with probe.patches={config.patches}: the maximum is "
                f"{_MAX_CELLS}; use larger cells or fewer patches"
            )
        labelled = manifest.column(f"length.{config.label}").to_numpy() > 0
        self.rows = []
        for key, value in (("train", config.train), ("test", config.test)):
            rows = manifest.split(split, value)
            rows = rows[labelled[rows]]
            if not len(rows):
                raise InputError(
                    f"probe.{key}={value}: no patch of {split} with this value has {config.label}; "
                    "probe.label= disables the probes"
                )
            spaced = np.linspace(0, len(rows) - 1, min(config.patches, len(rows))).round().astype(np.int64)
            self.rows.append(rows[spaced])
        self._control_scores: dict[str, float] | None = None

    @property
    def scheme(self) -> ClassScheme:
        """Classes of the probed label band."""
        return self.label.schemes[self.config.level - 1]

    def scores(self, model: PretrainingModel, batch_size: int, workers: int) -> dict[str, float]:
        """Fit and score the probes of each encoder; a collective.

        Args:
            model: pretraining model with the encoders.
            batch_size: patches per batch.
            workers: DataLoader workers.

        Returns:
            Scores in percent, by encoder: strict mIoU of both probes, ``knn_miou/NAME`` and ``linear_miou/NAME``; of
            the controls, ``knn_miou/NAME/random`` and ``/raw``, and the same of the linear probe; of the linear probe
            on each feature map alone, ``linear_miou/NAME/level1`` (finest) and following; and its IoU of each class,
            ``linear_iou/NAME/CLASS``. Encoders whose sensor is absent from all train or all test patches are left out.
        """
        loading = {"batch_size": batch_size, "workers": workers}
        if self._control_scores is None:
            self._control_scores = {}
            for control in CONTROLS:
                extractors: dict[str, FeatureExtractor] = dict.fromkeys(model.encoders, raw_cell_features)
                if control == "random":
                    extractors = {n: _encoder_extractor(random_encoder(model.encoder(n))) for n in model.encoders}
                train, test = (self._labelled_cells(model, extractors, rows, **loading) for rows in self.rows)
                for name in train.keys() & test.keys():
                    knn, linear, _ = self._probe_scores(train[name], test[name])
                    self._control_scores[f"knn_miou/{name}/{control}"] = knn
                    self._control_scores[f"linear_miou/{name}/{control}"] = linear
        extractors = {name: _encoder_extractor(model.encoder(name)) for name in model.encoders}
        train, test = (self._labelled_cells(model, extractors, rows, **loading) for rows in self.rows)
        scores: dict[str, float] = {}
        for name in model.encoders:
            if name not in train or name not in test:
                continue
            knn, linear, by_class = self._probe_scores(train[name], test[name])
            scores |= {f"knn_miou/{name}": knn, f"linear_miou/{name}": linear}
            start = 0
            for level, width in enumerate(model.encoder(name).widths, 1):
                part = slice(start, start + width)
                scores[f"linear_miou/{name}/level{level}"] = self._linear_score(
                    train[name].columns(part.start, part.stop), test[name].columns(part.start, part.stop)
                )[0]
                start += width
            scores |= {f"linear_iou/{name}/{cls}": value for cls, value in by_class.items()}
        return scores | self._control_scores

    def _probe_scores(self, train: LabelledCells, test: LabelledCells) -> tuple[float, float, dict[str, float]]:
        """Strict mIoU of the kNN and of the linear probe, and IoU by class of the latter."""
        with torch.autocast("cpu", enabled=False):  # features have the precision of the run, probes float32
            nearest = knn_probe(train, test.features, len(self.scheme), self.config.neighbours)
        return (self._score(test.labels, nearest)[0], *self._linear_score(train, test))

    def _linear_score(self, train: LabelledCells, test: LabelledCells) -> tuple[float, dict[str, float]]:
        with torch.autocast("cpu", enabled=False):
            predict, _ = tuned_linear_probe(train, None, self.scheme, self.config.penalties)
            return self._score(test.labels, predict(test.features))

    def _score(self, truth: torch.Tensor, predicted: torch.Tensor) -> tuple[float, dict[str, float]]:
        scores = strict_scores(_confusion(truth, predicted, self.scheme).total, self.scheme)
        return scores.miou, scores.iou

    def _labelled_cells(
        self,
        model: PretrainingModel,
        extractors: Mapping[str, FeatureExtractor],
        rows: np.ndarray,
        *,
        batch_size: int,
        workers: int,
    ) -> dict[str, LabelledCells]:
        """Collect the cells of all ranks' patches by encoder, in the order of ``rows``; equal on all ranks."""
        rank, world = rank_and_world()
        modalities = required_modalities(self.manifest.registry, list(model.encoders), [self.label.name])
        local: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in model.encoders}
        device = next(model.parameters()).device
        for batch in evaluation_batches(
            self.manifest, rows, modalities, batch_size=batch_size, workers=workers, rank=rank, world=world
        ):
            for name, key, features, labels in self._batch_cells(model, extractors, batch.to(device)):
                local[name][key] = (features, labels)
        gathered: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in model.encoders}
        for rank_patches in all_gather_object(local):
            for name, patches in rank_patches.items():
                gathered[name].update(patches)
        keys = self.manifest.column("key").take(rows).to_pylist()
        cells = {}
        for name, patches in gathered.items():
            parts = [(number, *patches[key]) for number, key in enumerate(keys) if key in patches]
            if sum(len(labels) for _, _, labels in parts):
                cells[name] = LabelledCells(
                    torch.from_numpy(np.concatenate([features for _, features, _ in parts])),
                    torch.from_numpy(np.concatenate([labels for _, _, labels in parts])),
                    torch.from_numpy(np.concatenate([np.full(len(labels), number) for number, _, labels in parts])),
                )
        return cells

    @torch.no_grad()
    def _batch_cells(
        self, model: PretrainingModel, extractors: Mapping[str, FeatureExtractor], batch: Batch
    ) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        """Return encoder, patch key, features and labels of the labelled cells, for each encoder and patch."""
        specs = {name: model.encoder(name).spec for name in model.encoders}
        inputs = encoder_inputs(batch, specs, model.quality_masks, random_orientation=False)
        cells = _cells_per_side(float(batch.windows[0, 2]), self.cell)
        labels = majority_class(batch.values[self.label.name][:, self.config.level - 1], self.scheme, cells)
        labels[~batch.present[self.label.name]] = -1
        results = []
        for name, encoder_input in inputs.items():
            rows, features = extractors[name](encoder_input, cells)
            for index, row in enumerate(rows.tolist()):
                known = labels[row].flatten() >= 0
                vectors = features[index].flatten(1).T[known].float().cpu().numpy()
                results.append((name, batch.keys[row], vectors, labels[row].flatten()[known].cpu().numpy()))
        return results


def _encoder_extractor(encoder: Encoder) -> FeatureExtractor:
    return lambda inputs, cells: present_features(encoder, inputs, cells)


def random_encoder(encoder: Encoder) -> Encoder:
    """Build an encoder of the same architecture with random weights of seed 0, on the same device."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_encoder(encoder.spec, encoder.config).to(next(encoder.parameters()).device).eval()


def _cells_per_side(side: float, cell: float) -> int:
    """Number of cells along a window of ``side`` metres, at least 1."""
    return max(1, round(side / cell))


def present_features(encoder: Encoder, inputs: EncoderInput, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``cell_features`` of the samples that have the sensor.

    Returns:
        Indices of these samples, (R,) int64, and their features, (R, sum of widths, cells, cells).
    """
    rows = inputs.present.nonzero()[:, 0]
    if not len(rows):
        return rows, inputs.values.new_empty(0, sum(encoder.widths), cells, cells)
    dates = None if inputs.dates is None else inputs.dates[rows]
    padding = None if inputs.padding is None else inputs.padding[rows]
    return rows, cell_features(encoder, inputs.values[rows], dates, padding, cells)


def cell_features(
    encoder: Encoder, values: torch.Tensor, dates: torch.Tensor | None, padding: torch.Tensor | None, cells: int
) -> torch.Tensor:
    """Resample all maps of an encoder to ``cells`` x ``cells`` cells: (B, sum of widths, cells, cells)."""
    parts = []
    for features in encoder.features(values, dates, padding):
        normed = F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)
        if min(features.shape[-2:]) >= cells:
            parts.append(F.adaptive_avg_pool2d(normed, cells))
        else:
            parts.append(F.interpolate(normed, size=(cells, cells), mode="bilinear", align_corners=False))
    return torch.cat(parts, dim=1)


def majority_class(labels: torch.Tensor, scheme: ClassScheme, cells: int) -> torch.Tensor:
    """Find the most frequent scored class of each cell, (B, cells, cells) int64; -1 for cells without scored pixels.

    Args:
        labels: class values, (B, H, W).
        scheme: classes.
        cells: cells per side.
    """
    batch, side = labels.shape[0], labels.shape[-1]
    position = torch.arange(side, device=labels.device) * cells // side
    cell = (position[:, None] * cells + position[None]).expand(batch, -1, -1)
    sample = torch.arange(batch, device=labels.device)[:, None, None]
    classes = len(scheme)
    index = (sample * cells * cells + cell) * classes + labels.long().clamp(0, classes - 1)
    counts = torch.bincount(index.flatten(), minlength=batch * cells * cells * classes).view(batch, cells, cells, -1)
    counts[..., list(scheme.unscored)] = 0
    highest, majority = counts.max(dim=-1)
    return torch.where(highest > 0, majority, -1)


def knn_probe(train: LabelledCells, queries: torch.Tensor, classes: int, neighbours: int) -> torch.Tensor:
    """Classify cells by weighted votes of the nearest training cells, by cosine (Wu et al., arXiv 1805.01978).

    Args:
        train: labelled cells.
        queries: features of the cells to classify, (N, C).
        classes: number of classes.
        neighbours: number of neighbours.

    Returns:
        Class values, (N,) int64.
    """
    keys = F.normalize(train.features, dim=1)
    count = min(neighbours, len(keys))
    predicted = []
    for part in F.normalize(queries, dim=1).split(1024):
        similarity, index = (part @ keys.T).topk(count, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, train.labels[index], (similarity / _TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted) if predicted else torch.empty(0, dtype=torch.int64)


def linear_probe(train: LabelledCells, classes: int, penalty: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fit multinomial logistic regression on standardised features, by L-BFGS from zero weights.

    Linear probes were proposed by Alain & Bengio, arXiv 1610.01644.

    Args:
        train: labelled cells.
        classes: number of classes.
        penalty: L2 penalty on the weights.

    Returns:
        Function from features (N, C) to class values (N,).
    """
    mean, std = train.features.mean(dim=0), train.features.std(dim=0, correction=0).clamp_min(1e-6)
    values = (train.features - mean) / std
    with torch.enable_grad():
        weight = torch.zeros(classes, values.shape[1], device=values.device, requires_grad=True)
        bias = torch.zeros(classes, device=values.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=_LBFGS_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(values @ weight.T + bias, train.labels) + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    weight_t, intercept = weight.detach().T, bias.detach()
    return lambda features: ((features - mean) / std @ weight_t + intercept).argmax(dim=1)


def tuned_linear_probe(
    train: LabelledCells, validation: LabelledCells | None, scheme: ClassScheme, penalties: Sequence[float]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    """Fit a linear probe with the penalty that scores best on validation cells (strict mIoU).

    Args:
        train: labelled cells.
        validation: cells to choose the penalty on; None holds out every fourth training patch for the choice.
        scheme: classes.
        penalties: L2 penalties to try.

    Returns:
        Function from features (N, C) to class values (N,), fitted on all of ``train``; and the chosen penalty.
    """
    fitted = train
    if validation is None:
        held_out = train.patches % _HELD_OUT == _HELD_OUT - 1
        if held_out.any() and not held_out.all():
            fitted, validation = train.select(~held_out), train.select(held_out)
    if validation is None or len(penalties) == 1:
        penalty = sorted(penalties)[len(penalties) // 2]
        return linear_probe(train, len(scheme), penalty), penalty
    fits = {penalty: linear_probe(fitted, len(scheme), penalty) for penalty in penalties}
    scores = {
        penalty: strict_scores(_confusion(validation.labels, predict(validation.features), scheme).total, scheme).miou
        for penalty, predict in fits.items()
    }
    best = max(scores, key=lambda penalty: scores[penalty])
    return (fits[best] if fitted is train else linear_probe(train, len(scheme), best)), best


def _confusion(truth: torch.Tensor, predicted: torch.Tensor, scheme: ClassScheme) -> ConfusionMatrix:
    matrix = ConfusionMatrix(scheme)
    matrix.update(truth.view(1, 1, -1), predicted.view(1, 1, -1), ["all"])
    return matrix
