"""Damage shards in one exact way, and optionally update the hashes to hide the damage."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bocage.shards.format.manifest import Manifest
from bocage.shards.format.tar import TarWriter


def member_range(shards: Path, key: str, modality: str) -> tuple[int, int]:
    """Offset and length of a member in its tar."""
    manifest = Manifest.open(shards)
    row = manifest.index.keys.to_pylist().index(key)
    return int(manifest.index.offset[modality][row]), int(manifest.index.length[modality][row])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip_bit(path: Path, offset: int) -> None:
    """Flip one bit of a byte."""
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 4]))


def edit_description(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``dataset.json``."""
    description = json.loads((shards / "dataset.json").read_text())
    change(description)
    (shards / "dataset.json").write_text(json.dumps(description))


def update_hashes(shards: Path) -> None:
    """Update sizes and hashes in ``dataset.json`` to hide a change of the files."""

    def describe(description: dict[str, Any]) -> None:
        for entry in description["shards"]:
            entry |= _size_and_hash(shards / entry["name"])
        for name in description["files"]:
            description["files"][name] = _size_and_hash(shards / name)

    edit_description(shards, describe)


def _size_and_hash(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def edit_columns(shards: Path, columns: dict[str, Callable[[list[Any]], None]], index: bool = True) -> None:
    """Change columns of the table and the same columns of the index."""
    table = pq.read_table(shards / "manifest.parquet")
    batch = pa.ipc.open_file(shards / "index.arrow").get_batch(0)
    index_columns = dict(zip(batch.schema.names, batch.columns))
    for name, change in columns.items():
        values = table[name].to_pylist()
        change(values)
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
        if name in index_columns and not pa.types.is_dictionary(index_columns[name].type):
            index_columns[name] = pa.array(values, index_columns[name].type)
    pq.write_table(table, shards / "manifest.parquet")
    if index:
        with pa.ipc.new_file(str(shards / "index.arrow"), batch.schema) as writer:
            writer.write_batch(pa.record_batch(list(index_columns.values()), schema=batch.schema))
    update_hashes(shards)


def replace_member(shards: Path, key: str, modality: str, data: bytes) -> None:
    """Replace the bytes of a member, and update tar, table, index and hashes consistently."""
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

    def updated_offsets(name: str) -> Callable[[list[Any]], None]:
        def change(values: list[Any]) -> None:
            for row, offset in offsets[name].items():
                values[row] = offset

        return change

    def set_length(values: list[Any]) -> None:
        values[keys.index(key)] = len(data)

    changes = {f"offset.{name}": updated_offsets(name) for name in manifest.registry}
    edit_columns(shards, changes | {f"length.{modality}": set_length})


def rewrite_tar(
    shards: Path, name: str, write: Callable[[tarfile.TarFile, dict[str, bytes]], None], **options: Any
) -> None:
    """Rewrite a shard: ``write`` gets a new tar and the members of the old one."""
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
    update_hashes(shards)


def add_member(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    """Add a member of any type."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))
