"""Confusion matrices by region of interest, and the official and strict scores that follow from one matrix."""

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
    """Pixel counts [truth, prediction] of every class of a scheme, kept by region of interest.

    Counts are exact integers: regions add up to domains and to the total, and ranks to one matrix, in any order.
    Regions are what a confidence interval resamples.
    """

    def __init__(self, scheme: ClassScheme) -> None:
        self.scheme = scheme
        self.by_roi: dict[str, np.ndarray] = {}

    def update(
        self, truth: torch.Tensor, predicted: torch.Tensor, rois: Sequence[str], present: torch.Tensor | None = None
    ) -> None:
        """Count a batch.

        Args:
            truth, predicted: (B, H, W) integer class values.
            rois: B names.
            present: (B,) bool; samples without the label do not count.

        Raises:
            InputError: a value outside the scheme.
        """
        classes = len(self.scheme)
        cells = classes * classes
        # Narrow dtypes would wrap around in the products below.
        truth, predicted = truth.long(), predicted.long()
        for what, values in (("label", truth), ("prediction", predicted)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
                raise InputError(
                    f"{self.scheme.name}: a {what} of {', '.join(sorted(set(rois)))} holds values "
                    f"{int(values.min())}..{int(values.max())}, the classes are 0..{classes - 1}"
                )
        samples = torch.arange(len(truth), device=truth.device).view(-1, 1, 1)
        index = samples * cells + truth * classes + predicted
        counts = torch.bincount(index.flatten(), minlength=len(truth) * cells).view(-1, classes, classes)
        here = [True] * len(rois) if present is None else present.tolist()
        for roi, matrix, labelled in zip(rois, counts.cpu().numpy(), here, strict=True):
            if labelled:
                self._add(roi, matrix)

    def _add(self, roi: str, matrix: np.ndarray) -> None:
        if roi in self.by_roi:
            self.by_roi[roi] += matrix
        else:
            self.by_roi[roi] = matrix.astype(np.int64)

    def merged(self) -> ConfusionMatrix:
        """The counts of all ranks together, on every rank; a collective call."""
        merged = ConfusionMatrix(self.scheme)
        for counts in all_gather_object(self.by_roi):
            for roi, matrix in counts.items():
                merged._add(roi, matrix)
        return merged

    @staticmethod
    def domain(roi: str) -> str:
        """The domain-year of a region, e.g. ``D012-2019`` of ``D012-2019/AF-S1-27``."""
        return roi.partition("/")[0]

    def by_domain(self) -> dict[str, np.ndarray]:
        """(classes, classes) int64 of each domain-year, by name."""
        found: dict[str, np.ndarray] = {}
        for roi in sorted(self.by_roi):
            name = self.domain(roi)
            found[name] = found.get(name, 0) + self.by_roi[roi]
        return found

    @property
    def total(self) -> np.ndarray:
        """(classes, classes) int64, all regions together."""
        zero = np.zeros((len(self.scheme), len(self.scheme)), np.int64)
        return sum(self.by_roi.values(), start=zero)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores in percent.

    Attributes:
        miou: mean intersection over union, over the classes of ``iou``.
        oa: overall accuracy.
        iou: by class name, the classes that count in ``miou``.
        precision, recall, f1: of the same classes; 0 where a class is never predicted.
        absent: scored classes that the ground truth does not hold.
        miou_without_background: ``miou`` over the same classes but the background, where the scheme has one.
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
        """A JSON-serialisable form."""
        return {**asdict(self), "absent": list(self.absent)}


def _scores(scheme: ClassScheme, counted: list[int], kept: np.ndarray, absent: list[int]) -> Scores:
    """Scores of the ``counted`` classes from the pixels that are ``kept`` of a confusion matrix."""
    hits, truth, predicted = kept.diagonal(), kept.sum(axis=1), kept.sum(axis=0)
    iou = _percent(hits, truth + predicted - hits)
    foreground = [value for value in counted if value != scheme.background]

    def named(values: np.ndarray) -> dict[str, float]:
        return {scheme.classes[value]: float(values[value]) for value in counted}

    return Scores(
        miou=_mean(iou[counted]),
        oa=float(_percent(hits.sum(), kept.sum())),
        iou=named(iou),
        precision=named(_percent(hits, predicted)),
        recall=named(_percent(hits, truth)),
        f1=named(_percent(2 * hits, truth + predicted)),
        absent=tuple(scheme.classes[value] for value in absent),
        miou_without_background=None if scheme.background is None else _mean(iou[foreground]),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _percent(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    """100 part / whole, 0 where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(100.0 * part, whole, out=np.zeros_like(part), where=whole > 0)


def official_scores(matrix: np.ndarray, scheme: ClassScheme) -> Scores:
    """The scores of the official FLAIR-HUB code.

    The matrix is first reduced to the rows and columns of scored classes, so a scored pixel that is predicted as an
    unscored class vanishes from every figure; a class found in neither labels nor predictions counts as 0.

    Args:
        matrix: (classes, classes) counts, [truth, prediction].
        scheme: the classes.
    """
    scored = list(scheme.scored)
    kept = np.zeros_like(matrix)
    kept[np.ix_(scored, scored)] = matrix[np.ix_(scored, scored)]
    return _scores(scheme, scored, kept, [value for value in scored if matrix[value].sum() == 0])


def strict_scores(matrix: np.ndarray, scheme: ClassScheme) -> Scores:
    """Scores that a prediction cannot escape.

    Pixels whose true class is scored all count: one predicted as an unscored class is a miss. Classes that the
    ground truth does not hold are left out of the mean and named.

    Args:
        matrix: (classes, classes) counts, [truth, prediction].
        scheme: the classes.
    """
    kept = matrix.copy()
    kept[list(scheme.unscored)] = 0
    truth = kept.sum(axis=1)
    counted = [value for value in scheme.scored if truth[value]]
    return _scores(scheme, counted, kept, [value for value in scheme.scored if not truth[value]])
