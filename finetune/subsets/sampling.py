"""Draw nested, stratified subsets of labelled patches, identical on every machine.

A subset depends only on the number of the draw and on the patches' keys, regions, domains and class histograms. Hashes
of (draw, key) replace random numbers, so no library's random generator matters. Each draw sorts the patches (or whole
ROIs) into one order, and a subset is the first patches of that order: subsets are nested and have exact sizes.

The order comes from systematic sampling within strata of domain and rarest class. It spreads each stratum evenly, so
that every subset contains each stratum in proportion, up to about one patch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bocage.finetune.models.targets import Target
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest

SamplingUnit = Literal["patch", "roi"]
"""Unit that is drawn: single patches, or all patches of a region of interest."""

SAMPLING_UNITS: tuple[SamplingUnit, ...] = get_args(SamplingUnit)
_TOLERANCE = 1e-9  # excess over a whole number of patches that is rounding error


@dataclass(frozen=True)
class LabelledPatches:
    """Labelled patches to draw subsets from.

    Attributes:
        keys: (N,) patch keys.
        rois: (N,) names of regions of interest; they include the domain.
        domains: (N,) names of domains.
        classes: pairs (label, class) of the C scored classes.
        pixels: (N, C) int64 pixel counts of each class in each patch.
    """

    keys: Sequence[str]
    rois: np.ndarray
    domains: np.ndarray
    classes: tuple[tuple[str, str], ...]
    pixels: np.ndarray

    @classmethod
    def read(cls, manifest: Manifest, rows: np.ndarray, targets: Sequence[Target]) -> LabelledPatches:
        """Read the patches at ``rows``, (N,) int64, of a manifest and their pixel counts of the targets' classes."""
        counts, names = [], []
        for target in targets:
            scheme = target.scheme
            histograms = _histograms(manifest, rows, target)
            counts.append(histograms[:, list(scheme.scored)])
            names += [(target.name, scheme.classes[value]) for value in scheme.scored]
        keys, rois, domains = (manifest.column(name).take(rows).to_pylist() for name in ("key", "roi", "domain"))
        return cls(keys, np.array(rois), np.array(domains), tuple(names), np.concatenate(counts, axis=1))

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, index: np.ndarray) -> LabelledPatches:
        """Select the patches at the indices ``index``, (n,) int64."""
        keys = [self.keys[position] for position in index]
        return LabelledPatches(keys, self.rois[index], self.domains[index], self.classes, self.pixels[index])


def _histograms(manifest: Manifest, rows: np.ndarray, target: Target) -> np.ndarray:
    """Read the (N, classes) int64 pixel counts of a target; 0 for a patch without the label."""
    band = target.label.bands[target.band].name
    column = manifest.column(f"histogram.{target.name}.{band}").take(rows).combine_chunks()
    has_label = column.is_valid().to_numpy(zero_copy_only=False)
    stored = np.zeros((len(rows), len(target.label.schemes[target.band])), np.int64)
    stored[has_label] = column.flatten().to_numpy().reshape(-1, stored.shape[1])
    if target.groups is None:
        return stored
    grouped = np.zeros((len(rows), len(target.scheme)), np.int64)
    for value, group in enumerate(target.groups):
        grouped[:, group] += stored[:, value]
    return grouped


def draw_subset(patches: LabelledPatches, fraction: float, *, draw: int, sampling_unit: SamplingUnit) -> np.ndarray:
    """Draw a subset and return the indices of its patches, int64, ascending.

    Args:
        patches: patches to draw from.
        fraction: size of the subset as a fraction of the patches, in (0, 1]. A number of patches is rounded up. Whole
            regions are added while that brings the number of patches closer to the fraction; there is at least one.
        draw: number of the draw; subsets of one draw are nested.
        sampling_unit: ``patch`` to draw single patches, ``roi`` to draw whole regions.

    Raises:
        InputError: ``patches`` is empty.
    """
    order = _sampling_order(patches, draw, sampling_unit)
    return np.sort(order[: _subset_size(patches.rois[order], fraction, sampling_unit)])


def smallest_fractions(
    patches: LabelledPatches, fractions: Sequence[float], *, draw: int, sampling_unit: SamplingUnit
) -> np.ndarray:
    """Return the smallest of ``fractions`` whose subset contains each patch, (N,) float64; NaN if none does.

    Raises:
        InputError: ``patches`` is empty.
    """
    order = _sampling_order(patches, draw, sampling_unit)
    rois = patches.rois[order]
    smallest = np.full(len(patches), np.nan)
    for fraction in sorted(fractions, reverse=True):
        smallest[order[: _subset_size(rois, fraction, sampling_unit)]] = fraction
    return smallest


def _subset_size(rois: np.ndarray, fraction: float, sampling_unit: SamplingUnit) -> int:
    """Number of patches in a subset; ``rois`` are the regions of all patches in sampling order."""
    target = fraction * len(rois)
    if sampling_unit == "patch":
        return max(1, math.ceil(target - _TOLERANCE))
    ends = np.flatnonzero(np.append(rois[1:] != rois[:-1], True)) + 1
    return int(ends[np.abs(ends - target).argmin()])


def _sampling_order(patches: LabelledPatches, draw: int, sampling_unit: SamplingUnit) -> np.ndarray:
    """Return the indices of all patches, (N,) int64, in the order in which subsets add them."""
    if not len(patches):
        raise InputError("there is no labelled patch to draw from")
    present = patches.pixels > 0
    if sampling_unit == "patch":
        return _systematic_order([f"{draw}/{key}" for key in patches.keys], patches.domains, present)
    names, first, region = np.unique(patches.rois, return_index=True, return_inverse=True)
    region_classes = np.zeros((len(names), present.shape[1]), bool)
    np.logical_or.at(region_classes, region, present)
    regions = _systematic_order([f"{draw}/{name}" for name in names], patches.domains[first], region_classes)
    rank = np.empty(len(names), np.int64)
    rank[regions] = np.arange(len(names))
    keys = np.array(patches.keys)
    return np.lexsort((keys, rank[region]))


def _systematic_order(names: Sequence[str], domains: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the order of systematic sampling within strata of domain and rarest class present.

    Within a stratum of n units, the r-th unit by hash has the position (r + offset) / n, between 0 and 1. Sorting by
    position merges the strata. Offsets are spread evenly within and across domains, so that rounding errors of the
    strata cancel out.

    Args:
        names: names of the N units, which are hashed.
        domains: (N,) domain of each unit.
        present: (N, C) bool, classes that each unit has.
    """
    rarest_first = np.argsort(present.sum(axis=0), kind="stable")
    ranked = present[:, rarest_first]
    rarest_class = np.where(ranked.any(axis=1), ranked.argmax(axis=1), present.shape[1])
    digests = np.array([_digest(name) for name in names], np.uint64)
    strata, stratum = np.unique(
        np.stack([np.unique(domains, return_inverse=True)[1], rarest_class]), axis=1, return_inverse=True
    )
    stratum = stratum.reshape(-1)
    # Strata are sorted by the smallest hash of their units, and domains by the smallest hash of their strata.
    smallest = np.full(strata.shape[1], np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, stratum, digests)
    offsets = _offsets(strata[0], smallest)
    order = np.lexsort((digests, stratum))
    sizes = np.bincount(stratum)
    rank = np.arange(len(names)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    position = np.empty(len(names))
    position[order] = (rank + offsets[stratum[order]]) / sizes[stratum[order]]
    return np.lexsort((digests, position))


def _offsets(domain: np.ndarray, digest: np.ndarray) -> np.ndarray:
    """Return an offset in (0, 1) for each stratum, (S,): evenly spaced within a domain, domains evenly shifted."""
    groups = [np.flatnonzero(domain == name) for name in np.unique(domain)]
    groups.sort(key=lambda group: int(digest[group].min()))
    offsets = np.empty(len(domain))
    for number, group in enumerate(groups):
        shift = (number + 0.5) / len(groups)
        offsets[group[np.argsort(digest[group], kind="stable")]] = (np.arange(len(group)) + shift) / len(group)
    return offsets


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def disjoint_validation_mask(rois: np.ndarray, domains: np.ndarray, fraction: float) -> np.ndarray:
    """Choose whole regions for validation, so that training and validation share no region.

    Within each domain, regions are added in the order of their hashes while that brings the number of patches closer to
    the fraction. A domain with a single region has no validation patches. (In FLAIR-HUB's toy split, 24 of the 46
    validation regions are also in the training set.)

    Args:
        rois: (N,) regions of all patches of training and validation.
        domains: (N,) domains of these patches.
        fraction: fraction of the patches to validate on.

    Returns:
        (N,) bool, True for validation patches.
    """
    chosen: set[str] = set()
    for domain in np.unique(domains):
        names, sizes = np.unique(rois[domains == domain], return_counts=True)
        order = np.argsort([_digest(f"validation/{name}") for name in names], kind="stable")
        ends = np.concatenate(([0], np.cumsum(sizes[order])))[: len(names)]  # one region remains for training
        chosen.update(names[order[: int(np.abs(ends - fraction * sizes.sum()).argmin())]])
    return np.isin(rois, sorted(chosen))


def keys_digest(keys: Sequence[str]) -> str:
    """SHA-256 of the sorted keys, one per line; equal for two runs that train on the same patches."""
    return hashlib.sha256("".join(f"{key}\n" for key in sorted(keys)).encode()).hexdigest()
