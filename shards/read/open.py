"""Opening a dataset anywhere: a local folder as it is, another place through the cache."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bocage.shards.errors import InputError
from bocage.shards.format.index import INDEX_FILE
from bocage.shards.format.manifest import DATASET_FILE, TABLE_FILE, Manifest, Shard
from bocage.shards.read.cache import Cache, CacheConfig, Wanted
from bocage.shards.read.object_store import ObjectStore, RetryPolicy, is_remote
from bocage.shards.read.sampler import BLOCK


def open_shards(where: str | Path, cache: CacheConfig | None = None, patience: RetryPolicy | None = None) -> Manifest:
    """The manifest of the shards at ``where``, what the key ``shards`` of a recipe names.

    Args:
        where: a folder, ``file://``, ``s3://bucket/prefix``, ``hf://datasets/org/name/...`` or ``http(s)://host/path``.
        cache: where the shards of another machine are kept; unused for a folder.
        patience: when another machine is given up.

    Raises:
        InputError: nothing there, it cannot be had or contradicts itself, or the cache is too small for one shard.
    """
    text = str(where)
    if not is_remote(text):
        return Manifest.open(unquote(urlsplit(text).path) if text.lower().startswith("file://") else where)
    place, cache = ObjectStore(text, patience), cache or CacheConfig()
    content = place.read(DATASET_FILE)
    files = _files_beside(place, content)
    kept = Cache(place, cache, hashlib.sha256(content).hexdigest())
    for file in files:
        kept.bring(file)
    kept.write(DATASET_FILE, content)
    manifest = Manifest.open(kept.folder)
    largest = max(manifest.shards, key=lambda shard: shard.bytes, default=None)
    if largest is not None and largest.bytes > cache.bytes:
        raise InputError(
            f"cache.size={cache.size} is less than one shard of {place.name} ({largest.name}: {largest.bytes} bytes); "
            "raise it to several shards"
        )
    held = cache.bytes // max(largest.bytes, 1) if largest is not None else 0
    if held < min(BLOCK, manifest.shard_count):
        warnings.warn(
            f"cache.size={cache.size} holds {held} shards of {place.name}, but training mixes {BLOCK} at a time: they "
            "will be fetched again and again",
            stacklevel=2,
        )
    manifest.files = RemoteShards(kept, manifest.shards)
    return manifest


def _files_beside(place: ObjectStore, content: bytes) -> list[Wanted]:
    """Size and hash of index and table, from the description that everything else is checked against."""
    try:
        files = json.loads(content)["files"]
        found = [Wanted(name, files[name]["bytes"], files[name]["sha256"]) for name in (INDEX_FILE, TABLE_FILE)]
        if any(type(file.bytes) is not int or file.bytes < 0 for file in found):
            raise ValueError("a size is not a number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{place.name_of(DATASET_FILE)}: not a description of shards of this version") from error
    return found


class RemoteShards:
    """``ShardFiles`` of another place, through a cache; shards that come next are fetched by a thread.

    Each process that reads has its own thread, started when it first says what comes next: forked and pickled copies
    begin without one.
    """

    def __init__(self, cache: Cache, shards: Sequence[Shard]) -> None:
        self._cache = cache
        self._shards = [Wanted(shard.name, shard.bytes, shard.sha256) for shard in shards]
        self._queue: _Queue | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_queue": None}

    def name(self, shard: int) -> str:
        """Address of a shard, without secrets."""
        return self._cache.place.name_of(self._shards[shard].name)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """See ``ShardFiles``; waits for a shard that is not here yet.

        Raises:
            InputError: the shard cannot be fetched or read, or ends before.
        """
        data = self._cache.read(self._shards[shard], offset, length)
        if len(data) != length:
            raise InputError(
                f"{self.name(shard)}: truncated: {length} bytes wanted at {offset}, {len(data)} there; copy it again"
            )
        return data

    def ahead(self, shards: Sequence[int]) -> None:
        """See ``ShardFiles``; of these, as many are fetched as the cache holds at once."""
        if self._queue is None or self._queue.process != os.getpid():
            self._queue = _Queue(self._cache)
        chosen, total = [], 0
        for shard in shards:
            total += self._shards[shard].bytes
            if total > self._cache.bound:
                break
            chosen.append(self._shards[shard])
        self._queue.replace(chosen)


class _Queue:
    """The thread that fetches ahead. A daemon: it never keeps a process from ending."""

    def __init__(self, cache: Cache) -> None:
        self.process = os.getpid()
        self._cache = cache
        self._changed = threading.Condition()
        self._shards: list[Wanted] = []
        self._failed: set[str] = set()
        threading.Thread(target=self._run, name="shards ahead", daemon=True).start()

    def replace(self, shards: list[Wanted]) -> None:
        with self._changed:
            self._shards = shards
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._shards)
                shards = self._shards
            names = {shard.name for shard in shards}
            for shard in shards:
                try:
                    room = shard.name in self._failed or self._cache.fetch(shard, names)
                except InputError:
                    self._failed.add(shard.name)  # whoever reads it meets the error
                    room = True
                if not room:
                    time.sleep(0.5)
                if not room or self._shards is not shards:
                    break
            else:
                with self._changed:
                    if self._shards is shards:
                        self._shards = []
