"""Subsets of labelled patches as files that others can train on: which patch is in which, and what they hold."""

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

from bocage.finetune.subsets.draw import TRACKS, LabelledPatches, Track, keys_digest, smallest_fractions
from bocage.shards.files import written_atomically

_FEW = 0.05  # shares up to it have more draws
_LEAST_REGIONS = 0.05  # smaller shares are not drawn by regions, of which some hundred patches come together
TABLE, CLASSES, DESCRIPTION = "subsets.parquet", "classes.csv", "subsets.json"


@dataclass(frozen=True, kw_only=True)
class SubsetPlan:
    """Which subsets there are.

    Attributes:
        fractions: shares of the labelled patches, under 1.
        draws: subsets of each share up to 0.05.
        draws_above: subsets of each larger one, which differ less.

    Raises:
        ValueError: no fraction, one that is not between 0 and 1, or draws below 1.
    """

    fractions: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
    draws: int = 5
    draws_above: int = 3

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError("fractions must lie between 0 and 1")
        if min(self.draws, self.draws_above) < 1:
            raise ValueError("draws must be at least 1")

    def draws_of(self, fraction: float) -> int:
        """How many subsets of a share there are."""
        return self.draws if fraction <= _FEW else self.draws_above

    def subsets(self) -> Iterator[tuple[Track, int, list[float]]]:
        """Track, draw and its fractions, ascending; those without a fraction are left out."""
        for track in TRACKS:
            fractions = [f for f in sorted(self.fractions) if track == "patch" or f >= _LEAST_REGIONS]
            for draw in range(max(self.draws, self.draws_above)):
                if chosen := [fraction for fraction in fractions if draw < self.draws_of(fraction)]:
                    yield track, draw, chosen


def write_subsets(
    out: Path,
    patches: LabelledPatches,
    plan: SubsetPlan,
    source: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write ``subsets.parquet``, ``classes.csv`` and, last, ``subsets.json``; what is there is replaced.

    The table has ``key``, ``roi``, ``domain`` and a column a draw, e.g. ``patch_0``: the smallest share whose subset
    holds the patch, null where none does. ``classes.csv`` tells how many patches and pixels of each class a subset has.

    Args:
        out: a folder.
        patches: what subsets are drawn from.
        plan: which there are.
        source: what the patches are, for the description.
        progress: called with the number of draws done.

    Returns:
        The description, as written to ``subsets.json``: ``source``, hashes of both files, and for each subset its size,
        the hash of its keys (``keys_digest``) and the classes that it has none of.
    """
    out.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"key": patches.keys, "roi": patches.rois, "domain": patches.domains}
    counts: list[dict[str, Any]] = list(_classes(patches, "", "", 1.0))
    found: list[dict[str, Any]] = []
    for done, (track, draw, fractions) in enumerate(plan.subsets(), 1):
        smallest = smallest_fractions(patches, fractions, draw=draw, track=track)
        columns[f"{track}_{draw}"] = pa.array(smallest, mask=np.isnan(smallest))
        for fraction in fractions:
            held = patches.take(np.flatnonzero(smallest <= fraction))
            counts += _classes(held, track, draw, fraction)
            found.append(
                {
                    "track": track,
                    "draw": draw,
                    "fraction": fraction,
                    "patches": len(held),
                    "regions": len(np.unique(held.rois)),
                    "keys": keys_digest(held.keys),
                    "without": _left_out(patches, held),
                }
            )
        if progress is not None:
            progress(done)
    with written_atomically(out / TABLE) as path:
        pq.write_table(pa.table(columns), path, compression="zstd")
    with written_atomically(out / CLASSES) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(counts[0]))
        writer.writeheader()
        writer.writerows(counts)
    description = {
        **source,
        "patches": len(patches),
        "files": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (TABLE, CLASSES)},
        "subsets": found,
    }
    with written_atomically(out / DESCRIPTION) as path:
        path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def _classes(held: LabelledPatches, track: str, draw: int | str, fraction: float) -> Iterator[dict[str, Any]]:
    for column, (label, name) in enumerate(held.classes):
        pixels = held.pixels[:, column]
        yield {
            "track": track,
            "draw": draw,
            "fraction": fraction,
            "label": label,
            "class": name,
            "patches": int((pixels > 0).sum()),
            "pixels": int(pixels.sum()),
        }


def _left_out(every: LabelledPatches, held: LabelledPatches) -> list[str]:
    """Classes that there are but not in the subset, ``LABEL/class``."""
    lost = every.pixels.any(axis=0) & ~held.pixels.any(axis=0)
    return [f"{label}/{name}" for (label, name), gone in zip(held.classes, np.asarray(lost), strict=True) if gone]
