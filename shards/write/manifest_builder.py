"""Join the manifest parts of finished shards to one manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.shards.dataset_info import DatasetInfo
from bocage.shards.files import atomic_write
from bocage.shards.format.index import INDEX_FILE, IndexBuilder
from bocage.shards.format.manifest import DATASET_FILE, SCHEMA_VERSION, TABLE_FILE, manifest_schema
from bocage.shards.format.running_stats import merge_stats
from bocage.shards.modality import Registry
from bocage.shards.write.packing import read_part

_MIN_GROUP_ROWS = 1 << 14
"""Minimal rows of a Parquet row group. One group per part would make a footer of many MB, which every reader parses."""


def build_manifest(
    out: Path,
    paths: Sequence[Path],
    registry: Registry,
    splits: list[str],
    *,
    dataset: DatasetInfo,
    plan: dict[str, Any],
    samples_per_shard: int,
) -> None:
    """Write the Parquet table, the index and, last, ``dataset.json`` into the folder ``out``.

    Memory holds a few parts and the index (200 bytes per sample), never the whole table.

    Args:
        out: folder of the shards.
        paths: manifest parts of all shards, in the order of the shards.
        registry: modalities of the shards.
        splits: names of the split columns.
        dataset: name, licence and origin of the dataset.
        plan: settings of the plan, recorded unchanged.
        samples_per_shard: number recorded beside the plan.
    """
    parts = [read_part(path) for path in paths]
    index = IndexBuilder(registry, sum(part.shard.samples for part in parts))
    columns = manifest_schema(registry, splits)
    present = dict.fromkeys(registry, 0)
    with atomic_write(out / TABLE_FILE) as temporary, pq.ParquetWriter(temporary, columns) as writer:
        for table in _iterate_row_groups(paths):
            for name in registry:
                present[name] += int(np.count_nonzero(table[f"length.{name}"].to_numpy()))
            index.add(table)
            writer.write_table(table)
    with atomic_write(out / INDEX_FILE) as temporary:
        index.write(temporary)
    statistics = {}
    for modality in registry.inputs:
        total = merge_stats(part.stats[modality.name] for part in parts if modality.name in part.stats)
        empty = np.full(len(modality.channels), np.nan)
        statistics[modality.name] = {
            "channels": modality.channels,
            "count": [0.0] * len(empty) if total is None else total.count.tolist(),
            "mean": _nan_to_none(empty if total is None else total.mean),
            "std": _nan_to_none(empty if total is None else total.std),
        }
    description = {
        "schema_version": SCHEMA_VERSION,
        "created_by": f"bocage {importlib.metadata.version('bocage')}",
        "dataset": dataset.to_json(),
        "registry": [modality.to_json() for modality in registry.values()],
        "splits": splits,
        "statistics": statistics,
        "shards": [vars(part.shard) for part in parts],
        "files": {name: _describe_file(out / name) for name in (TABLE_FILE, INDEX_FILE)},
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
    with atomic_write(out / DATASET_FILE) as temporary:
        temporary.write_text(json.dumps(description, indent=1, allow_nan=False), encoding="utf-8")


def _iterate_row_groups(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the rows of the parts in order, as tables of at least ``_MIN_GROUP_ROWS`` rows except the last."""
    buffer: list[pa.Table] = []
    for path in paths:
        buffer.append(pq.read_table(path).replace_schema_metadata(None))
        if sum(table.num_rows for table in buffer) >= _MIN_GROUP_ROWS:
            yield pa.concat_tables(buffer)
            buffer = []
    if buffer:
        yield pa.concat_tables(buffer)


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _nan_to_none(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
