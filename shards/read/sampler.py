"""Deterministic global shuffle, split across ranks.

The order is a function of (seed, epoch). It permutes the shards, groups them into blocks of ``SHUFFLE_BLOCK``, and
permutes the samples inside each block. The shuffle is nearly global while reads stay local.

Rank r of R takes every R-th sample of the *global* order, so a run that resumes on another number of ranks continues
the same order. One number describes the position of a run: the samples of the endless order consumed so far.

The training process computes the order and sends its DataLoader workers only the few rows of each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SHUFFLE_BLOCK = 4
"""Number of consecutive shards whose samples are shuffled together."""
_PREFETCH_SHARDS = 2 * SHUFFLE_BLOCK  # shards that evaluation announces to its workers


class BatchRequest(NamedTuple):
    """Description of one batch, sent to the DataLoader worker that reads it.

    Attributes:
        samples: (epoch, manifest row) of each sample.
        upcoming_shards: shards that this batch and the next ones read, soonest first; for prefetching.
    """

    samples: list[tuple[int, int]]
    upcoming_shards: list[int]


class GlobalShuffle:
    """Endless global order of a set of samples.

    It keeps two arrays of the set's size: its rows, and the permutation of one epoch.

    Args:
        rows: (N,) int64, manifest rows to shuffle.
        shard: shard of every row of the manifest.
        seed: seed of the shuffle.
    """

    def __init__(self, rows: np.ndarray, shard: np.ndarray, seed: int) -> None:
        self._shard = shard
        self._seed = seed
        shards = shard[rows]
        by_shard = np.argsort(shards, kind="stable")
        self._rows = rows[by_shard]
        self._starts = np.flatnonzero(np.diff(shards[by_shard], prepend=-1))
        self._counts = np.diff(self._starts, append=len(rows))
        self._cached_epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def _permute_shards(self, epoch: int) -> tuple[np.random.Generator, np.ndarray]:
        """Generator of an epoch, and its first draw: the permutation of the shards."""
        random = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        return random, random.permutation(len(self._starts))

    def _permute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one epoch in its order, and the end of each block."""
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            random, shards = self._permute_shards(epoch)
            rows, block_ends, filled = np.empty_like(self._rows), [], 0
            for start in range(0, len(shards), SHUFFLE_BLOCK):
                block_start = filled
                for index in shards[start : start + SHUFFLE_BLOCK]:
                    count = self._counts[index]
                    rows[filled : filled + count] = self._rows[self._starts[index] :][:count]
                    filled += count
                rows[block_start:filled] = random.permutation(rows[block_start:filled])
                block_ends.append(filled)
            self._cached_epoch = (epoch, rows, np.array(block_ends))
        return self._cached_epoch[1:]

    def epoch(self, epoch: int) -> np.ndarray:
        """Rows of one epoch in its order, (N,) int64, each exactly once."""
        return self._permute(epoch)[0]

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and row of the sample at ``position`` of the endless order."""
        epoch, index = divmod(position, len(self))
        return epoch, int(self.epoch(epoch)[index])

    def upcoming_shards(self, position: int) -> list[int]:
        """Shards read from ``position`` on, soonest first: the rest of the current block, then the next block."""
        epoch, index = divmod(position, len(self))
        rows, block_ends = self._permute(epoch)
        block = int(np.searchsorted(block_ends, index, side="right"))
        current = unique_in_order(self._shard[rows[index : block_ends[block]]])
        if block + 1 < len(block_ends):
            following = unique_in_order(self._shard[rows[block_ends[block] : block_ends[block + 1]]])
        else:
            # The next block starts a new epoch. Its first shards follow from the permutation of shards alone.
            first_shards = self._permute_shards(epoch + 1)[1][:SHUFFLE_BLOCK]
            following = self._shard[self._rows[self._starts[first_shards]]].tolist()
        return list(dict.fromkeys([*current, *following]))


class DistributedBatchSampler:
    """Endless batches of one rank, from a position of the global order on.

    Args:
        order: global order.
        batch_size: samples per rank and batch.
        position: number of samples of the global order already consumed.
        rank: rank r takes every ``world``-th sample, from the r-th on, of each round of ``batch_size * world`` samples.
        world: number of ranks.
    """

    def __init__(self, order: GlobalShuffle, batch_size: int, position: int, rank: int, world: int) -> None:
        self._order, self._batch_size, self._position = order, batch_size, position
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[BatchRequest]:
        start = self._position
        while True:
            # Compute this before the samples: they may end in the next epoch, and only one epoch is cached.
            upcoming = self._order.upcoming_shards(start)
            samples = [self._order.at(start + self._rank + self._world * index) for index in range(self._batch_size)]
            yield BatchRequest(samples, upcoming)
            start += self._batch_size * self._world


class EvaluationBatchSampler:
    """Batches that cover each sample exactly once over all ranks, in the order of ``rows``.

    Nothing is dropped or repeated at the end. Rank r of R takes every R-th batch, so the batches are the same on any
    number of ranks, and so are the last digits of results computed from them. The last batch may be short, and a rank
    may have one batch fewer than another.

    Args:
        rows: (N,) int64, manifest rows.
        shard: shard of every row of the manifest.
        batch_size: samples per batch.
        rank: rank that reads these batches.
        world: number of ranks.
    """

    def __init__(self, rows: np.ndarray, shard: np.ndarray, batch_size: int, rank: int, world: int) -> None:
        self._rows, self._batch_size = rows[np.arange(len(rows)) // batch_size % world == rank], batch_size
        shards = shard[self._rows]
        self._shard_starts = np.flatnonzero(np.diff(shards, prepend=-1))  # first sample of each run of one shard
        self._shards = shards[self._shard_starts]

    def __iter__(self) -> Iterator[BatchRequest]:
        for start in range(0, len(self._rows), self._batch_size):
            current = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
            upcoming = unique_in_order(self._shards[current : current + _PREFETCH_SHARDS])
            rows = self._rows[start : start + self._batch_size]
            yield BatchRequest([(0, int(row)) for row in rows], upcoming)


def unique_in_order(values: np.ndarray) -> list[int]:
    """Distinct values of ``values``, (N,), in the order of their first appearance."""
    distinct, first = np.unique(values, return_index=True)
    return distinct[np.argsort(first)].tolist()
