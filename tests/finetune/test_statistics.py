"""Bootstrap statistics: coverage of the intervals on simulated studies, p-values and labels needed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bocage.finetune.evaluation.statistics import (
    BootstrapEstimate,
    aggregate,
    estimate_mean,
    estimate_over_runs,
    holm_correction,
    labels_needed,
    mean_iou,
    paired_difference,
    region_weights,
    strict_counts,
    strict_iou,
)
from bocage.shards.classes import COSIA, LPIS_1, ClassScheme
from bocage.ssl.evaluation.confusion import strict_scores

THREE = ClassScheme(name="three", classes=("a", "b", "c"), colours=("000000",) * 3)


@given(st.integers(0, 10_000), st.sampled_from([COSIA, LPIS_1]))
@settings(max_examples=50, deadline=None)
def test_counts_give_the_strict_scores(seed: int, scheme: ClassScheme) -> None:
    random = np.random.default_rng(seed)
    matrices = random.integers(0, 50, (4, len(scheme), len(scheme))) * (random.random((1, len(scheme), 1)) < 0.7)
    counts = strict_counts(matrices, scheme)
    for matrix, count in zip((*matrices, matrices.sum(axis=0)), (*counts, counts.sum(axis=0)), strict=True):
        expected = strict_scores(matrix, scheme)
        assert mean_iou(count, scheme, background=True) == pytest.approx(expected.miou)
        if scheme.background is not None:
            assert mean_iou(count, scheme, background=False) == pytest.approx(expected.miou_without_background)
        iou = dict(zip((scheme.classes[value] for value in scheme.scored), strict_iou(count), strict=True))
        assert {name: value for name, value in iou.items() if not np.isnan(value)} == pytest.approx(expected.iou)


def test_region_weights_sum_to_the_number_of_regions_per_domain() -> None:
    domains = ["a"] * 5 + ["b"] * 3 + ["c", "d"]
    weights = region_weights(domains, 4000, np.random.default_rng(0))
    assert weights[:, :5].sum(axis=1) == pytest.approx(5)
    assert weights[:, 5:8].sum(axis=1) == pytest.approx(3)
    assert weights[:, 8:].sum(axis=1) == pytest.approx(2)  # domains with a single region are pooled
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.06)
    assert weights.var(axis=0) == pytest.approx(1, abs=0.15)  # the mean of n regions then varies by s² / n
    assert np.all(weights[:, :5] > 0)  # a class in a single region never vanishes
    assert np.all(region_weights(["a"], 10, np.random.default_rng(0)) == 1)


# Simulated study: recall depends on a logit per domain, region and class, and on a gain per run.
_EASE = np.array([1.6, 0.9, 0.3])
_DOMAINS, _REGIONS, _PIXELS = 12, 10, 4000


def _matrices(random: np.random.Generator, gains: np.ndarray, regions: int) -> np.ndarray:
    """Simulate (runs, domains x regions, 3, 3) confusion matrices; ``gains`` are logits per run."""
    count = _DOMAINS * regions
    domain = np.repeat(np.linspace(-0.5, 0.5, _DOMAINS), regions)
    ease = domain + 0.7 * random.standard_normal(count)
    truth = random.dirichlet([3.0, 2.0, 1.0], count) * _PIXELS
    logits = _EASE + (ease + gains[:, None])[..., None]  # runs, regions, classes
    recall = 1 / (1 + np.exp(-logits))
    hits = truth * recall
    wrong = (truth - hits) / 2
    matrices = np.repeat(wrong[..., None], 3, axis=-1)
    matrices[..., [0, 1, 2], [0, 1, 2]] = hits
    return matrices


def _replicates(matrices: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = strict_counts(matrices, THREE)
    resampled = np.einsum("br,nrkc->nbkc", weights, counts)
    return mean_iou(counts.sum(axis=1), THREE, background=True), mean_iou(resampled, THREE, background=True)


_SPREAD, _GAIN = 0.08, 0.1


# About 20 s: 800 simulated studies, each with its own bootstrap.
@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(1)
    names = [f"D{domain}" for domain in range(_DOMAINS) for _ in range(_REGIONS)]
    # Ground truth: the mean over many regions and many runs.
    many = [_matrices(random, gain + _SPREAD * random.standard_normal(40), 400) for gain in (0.0, _GAIN)]
    truths = [float(mean_iou(strict_counts(found, THREE).sum(axis=1), THREE, background=True).mean()) for found in many]
    studies, runs = 800, 5
    covered = np.zeros((5, studies), bool)
    for study in range(studies):
        weights = region_weights(names, 400, random)
        draw = _SPREAD * random.standard_normal(runs)  # initializations share a part of each draw's effect
        gains = [gain + 0.7 * draw + 0.7 * _SPREAD * random.standard_normal(runs) for gain in (0.0, _GAIN)]
        seed = random.integers(1 << 30)  # both initializations are tested on the same regions
        found = [_replicates(_matrices(np.random.default_rng(seed), gain, _REGIONS), weights) for gain in gains]
        estimates = [estimate_mean(*item, random) for item in found]
        by_run = [{(run, 0): (item[0][run], item[1][run]) for run in range(runs)} for item in found]
        difference = paired_difference(by_run[1], by_run[0], random)
        assert difference is not None
        scores, resampled = found[0]
        without_regions = np.repeat(scores[:, None], 400, axis=1)
        controls = (
            BootstrapEstimate(float(scores.mean()), resampled.mean(axis=0), runs),
            estimate_mean(scores, without_regions, random),
        )
        expected = (*truths, truths[1] - truths[0], truths[0], truths[0])
        for kind, (item, truth) in enumerate(zip((*estimates, difference, *controls), expected, strict=True)):
            low, high = item.interval
            covered[kind, study] = low <= truth <= high
    coverage = covered.mean(axis=1)
    assert np.all((coverage[:3] >= 0.93) & (coverage[:3] <= 0.97)), coverage
    # Controls: with the uncertainty of regions alone, or of runs alone, the intervals are too narrow.
    assert np.all(coverage[3:] < 0.92), coverage


def test_interquartile_mean_ignores_outliers() -> None:
    values = np.array([10.0, 50.0, 51.0, 52.0, 95.0])
    assert aggregate(values, True) == pytest.approx(51)
    assert aggregate(values, False) == pytest.approx(51.6)
    random = np.random.default_rng(0)
    resampled = np.repeat(values[:, None], 20_000, axis=1)
    wide, narrow = (estimate_mean(values, resampled, random, interquartile=choice).interval for choice in (False, True))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


# Without uncertainty of regions, the interval of the mean is Student's.
@pytest.mark.parametrize(("runs", "quantile"), [(3, 4.303), (5, 2.776)])
def test_runs_alone_give_student_intervals(runs: int, quantile: float) -> None:
    values = np.arange(runs, dtype=float)
    found = estimate_mean(values, np.repeat(values[:, None], 200_000, axis=1), np.random.default_rng(0))
    half = quantile * values.std(ddof=1) / np.sqrt(runs)
    assert found.interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)


def test_pairing_removes_shared_variance() -> None:
    random = np.random.default_rng(0)
    shared = 5 * random.standard_normal((4, 500))
    one = {(draw, 0): (40.0 + draw, 40.0 + draw + shared[draw]) for draw in range(4)}
    other = {run: (value - 2, resampled - 2) for run, (value, resampled) in one.items() if run != (3, 0)}
    found = paired_difference(one, other, random)
    assert found is not None
    assert (found.value, found.runs) == (pytest.approx(2), 3)
    assert found.interval == pytest.approx((2, 2))
    assert found.p_value < 0.01
    assert paired_difference(one, {(9, 9): one[0, 0]}, random) is None


# Seeds of one draw share its labels, so they are not independent runs. Takes seconds.
@pytest.mark.parametrize(("draw_spread", "seed_spread"), [(1.0, 0.0), (1.0, 0.5), (0.3, 1.0)])
def test_intervals_cover_the_truth_of_nested_runs(draw_spread: float, seed_spread: float) -> None:
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(1500):
        draws = 50 + draw_spread * random.standard_normal(5)
        values = {(d, s): draws[d] + seed_spread * random.standard_normal() for d in range(5) for s in range(3)}
        found = estimate_over_runs({run: (value, np.full(400, value)) for run, value in values.items()}, random)
        low, high = found.interval
        covered += low <= 50 <= high
        assert found.runs == 5
    assert 0.93 <= covered / 1500 <= 0.97


def test_seeds_are_the_units_of_a_single_draw() -> None:
    runs = {(0, seed): (float(seed), np.full(10, float(seed))) for seed in range(3)}
    assert estimate_over_runs(runs, np.random.default_rng(0)).runs == 3


def test_holm_correction_matches_the_worked_example() -> None:
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_correction([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm_correction([]) == []


def _flat(value: float) -> BootstrapEstimate:
    return BootstrapEstimate(value, np.full(3, value), 3)


@pytest.mark.parametrize(
    ("target", "fraction"),
    [(30, np.sqrt(0.01 * 0.1)), (40, 0.1), (20, 0.01), (15, 0.01), (50, 1.0), (51, np.inf), (45, np.sqrt(0.1))],
)
def test_labels_needed_are_interpolated_in_the_logarithm(target: float, fraction: float) -> None:
    curve = {0.01: _flat(20), 0.1: _flat(40), 1.0: _flat(50)}
    assert labels_needed(curve, _flat(target)).value == pytest.approx(fraction)


def test_the_smallest_fraction_is_returned_exactly() -> None:
    for fraction in (0.001, 0.01, 0.05, 0.1):
        assert labels_needed({fraction: _flat(20), 1.0: _flat(50)}, _flat(10)).value == fraction


def test_labels_needed_use_the_running_maximum_of_a_falling_curve() -> None:
    curve = {0.01: _flat(20), 0.1: _flat(40), 1.0: _flat(35)}
    assert labels_needed(curve, _flat(38)).value == pytest.approx(10 ** (-2 + 0.9))
    replicates = np.array([30.0, 40.0, 60.0])
    found = labels_needed(curve, BootstrapEstimate(40.0, replicates, 3))
    assert found.replicates == pytest.approx([np.sqrt(0.001), 0.1, np.inf])
