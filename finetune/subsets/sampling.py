"""Which patches are labelled in a study of few labels: nested subsets, stratified, the same on any machine.

Nothing but keys, regions, domains and class histograms decides. A draw is a number; its hash of a key stands where a
random number would, so that no library's generator matters. Patches (or whole ROIs) are put in one order, of which
each subset is a beginning: subsets are nested and their sizes exact. The order is that of systematic sampling within
strata of domain and rarest class: each stratum is spread evenly over it, so that every beginning holds each in its
share, up to one patch or so.
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

Track = Literal["patch", "roi"]
"""What annotators label: single patches, or all patches of regions of interest."""

TRACKS: tuple[Track, ...] = get_args(Track)
_ALMOST = 1e-9  # below a whole number of patches still counts as it


@dataclass(frozen=True)
class LabelledPatches:
    """What subsets are drawn from.

    Attributes:
        keys, rois, domains: (N,) names each; regions are named with their domain.
        classes: (label, class) of each of the C scored classes.
        pixels: (N, C) int64, how many of each a patch has.
    """

    keys: Sequence[str]
    rois: np.ndarray
    domains: np.ndarray
    classes: tuple[tuple[str, str], ...]
    pixels: np.ndarray

    @classmethod
    def read(cls, manifest: Manifest, rows: np.ndarray, targets: Sequence[Target]) -> LabelledPatches:
        """The patches of some rows of a manifest, (N,) int64, and what they have of the classes of some labels."""
        parts, names = [], []
        for target in targets:
            scheme = target.scheme
            histograms = _histograms(manifest, rows, target)
            parts.append(histograms[:, list(scheme.scored)])
            names += [(target.name, scheme.classes[value]) for value in scheme.scored]
        keys, rois, domains = (manifest.column(name).take(rows).to_pylist() for name in ("key", "roi", "domain"))
        return cls(keys, np.array(rois), np.array(domains), tuple(names), np.concatenate(parts, axis=1))

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, index: np.ndarray) -> LabelledPatches:
        """Those at the places ``index``, (n,) int64."""
        keys = [self.keys[place] for place in index]
        return LabelledPatches(keys, self.rois[index], self.domains[index], self.classes, self.pixels[index])


def _histograms(manifest: Manifest, rows: np.ndarray, target: Target) -> np.ndarray:
    """(N, classes) int64 pixels of each class of a target, 0 where a patch lacks the label."""
    band = target.label.bands[target.band].name
    column = manifest.column(f"histogram.{target.name}.{band}").take(rows).combine_chunks()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    stored = np.zeros((len(rows), len(target.label.schemes[target.band])), np.int64)
    stored[there] = column.flatten().to_numpy().reshape(-1, stored.shape[1])
    if target.groups is None:
        return stored
    grouped = np.zeros((len(rows), len(target.scheme)), np.int64)
    for value, group in enumerate(target.groups):
        grouped[:, group] += stored[:, value]
    return grouped


def subset(patches: LabelledPatches, fraction: float, *, draw: int, track: Track) -> np.ndarray:
    """Places of the patches of a subset, (N,) int64 ascending.

    Args:
        patches: what to draw from.
        fraction: of them, in (0, 1]. Of patches as many as it says, rounded up; regions are taken while that brings
            their patches nearer to it. At least one.
        draw: which of the subsets of that size; those of one draw are nested.
        track: whether to draw patches or whole regions.

    Raises:
        InputError: there is nothing to draw from.
    """
    order = _order(patches, draw, track)
    return np.sort(order[: _count(patches.rois[order], fraction, track)])


def smallest_fractions(patches: LabelledPatches, fractions: Sequence[float], *, draw: int, track: Track) -> np.ndarray:
    """(N,) float64: the smallest of the ``fractions`` whose subset holds each patch, NaN where none does.

    Raises:
        InputError: there is nothing to draw from.
    """
    order = _order(patches, draw, track)
    rois = patches.rois[order]
    found = np.full(len(patches), np.nan)
    for fraction in sorted(fractions, reverse=True):
        found[order[: _count(rois, fraction, track)]] = fraction
    return found


def _count(rois: np.ndarray, fraction: float, track: Track) -> int:
    """How many patches of the order a subset takes; ``rois`` are their regions in that order."""
    wanted = fraction * len(rois)
    if track == "patch":
        return max(1, math.ceil(wanted - _ALMOST))
    ends = np.flatnonzero(np.append(rois[1:] != rois[:-1], True)) + 1
    return int(ends[np.abs(ends - wanted).argmin()])


def _order(patches: LabelledPatches, draw: int, track: Track) -> np.ndarray:
    """(N,) int64: places of all patches, in the order in which subsets take them."""
    if not len(patches):
        raise InputError("no labelled patch to draw from")
    present = patches.pixels > 0
    if track == "patch":
        return _systematic([f"{draw}/{key}" for key in patches.keys], patches.domains, present)
    names, first, region = np.unique(patches.rois, return_index=True, return_inverse=True)
    held = np.zeros((len(names), present.shape[1]), bool)
    np.logical_or.at(held, region, present)
    regions = _systematic([f"{draw}/{name}" for name in names], patches.domains[first], held)
    rank = np.empty(len(names), np.int64)
    rank[regions] = np.arange(len(names))
    keys = np.array(patches.keys)
    return np.lexsort((keys, rank[region]))


def _systematic(names: Sequence[str], domains: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The order of systematic sampling within strata of domain and rarest class present.

    Within its stratum, the r-th of n units by hash stands at (r + offset) / n, between 0 and 1; sorting these positions
    merges the strata. Offsets are spread evenly, within and over domains, so that roundings of strata cancel out.

    Args:
        names: of the units, what is hashed.
        domains: (N,) of each.
        present: (N, C) bool.
    """
    rarest_first = np.argsort(present.sum(axis=0), kind="stable")
    ranked = present[:, rarest_first]
    kind = np.where(ranked.any(axis=1), ranked.argmax(axis=1), present.shape[1])
    digests = np.array([_digest(name) for name in names], np.uint64)
    strata, stratum = np.unique(
        np.stack([np.unique(domains, return_inverse=True)[1], kind]), axis=1, return_inverse=True
    )
    stratum = stratum.reshape(-1)
    # The least hash of its units stands for a stratum, and that of its strata for a domain.
    least = np.full(strata.shape[1], np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, stratum, digests)
    offsets = _offsets(strata[0], least)
    order = np.lexsort((digests, stratum))
    sizes = np.bincount(stratum)
    rank = np.arange(len(names)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    position = np.empty(len(names))
    position[order] = (rank + offsets[stratum[order]]) / sizes[stratum[order]]
    return np.lexsort((digests, position))


def _offsets(domain: np.ndarray, least: np.ndarray) -> np.ndarray:
    """An offset in (0, 1) of each stratum, (S,): evenly spread within its domain, domains evenly shifted."""
    groups = [np.flatnonzero(domain == name) for name in np.unique(domain)]
    groups.sort(key=lambda group: int(least[group].min()))
    offsets = np.empty(len(domain))
    for number, group in enumerate(groups):
        shift = (number + 0.5) / len(groups)
        offsets[group[np.argsort(least[group], kind="stable")]] = (np.arange(len(group)) + shift) / len(group)
    return offsets


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def disjoint_regions(rois: np.ndarray, domains: np.ndarray, share: float) -> np.ndarray:
    """Patches of whole regions to validate on, (N,) bool, so that training and validation share no region.

    Regions are taken by hash within each domain, while that brings their patches nearer to the share; a domain of one
    region has none. (Of the 46 regions that FLAIR-HUB's toy split validates on, 24 are trained on, too.)

    Args:
        rois, domains: of all patches of training and validation.
        share: of the patches to validate on.
    """
    chosen: set[str] = set()
    for domain in np.unique(domains):
        names, sizes = np.unique(rois[domains == domain], return_counts=True)
        order = np.argsort([_digest(f"validation/{name}") for name in names], kind="stable")
        ends = np.concatenate(([0], np.cumsum(sizes[order])))[: len(names)]  # one region stays
        chosen.update(names[order[: int(np.abs(ends - share * sizes.sum()).argmin())]])
    return np.isin(rois, sorted(chosen))


def keys_digest(keys: Sequence[str]) -> str:
    """SHA-256 of keys, sorted, one a line: what two runs that learn from the same patches have in common."""
    return hashlib.sha256("".join(f"{key}\n" for key in sorted(keys)).encode()).hexdigest()
