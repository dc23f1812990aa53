"""Confusion matrices per region of interest, and the official and strict scores of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.ssl.engine.parallel.distributed import all_gather_object


class ConfusionMatrix:
    """Pixel counts [truth, prediction] of the classes of a scheme, per region of interest (ROI).

    Counts are exact integers, so sums over regions and ranks do not depend on their order. Bootstrap intervals resample
    regions.

    Attributes:
        scheme: classes.
        by_roi: counts of each region, (classes, classes) int64, by name.
    """

    def __init__(self, scheme: ClassScheme) -> None:
        self.scheme = scheme
        self.by_roi: dict[str, np.ndarray] = {}

    def update(
        self, truth: torch.Tensor, predicted: torch.Tensor, rois: Sequence[str], present: torch.Tensor | None = None
    ) -> None:
        """Count the pixels of a batch.

        Args:
            truth: labels, (B, H, W) integer class values.
            predicted: predictions, (B, H, W) integer class values.
            rois: names of the regions of the B samples.
            present: False at samples without a label, which are not counted, (B,) bool.

        Raises:
            InputError: a value is not a class of the scheme.
        """
        classes = len(self.scheme)
        cells = classes * classes
        # Narrow dtypes would overflow in the products below.
        truth, predicted = truth.long(), predicted.long()
        for kind, values in (("label", truth), ("prediction", predicted)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
                raise InputError(
                    f"{self.scheme.name}: a {kind} of {', '.join(sorted(set(rois)))} holds values "
                    f"{int(values.min())}..{int(values.max())}, the classes are 0..{classes - 1}"
                )
        samples = torch.arange(len(truth), device=truth.device).view(-1, 1, 1)
        index = samples * cells + truth * classes + predicted
        counts = torch.bincount(index.flatten(), minlength=len(truth) * cells).view(-1, classes, classes)
        has_label = [True] * len(rois) if present is None else present.tolist()
        for roi, matrix, labelled in zip(rois, counts.cpu().numpy(), has_label, strict=True):
            if labelled:
                self._add(roi, matrix)

    def _add(self, roi: str, matrix: np.ndarray) -> None:
        if roi in self.by_roi:
            self.by_roi[roi] += matrix
        else:
            self.by_roi[roi] = matrix.astype(np.int64)

    def merged(self) -> ConfusionMatrix:
        """Sum the counts of all ranks; a collective, with the result on every rank."""
        merged = ConfusionMatrix(self.scheme)
        for counts in all_gather_object(self.by_roi):
            for roi, matrix in counts.items():
                merged._add(roi, matrix)
        return merged

    @staticmethod
    def domain(roi: str) -> str:
        """Return the domain-year of a region: ``D012-2019`` for ``D012-2019/AF-S1-27``."""
        return roi.partition("/")[0]

    def by_domain(self) -> dict[str, np.ndarray]:
        """Sum the counts of each domain-year, (classes, classes) int64, by name."""
        matrices: dict[str, np.ndarray] = {}
        for roi in sorted(self.by_roi):
            name = self.domain(roi)
            matrices[name] = matrices.get(name, 0) + self.by_roi[roi]
        return matrices

    @property
    def total(self) -> np.ndarray:
        """Sum of the counts of all regions, (classes, classes) int64."""
        zero = np.zeros((len(self.scheme), len(self.scheme)), np.int64)
        return sum(self.by_roi.values(), start=zero)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores in percent.

    Attributes:
        miou: mean intersection over union of the classes in ``iou``.
        oa: overall accuracy.
        iou: intersection over union of the classes that count in ``miou``, by name.
        precision, recall, f1: scores of the same classes; 0 if a class is never predicted.
        absent: scored classes without labelled pixels.
        miou_without_background: ``miou`` without the background class; None if the scheme has no background.
    """

    miou: float
    oa: float
    iou: dict[str, float]
    precision: dict[str, float]
    recall: dict[str, float]
    f1: dict[str, float]
    absent: tuple[str, ...]
    miou_without_background: float | None

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {**asdict(self), "absent": list(self.absent)}


def _scores(scheme: ClassScheme, counted: list[int], matrix: np.ndarray, absent: list[int]) -> Scores:
    """Compute the scores of the ``counted`` classes from a confusion matrix without the excluded pixels."""
    hits, truth, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    iou = _percent(hits, truth + predicted - hits)
    foreground = [value for value in counted if value != scheme.background]

    def by_name(values: np.ndarray) -> dict[str, float]:
        return {scheme.classes[value]: float(values[value]) for value in counted}

    return Scores(
        miou=_mean(iou[counted]),
        oa=float(_percent(hits.sum(), matrix.sum())),
        iou=by_name(iou),
        precision=by_name(_percent(hits, predicted)),
        recall=by_name(_percent(hits, truth)),
        f1=by_name(_percent(2 * hits, truth + predicted)),
        absent=tuple(scheme.classes[value] for value in absent),
        miou_without_background=None if scheme.background is None else _mean(iou[foreground]),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _percent(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """Return 100 numerator / denominator, 0 where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(100.0 * numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def official_scores(matrix: np.ndarray, scheme: ClassScheme) -> Scores:
    """Compute the scores as the official FLAIR-HUB code does.

    The matrix is first reduced to the rows and columns of scored classes. So a pixel of a scored class that is
    predicted as an unscored class is not counted at all. A class in neither labels nor predictions counts as 0.

    Args:
        matrix: pixel counts [truth, prediction], (classes, classes).
        scheme: classes.
    """
    scored = list(scheme.scored)
    reduced = np.zeros_like(matrix)
    reduced[np.ix_(scored, scored)] = matrix[np.ix_(scored, scored)]
    return _scores(scheme, scored, reduced, [value for value in scored if matrix[value].sum() == 0])


def strict_scores(matrix: np.ndarray, scheme: ClassScheme) -> Scores:
    """Compute scores in which predictions of unscored classes count as misses.

    All pixels whose true class is scored count. Classes without labelled pixels are excluded from the mean and listed
    in ``absent``.

    Args:
        matrix: pixel counts [truth, prediction], (classes, classes).
        scheme: classes.
    """
    labelled = matrix.copy()
    labelled[list(scheme.unscored)] = 0
    truth = labelled.sum(axis=1)
    counted = [value for value in scheme.scored if truth[value]]
    return _scores(scheme, counted, labelled, [value for value in scheme.scored if not truth[value]])
