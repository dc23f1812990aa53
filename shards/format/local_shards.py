"""Bytes of shards by number and offset: what a reader asks of any place, and the shards of a local folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bocage.shards.errors import InputError

_OPEN_SHARDS = 64  # file descriptors kept by a reading process


class ShardFiles(Protocol):
    """The shards of a dataset, wherever they lie. Picklable: reading processes get a copy."""

    def name(self, shard: int) -> str:
        """Path or address of a shard, for messages."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """``length`` bytes of a shard from ``offset`` on.

        Raises:
            InputError: the shard, which is named, lacks them.
        """

    def ahead(self, shards: Sequence[int]) -> None:
        """Says which shards will be read next, soonest first; returns at once."""


class LocalShards:
    """``ShardFiles`` of a folder, by ``os.pread``.

    Args:
        paths: of the tars, by shard index.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [str(path) for path in paths]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"_paths": self._paths, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def name(self, shard: int) -> str:
        """Path of a shard."""
        return self._paths[shard]

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """See ``ShardFiles``.

        Raises:
            InputError: the shard cannot be opened or read, or ends before.
        """
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            try:
                descriptor = os.open(self._paths[shard], os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{self._paths[shard]}: cannot be opened: {error.strerror}") from error
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard] = descriptor
        try:
            data = os.pread(descriptor, length, offset)
        except OSError as error:
            raise InputError(f"{self._paths[shard]}: cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise InputError(
                f"{self._paths[shard]}: truncated: {length} bytes wanted at {offset}, {len(data)} there; copy it again"
            )
        return data

    def ahead(self, shards: Sequence[int]) -> None:
        """Nothing: they are here."""
