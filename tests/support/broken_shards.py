"""Sound shards to copies that are broken in one exact way, with or without hashes that hide it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bocage.shards.format.manifest import Manifest
from bocage.shards.format.tar import TarWriter


def place_of(shards: Path, key: str, modality: str) -> tuple[int, int]:
    """Offset and length of a member."""
    manifest = Manifest.open(shards)
    row = manifest.index.keys.to_pylist().index(key)
    return int(manifest.index.offset[modality][row]), int(manifest.index.length[modality][row])


def patched(path: Path, offset: int, data: bytes) -> None:
    """Overwrites some bytes."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flipped(path: Path, offset: int) -> None:
    """Flips one bit of a byte."""
    patched(path, offset, bytes([path.read_bytes()[offset] ^ 4]))


def with_description(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes ``dataset.json``."""
    description = json.loads((shards / "dataset.json").read_text())
    change(description)
    (shards / "dataset.json").write_text(json.dumps(description))


def with_hashes(shards: Path) -> None:
    """Sizes and hashes as one would set them who hides a change."""

    def describe(description: dict[str, Any]) -> None:
        for entry in description["shards"]:
            entry |= _described(shards / entry["name"])
        for name in description["files"]:
            description["files"][name] = _described(shards / name)

    with_description(shards, describe)


def _described(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def with_columns(shards: Path, columns: dict[str, Callable[[list[Any]], None]], index: bool = True) -> None:
    """Changes columns of the table and, where it has them, of the index."""
    table = pq.read_table(shards / "manifest.parquet")
    batch = pa.ipc.open_file(shards / "index.arrow").get_batch(0)
    of_index = dict(zip(batch.schema.names, batch.columns))
    for name, change in columns.items():
        values = table[name].to_pylist()
        change(values)
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
        if name in of_index and not pa.types.is_dictionary(of_index[name].type):
            of_index[name] = pa.array(values, of_index[name].type)
    pq.write_table(table, shards / "manifest.parquet")
    if index:
        with pa.ipc.new_file(str(shards / "index.arrow"), batch.schema) as writer:
            writer.write_batch(pa.record_batch(list(of_index.values()), schema=batch.schema))
    with_hashes(shards)


def with_member(shards: Path, key: str, modality: str, data: bytes) -> None:
    """Replaces the bytes of a member; tar, table, index and hashes agree with each other afterwards."""
    manifest = Manifest.open(shards)
    keys = manifest.index.keys.to_pylist()
    shard = int(manifest.index.shard[keys.index(key)])
    buffer = io.BytesIO()
    archive = TarWriter(buffer)
    offsets: dict[str, dict[int, int]] = {name: {} for name in manifest.registry}
    with tarfile.open(manifest.shard_path(shard)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            owner, name, _ = member.name.split(".") if member.name.count(".") == 2 else (member.name, "", "")
            offset = archive.add(member.name, data if (owner, name) == (key, modality) else file.read())
            if name:
                offsets[name][keys.index(owner)] = offset
    archive.finish()
    manifest.shard_path(shard).write_bytes(buffer.getvalue())

    def moved(name: str) -> Callable[[list[Any]], None]:
        def change(values: list[Any]) -> None:
            for row, offset in offsets[name].items():
                values[row] = offset

        return change

    def resized(values: list[Any]) -> None:
        values[keys.index(key)] = len(data)

    changes = {f"offset.{name}": moved(name) for name in manifest.registry}
    with_columns(shards, changes | {f"length.{modality}": resized})


def with_tar(
    shards: Path, name: str, write: Callable[[tarfile.TarFile, dict[str, bytes]], None], **options: Any
) -> None:
    """Writes a shard again by hand: ``write`` is given a new tar and the members of the old one."""
    with tarfile.open(shards / name) as tar:
        members = {}
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            members[member.name] = file.read()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        write(tar, members)
    (shards / name).write_bytes(buffer.getvalue())
    with_hashes(shards)


def added(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    """Adds a member of any kind."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def arrays_of(dtype: str, *shape: int) -> np.ndarray:
    """Some values of a dtype and shape."""
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape).astype(dtype)
