"""Name the files of a folder of shards, and read byte ranges of shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bocage.shards.errors import InputError

MEMBER_EXTENSION = ".bin"
PARTS_FOLDER = "parts"

_MAX_OPEN_SHARDS = 64  # file descriptors that one DataLoader worker keeps open


def shard_path(out: Path, index: int) -> Path:
    """Path of the tar of shard ``index``."""
    return out / f"shard-{index:06d}.tar"


def part_path(out: Path, index: int) -> Path:
    """Path of the manifest rows of shard ``index``, a temporary file until the whole manifest is written."""
    return out / PARTS_FOLDER / f"shard-{index:06d}.parquet"


def member_name(key: str, modality: str) -> str:
    """Name of the tar member that holds the array of ``modality`` for the sample ``key``."""
    return f"{key}.{modality}{MEMBER_EXTENSION}"


class ShardFiles(Protocol):
    """Byte access to the shards of a dataset, local or remote. Picklable: each DataLoader worker gets a copy."""

    def name(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read ``length`` bytes of a shard, starting at ``offset``.

        Raises:
            InputError: the shard does not have these bytes; the message names the shard.
        """

    def prefetch(self, shards: Sequence[int]) -> None:
        """Announce the shards to be read next, soonest first. Returns at once."""


class LocalShards:
    """``ShardFiles`` of a local folder, read with ``os.pread``.

    Args:
        paths: paths of the tars, by shard index.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [str(path) for path in paths]
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"_paths": self._paths, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def name(self, shard: int) -> str:
        """Path of a shard."""
        return self._paths[shard]

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read ``length`` bytes of a shard, starting at ``offset``.

        Raises:
            InputError: the shard cannot be opened or read, or ends before the last of these bytes.
        """
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            try:
                descriptor = os.open(self._paths[shard], os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{self._paths[shard]}: cannot be opened: {error.strerror}") from error
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = descriptor
        try:
            data = os.pread(descriptor, length, offset)
        except OSError as error:
            raise InputError(f"{self._paths[shard]}: cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise InputError(
                f"{self._paths[shard]}: truncated: read {len(data)} of {length} bytes at offset {offset}; "
                "copy the shard again"
            )
        return data

    def prefetch(self, shards: Sequence[int]) -> None:
        """Do nothing: local shards need no download."""
