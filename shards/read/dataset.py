"""Shards to batches: exact epochs in a computed order, resume by position, and reads at known offsets.

The order is `order.py`'s. A batch is decoded and cropped into one block of memory (`collate.py`), by a reading process
or here. Nothing is to be prepared by Accelerate: the batches of a rank are that rank's alone as they come.
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
from bocage.shards.modality import PATCH_SIZE, Modality
from bocage.shards.read.collate import BatchWriter, PackedBatch
from bocage.shards.read.sampler import BatchRequest, DistributedBatchSampler, EvaluationBatchSampler, GlobalShuffle
from bocage.shards.read.windows import check_side, draw_windows, lattice, pixel_slices
from bocage.shards.sample_seed import sample_seed

_BRIDGED = 1024
"""Bytes between two members that are read with them: the padding of one and the tar header of the next."""


def days_since_may(days: np.ndarray) -> np.ndarray:
    """Days since 15 May of the date's own year, the time axis of the official FLAIR-HUB code.

    Args:
        days: integer days since 1970-01-01, of any shape; int32 of the same shape is returned.
    """
    dates = days.astype("datetime64[D]")
    may = dates.astype("datetime64[Y]").astype("datetime64[M]") + np.timedelta64(4, "M")
    return (dates - (may.astype("datetime64[D]") + np.timedelta64(14, "D"))).astype(np.int32)


class ShardDataset(Dataset[Sample]):
    """Map-style access to the samples of shards at the offsets of the index.

    Items are addressed by (epoch, row): the epoch only decides the sample's random view. Only the members of the
    wanted modalities are read and decoded. It holds nothing by sample: the index is mapped.

    Args:
        manifest: an open manifest.
        modalities: what to read.
        window: side of the ground window, metres.
        seed: of windows and of everything else that is drawn for a sample.

    Raises:
        InputError: a window that is not whole pixels, or a modality that the shards do not hold.
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
        self._index, self._files = manifest.index, manifest.files
        self._told: list[int] = []

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, row = item
        key = self._index.key(row)
        seed = sample_seed(self._seed, epoch, key)
        [window] = draw_windows([seed], self._window, self._step)
        arrays, dates = {}, {}
        for modality, data in self._members(row):
            arrays[modality.name] = self._decoded(row, modality, data, window)
            if modality.has_dates:
                dates[modality.name] = self._dates(row, modality)
        return Sample(key, self._index.roi(row), seed, window, arrays, dates)

    def __getitems__(self, request: BatchRequest) -> PackedBatch:
        """The samples of a batch, decoded and cropped into one block of memory."""
        if request.ahead != self._told:
            self._files.ahead(request.ahead)
            self._told = request.ahead
        rows = [row for _, row in request.samples]
        keys = [self._index.key(row) for row in rows]
        seeds = [sample_seed(self._seed, epoch, key) for key, (epoch, _) in zip(keys, request.samples)]
        windows = draw_windows(seeds, self._window, self._step)
        dates = {
            item.name: [self._dates(row, item) if self._index.length[item.name][row] else None for row in rows]
            for item in self.modalities
            if item.has_dates
        }
        longest = {name: max(0 if days is None else len(days) for days in lists) for name, lists in dates.items()}
        rois = [self._index.roi(row) for row in rows]
        writer = BatchWriter(keys, rois, seeds, windows, self.modalities, longest)

        def fill(place: int, members: list[tuple[Modality, memoryview]]) -> None:
            absent = {modality.name: modality for modality in self.modalities}
            for modality, data in members:
                del absent[modality.name]
                days = dates[modality.name][place] if modality.has_dates else None
                out = writer.put(place, modality, days)
                self._decoded(rows[place], modality, data, windows[place], out)
            for modality in absent.values():
                writer.leave_out(place, modality)

        # Decoders leave Python alone, so threads share the work; a reading process has one, as torch does there.
        threads = min(torch.get_num_threads(), len(rows))
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            spread = map if pool is None else pool.map
            for _ in spread(fill, range(len(rows)), (list(self._members(row)) for row in rows)):
                pass
        return writer.packed

    def _members(self, row: int) -> Iterator[tuple[Modality, memoryview]]:
        """The wanted modalities that a sample has, encoded, in the order of the tar; neighbours are read at once."""
        shard = int(self._index.shard[row])
        found = [
            (int(self._index.offset[item.name][row]), length, item)
            for item in self.modalities
            if (length := int(self._index.length[item.name][row]))
        ]
        found.sort(key=lambda member: member[0])
        while found:
            start, end, count = found[0][0], 0, 0
            for offset, length, _ in found:
                if count and offset - end > _BRIDGED:
                    break
                end, count = max(end, offset + length), count + 1
            data = memoryview(self._files.read(shard, start, end - start))
            for offset, length, modality in found[:count]:
                yield modality, data[offset - start : offset - start + length]
            found = found[count:]

    def _decoded(
        self, row: int, modality: Modality, data: memoryview, window: GroundWindow, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The pixels of one member under the window, in ``out`` if it is given."""
        expected: tuple[int, ...] = (len(modality.bands), modality.size, modality.size)
        if modality.has_dates:
            expected = (len(self._index.dates(modality.mask_of or modality.name, row)), *expected)
        try:
            member = EncodedArray(data)
            if (member.shape, member.dtype) == (expected, modality.dtype):
                return member.array(pixel_slices(modality, window), out)
        except ValueError as error:
            raise InputError(f"{self._name(row, modality)} is damaged: {error}") from error
        if modality.has_dates and member.shape[1:] == expected[1:] and member.dtype == modality.dtype:
            raise InputError(
                f"{self._name(row, modality)} has {member.shape[0]} dates in its shard but {expected[0]} in the index"
            )
        raise InputError(
            f"{self._name(row, modality)} is {member.dtype} of shape {member.shape}, not {modality.dtype} of {expected}"
        )

    def _name(self, row: int, modality: Modality) -> str:
        return f"{self._files.name(int(self._index.shard[row]))}: {modality.name} of {self._index.key(row)}"

    def _dates(self, row: int, modality: Modality) -> np.ndarray:
        # A quality mask has the dates of its series.
        return days_since_may(self._index.dates(modality.mask_of or modality.name, row))


class _Reader(Dataset[Any]):
    """What a reading process runs. A wrong file goes back as an answer: raised there, torch would wrap its sentence."""

    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, request: BatchRequest) -> PackedBatch | InputError:
        try:
            return self._dataset.__getitems__(request)
        except InputError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    """What the loader does with a batch: it is collated already."""
    return batch


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C and SLURM's signals reach every process of a job; the training process decides when its readers end."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    trainer = parent_process()
    assert trainer is not None

    def end_on_request() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
            pass
        os._exit(0)

    # SIGTERM is also how a reader that hangs is ended, by the training process alone. A reader that was spawned, not
    # forked, may have threads of libraries that receive it before this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_on_request, name="SIGTERM", daemon=True).start()


def _read(dataset: ShardDataset, requests: Iterable[BatchRequest], workers: int) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        _Reader(dataset),
        batch_sampler=requests,  # type: ignore[arg-type]  # torch types it as Sampler; any iterable of batches works
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that starting a loader leaves the global state as it was
    )
    for answer in loader:
        if isinstance(answer, InputError):
            raise answer
        yield answer.batch()


class TrainingStream:
    """The endless stream of training batches; what the training loop calls a batch source.

    Args:
        manifest: an open manifest.
        rows: (N,) int64, manifest rows to train on.
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
        self.order = GlobalShuffle(rows, manifest.index.shard, seed)

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        """Batches of one rank from a position of the global order on, for ever."""
        requests = DistributedBatchSampler(self.order, self.batch_size, position, rank, world)
        yield from _read(self._dataset, requests, self._workers)


def evaluation_batches(
    manifest: Manifest,
    rows: np.ndarray,
    modalities: Sequence[Modality],
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    window: float = PATCH_SIZE,
) -> Iterator[Batch]:
    """Patches, each exactly once over all ranks, in the order of ``rows``, (N,) int64; the last batch may be short.

    They are whole, or of each a ``window`` of so many metres, drawn once and for all.

    Raises:
        InputError: a window that is not whole pixels, or a modality that the shards do not hold.
    """
    dataset = ShardDataset(manifest, modalities, window, seed=0)
    requests = EvaluationBatchSampler(rows, manifest.index.shard, batch_size, rank, world)
    yield from _read(dataset, requests, workers)
