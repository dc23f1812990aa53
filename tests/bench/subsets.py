"""How long all subsets of as many patches as FLAIR-HUB has take: ``python tests/bench/subsets.py``.

241,100 patches of 2,822 regions in 74 domains, with both labels' classes; every share, draw and track of
``bocage study subsets``, files included. The peer is what many papers do, NumPy's shuffle of the keys once a draw,
written to the same columns, which neither stratifies nor takes whole regions.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.finetune.subsets.draw import LabelledPatches
from bocage.finetune.subsets.files import TABLE, SubsetPlan, write_subsets
from bocage.shards.classes import COSIA, LPIS_1

PATCHES, REGIONS, DOMAINS = 241_100, 2_822, 74


def patches() -> LabelledPatches:
    """As many as there are, with classes as unevenly common as theirs."""
    random = np.random.default_rng(0)
    region = np.sort(random.integers(0, REGIONS, PATCHES))
    names = np.array([f"D{number % DOMAINS:03}-2020" for number in range(REGIONS)])
    classes = [(scheme.name, scheme.classes[value]) for scheme in (COSIA, LPIS_1) for value in scheme.scored]
    common = random.beta(0.4, 1.5, (REGIONS, len(classes)))
    pixels = (random.random((PATCHES, len(classes))) < common[region]) * random.integers(1, 90_000, PATCHES)[:, None]
    rois = np.array([f"{names[number]}/R{number}" for number in range(REGIONS)])[region]
    keys = [f"{names[number]}_R{number}_{place}-0" for place, number in enumerate(region)]
    return LabelledPatches(keys, rois, names[region], tuple(classes), pixels)


def shuffled(known: LabelledPatches, plan: SubsetPlan, out: Path) -> None:
    """The peer."""
    columns = {"key": known.keys}
    for draw in range(plan.draws):
        place = np.random.default_rng(draw).permutation(len(known)) / len(known)
        smallest = np.full(len(known), np.nan)
        for fraction in sorted(plan.fractions, reverse=True):
            smallest[place < fraction] = fraction
        columns[f"draw_{draw}"] = smallest
    pq.write_table(pa.table(columns), out, compression="zstd")


def main() -> None:
    """Time both once and print them."""
    known, plan = patches(), SubsetPlan()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = write_subsets(Path(folder), known, plan, {})
        own = time.perf_counter() - began
        size = (Path(folder) / TABLE).stat().st_size / 1e6
        began = time.perf_counter()
        shuffled(known, plan, Path(folder) / "peer.parquet")
        peer = time.perf_counter() - began
    print(f"{len(found['subsets'])} subsets of {len(known):,} patches: {own:.1f} s, {size:.1f} MB")
    print(f"NumPy's shuffle, {plan.draws} draws of patches alone: {peer:.1f} s; ratio {own / peer:.1f}")


if __name__ == "__main__":
    main()
