"""Read offline W&B runs: a file is a header of seven bytes and a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_MESSAGES: Any = wandb_internal_pb2  # its classes depend on the version of protobuf
_HEADER, _BLOCK, _FULL, _LAST = 7, 2**15, 1, 4


def records(path: Path) -> Iterator[Any]:
    """Iterate over the protobuf records of one ``run-ID.wandb``."""
    content, position, parts = path.read_bytes(), _HEADER, []
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # padding, too short for the header of a record
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + _HEADER])
        parts.append(content[position + _HEADER : position + _HEADER + length])
        position += _HEADER + length
        if kind in (_FULL, _LAST):
            record = _MESSAGES.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def read_offline_runs(output: Path) -> dict[str, Any]:
    """Merge the contents of all offline runs below a folder, in the order of their start.

    Returns:
        ``ids``: run ids; ``config`` and ``summary``: values by key; ``history``: (step, values) of each record;
        ``system``: names of system metrics; ``exits``: exit code of each start.
    """
    merged: dict[str, Any] = {"ids": set(), "config": {}, "summary": {}, "history": [], "system": set(), "exits": []}

    def key_of(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    for path in sorted(output.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                merged["ids"].add(record.run.run_id)
                merged["config"] |= {key_of(item): json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "config":
                merged["config"] |= {key_of(item): json.loads(item.value_json) for item in record.config.update}
            elif kind == "summary":
                merged["summary"] |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "history":
                values = {key_of(item): json.loads(item.value_json) for item in record.history.item}
                merged["history"].append((record.history.step.num or values.get("_step"), values))
            elif kind == "exit":
                merged["exits"].append(record.exit.exit_code)
            elif kind == "stats":
                merged["system"] |= {item.key for item in record.stats.item}
    return merged
