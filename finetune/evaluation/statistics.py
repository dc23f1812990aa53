"""What can be said of scores that were measured on some regions after some runs: intervals, differences, corrections.

Two things make a score uncertain. *Regions* tested on: in each replicate the regions of a domain have random weights,
those of the Bayesian bootstrap (Rubin 1981) as wide as the rescaling bootstrap for strata of few units (Rao & Wu 1988),
which is unbiased; no weight is 0, so that a class which one region holds does not vanish. *Runs*: draws of labelled
patches, or training seeds where there is one draw. There are three to five, too few to resample; the mean of n is off
by s / sqrt(n) times a Student variable of n - 1 degrees, and such a variable is added to each replicate. Starts that
are compared share regions and runs: differences are paired in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bocage.shards.classes import ClassScheme

LEVEL = 0.95


def strict_counts(matrices: np.ndarray, scheme: ClassScheme) -> np.ndarray:
    """What the strict IoU of each scored class is made of; it adds up over regions.

    Args:
        matrices: (..., classes, classes) pixels, [truth, prediction].
        scheme: the classes.

    Returns:
        (..., 3, scored classes) float64: hits, pixels of the class, pixels predicted as it where the truth is scored.
    """
    scored = list(scheme.scored)
    kept = matrices[..., scored, :]
    hits = matrices[..., scored, scored]
    return np.stack((hits, kept.sum(axis=-1), kept[..., scored].sum(axis=-2)), axis=-2).astype(np.float64)


def strict_iou(counts: np.ndarray) -> np.ndarray:
    """IoU in percent of (..., 3, C) ``strict_counts``: (..., C), NaN for classes that the truth does not hold."""
    hits, truth, predicted = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
    union = truth + predicted - hits
    return np.where(truth > 0, 100.0 * np.divide(hits, union, out=np.zeros_like(hits), where=union > 0), np.nan)


def mean_iou(counts: np.ndarray, scheme: ClassScheme, *, background: bool) -> np.ndarray:
    """Mean of (..., 3, C) ``strict_counts`` over the classes that there are, (...): strict mIoU in percent.

    It counts the scheme's background or leaves it out.
    """
    iou = strict_iou(counts)
    if not background:
        iou = iou[..., [value != scheme.background for value in scheme.scored]]
    there = ~np.isnan(iou)
    return np.where(there, iou, 0.0).sum(axis=-1) / there.sum(axis=-1).clip(1)


def region_weights(domains: Sequence[str], replicates: int, random: np.random.Generator) -> np.ndarray:
    """Weights of regions in each replicate, (replicates, R) float64 of mean and variance 1, adding up within domains.

    n times a Dirichlet variable of concentration (n - 2) / n has that variance; of two regions it is one or the other.
    Domains of one region are one domain.

    Args:
        domains: of each of the R regions.
        replicates: how many.
        random: where they are drawn from.
    """
    names, sizes = np.unique(np.array(domains), return_counts=True)
    alone = set(names[sizes == 1].tolist())
    strata = np.array(["" if name in alone else name for name in domains])
    weights = np.ones((replicates, len(strata)))
    for name in np.unique(strata):
        here = np.flatnonzero(strata == name)
        if len(here) > 1:
            if len(here) == 2:
                drawn = random.integers(0, 2, (replicates, 1)) == [0, 1]
            else:
                drawn = random.standard_gamma(1 - 2 / len(here), (replicates, len(here)))
            weights[:, here] = len(here) * drawn / drawn.sum(axis=1, keepdims=True)
    return weights


@dataclass(frozen=True)
class BootstrapEstimate:
    """A figure with what it might have been.

    Attributes:
        value: the figure.
        replicates: (B,) float64, what it might have been.
        runs: how many it is the mean of.
    """

    value: float
    replicates: np.ndarray
    runs: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, by percentiles; a replicate may be infinite."""
        tails = (1 - LEVEL) / 2
        low, high = np.quantile(self.replicates, [tails, 1 - tails], method="inverted_cdf")
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Two-sided, of being 0; at least 2 / (B + 1). 1 for a single run, which cannot tell chance from effect."""
        if self.runs < 2:
            return 1.0
        count = len(self.replicates)
        below, above = (self.replicates <= 0).sum(), (self.replicates >= 0).sum()
        return float(min(1.0, 2 * (min(below, above) + 1) / (count + 1)))


def trimmed(values: np.ndarray, interquartile: bool) -> np.ndarray:
    """Mean of (N, ...) over the first axis, or of its middle half (interquartile mean, arXiv 2108.13264)."""
    if not interquartile:
        return values.mean(axis=0)
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def _error(values: np.ndarray, interquartile: bool) -> tuple[float, int]:
    """Standard error of ``trimmed`` of (n,) values, and its degrees of freedom (Tukey & McLaughlin 1963)."""
    count = len(values)
    cut = count // 4 if interquartile else 0
    ordered = np.sort(values)
    winsorized = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    return float(winsorized.std(ddof=1) / ((1 - 2 * cut / count) * math.sqrt(count))), count - 2 * cut - 1


def estimate(
    scores: np.ndarray, resampled: np.ndarray, random: np.random.Generator, *, interquartile: bool = False
) -> BootstrapEstimate:
    """The mean over runs.

    Args:
        scores: (n,) score of each run on all regions.
        resampled: (n, B) score of each run in each replicate of the regions.
        random: for what runs add.
        interquartile: mean of the middle half of the runs.
    """
    value = float(trimmed(scores, interquartile))
    replicates = trimmed(resampled, interquartile)
    if len(scores) > 1:
        error, degrees = _error(scores, interquartile)
        replicates = replicates + error * random.standard_t(degrees, replicates.shape)
    return BootstrapEstimate(value, replicates, len(scores))


Runs = Mapping[tuple[int, int], tuple[float, np.ndarray]]
"""By draw and seed, the score of a run and its (B,) scores in the replicates of the regions."""


def mean_of(runs: Runs, random: np.random.Generator, *, interquartile: bool = False) -> BootstrapEstimate:
    """The mean over draws, each the mean of its seeds, which share labels; of a single draw over its seeds.

    Args:
        runs: at least one.
        random, interquartile: see ``estimate``.
    """
    draws = {draw for draw, _ in runs}
    units: dict[int, list[tuple[float, np.ndarray]]] = {}
    for (draw, seed), run in sorted(runs.items(), key=lambda item: item[0]):
        units.setdefault(draw if len(draws) > 1 else seed, []).append(run)
    scores = np.array([np.mean([value for value, _ in found]) for found in units.values()])
    resampled = np.stack([np.mean([replicates for _, replicates in found], axis=0) for found in units.values()])
    return estimate(scores, resampled, random, interquartile=interquartile)


def paired(
    one: Runs,
    other: Runs,
    random: np.random.Generator,
    *,
    interquartile: bool = False,
) -> BootstrapEstimate | None:
    """The difference of two starts over the runs that both have; None without any.

    Args:
        one, other: their runs.
        random, interquartile: see ``estimate``.
    """
    runs = {run: (one[run][0] - other[run][0], one[run][1] - other[run][1]) for run in one if run in other}
    return mean_of(runs, random, interquartile=interquartile) if runs else None


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(np.array(p_values)[order] * (len(p_values) - np.arange(len(p_values))))
    return [float(min(1.0, value)) for value in corrected]


def labels_needed(curve: Mapping[float, BootstrapEstimate], target: BootstrapEstimate) -> BootstrapEstimate:
    """The share of labels at which a curve first reaches a target: infinite where it never does.

    Between fractions scores are interpolated over the logarithm of the share; of a falling curve, what it has reached
    counts. The smallest share stands for all below it.

    Args:
        curve: by share of the labels, the score there; at least one.
        target: the score to reach.
    """
    shares = np.array(sorted(curve))
    values = np.stack([np.append(curve[share].value, curve[share].replicates) for share in shares]).astype(np.float64)
    wanted = np.append(target.value, target.replicates)
    found = _first_reached(shares, np.maximum.accumulate(values, axis=0), wanted)
    return BootstrapEstimate(float(found[0]), found[1:], min(item.runs for item in curve.values()))


def _first_reached(shares: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The share where each rising column of (F, B) ``values`` reaches its (B,) ``wanted``, infinite where none does."""
    positions = np.log(shares)
    reached = values >= wanted
    place = reached.argmax(axis=0)
    columns = np.arange(values.shape[1])
    before = (place - 1).clip(0)
    low, high = values[before, columns], values[place, columns]
    share = np.divide(wanted - low, high - low, out=np.zeros_like(low), where=high > low)
    position = positions[before] + share * (positions[place] - positions[before])
    found = np.where(place == 0, shares[0], np.exp(position))  # exp of a logarithm is not quite the same
    return np.where(reached.any(axis=0), found, np.inf)
