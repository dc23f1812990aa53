"""What an offline W&B run holds: its file is a LevelDB log of protobuf records, behind a header of seven bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER, _BLOCK, _FULL, _LAST = 7, 2**15, 1, 4


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of one ``run-ID.wandb``."""
    content, place, parts = path.read_bytes(), _HEADER, []
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # too little for a record's head: padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        parts.append(content[place + _HEADER : place + _HEADER + length])
        place += _HEADER + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def told(output: Path) -> dict[str, Any]:
    """Everything that the offline runs below a folder hold together, in the order in which they were begun.

    Returns:
        ``ids``: of the runs, ``config`` and ``summary``: by key, ``history``: (step, values) of each record,
        ``system``: names that W&B measured of the machine, ``exits``: how each start ended.
    """
    found: dict[str, Any] = {"ids": set(), "config": {}, "summary": {}, "history": [], "system": set(), "exits": []}

    def key_of(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    for path in sorted(output.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found["ids"].add(record.run.run_id)
                found["config"] |= {key_of(item): json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "config":
                found["config"] |= {key_of(item): json.loads(item.value_json) for item in record.config.update}
            elif kind == "summary":
                found["summary"] |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "history":
                values = {key_of(item): json.loads(item.value_json) for item in record.history.item}
                found["history"].append((record.history.step.num or values.get("_step"), values))
            elif kind == "exit":
                found["exits"].append(record.exit.exit_code)
            elif kind == "stats":
                found["system"] |= {item.key for item in record.stats.item}
    return found
