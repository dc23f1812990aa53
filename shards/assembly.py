"""The parts of finished shards to one manifest."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bocage.shards.files import written_atomically
from bocage.shards.manifest import DATASET_FILE, SCHEMA_VERSION, TABLE_FILE, schema
from bocage.shards.modality import Registry
from bocage.shards.moments import merge
from bocage.shards.packing import read_part


def assemble(
    out: Path,
    paths: Sequence[Path],
    registry: Registry,
    splits: list[str],
    *,
    plan: dict[str, Any],
    samples_per_shard: int,
) -> None:
    """Writes the manifest of the folder ``out``; ``dataset.json`` comes last.

    Args:
        out: the folder of the shards.
        paths: the part of every shard, in the order of the shards: the result does not depend on who finished first.
        registry: what the shards hold.
        splits: names of the split columns.
        plan: what the shards were planned from, recorded as it is.
        samples_per_shard: recorded beside it.
    """
    columns = schema(registry, splits)
    parts = [read_part(path) for path in paths]
    present = dict.fromkeys(registry, 0)
    with written_atomically(out / TABLE_FILE) as temporary, pq.ParquetWriter(temporary, columns) as writer:
        for path in paths:
            table = pq.read_table(path).replace_schema_metadata(None)
            for name in registry:
                present[name] += int(np.count_nonzero(table[f"length.{name}"].to_numpy()))
            writer.write_table(table)
    statistics = {}
    for modality in registry.inputs:
        total = merge(part.moments[modality.name] for part in parts if modality.name in part.moments)
        empty = np.full(len(modality.channels), np.nan)
        statistics[modality.name] = {
            "channels": modality.channels,
            "count": [0.0] * len(empty) if total is None else total.count.tolist(),
            "mean": _without_nan(empty if total is None else total.mean),
            "std": _without_nan(empty if total is None else total.std),
        }
    description = {
        "schema_version": SCHEMA_VERSION,
        "created_by": f"bocage {importlib.metadata.version('bocage')}",
        "registry": [modality.to_json() for modality in registry.values()],
        "splits": splits,
        "statistics": statistics,
        "shards": [vars(part.shard) for part in parts],
        "counts": {
            "samples": sum(part.shard.samples for part in parts),
            "skipped": sum(len(part.skipped) for part in parts),
            "source_bytes": sum(part.source_bytes for part in parts),
            "present": present,
        },
        "skipped": {key: reason for part in parts for key, reason in part.skipped.items()},
        "plan": plan,
        "samples_per_shard": samples_per_shard,
    }
    with written_atomically(out / DATASET_FILE) as temporary:
        temporary.write_text(json.dumps(description, indent=1, allow_nan=False), encoding="utf-8")


def _without_nan(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
