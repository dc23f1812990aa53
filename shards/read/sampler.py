"""Which samples every batch holds: a computed global order, parted among ranks; nothing else decides it.

The order is a function of (seed, epoch): shards are permuted, taken in blocks of a few, and samples permuted inside a
block, which shuffles nearly globally while reads stay local. Rank r of R takes every R-th sample of the *global*
order, so a run that resumes on another number of ranks goes on in the same order. The position of a run is one
number: the samples of the endless order consumed so far.

All this is computed where the training process runs; its reading processes are sent the few rows of each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 4
"""Shards whose samples are mixed."""
_AHEAD = 2 * BLOCK  # shards that readers are told of


class BatchRequest(NamedTuple):
    """What a reader needs to know to read one batch.

    Attributes:
        samples: (epoch, manifest row) of each.
        ahead: shards that this batch and those after it read, soonest first.
    """

    samples: list[tuple[int, int]]
    ahead: list[int]


class GlobalShuffle:
    """The endless global order of a set of samples.

    It keeps two arrays of the set's size: its rows, and the permutation of one epoch.

    Args:
        rows: (N,) int64, manifest rows that take part.
        shard: the shard of every row of the manifest.
        seed: of the shuffle.
    """

    def __init__(self, rows: np.ndarray, shard: np.ndarray, seed: int) -> None:
        self._shard = shard
        self._seed = seed
        shards = shard[rows]
        by_shard = np.argsort(shards, kind="stable")
        self._rows = rows[by_shard]
        self._starts = np.flatnonzero(np.diff(shards[by_shard], prepend=-1))
        self._counts = np.diff(self._starts, append=len(rows))
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def _shuffled(self, epoch: int) -> tuple[np.random.Generator, np.ndarray]:
        """The generator of an epoch, and its first draw: the permutation of the shards that take part."""
        random = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        return random, random.permutation(len(self._starts))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of one epoch in its order, and where each block ends."""
        if self._cached is None or self._cached[0] != epoch:
            random, shards = self._shuffled(epoch)
            rows, ends, filled = np.empty_like(self._rows), [], 0
            for start in range(0, len(shards), BLOCK):
                first = filled
                for index in shards[start : start + BLOCK]:
                    count = self._counts[index]
                    rows[filled : filled + count] = self._rows[self._starts[index] :][:count]
                    filled += count
                rows[first:filled] = random.permutation(rows[first:filled])
                ends.append(filled)
            self._cached = (epoch, rows, np.array(ends))
        return self._cached[1:]

    def epoch(self, epoch: int) -> np.ndarray:
        """The rows of one epoch, (N,) int64, each exactly once, in the order of that epoch."""
        return self._epoch(epoch)[0]

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and row of the sample at this position of the endless order."""
        epoch, index = divmod(position, len(self))
        return epoch, int(self.epoch(epoch)[index])

    def ahead(self, position: int) -> list[int]:
        """Shards of the samples from a position on, soonest first: what is left of its block, then the next block."""
        epoch, index = divmod(position, len(self))
        rows, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, index, side="right"))
        shards = first_seen(self._shard[rows[index : ends[block]]])
        if block + 1 < len(ends):
            following = first_seen(self._shard[rows[ends[block] : ends[block + 1]]])
        else:
            # The next epoch begins; which shards come first is known without computing its whole permutation.
            groups = self._shuffled(epoch + 1)[1][:BLOCK]
            following = self._shard[self._rows[self._starts[groups]]].tolist()
        return list(dict.fromkeys([*shards, *following]))


class DistributedBatchSampler:
    """The batches of one rank, endless from a position of the global order on.

    Args:
        order: the global order.
        batch_size: samples a batch.
        position: samples of the global order that were consumed before.
        rank, world: of each round of ``batch_size * world`` samples, rank r takes every ``world``-th from the r-th on.
    """

    def __init__(self, order: GlobalShuffle, batch_size: int, position: int, rank: int, world: int) -> None:
        self._order, self._batch_size, self._position, self._rank, self._world = (
            order,
            batch_size,
            position,
            rank,
            world,
        )

    def __iter__(self) -> Iterator[BatchRequest]:
        start = self._position
        while True:
            # Asked for first: the batch may end in the next epoch, and one epoch at a time is kept.
            ahead = self._order.ahead(start)
            yield BatchRequest(
                [self._order.at(start + self._rank + self._world * index) for index in range(self._batch_size)], ahead
            )
            start += self._batch_size * self._world


class EvaluationBatchSampler:
    """Each sample of a set once over all ranks, in the order given; nothing is dropped or repeated at the end.

    Rank r of R takes every R-th batch, so that batches are the same on any number of ranks, and with them the last
    digits of what is computed from them. The very last may be short, and a rank may have one batch fewer.

    Args:
        rows: (N,) int64, manifest rows.
        shard: the shard of every row of the manifest.
        batch_size: samples a batch.
        rank, world: see above.
    """

    def __init__(self, rows: np.ndarray, shard: np.ndarray, batch_size: int, rank: int, world: int) -> None:
        self._rows, self._batch_size = rows[np.arange(len(rows)) // batch_size % world == rank], batch_size
        shards = shard[self._rows]
        # Where another shard begins to be read.
        self._changes = np.flatnonzero(np.diff(shards, prepend=-1))
        self._shards = shards[self._changes]

    def __iter__(self) -> Iterator[BatchRequest]:
        for start in range(0, len(self._rows), self._batch_size):
            change = int(np.searchsorted(self._changes, start, side="right")) - 1
            ahead = first_seen(self._shards[change : change + _AHEAD])
            rows = self._rows[start : start + self._batch_size]
            yield BatchRequest([(0, int(row)) for row in rows], ahead)


def first_seen(values: np.ndarray) -> list[int]:
    """The distinct ones of (N,) values in the order in which they first appear."""
    distinct, first = np.unique(values, return_index=True)
    return distinct[np.argsort(first)].tolist()
