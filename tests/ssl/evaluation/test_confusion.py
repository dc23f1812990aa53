"""Confusion matrices and the official and strict scores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bocage.shards.classes import COSIA, LPIS_1, ClassScheme
from bocage.shards.errors import InputError
from bocage.ssl.evaluation.confusion import ConfusionMatrix, official_scores, strict_scores

SMALL = ClassScheme(
    name="small",
    classes=("a", "b", "c", "odd", "rest"),
    colours=("000000",) * 5,
    unscored=(3,),
    background=4,
)
maps = arrays(np.uint8, (2, 4, 5), elements=st.integers(0, len(SMALL) - 1))


def matrix_of(truth: np.ndarray, predicted: np.ndarray, scheme: ClassScheme) -> np.ndarray:
    confusion = ConfusionMatrix(scheme)
    confusion.update(torch.from_numpy(truth), torch.from_numpy(predicted), ["r1", "r2"][: len(truth)])
    return confusion.total


def by_pixel(truth: np.ndarray, predicted: np.ndarray, scheme: ClassScheme, strict: bool) -> tuple[dict, float]:
    """Compute IoU per class and accuracy from sets of pixels instead of a matrix."""
    truth, predicted = truth.ravel(), predicted.ravel()
    counts = ~np.isin(truth, scheme.unscored)
    if not strict:
        counts &= ~np.isin(predicted, scheme.unscored)
    truth, predicted = truth[counts], predicted[counts]
    iou = {}
    for value in scheme.scored:
        union = np.sum((truth == value) | (predicted == value))
        hit = np.sum((truth == value) & (predicted == value))
        if strict and not (truth == value).any():
            continue
        iou[scheme.classes[value]] = 100 * hit / union if union else 0.0
    return iou, 100 * float(np.mean(truth == predicted)) if len(truth) else 0.0


@given(truth=maps, predicted=maps, strict=st.booleans())
@settings(max_examples=150, deadline=None)
def test_scores_equal_counting_pixels(truth: np.ndarray, predicted: np.ndarray, strict: bool) -> None:
    scores = (strict_scores if strict else official_scores)(matrix_of(truth, predicted, SMALL), SMALL)
    iou, accuracy = by_pixel(truth, predicted, SMALL, strict)
    assert scores.iou == pytest.approx(iou)
    assert scores.oa == pytest.approx(accuracy)
    assert scores.miou == pytest.approx(np.mean(list(iou.values())) if iou else 0.0)
    foreground = [value for name, value in iou.items() if name != "rest"]
    assert scores.miou_without_background == pytest.approx(np.mean(foreground) if foreground else 0.0)
    assert set(scores.absent) == {SMALL.classes[value] for value in SMALL.scored if value not in truth}


@given(truth=maps, predicted=maps)
@settings(max_examples=50, deadline=None)
def test_official_scores_equal_the_official_formula(truth: np.ndarray, predicted: np.ndarray) -> None:
    matrix = matrix_of(truth, predicted, SMALL)
    reduced = np.delete(np.delete(matrix, SMALL.unscored, axis=0), SMALL.unscored, axis=1)
    diagonal = np.diag(reduced)
    with np.errstate(invalid="ignore"):
        iou = np.nan_to_num(100 * diagonal / (reduced.sum(0) + reduced.sum(1) - diagonal))
        accuracy = np.nan_to_num(100 * diagonal.sum() / reduced.sum())
    scores = official_scores(matrix, SMALL)
    assert list(scores.iou.values()) == pytest.approx(iou.tolist())
    assert (scores.miou, scores.oa) == (pytest.approx(iou.mean()), pytest.approx(accuracy))


def test_predictions_of_unscored_classes_lower_the_strict_score_only() -> None:
    matrix = np.zeros((19, 19), np.int64)
    for value in COSIA.scored:
        matrix[value, value], matrix[value, 18] = 60, 40
    assert official_scores(matrix, COSIA).miou == 100
    assert strict_scores(matrix, COSIA).miou == pytest.approx(60)
    assert strict_scores(matrix, COSIA).oa == pytest.approx(60)


def test_absent_classes_and_miou_without_background() -> None:
    matrix = np.zeros((23, 23), np.int64)
    matrix[1, 1], matrix[1, 22], matrix[22, 22] = 30, 10, 60
    scores = strict_scores(matrix, LPIS_1)
    assert scores.iou == pytest.approx({"wheat": 75.0, "background": 100 * 60 / 70})
    assert scores.miou_without_background == pytest.approx(75.0)
    assert len(scores.absent) == 21
    assert official_scores(matrix, LPIS_1).miou == pytest.approx((75 + 100 * 60 / 70) / 23)
    assert scores.to_json()["absent"] == list(scores.absent)


def test_counts_per_region_exclude_unlabelled_samples() -> None:
    truth = torch.tensor([[[0, 1]], [[1, 1]], [[2, 2]], [[4, 4]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0]], [[1, 2]], [[2, 0]], [[4, 4]]], dtype=torch.uint8)
    whole = ConfusionMatrix(SMALL)
    whole.update(truth, predicted, ["x", "y", "x", "z"], torch.tensor([True, True, True, False]))
    assert set(whole.by_roi) == {"x", "y"}
    assert whole.by_roi["y"][1].tolist() == [0, 1, 1, 0, 0]
    parts = ConfusionMatrix(SMALL)
    for index, roi in ((2, "x"), (0, "x"), (1, "y")):
        parts.update(truth[[index]], predicted[[index]], [roi])
    for roi, matrix in whole.by_roi.items():
        assert np.array_equal(parts.by_roi[roi], matrix)
    assert np.array_equal(whole.merged().total, whole.total)
    assert whole.total.dtype == np.int64
    assert whole.total.sum() == 6


def test_value_outside_the_scheme_raises_input_error() -> None:
    truth = torch.full((1, 2, 2), 200, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"label of D001-2020/AA holds values 200\.\.200, the classes are 0\.\.4"):
        ConfusionMatrix(SMALL).update(truth, torch.zeros_like(truth), ["D001-2020/AA"])


def test_empty_matrix_scores_zero() -> None:
    empty = ConfusionMatrix(COSIA).total
    assert strict_scores(empty, COSIA).miou == 0
    assert official_scores(empty, COSIA).oa == 0
