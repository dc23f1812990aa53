"""Subsets of labelled patches: nested, exact in size, stratified, independent of input order and machine."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bocage.finetune.subsets.sampling import (
    SAMPLING_UNITS,
    LabelledPatches,
    SamplingUnit,
    disjoint_validation_mask,
    draw_subset,
    keys_digest,
    smallest_fractions,
)
from bocage.shards.errors import InputError

FRACTIONS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
CLASSES = ("common", "frequent", "usual", "rare", "never")
CHANCES = np.array([0.7, 0.5, 0.2, 0.02, 0.0])


def patches(domains: int = 12, regions: int = 9, most: int = 30, seed: int = 0) -> LabelledPatches:
    """Regions of different sizes, whose patches mostly have the classes of their region."""
    random = np.random.default_rng(seed)
    keys, rois, names, pixels = [], [], [], []
    for domain in range(domains):
        for region in range(regions):
            cover = random.random(5) < CHANCES
            for patch in range(random.integers(1, most)):
                here = np.where(random.random(5) < 0.8, cover, random.random(5) < CHANCES)
                keys.append(f"D{domain:03}-2020_R{region}_{patch}-0")
                rois.append(f"D{domain:03}-2020/R{region}")
                names.append(f"D{domain:03}-2020")
                pixels.append(here * random.integers(1, 1000, 5))
    classes = tuple(("LABEL", name) for name in CLASSES)
    return LabelledPatches(keys, np.array(rois), np.array(names), classes, np.array(pixels))


@given(st.integers(0, 50), st.integers(0, 4), st.sampled_from(SAMPLING_UNITS), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_subsets_are_nested_and_of_exact_size(seed: int, draw: int, sampling_unit: SamplingUnit, domains: int) -> None:
    known = patches(domains, seed=seed)
    chosen = [set(draw_subset(known, size, draw=draw, sampling_unit=sampling_unit).tolist()) for size in FRACTIONS]
    assert all(small <= large for small, large in pairwise(chosen))
    assert len(chosen[-1]) == len(known)
    for fraction, found in zip(FRACTIONS, chosen, strict=True):
        if sampling_unit == "patch":
            assert len(found) == max(1, int(np.ceil(fraction * len(known) - 1e-9)))
        else:
            regions, sizes = np.unique(known.rois[sorted(found)], return_counts=True)
            assert all((known.rois == name).sum() == size for name, size in zip(regions, sizes, strict=True))


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_strata_are_drawn_in_proportion(draw: int) -> None:
    known = patches(domains=30, regions=12, most=60)
    present = known.pixels > 0
    rarest = present.sum(axis=0).argsort(kind="stable")
    kind = np.where(present.any(axis=1), present[:, rarest].argmax(axis=1), 5)
    strata = np.array([f"{domain}/{value}" for domain, value in zip(known.domains, kind, strict=True)])
    for fraction in (0.01, 0.05, 0.25, 0.5):
        chosen = draw_subset(known, fraction, draw=draw, sampling_unit="patch")
        for names, most in ((strata, 1.1), (known.domains, 2.0)):
            every, sizes = np.unique(names, return_counts=True)
            taken = dict(zip(*np.unique(names[chosen], return_counts=True), strict=True))
            apart = [abs(taken.get(name, 0) - fraction * size) for name, size in zip(every, sizes, strict=True)]
            assert max(apart) <= most
        shares = present[chosen].mean(axis=0) / present.mean(axis=0).clip(1e-9)
        assert shares[:3] == pytest.approx(1, abs=0.25 if fraction < 0.05 else 0.1)


def test_regions_are_stratified_too() -> None:
    known = patches(domains=30, regions=12, most=60)
    chosen = draw_subset(known, 0.25, draw=0, sampling_unit="roi")
    assert abs(len(chosen) - 0.25 * len(known)) <= 30
    by_domain = [len(set(known.rois[chosen][known.domains[chosen] == name])) for name in np.unique(known.domains)]
    assert set(by_domain) <= {2, 3, 4}


def test_draws_differ_and_neither_order_nor_machine_matters() -> None:
    known = patches()
    shuffled = known.take(np.random.default_rng(1).permutation(len(known)))
    for sampling_unit in SAMPLING_UNITS:
        digests = []
        for draw in range(4):
            chosen, other = (
                {item.keys[index] for index in draw_subset(item, 0.05, draw=draw, sampling_unit=sampling_unit)}
                for item in (known, shuffled)
            )
            assert chosen == other
            digests.append(keys_digest(sorted(chosen)))
        assert len(set(digests)) == 4


@pytest.mark.parametrize(("sampling_unit", "recorded"), [("patch", "ad7c5904555643cc"), ("roi", "503774d33de0b99b")])
def test_subsets_equal_recorded_ones(sampling_unit: SamplingUnit, recorded: str) -> None:
    # Fails if a machine or a library version draws other subsets.
    number = np.arange(600)
    keys = [f"D{value % 7:03}-2020_R{value % 35}_{value}-0" for value in number]
    rois = np.array([f"D{value % 7:03}-2020/R{value % 35}" for value in number])
    domains = np.array([name[:9] for name in rois])
    pixels = np.stack([number % 2, number % 3, number % 50 == 0], axis=1).astype(np.int64)
    known = LabelledPatches(keys, rois, domains, (("L", "a"), ("L", "b"), ("L", "c")), pixels)
    chosen = draw_subset(known, 0.1, draw=1, sampling_unit=sampling_unit)
    assert keys_digest([keys[place] for place in chosen])[:16] == recorded


@pytest.mark.parametrize("sampling_unit", SAMPLING_UNITS)
def test_smallest_fractions_give_all_subsets(sampling_unit: SamplingUnit) -> None:
    known = patches(domains=4)
    smallest = smallest_fractions(known, [0.5, 0.05, 0.1], draw=2, sampling_unit=sampling_unit)
    for fraction in (0.05, 0.1, 0.5):
        subset = draw_subset(known, fraction, draw=2, sampling_unit=sampling_unit)
        assert np.array_equal(np.flatnonzero(smallest <= fraction), subset)
    assert np.isnan(smallest).any()


def test_patches_without_classes_are_drawn_and_no_patches_raise() -> None:
    known = patches(domains=3)
    bare = LabelledPatches(known.keys, known.rois, known.domains, known.classes, np.zeros_like(known.pixels))
    assert len(draw_subset(bare, 0.1, draw=0, sampling_unit="patch")) == int(np.ceil(0.1 * len(bare)))
    with pytest.raises(InputError, match="no labelled patch"):
        draw_subset(bare.take(np.array([], int)), 0.1, draw=0, sampling_unit="patch")


@given(st.integers(0, 30), st.floats(0.01, 0.6))
@settings(max_examples=30, deadline=None)
def test_disjoint_validation_takes_whole_regions_in_every_domain(seed: int, share: float) -> None:
    known = patches(domains=5, regions=8, seed=seed)
    chosen = disjoint_validation_mask(known.rois, known.domains, share)
    assert not set(known.rois[chosen]) & set(known.rois[~chosen])
    for name in np.unique(known.domains):
        here = known.domains == name
        assert not chosen[here].all()
        assert abs(chosen[here].sum() - share * here.sum()) <= 30  # a region has fewer than 30 patches
