"""Summarise a folder of shards in one pass over a few columns of its manifest, or a catalogue before it is shards."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards.format.manifest import Manifest, has_acquisition_dates
from bocage.shards.source.catalogue import Catalogue

_CANDIDATES = 64  # patches among which a few are chosen for a picture


def summarize(manifest: Manifest) -> dict[str, Any]:
    """Count patches, modalities, splits, classes and dates; memory holds a few numbers per sample.

    Returns:
        JSON-serialisable dictionary: ``patches``, ``skipped``, ``shards``, ``bytes`` and ``source_bytes`` are totals;
        ``modalities`` holds presence, bytes and, for inputs, statistics by channel; ``domains`` the patches of each
        domain; ``rois`` the number of ROIs; ``splits`` the patches by split and value; ``classes`` the fraction of
        pixels by label band and class name; ``dates`` the minimum, median and maximum number of dates by series.
    """
    registry = manifest.registry
    labels = [(item, band) for item in registry.labels for band in item.bands if band.scheme is not None]
    pixels = {(item.name, band.name): np.zeros(len(band.scheme or ()), np.int64) for item, band in labels}
    columns = ["domain", "roi", *manifest.splits, *(f"histogram.{name}.{band}" for name, band in pixels)]
    domains: Counter[str] = Counter()
    rois: set[str] = set()
    splits: dict[str, Counter[str]] = {name: Counter() for name in manifest.splits}
    series = [item.name for item in registry.by_role("series") if has_acquisition_dates(item)]
    date_counts: dict[str, list[np.ndarray]] = {name: [] for name in series}
    for batch in manifest.batches([*columns, *(f"dates.{name}" for name in series)]):
        _count(domains, batch["domain"])
        rois.update(batch["roi"].unique().to_pylist())
        for name, counter in splits.items():
            _count(counter, batch[name])
        for (name, band), total in pixels.items():
            total += batch[f"histogram.{name}.{band}"].flatten().to_numpy().reshape(-1, len(total)).sum(axis=0)
        for name, lengths in date_counts.items():
            lengths.append(pc.list_value_length(batch[f"dates.{name}"].drop_null()).to_numpy())
    return {
        "patches": len(manifest),
        "skipped": int(manifest.counts["skipped"]),
        "shards": manifest.shard_count,
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "source_bytes": int(manifest.counts["source_bytes"]),
        "modalities": _modalities(manifest),
        "domains": dict(sorted(domains.items())),
        "rois": len(rois),
        "splits": {name: dict(sorted(counter.items())) for name, counter in splits.items()},
        "classes": {
            f"{item.name} {band.name}": _fractions(band.scheme.classes, pixels[item.name, band.name])
            for item, band in labels
            if band.scheme is not None
        },
        "dates": {name: _range(np.concatenate(lengths)) for name, lengths in date_counts.items() if lengths},
    }


def _count(counter: Counter[str], column: pa.Array) -> None:
    for item in column.drop_null().value_counts():
        counter[item["values"].as_py()] += item["counts"].as_py()


def _modalities(manifest: Manifest) -> dict[str, Any]:
    summary = {}
    for name, modality in manifest.registry.items():
        lengths = manifest.index.length[name]
        item: dict[str, Any] = {
            "role": modality.role,
            "dtype": modality.dtype,
            "bands": [band.name for band in modality.bands],
            "pixels": modality.size,
            "gsd": modality.gsd,
            "present": int(np.count_nonzero(lengths)),
            "bytes": int(lengths.sum(dtype=np.int64)),
        }
        if modality.is_input:
            mean, std = manifest.statistics[name]
            item |= {"channels": list(modality.channels), "mean": list(mean), "std": list(std)}
        summary[name] = item
    return summary


def _fractions(classes: tuple[str, ...], pixels: np.ndarray) -> dict[str, float]:
    """Fraction of all pixels by class; 0 for classes that do not occur."""
    return {name: float(count) for name, count in zip(classes, pixels / max(int(pixels.sum()), 1), strict=True)}


def _range(lengths: np.ndarray) -> dict[str, float]:
    """Number of series, and minimum, median and maximum of their number of dates."""
    if len(lengths) == 0:
        return {"series": 0, "min": 0, "median": 0.0, "max": 0}
    return {
        "series": len(lengths),
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
    }


def most_complete_row(manifest: Manifest) -> int:
    """First row with the largest number of modalities."""
    present = np.zeros(len(manifest), np.int32)
    for lengths in manifest.index.length.values():
        present += lengths > 0
    return int(present.argmax())


def preferred_patches(catalogue: Catalogue) -> list[int]:
    """Indices of some patches, evenly spaced: first those with most modalities, and each domain once before the next.

    Args:
        catalogue: a catalogue with at least one patch.
    """
    spread = np.unique(np.linspace(0, len(catalogue) - 1, min(_CANDIDATES, len(catalogue))).astype(int)).tolist()
    patches = {index: catalogue.patch(index) for index in spread}
    complete = sorted(spread, key=lambda index: -len(patches[index].sources))
    turns: Counter[str] = Counter()
    ranks = {}
    for index in complete:
        domain = patches[index].domain
        ranks[index] = (turns[domain], -len(patches[index].sources), index)
        turns[domain] += 1
    return sorted(spread, key=lambda index: ranks[index])
