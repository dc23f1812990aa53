"""Open the shards of a dataset, local or remote."""

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

from bocage.shards.errors import InputError, counted
from bocage.shards.format.index import INDEX_FILE
from bocage.shards.format.manifest import DATASET_FILE, TABLE_FILE, Manifest, Shard
from bocage.shards.read.cache import Cache, CacheConfig, RemoteFile
from bocage.shards.read.object_store import ObjectStore, RetryPolicy, is_remote
from bocage.shards.read.sampler import SHUFFLE_BLOCK


def open_shards(
    location: str | Path, cache: CacheConfig | None = None, retry_policy: RetryPolicy | None = None
) -> Manifest:
    """Open the manifest of the shards at ``location``, the value of a recipe's key ``shards``.

    Args:
        location: a folder, ``file://``, ``s3://bucket/prefix``, ``hf://datasets/org/name/...`` or
            ``http(s)://host/path``.
        cache: local cache of remote shards; unused for a folder.
        retry_policy: when to retry failed downloads and when to give up.

    Raises:
        InputError: there are no shards, they cannot be read or are inconsistent, or one shard exceeds the cache.
    """
    text = str(location)
    if not is_remote(text):
        return Manifest.open(unquote(urlsplit(text).path) if text.lower().startswith("file://") else location)
    store, config = ObjectStore(text, retry_policy), cache or CacheConfig()
    description = store.read(DATASET_FILE)
    files = _index_and_table(store, description)
    local = Cache(store, config, hashlib.sha256(description).hexdigest())
    for file in files:
        local.download_metadata(file)
    local.write_metadata(DATASET_FILE, description)
    manifest = Manifest.open(local.folder)
    largest = max(manifest.shards, key=lambda shard: shard.bytes, default=None)
    if largest is not None and largest.bytes > config.bytes:
        raise InputError(
            f"cache.size={config.size} is less than one shard of {store.redacted_url} ({largest.name}: "
            f"{largest.bytes} bytes); raise it to several shards"
        )
    capacity = config.bytes // max(largest.bytes, 1) if largest is not None else 0
    if capacity < min(SHUFFLE_BLOCK, manifest.shard_count):
        warnings.warn(
            f"cache.size={config.size} holds {counted(capacity, 'shard')} of {store.redacted_url}, but training "
            f"shuffles {SHUFFLE_BLOCK} together: shards will be downloaded again and again",
            stacklevel=2,
        )
    manifest.files = RemoteShards(local, manifest.shards)
    return manifest


def _index_and_table(store: ObjectStore, description: bytes) -> list[RemoteFile]:
    """Size and hash of index and table, read from the dataset's description."""
    try:
        entries = json.loads(description)["files"]
        files = [RemoteFile(name, entries[name]["bytes"], entries[name]["sha256"]) for name in (INDEX_FILE, TABLE_FILE)]
        if any(type(file.bytes) is not int or file.bytes < 0 for file in files):
            raise ValueError("a size is not a number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{store.redacted_file_url(DATASET_FILE)}: not a description of shards of this version"
        ) from error
    return files


class RemoteShards:
    """``ShardFiles`` of a remote dataset, read through a cache; a thread prefetches upcoming shards.

    Each process starts its own thread at its first ``prefetch``. Forked and pickled copies begin without a thread.
    """

    def __init__(self, cache: Cache, shards: Sequence[Shard]) -> None:
        self._cache = cache
        self._shards = [RemoteFile(shard.name, shard.bytes, shard.sha256) for shard in shards]
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_prefetcher": None}

    def name(self, shard: int) -> str:
        """Address of a shard for messages, without secrets."""
        return self._cache.store.redacted_file_url(self._shards[shard].name)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """See ``ShardFiles``; waits for a shard that is not cached yet.

        Raises:
            InputError: the shard cannot be downloaded or read, or ends too early.
        """
        data = self._cache.read(self._shards[shard], offset, length)
        if len(data) != length:
            raise InputError(
                f"{self.name(shard)}: truncated: read {len(data)} of {length} bytes at offset {offset}; "
                "copy the shard again"
            )
        return data

    def prefetch(self, shards: Sequence[int]) -> None:
        """See ``ShardFiles``; downloads as many of the shards, from the first on, as fit into the cache together."""
        if self._prefetcher is None or self._prefetcher.process != os.getpid():
            self._prefetcher = _Prefetcher(self._cache)
        files, total = [], 0
        for shard in shards:
            total += self._shards[shard].bytes
            if total > self._cache.max_bytes:
                break
            files.append(self._shards[shard])
        self._prefetcher.replace(files)


class _Prefetcher:
    """Thread that downloads upcoming shards. It is a daemon, so it never keeps a process alive."""

    def __init__(self, cache: Cache) -> None:
        self.process = os.getpid()
        self._cache = cache
        self._changed = threading.Condition()
        self._files: list[RemoteFile] = []
        self._failed: set[str] = set()
        threading.Thread(target=self._run, name="shard prefetch", daemon=True).start()

    def replace(self, files: list[RemoteFile]) -> None:
        """Replace the files to download."""
        with self._changed:
            self._files = files
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._files)
                files = self._files
            names = {file.name for file in files}
            for file in files:
                try:
                    has_room = file.name in self._failed or self._cache.prefetch(file, names)
                except InputError:
                    self._failed.add(file.name)  # reading the shard will raise the error
                    has_room = True
                if not has_room:
                    time.sleep(0.5)
                if not has_room or self._files is not files:
                    break
            else:
                with self._changed:
                    if self._files is files:
                        self._files = []
