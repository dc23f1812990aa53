"""Write subsets of labelled patches to files: the patches of each subset, and its patches and pixels per class."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.finetune.subsets.sampling import (
    SAMPLING_UNITS,
    LabelledPatches,
    SamplingUnit,
    keys_digest,
    smallest_fractions,
)
from bocage.shards.files import atomic_write

_SMALL_FRACTION = 0.05  # fractions up to this have ``draws`` draws, larger ones ``draws_above``
_MIN_ROI_FRACTION = 0.05  # smaller fractions are not drawn by region, since a region has about a hundred patches
TABLE, CLASSES, DESCRIPTION = "subsets.parquet", "classes.csv", "subsets.json"


@dataclass(frozen=True, kw_only=True)
class SubsetPlan:
    """Fractions and draws of the subsets to write.

    Attributes:
        fractions: fractions of the labelled patches, each below 1.
        draws: number of draws for each fraction up to 0.05.
        draws_above: number of draws for each larger fraction, whose draws differ less.

    Raises:
        ValueError: there is no fraction, a fraction is not between 0 and 1, or a number of draws is below 1.
    """

    fractions: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
    draws: int = 5
    draws_above: int = 3

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError("fractions: give at least one, each between 0 and 1")
        if min(self.draws, self.draws_above) < 1:
            raise ValueError("draws and draws_above must be at least 1")

    def num_draws(self, fraction: float) -> int:
        """Return the number of draws for a fraction."""
        return self.draws if fraction <= _SMALL_FRACTION else self.draws_above

    def subsets(self) -> Iterator[tuple[SamplingUnit, int, list[float]]]:
        """Yield the sampling unit, number and fractions (ascending) of each draw that has at least one fraction."""
        for sampling_unit in SAMPLING_UNITS:
            fractions = [f for f in sorted(self.fractions) if sampling_unit == "patch" or f >= _MIN_ROI_FRACTION]
            for draw in range(max(self.draws, self.draws_above)):
                if chosen := [fraction for fraction in fractions if draw < self.num_draws(fraction)]:
                    yield sampling_unit, draw, chosen


def write_subsets(
    out: Path,
    patches: LabelledPatches,
    plan: SubsetPlan,
    source: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write ``subsets.parquet``, ``classes.csv`` and, last, ``subsets.json``, replacing existing files.

    The table has the columns ``key``, ``roi``, ``domain`` and one per draw, e.g. ``patch_0``: the smallest fraction
    whose subset contains the patch, or null. ``classes.csv`` counts patches and pixels of each class per subset.

    Args:
        out: output folder, created if missing.
        patches: patches to draw from.
        plan: fractions and draws of the subsets.
        source: description of the patches, stored in ``subsets.json``.
        progress: callback that receives the number of finished draws.

    Returns:
        Content of ``subsets.json``: ``source``, hashes of both files, and for each subset its size, the hash of its
        keys (``keys_digest``) and the classes that are missing from it.
    """
    out.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"key": patches.keys, "roi": patches.rois, "domain": patches.domains}
    counts: list[dict[str, Any]] = list(_class_counts(patches, "", "", 1.0))
    subsets: list[dict[str, Any]] = []
    for done, (sampling_unit, draw, fractions) in enumerate(plan.subsets(), 1):
        smallest = smallest_fractions(patches, fractions, draw=draw, sampling_unit=sampling_unit)
        columns[f"{sampling_unit}_{draw}"] = pa.array(smallest, mask=np.isnan(smallest))
        for fraction in fractions:
            subset = patches.take(np.flatnonzero(smallest <= fraction))
            counts += _class_counts(subset, sampling_unit, draw, fraction)
            subsets.append(
                {
                    "sampling_unit": sampling_unit,
                    "draw": draw,
                    "fraction": fraction,
                    "patches": len(subset),
                    "regions": len(np.unique(subset.rois)),
                    "keys": keys_digest(subset.keys),
                    "without": _missing_classes(patches, subset),
                }
            )
        if progress is not None:
            progress(done)
    with atomic_write(out / TABLE) as path:
        pq.write_table(pa.table(columns), path, compression="zstd")
    with atomic_write(out / CLASSES) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(counts[0]))
        writer.writeheader()
        writer.writerows(counts)
    description = {
        **source,
        "patches": len(patches),
        "files": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (TABLE, CLASSES)},
        "subsets": subsets,
    }
    with atomic_write(out / DESCRIPTION) as path:
        path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def _class_counts(
    subset: LabelledPatches, sampling_unit: str, draw: int | str, fraction: float
) -> Iterator[dict[str, Any]]:
    for column, (label, name) in enumerate(subset.classes):
        pixels = subset.pixels[:, column]
        yield {
            "sampling_unit": sampling_unit,
            "draw": draw,
            "fraction": fraction,
            "label": label,
            "class": name,
            "patches": int((pixels > 0).sum()),
            "pixels": int(pixels.sum()),
        }


def _missing_classes(patches: LabelledPatches, subset: LabelledPatches) -> list[str]:
    """Return the classes that ``patches`` have and the subset does not, as ``LABEL/class``."""
    missing = patches.pixels.any(axis=0) & ~subset.pixels.any(axis=0)
    return [
        f"{label}/{name}" for (label, name), absent in zip(subset.classes, np.asarray(missing), strict=True) if absent
    ]
