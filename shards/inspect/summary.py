"""What a folder of shards holds, in numbers: one pass over a few columns of its manifest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards.format.manifest import Manifest, dated


def summarize(manifest: Manifest) -> dict[str, Any]:
    """JSON-serialisable counts; memory holds a few numbers a sample.

    ``patches``, ``skipped``, ``shards``, ``bytes``, ``source_bytes``; ``modalities``: by name presence, bytes of
    members, and of inputs the statistics by channel; ``domains`` and ``rois``: patches in each, and how many there are;
    ``splits``: by split and value; ``classes``: by label band and class name its share of the pixels; ``dates``: by
    series, least, median and greatest number.
    """
    registry = manifest.registry
    labels = [(item, band) for item in registry.labels for band in item.bands if band.scheme is not None]
    pixels = {(item.name, band.name): np.zeros(len(band.scheme or ()), np.int64) for item, band in labels}
    columns = ["domain", "roi", *manifest.splits, *(f"histogram.{name}.{band}" for name, band in pixels)]
    domains: Counter[str] = Counter()
    rois: set[str] = set()
    splits: dict[str, Counter[str]] = {name: Counter() for name in manifest.splits}
    steps: dict[str, list[np.ndarray]] = {item.name: [] for item in registry.by_role("series") if dated(item)}
    for batch in manifest.batches([*columns, *(f"dates.{name}" for name in steps)]):
        _count(domains, batch["domain"])
        rois.update(batch["roi"].unique().to_pylist())
        for name, counter in splits.items():
            _count(counter, batch[name])
        for (name, band), total in pixels.items():
            total += batch[f"histogram.{name}.{band}"].flatten().to_numpy().reshape(-1, len(total)).sum(axis=0)
        for name, lengths in steps.items():
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
            f"{item.name} {band.name}": _shares(band.scheme.classes, pixels[item.name, band.name])
            for item, band in labels
            if band.scheme is not None
        },
        "dates": {name: _spread(np.concatenate(lengths)) for name, lengths in steps.items() if lengths},
    }


def _count(counter: Counter[str], column: pa.Array) -> None:
    for item in column.drop_null().value_counts():
        counter[item["values"].as_py()] += item["counts"].as_py()


def _modalities(manifest: Manifest) -> dict[str, Any]:
    found = {}
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
        found[name] = item
    return found


def _shares(classes: tuple[str, ...], pixels: np.ndarray) -> dict[str, float]:
    """By class, its share of all pixels; classes that do not occur are 0."""
    return {name: float(count) for name, count in zip(classes, pixels / max(int(pixels.sum()), 1), strict=True)}


def _spread(lengths: np.ndarray) -> dict[str, float]:
    if len(lengths) == 0:
        return {"series": 0, "least": 0, "median": 0.0, "greatest": 0}
    return {
        "series": len(lengths),
        "least": int(lengths.min()),
        "median": float(np.median(lengths)),
        "greatest": int(lengths.max()),
    }


def fullest(manifest: Manifest) -> int:
    """The first row that has every modality, else the first of those that have the most; 0 in a dataset of any."""
    present = np.zeros(len(manifest), np.int32)
    for lengths in manifest.index.length.values():
        present += lengths > 0
    return int(present.argmax())
