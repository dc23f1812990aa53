"""Shards to batches: a computed global order, exact epochs, resume by position, and reads at known offsets.

The order is a function of (seed, epoch): shards are permuted, taken in blocks of a few, and samples permuted inside a
block, which shuffles nearly globally while reads stay local. Rank r of R takes every R-th sample of the *global*
order, so a run that resumes on another number of ranks goes on in the same order. The position of a run is one
number: the samples of the endless order consumed so far.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from bocage.shards.batch import Batch, Sample
from bocage.shards.codec import decode
from bocage.shards.collate import collate
from bocage.shards.crop import WHOLE_PATCH, check_side, crop, draw_window, lattice
from bocage.shards.errors import InputError
from bocage.shards.manifest import Manifest
from bocage.shards.modality import PATCH_SIZE, Modality
from bocage.shards.seeds import sample_seed

_BLOCK = 4  # shards whose samples are mixed


def days_since_may(days: np.ndarray) -> np.ndarray:
    """Days since 15 May of the date's own year, the time axis of the official FLAIR-HUB code.

    Args:
        days: integer days since 1970-01-01.
    """
    dates = days.astype("datetime64[D]")
    may = dates.astype("datetime64[Y]").astype("datetime64[M]") + np.timedelta64(4, "M")
    return (dates - (may.astype("datetime64[D]") + np.timedelta64(14, "D"))).astype(np.int32)


class Order:
    """The endless global order of a set of samples.

    Args:
        rows: manifest rows that take part.
        shards: the shard of each of them.
        seed: of the shuffle.
    """

    def __init__(self, rows: np.ndarray, shards: np.ndarray, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        by_shard = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[by_shard], prepend=-1))
        self._groups = np.split(rows[by_shard], starts[1:])
        self._cached: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def epoch(self, epoch: int) -> np.ndarray:
        """The rows of one epoch, each exactly once, in the order of that epoch."""
        if self._cached is None or self._cached[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            shards = random.permutation(len(self._groups))
            blocks = [
                random.permutation(np.concatenate([self._groups[index] for index in shards[start : start + _BLOCK]]))
                for start in range(0, len(shards), _BLOCK)
            ]
            self._cached = (epoch, np.concatenate(blocks))
        return self._cached[1]

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and row of the sample at this position of the endless order."""
        epoch, index = divmod(position, len(self))
        return epoch, int(self.epoch(epoch)[index])


class _TrainingSampler:
    """Batches of (epoch, row) of one rank, endless from a position on."""

    def __init__(self, order: Order, batch_size: int, position: int, rank: int, world: int) -> None:
        self.order, self.batch_size, self.position, self.rank, self.world = order, batch_size, position, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.position
        while True:
            yield [self.order.at(start + self.rank + self.world * index) for index in range(self.batch_size)]
            start += self.batch_size * self.world


class ShardDataset(Dataset[Sample]):
    """Map-style access to the samples of shards at the offsets of the index.

    Items are addressed by (epoch, row): the epoch only decides the sample's random view. Only the members of the
    wanted modalities are read and decoded.

    Args:
        manifest: an open manifest.
        modalities: what to read.
        window: side of the ground window, metres.
        seed: of windows and of everything else that is drawn for a sample.
    """

    def __init__(self, manifest: Manifest, modalities: Sequence[Modality], window: float, seed: int) -> None:
        check_side(window, modalities)
        missing = [modality.name for modality in modalities if modality.name not in manifest.registry]
        if missing:
            raise InputError(
                f"{manifest.path}: the shards hold no {', '.join(missing)}; they hold {', '.join(manifest.registry)}"
            )
        self.modalities = list(modalities)
        self._window, self._seed = window, seed
        self._step = lattice(modalities)
        self._files = manifest.files
        table = manifest.table
        self._keys, self._rois = table["key"].combine_chunks(), table["roi"].combine_chunks()
        self._shards = table["shard"].to_numpy()
        self._offsets = {item.name: table[f"offset.{item.name}"].to_numpy() for item in modalities}
        self._lengths = {item.name: table[f"length.{item.name}"].to_numpy() for item in modalities}
        # A quality mask has the dates of its series.
        self._dates = {
            item.name: table[f"dates.{item.mask_of or item.name}"].combine_chunks()
            for item in modalities
            if item.has_dates
        }

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, row = item
        key = self._keys[row].as_py()
        seed = sample_seed(self._seed, epoch, key)
        window = draw_window(seed, self._window, self._step)
        shard = int(self._shards[row])
        arrays, dates = {}, {}
        for modality in self.modalities:
            name = modality.name
            length = int(self._lengths[name][row])
            if length == 0:
                continue
            try:
                array = decode(self._files.read(shard, int(self._offsets[name][row]), length))
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"{self._files.name(shard)}: {name} of {key} is damaged: {error}") from error
            arrays[name] = crop(array, modality, window)
            if modality.has_dates:
                dates[name] = self._dates_of(name, row, len(array), key)
        return Sample(key, self._rois[row].as_py(), seed, window, arrays, dates)

    def _dates_of(self, name: str, row: int, count: int, key: str) -> np.ndarray:
        values = self._dates[name][row].values
        days = np.zeros(0, np.int32) if values is None else days_since_may(_plain(values))
        if len(days) != count:
            raise InputError(f"{key}: {name} has {count} dates in its shard but {len(days)} in the manifest")
        return days


def _plain(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)


class _Collate:
    """A picklable ``collate`` for worker processes."""

    def __init__(self, modalities: Sequence[Modality]) -> None:
        self.modalities = list(modalities)

    def __call__(self, samples: list[Sample]) -> Batch:
        return collate(samples, self.modalities)


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C and SLURM's signals reach every process of a job; the training process decides when its readers end."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _loader(dataset: ShardDataset, batches: object, workers: int) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # torch types it as Sampler; any iterable of batches works
        num_workers=workers,
        collate_fn=_Collate(dataset.modalities),
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that starting a loader leaves the global state as it was
    )


class TrainingStream:
    """The endless stream of training batches; what the training loop calls a batch source.

    Args:
        manifest: an open manifest.
        rows: manifest rows to train on.
        modalities: what to read.
        batch_size: samples per rank and batch.
        window: side of the ground window, metres.
        seed: of order, windows and views.
        workers: reading processes; 0 reads in the training process.

    Raises:
        InputError: no rows, a window that is not whole pixels, or a modality that the shards do not hold.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        modalities: Sequence[Modality],
        *,
        batch_size: int,
        window: float = PATCH_SIZE,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if len(rows) == 0:
            raise InputError(f"{manifest.path}: no sample to train on")
        self.batch_size = batch_size
        self._workers = workers
        self._dataset = ShardDataset(manifest, modalities, window, seed)
        self.order = Order(rows, manifest.table["shard"].to_numpy()[rows], seed)

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        """Batches of one rank from a position of the global order on, for ever."""
        sampler = _TrainingSampler(self.order, self.batch_size, position, rank, world)
        yield from _loader(self._dataset, sampler, self._workers)


def evaluation_batches(
    manifest: Manifest,
    rows: np.ndarray,
    modalities: Sequence[Modality],
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Whole patches, each exactly once over all ranks, in the order of ``rows``; the last batch may be short."""
    dataset = ShardDataset(manifest, modalities, WHOLE_PATCH.side, seed=0)
    mine = [(0, int(row)) for row in rows[rank::world]]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    yield from _loader(dataset, batches, workers)
