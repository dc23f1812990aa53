"""Read shards as batches: exact epochs in a deterministic order, resume by position, reads at known offsets.

``sampler.py`` computes the order. A DataLoader worker, or this process, decodes and crops a batch into one block of
memory (``collate.py``). Do not pass the batches to Accelerate's ``prepare``: they are already split across ranks.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing import parent_process
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bocage.shards.batch import Batch, GroundWindow, Sample
from bocage.shards.errors import InputError
from bocage.shards.format.codec import EncodedArray
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import Modality
from bocage.shards.read.collate import BatchWriter, PackedBatch
from bocage.shards.read.sampler import BatchRequest, DistributedBatchSampler, EvaluationBatchSampler, GlobalShuffle
from bocage.shards.read.windows import check_side, draw_windows, pixel_slices
from bocage.shards.sample_seed import sample_seed

_MAX_GAP = 1024
"""Bytes between two members up to which one read covers both: the padding of one and the tar header of the next."""


def days_since_may(days: np.ndarray) -> np.ndarray:
    """Days since 15 May of the same year, the time axis of the official FLAIR-HUB code.

    Args:
        days: integer days since 1970-01-01, of any shape.

    Returns:
        int32 array of the same shape.
    """
    dates = days.astype("datetime64[D]")
    may = dates.astype("datetime64[Y]").astype("datetime64[M]") + np.timedelta64(4, "M")
    return (dates - (may.astype("datetime64[D]") + np.timedelta64(14, "D"))).astype(np.int32)


class ShardDataset(Dataset[Sample]):
    """Map-style dataset over the samples of shards, read at the offsets of the index.

    An item is addressed by (epoch, row); the epoch only changes the random window and the seed of the sample. Only
    members of ``modalities`` are read and decoded. Memory does not grow with the number of samples, because the index
    is memory-mapped.

    Args:
        manifest: an open manifest.
        modalities: modalities to read.
        window: side of the ground window, in metres; None reads whole patches.
        seed: seed of the windows and of all other random numbers of a sample.

    Raises:
        InputError: the window is not whole pixels, or the shards lack a modality.
    """

    def __init__(self, manifest: Manifest, modalities: Sequence[Modality], window: float | None, seed: int) -> None:
        missing = [modality.name for modality in modalities if modality.name not in manifest.registry]
        if missing:
            raise InputError(
                f"{manifest.path}: the shards hold no {', '.join(missing)}; they hold {', '.join(manifest.registry)}"
            )
        self.modalities = list(modalities)
        if window is not None:
            check_side(window, modalities)
        self._window, self._seed = window or manifest.registry.patch_size, seed
        self._index, self._files = manifest.index, manifest.files
        self._prefetched: list[int] = []

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, row = item
        key = self._index.key(row)
        seed = sample_seed(self._seed, epoch, key)
        [window] = draw_windows([seed], self._window, self.modalities)
        arrays, dates = {}, {}
        for modality, data in self._read_members(row):
            arrays[modality.name] = self._decode(row, modality, data, window)
            if modality.has_time_axis:
                dates[modality.name] = self._dates(row, modality)
        return Sample(key, self._index.roi(row), seed, window, arrays, dates)

    def __getitems__(self, request: BatchRequest) -> PackedBatch:
        """Read the samples of a batch, decoded and cropped into one block of memory."""
        if request.upcoming_shards != self._prefetched:
            self._files.prefetch(request.upcoming_shards)
            self._prefetched = request.upcoming_shards
        rows = [row for _, row in request.samples]
        keys = [self._index.key(row) for row in rows]
        seeds = [sample_seed(self._seed, epoch, key) for key, (epoch, _) in zip(keys, request.samples)]
        windows = draw_windows(seeds, self._window, self.modalities)
        dates = {
            item.name: [self._dates(row, item) if self._index.length[item.name][row] else None for row in rows]
            for item in self.modalities
            if item.has_time_axis
        }
        max_dates = {name: max(0 if days is None else len(days) for days in lists) for name, lists in dates.items()}
        rois = [self._index.roi(row) for row in rows]
        writer = BatchWriter(keys, rois, seeds, windows, self.modalities, max_dates)

        def fill(index: int, members: list[tuple[Modality, memoryview]]) -> None:
            missing = {modality.name: modality for modality in self.modalities}
            for modality, data in members:
                del missing[modality.name]
                days = dates[modality.name][index] if modality.has_time_axis else None
                out = writer.add(index, modality, days)
                self._decode(rows[index], modality, data, windows[index], out)
            for modality in missing.values():
                writer.add_missing(index, modality)

        # Decoders release the GIL, so threads share the work. torch gives a DataLoader worker one thread.
        threads = min(torch.get_num_threads(), len(rows))
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            map_samples = map if pool is None else pool.map
            for _ in map_samples(fill, range(len(rows)), (list(self._read_members(row)) for row in rows)):
                pass
        return writer.packed

    def _read_members(self, row: int) -> Iterator[tuple[Modality, memoryview]]:
        """Read the encoded members of a sample, in the order of the tar; one read covers neighbouring members."""
        shard = int(self._index.shard[row])
        members = [
            (int(self._index.offset[item.name][row]), length, item)
            for item in self.modalities
            if (length := int(self._index.length[item.name][row]))
        ]
        members.sort(key=lambda member: member[0])
        while members:
            start, end, count = members[0][0], 0, 0
            for offset, length, _ in members:
                if count and offset - end > _MAX_GAP:
                    break
                end, count = max(end, offset + length), count + 1
            data = memoryview(self._files.read(shard, start, end - start))
            for offset, length, modality in members[:count]:
                yield modality, data[offset - start : offset - start + length]
            members = members[count:]

    def _decode(
        self, row: int, modality: Modality, data: memoryview, window: GroundWindow, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Decode the pixels of one member under ``window``, into ``out`` if given."""
        expected: tuple[int, ...] = (len(modality.bands), modality.size, modality.size)
        if modality.has_time_axis:
            expected = (len(self._index.dates(modality.mask_of or modality.name, row)), *expected)
        try:
            member = EncodedArray(data)
            if (member.shape, member.dtype) == (expected, modality.dtype):
                return member.decode(pixel_slices(modality, window), out)
        except ValueError as error:
            raise InputError(f"{self._member_name(row, modality)} is damaged: {error}") from error
        if modality.has_time_axis and member.shape[1:] == expected[1:] and member.dtype == modality.dtype:
            raise InputError(
                f"{self._member_name(row, modality)} has {member.shape[0]} dates in its shard but {expected[0]} in the "
                "index"
            )
        raise InputError(
            f"{self._member_name(row, modality)} is {member.dtype} of shape {member.shape}, not {modality.dtype} of "
            f"{expected}"
        )

    def _member_name(self, row: int, modality: Modality) -> str:
        """Name of a member for messages."""
        return f"{self._files.name(int(self._index.shard[row]))}: {modality.name} of {self._index.key(row)}"

    def _dates(self, row: int, modality: Modality) -> np.ndarray:
        # A quality mask has the dates of its series.
        return days_since_may(self._index.dates(modality.mask_of or modality.name, row))


class _WorkerDataset(Dataset[Any]):
    """Dataset of a DataLoader worker that returns an ``InputError`` instead of raising it.

    torch would wrap the message of a raised exception in its own text.
    """

    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, request: BatchRequest) -> PackedBatch | InputError:
        try:
            return self._dataset.__getitems__(request)
        except InputError as error:
            return error


def _identity(batch: Any) -> Any:
    """``collate_fn`` of the loader: batches are already collated."""
    return batch


def _init_worker(_: int) -> None:
    """Make a DataLoader worker ignore SIGINT, SIGUSR1, and every SIGTERM that its training process did not send.

    Ctrl-C and SLURM's signals reach every process of a job, but the training process decides when its workers end.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    trainer = parent_process()
    assert trainer is not None

    def exit_on_sigterm() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
            pass
        os._exit(0)

    # The training process also ends a hanging worker by SIGTERM, so a thread waits for the signal. In a spawned
    # worker, threads that libraries started earlier do not block SIGTERM and may receive it instead.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=exit_on_sigterm, name="SIGTERM", daemon=True).start()


def _load(dataset: ShardDataset, requests: Iterable[BatchRequest], workers: int) -> Iterator[Batch]:
    """Read the requested batches through a DataLoader."""
    loader: DataLoader[Any] = DataLoader(
        _WorkerDataset(dataset),
        batch_sampler=requests,  # type: ignore[arg-type]  # torch types it as Sampler; any iterable of batches works
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # a separate one, because starting a loader draws from the global generator
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch.unpack()


class TrainingStream:
    """Endless stream of training batches.

    Args:
        manifest: an open manifest.
        rows: (N,) int64, manifest rows to train on.
        modalities: modalities to read.
        batch_size: samples per rank and batch.
        window: side of the ground window, in metres; None reads whole patches.
        seed: seed of the order, the windows and the augmentations.
        workers: number of DataLoader workers; 0 reads in the training process.

    Attributes:
        batch_size: samples per rank and batch.
        order: global order of the samples.

    Raises:
        InputError: there are no rows, the window is not whole pixels, or the shards lack a modality.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        modalities: Sequence[Modality],
        *,
        batch_size: int,
        window: float | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if len(rows) == 0:
            raise InputError(f"{manifest.path}: no sample to train on")
        self.batch_size = batch_size
        self._workers = workers
        self._dataset = ShardDataset(manifest, modalities, window, seed)
        self.order = GlobalShuffle(rows, manifest.index.shard, seed)

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless batches of one rank, from ``position`` of the global order on."""
        requests = DistributedBatchSampler(self.order, self.batch_size, position, rank, world)
        yield from _load(self._dataset, requests, self._workers)


def evaluation_batches(
    manifest: Manifest,
    rows: np.ndarray,
    modalities: Sequence[Modality],
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    window: float | None = None,
) -> Iterator[Batch]:
    """Read each patch exactly once over all ranks, in the order of ``rows``, (N,) int64; the last batch may be short.

    Patches are whole unless ``window`` is a side in metres: then each patch has one random window, the same in every
    evaluation.

    Raises:
        InputError: the window is not whole pixels, or the shards lack a modality.
    """
    dataset = ShardDataset(manifest, modalities, window, seed=0)
    requests = EvaluationBatchSampler(rows, manifest.index.shard, batch_size, rank, world)
    yield from _load(dataset, requests, workers)
