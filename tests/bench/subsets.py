"""Time drawing all subsets of a dataset of FLAIR-HUB's size: ``python tests/bench/subsets.py``.

The dataset has 241,100 patches of 2,822 regions in 74 domains, with the classes of both labels. The script draws every
fraction, draw and sampling unit of ``bocage study subsets`` and writes the files. The reference is common practice:
NumPy shuffles the keys once per draw and writes the same columns. It neither stratifies nor samples whole regions.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.finetune.subsets.sampling import LabelledPatches
from bocage.finetune.subsets.subset_files import TABLE, SubsetPlan, write_subsets
from bocage.shards.classes import COSIA, LPIS_1

PATCHES, REGIONS, DOMAINS = 241_100, 2_822, 74


def simulate_patches() -> LabelledPatches:
    """Simulate class histograms of all patches, with rare and frequent classes as in FLAIR-HUB."""
    random = np.random.default_rng(0)
    region = np.sort(random.integers(0, REGIONS, PATCHES))
    names = np.array([f"D{number % DOMAINS:03}-2020" for number in range(REGIONS)])
    classes = [(scheme.name, scheme.classes[value]) for scheme in (COSIA, LPIS_1) for value in scheme.scored]
    frequency = random.beta(0.4, 1.5, (REGIONS, len(classes)))
    pixels = (random.random((PATCHES, len(classes))) < frequency[region]) * random.integers(1, 90_000, PATCHES)[:, None]
    rois = np.array([f"{names[number]}/R{number}" for number in range(REGIONS)])[region]
    keys = [f"{names[number]}_R{number}_{patch}-0" for patch, number in enumerate(region)]
    return LabelledPatches(keys, rois, names[region], tuple(classes), pixels)


def write_shuffled_subsets(patches: LabelledPatches, plan: SubsetPlan, out: Path) -> None:
    """Draw subsets of patches by shuffling their keys, and write them."""
    columns: dict[str, Sequence[str] | np.ndarray] = {"key": patches.keys}
    for draw in range(plan.draws):
        position = np.random.default_rng(draw).permutation(len(patches)) / len(patches)
        smallest = np.full(len(patches), np.nan)
        for fraction in sorted(plan.fractions, reverse=True):
            smallest[position < fraction] = fraction
        columns[f"draw_{draw}"] = smallest
    pq.write_table(pa.table(columns), out, compression="zstd")


def main() -> None:
    """Time both methods once."""
    patches, plan = simulate_patches(), SubsetPlan()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        summary = write_subsets(Path(folder), patches, plan, {})
        bocage_seconds = time.perf_counter() - started
        size = (Path(folder) / TABLE).stat().st_size / 1e6
        started = time.perf_counter()
        write_shuffled_subsets(patches, plan, Path(folder) / "shuffled.parquet")
        numpy_seconds = time.perf_counter() - started
    print(f"{len(summary['subsets'])} subsets of {len(patches):,} patches: {bocage_seconds:.1f} s, {size:.1f} MB")
    print(f"NumPy shuffle, {plan.draws} draws of patches: {numpy_seconds:.1f} s")
    print(f"ratio {bocage_seconds / numpy_seconds:.1f}")


if __name__ == "__main__":
    main()
