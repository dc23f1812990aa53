"""The parts of finished shards to one manifest."""

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

from bocage.shards.files import written_atomically
from bocage.shards.format.index import INDEX_FILE, IndexBuilder
from bocage.shards.format.manifest import DATASET_FILE, SCHEMA_VERSION, TABLE_FILE, schema
from bocage.shards.format.running_stats import merge_stats
from bocage.shards.modality import Registry
from bocage.shards.write.packing import read_part

_GROUP = 1 << 14
"""Least rows of a row group: a group a part would make a footer of many MB, which every reader of a column parses."""


def assemble(
    out: Path,
    paths: Sequence[Path],
    registry: Registry,
    splits: list[str],
    *,
    plan: dict[str, Any],
    samples_per_shard: int,
) -> None:
    """Writes table and index of the folder ``out``; ``dataset.json`` comes last.

    Memory holds some parts and the index (200 bytes a sample), never the whole table.

    Args:
        out: the folder of the shards.
        paths: the part of every shard, in the order of the shards: the result does not depend on who finished first.
        registry: what the shards hold.
        splits: names of the split columns.
        plan: what the shards were planned from, recorded as it is.
        samples_per_shard: recorded beside it.
    """
    parts = [read_part(path) for path in paths]
    index = IndexBuilder(registry, sum(part.shard.samples for part in parts))
    columns = schema(registry, splits)
    present = dict.fromkeys(registry, 0)
    with written_atomically(out / TABLE_FILE) as temporary, pq.ParquetWriter(temporary, columns) as writer:
        for table in _grouped(paths):
            for name in registry:
                present[name] += int(np.count_nonzero(table[f"length.{name}"].to_numpy()))
            index.add(table)
            writer.write_table(table)
    with written_atomically(out / INDEX_FILE) as temporary:
        index.write(temporary)
    statistics = {}
    for modality in registry.inputs:
        total = merge_stats(part.moments[modality.name] for part in parts if modality.name in part.moments)
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
        "files": {name: _described(out / name) for name in (TABLE_FILE, INDEX_FILE)},
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


def _grouped(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The rows of the parts in order, some parts at a time."""
    waiting: list[pa.Table] = []
    for path in paths:
        waiting.append(pq.read_table(path).replace_schema_metadata(None))
        if sum(table.num_rows for table in waiting) >= _GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _without_nan(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
