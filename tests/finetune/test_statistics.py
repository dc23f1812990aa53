"""Intervals hold what they promise, on worlds whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bocage.finetune.evaluation.statistics import (
    BootstrapEstimate,
    estimate,
    holm,
    labels_needed,
    mean_iou,
    mean_of,
    paired,
    region_weights,
    strict_counts,
    strict_iou,
    trimmed,
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
    for matrix, own in zip((*matrices, matrices.sum(axis=0)), (*counts, counts.sum(axis=0)), strict=True):
        wanted = strict_scores(matrix, scheme)
        assert mean_iou(own, scheme, background=True) == pytest.approx(wanted.miou)
        if scheme.background is not None:
            assert mean_iou(own, scheme, background=False) == pytest.approx(wanted.miou_without_background)
        iou = dict(zip((scheme.classes[value] for value in scheme.scored), strict_iou(own), strict=True))
        assert {name: value for name, value in iou.items() if not np.isnan(value)} == pytest.approx(wanted.iou)


def test_weights_keep_domains_and_their_totals() -> None:
    domains = ["a"] * 5 + ["b"] * 3 + ["c", "d"]
    weights = region_weights(domains, 4000, np.random.default_rng(0))
    assert weights[:, :5].sum(axis=1) == pytest.approx(5)
    assert weights[:, 5:8].sum(axis=1) == pytest.approx(3)
    assert weights[:, 8:].sum(axis=1) == pytest.approx(2)  # the two domains of one region are one
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.06)
    assert weights.var(axis=0) == pytest.approx(1, abs=0.15)  # the mean of n regions then varies by s² / n
    assert np.all(weights[:, :5] > 0)  # what one region alone holds does not vanish
    assert np.all(region_weights(["a"], 10, np.random.default_rng(0)) == 1)


# A world: domains and regions with an ease of their own, classes with theirs; runs that are better or worse as a whole.
_EASE = np.array([1.6, 0.9, 0.3])
_DOMAINS, _REGIONS, _PIXELS = 12, 10, 4000


def _matrices(random: np.random.Generator, gains: np.ndarray, regions: int) -> np.ndarray:
    """(runs, domains x regions, 3, 3) confusion matrices; ``gains`` of each run, in logits."""
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


# About 20 s: eight hundred studies of a world, each with its own bootstrap.
@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(1)
    names = [f"D{domain}" for domain in range(_DOMAINS) for _ in range(_REGIONS)]
    # The truth: very many regions, and the mean over very many runs.
    many = [_matrices(random, gain + _SPREAD * random.standard_normal(40), 400) for gain in (0.0, _GAIN)]
    truths = [float(mean_iou(strict_counts(found, THREE).sum(axis=1), THREE, background=True).mean()) for found in many]
    studies, runs = 800, 5
    covered = np.zeros((5, studies), bool)
    for study in range(studies):
        weights = region_weights(names, 400, random)
        draw = _SPREAD * random.standard_normal(runs)  # starts share what a draw of labels is worth, in part
        gains = [gain + 0.7 * draw + 0.7 * _SPREAD * random.standard_normal(runs) for gain in (0.0, _GAIN)]
        seed = random.integers(1 << 30)  # the regions of a study are the same for both starts
        found = [_replicates(_matrices(np.random.default_rng(seed), gain, _REGIONS), weights) for gain in gains]
        alone = [estimate(*item, random) for item in found]
        by_run = [{(run, 0): (item[0][run], item[1][run]) for run in range(runs)} for item in found]
        difference = paired(by_run[1], by_run[0], random)
        assert difference is not None
        scores, resampled = found[0]
        alike = np.repeat(scores[:, None], 400, axis=1)
        controls = (
            BootstrapEstimate(float(scores.mean()), resampled.mean(axis=0), runs),
            estimate(scores, alike, random),
        )
        wanted = (*truths, truths[1] - truths[0], truths[0], truths[0])
        for kind, (item, truth) in enumerate(zip((*alone, difference, *controls), wanted, strict=True)):
            low, high = item.interval
            covered[kind, study] = low <= truth <= high
    shares = covered.mean(axis=1)
    assert np.all((shares[:3] >= 0.93) & (shares[:3] <= 0.97)), shares
    # What the test can tell: regions alone, or runs alone, are not enough.
    assert np.all(shares[3:] < 0.92), shares


def test_an_interquartile_mean_leaves_out_the_extremes() -> None:
    values = np.array([10.0, 50.0, 51.0, 52.0, 95.0])
    assert trimmed(values, True) == pytest.approx(51)
    assert trimmed(values, False) == pytest.approx(51.6)
    random = np.random.default_rng(0)
    resampled = np.repeat(values[:, None], 20_000, axis=1)
    wide, narrow = (estimate(values, resampled, random, interquartile=choice).interval for choice in (False, True))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


# Intervals of the mean of three and of five values from a normal distribution are those of Student.
@pytest.mark.parametrize(("runs", "quantile"), [(3, 4.303), (5, 2.776)])
def test_runs_alone_give_student_intervals(runs: int, quantile: float) -> None:
    values = np.arange(runs, dtype=float)
    found = estimate(values, np.repeat(values[:, None], 200_000, axis=1), np.random.default_rng(0))
    half = quantile * values.std(ddof=1) / np.sqrt(runs)
    assert found.interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)


def test_pairing_takes_out_what_starts_share() -> None:
    random = np.random.default_rng(0)
    shared = 5 * random.standard_normal((4, 500))
    one = {(draw, 0): (40.0 + draw, 40.0 + draw + shared[draw]) for draw in range(4)}
    other = {run: (value - 2, resampled - 2) for run, (value, resampled) in one.items() if run != (3, 0)}
    found = paired(one, other, random)
    assert found is not None
    assert (found.value, found.runs) == (pytest.approx(2), 3)
    assert found.interval == pytest.approx((2, 2))
    assert found.p_value < 0.01
    assert paired(one, {(9, 9): one[0, 0]}, random) is None


# Seeds of one draw share its labels: they are no runs of their own. Some seconds.
@pytest.mark.parametrize(("draw_spread", "seed_spread"), [(1.0, 0.0), (1.0, 0.5), (0.3, 1.0)])
def test_intervals_cover_the_truth_of_nested_runs(draw_spread: float, seed_spread: float) -> None:
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(1500):
        draws = 50 + draw_spread * random.standard_normal(5)
        values = {(d, s): draws[d] + seed_spread * random.standard_normal() for d in range(5) for s in range(3)}
        found = mean_of({run: (value, np.full(400, value)) for run, value in values.items()}, random)
        low, high = found.interval
        covered += low <= 50 <= high
        assert found.runs == 5
    assert 0.93 <= covered / 1500 <= 0.97


def test_seeds_count_where_there_is_one_draw() -> None:
    runs = {(0, seed): (float(seed), np.full(10, float(seed))) for seed in range(3)}
    assert mean_of(runs, np.random.default_rng(0)).runs == 3


def test_holm_is_that_of_his_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def _flat(value: float) -> BootstrapEstimate:
    return BootstrapEstimate(value, np.full(3, value), 3)


@pytest.mark.parametrize(
    ("target", "share"),
    [(30, np.sqrt(0.01 * 0.1)), (40, 0.1), (20, 0.01), (15, 0.01), (50, 1.0), (51, np.inf), (45, np.sqrt(0.1))],
)
def test_labels_needed_are_interpolated_over_the_logarithm(target: float, share: float) -> None:
    curve = {0.01: _flat(20), 0.1: _flat(40), 1.0: _flat(50)}
    assert labels_needed(curve, _flat(target)).value == pytest.approx(share)


def test_the_smallest_share_is_told_exactly() -> None:
    for share in (0.001, 0.01, 0.05, 0.1):
        assert labels_needed({share: _flat(20), 1.0: _flat(50)}, _flat(10)).value == share


def test_labels_needed_of_a_curve_that_falls_are_those_of_what_it_reached() -> None:
    curve = {0.01: _flat(20), 0.1: _flat(40), 1.0: _flat(35)}
    assert labels_needed(curve, _flat(38)).value == pytest.approx(10 ** (-2 + 0.9))
    replicates = np.array([30.0, 40.0, 60.0])
    found = labels_needed(curve, BootstrapEstimate(40.0, replicates, 3))
    assert found.replicates == pytest.approx([np.sqrt(0.001), 0.1, np.inf])
