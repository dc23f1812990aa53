"""Bootstrap intervals, paired differences and multiple-testing correction for scores of several runs.

Two sources of uncertainty enter an interval:

- The test regions. Each bootstrap replicate gives the regions of a domain random weights. They are the weights of the
  Bayesian bootstrap (Rubin 1981), scaled to the variance of the unbiased rescaling bootstrap for small strata
  (Rao & Wu 1988). No weight is 0, so a class that occurs in a single region never vanishes.
- The runs, which are draws of labelled patches, or training seeds when there is one draw. Three to five runs are too
  few to resample. The error of a mean of n runs is s / sqrt(n) times a Student variable with n - 1 degrees of freedom,
  so such a variable is added to each replicate.

Compared initializations share regions and runs. Their differences are therefore paired by region and by run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bocage.shards.classes import ClassScheme

CONFIDENCE = 0.95


def strict_counts(matrices: np.ndarray, scheme: ClassScheme) -> np.ndarray:
    """Compute the counts that give the strict IoU of each scored class; counts of regions can be summed.

    Args:
        matrices: (..., classes, classes) pixel counts, [truth, prediction].
        scheme: classes of the matrices.

    Returns:
        (..., 3, scored classes) float64: correct pixels, pixels of the class, and pixels predicted as the class among
        those with a scored label.
    """
    scored = list(scheme.scored)
    scored_truth = matrices[..., scored, :]
    correct = matrices[..., scored, scored]
    labelled, predicted = scored_truth.sum(axis=-1), scored_truth[..., scored].sum(axis=-2)
    return np.stack((correct, labelled, predicted), axis=-2).astype(np.float64)


def strict_iou(counts: np.ndarray) -> np.ndarray:
    """Compute the IoU in percent, (..., C), from (..., 3, C) ``strict_counts``; NaN for classes without a pixel."""
    correct, labelled, predicted = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
    union = labelled + predicted - correct
    return np.where(
        labelled > 0, 100.0 * np.divide(correct, union, out=np.zeros_like(correct), where=union > 0), np.nan
    )


def mean_iou(counts: np.ndarray, scheme: ClassScheme, *, background: bool) -> np.ndarray:
    """Compute the strict mIoU in percent, (...), from (..., 3, C) ``strict_counts``.

    Args:
        counts: (..., 3, C) counts.
        scheme: classes of the counts.
        background: whether the mean includes the scheme's background class.
    """
    iou = strict_iou(counts)
    if not background:
        iou = iou[..., [value != scheme.background for value in scheme.scored]]
    defined = ~np.isnan(iou)
    return np.where(defined, iou, 0.0).sum(axis=-1) / defined.sum(axis=-1).clip(1)


def region_weights(domains: Sequence[str], replicates: int, random: np.random.Generator) -> np.ndarray:
    """Draw the bootstrap weights of regions, with mean 1 and variance 1; they sum to the number of regions per domain.

    n times a Dirichlet variable with concentration (n - 2) / n has this variance. For two regions, one region gets the
    weight 2 and the other 0. Domains with a single region are pooled into one domain.

    Args:
        domains: domain of each of the R regions.
        replicates: number of bootstrap replicates.
        random: random generator.

    Returns:
        (replicates, R) float64 weights.
    """
    names, sizes = np.unique(np.array(domains), return_counts=True)
    singletons = set(names[sizes == 1].tolist())
    strata = np.array(["" if name in singletons else name for name in domains])
    weights = np.ones((replicates, len(strata)))
    for name in np.unique(strata):
        members = np.flatnonzero(strata == name)
        count = len(members)
        if count > 1:
            if count == 2:
                draws = random.integers(0, 2, (replicates, 1)) == [0, 1]
            else:
                draws = random.standard_gamma(1 - 2 / count, (replicates, count))
            weights[:, members] = count * draws / draws.sum(axis=1, keepdims=True)
    return weights


@dataclass(frozen=True)
class BootstrapEstimate:
    """Point estimate with its bootstrap replicates.

    Attributes:
        value: point estimate, a mean over runs.
        replicates: (B,) float64 bootstrap replicates.
        runs: number of runs in the mean.
    """

    value: float
    replicates: np.ndarray
    runs: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile interval; replicates may be infinite."""
        tails = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self.replicates, [tails, 1 - tails], method="inverted_cdf")
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Two-sided bootstrap p-value of a zero effect, at least 2 / (B + 1).

        It is 1 for a single run, because one run does not show the variance between runs.
        """
        if self.runs < 2:
            return 1.0
        count = len(self.replicates)
        below, above = (self.replicates <= 0).sum(), (self.replicates >= 0).sum()
        return float(min(1.0, 2 * (min(below, above) + 1) / (count + 1)))


def aggregate(values: np.ndarray, interquartile: bool) -> np.ndarray:
    """Average (N, ...) over the first axis by the mean or the interquartile mean (arXiv 2108.13264)."""
    if not interquartile:
        return values.mean(axis=0)
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def _standard_error(values: np.ndarray, interquartile: bool) -> tuple[float, int]:
    """Standard error of ``aggregate`` on (n,) values, and its degrees of freedom (Tukey & McLaughlin 1963)."""
    count = len(values)
    cut = count // 4 if interquartile else 0
    ordered = np.sort(values)
    winsorized = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    return float(winsorized.std(ddof=1) / ((1 - 2 * cut / count) * math.sqrt(count))), count - 2 * cut - 1


def estimate_mean(
    scores: np.ndarray, resampled: np.ndarray, random: np.random.Generator, *, interquartile: bool = False
) -> BootstrapEstimate:
    """Estimate the mean over runs.

    Args:
        scores: (n,) scores of the runs on all regions.
        resampled: (n, B) scores of the runs in each bootstrap replicate of the regions.
        random: random generator for the uncertainty between runs.
        interquartile: whether to use the interquartile mean.
    """
    value = float(aggregate(scores, interquartile))
    replicates = aggregate(resampled, interquartile)
    if len(scores) > 1:
        error, degrees = _standard_error(scores, interquartile)
        replicates = replicates + error * random.standard_t(degrees, replicates.shape)
    return BootstrapEstimate(value, replicates, len(scores))


RunScores = Mapping[tuple[int, int], tuple[float, np.ndarray]]
"""By (draw, seed): score of the run, and its (B,) scores in the bootstrap replicates of the regions."""


def estimate_over_runs(
    runs: RunScores, random: np.random.Generator, *, interquartile: bool = False
) -> BootstrapEstimate:
    """Estimate the mean over draws, or over seeds when there is a single draw.

    Seeds of one draw share its labels and are not independent, so they are averaged into one unit.

    Args:
        runs: scores of the runs, at least one.
        random: see ``estimate_mean``.
        interquartile: see ``estimate_mean``.
    """
    draws = {draw for draw, _ in runs}
    units: dict[int, list[tuple[float, np.ndarray]]] = {}
    for (draw, seed), run in sorted(runs.items(), key=lambda item: item[0]):
        units.setdefault(draw if len(draws) > 1 else seed, []).append(run)
    scores = np.array([np.mean([value for value, _ in unit]) for unit in units.values()])
    resampled = np.stack([np.mean([replicates for _, replicates in unit], axis=0) for unit in units.values()])
    return estimate_mean(scores, resampled, random, interquartile=interquartile)


def paired_difference(
    scores: RunScores,
    reference: RunScores,
    random: np.random.Generator,
    *,
    interquartile: bool = False,
) -> BootstrapEstimate | None:
    """Estimate the mean difference ``scores - reference``, paired by draw and seed.

    Args:
        scores: runs of one initialization.
        reference: runs of the initialization to compare with.
        random: see ``estimate_mean``.
        interquartile: see ``estimate_mean``.

    Returns:
        The difference over the common runs; None without any.
    """
    runs = {
        run: (scores[run][0] - reference[run][0], scores[run][1] - reference[run][1])
        for run in scores
        if run in reference
    }
    return estimate_over_runs(runs, random, interquartile=interquartile) if runs else None


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple testing (Holm 1979); the order is kept."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(np.array(p_values)[order] * (len(p_values) - np.arange(len(p_values))))
    return [float(min(1.0, value)) for value in corrected]


def labels_needed(curve: Mapping[float, BootstrapEstimate], target: BootstrapEstimate) -> BootstrapEstimate:
    """Estimate the fraction of labels at which a curve first reaches a target; infinite where it never does.

    Scores are interpolated linearly in the logarithm of the fraction, on the running maximum of the curve. A target
    that the smallest fraction already reaches gives the smallest fraction.

    Args:
        curve: scores by fraction of the labels, at least one.
        target: score to reach.
    """
    fractions = np.array(sorted(curve))
    values = np.stack([np.append(curve[fraction].value, curve[fraction].replicates) for fraction in fractions])
    targets = np.append(target.value, target.replicates)
    needed = _first_crossing(fractions, np.maximum.accumulate(values.astype(np.float64), axis=0), targets)
    return BootstrapEstimate(float(needed[0]), needed[1:], min(item.runs for item in curve.values()))


def _first_crossing(fractions: np.ndarray, values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Find where each rising column of (F, B) ``values`` reaches its (B,) target; infinite where it never does."""
    log_fractions = np.log(fractions)
    reached = values >= targets
    after = reached.argmax(axis=0)
    columns = np.arange(values.shape[1])
    before = (after - 1).clip(0)
    low, high = values[before, columns], values[after, columns]
    weight = np.divide(targets - low, high - low, out=np.zeros_like(low), where=high > low)
    position = log_fractions[before] + weight * (log_fractions[after] - log_fractions[before])
    crossing = np.where(after == 0, fractions[0], np.exp(position))  # exp(log(x)) may differ from x
    return np.where(reached.any(axis=0), crossing, np.inf)
