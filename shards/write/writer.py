"""Write a catalogue of patches as a folder of shards with a manifest.

The shards are planned before anything is written and each shard is one task, so the bytes do not depend on the number
of workers. A task writes its tar, then its manifest part (in ``parts/``), each under its final name only when complete.
An interrupted run therefore leaves finished shards, and the same call resumes. ``dataset.json`` is written last.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from bocage.shards.errors import InputError, counted
from bocage.shards.format.manifest import DATASET_FILE, Manifest
from bocage.shards.format.shard_files import PARTS_FOLDER, part_path
from bocage.shards.locks import FileLock
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.dask import run_on_cluster
from bocage.shards.write.estimate import Estimate, measure_encoding
from bocage.shards.write.manifest_builder import build_manifest
from bocage.shards.write.packing import too_many_skipped
from bocage.shards.write.plan import (
    ShardPlan,
    WriteOrder,
    check_output_folder,
    choose_samples_per_shard,
    library_versions,
    order_rows,
    plan_path,
    plan_settings,
    read_recorded_plan,
    record_plan,
    shard_bounds,
)
from bocage.shards.write.restore import find_lost_shards, restore_shards
from bocage.shards.write.tasks import (
    ShardTasks,
    TaskRunner,
    WriteProgress,
    accumulate_progress,
    explain_write_errors,
    run_locally,
)

_LOCK_FILE = "lock"
_MAX_RANGES = 20  # ranges of shard numbers in a message
_SLICES_PREFIX = "slices-of-"  # each slice leaves an empty file slices-of-N, so that messages can name slices


def write_shards(
    catalogue: Catalogue,
    out: str | Path,
    *,
    shard_bytes: int = 512 << 20,
    samples_per_shard: int | None = None,
    order: WriteOrder = "shuffled",
    seed: int = 0,
    workers: int = 1,
    scheduler: str | None = None,
    max_bad: float = 0.001,
    progress: WriteProgress | None = None,
) -> Manifest:
    """Write the patches of ``catalogue`` as WebDataset shards with a manifest into the folder ``out``.

    See ``DatasetWriter`` and ``DatasetWriter.write`` for the arguments and exceptions.
    """
    writer = DatasetWriter(
        catalogue,
        out,
        shard_bytes=shard_bytes,
        samples_per_shard=samples_per_shard,
        order=order,
        seed=seed,
        max_bad=max_bad,
    )
    return writer.write(workers=workers, scheduler=scheduler, progress=progress)


class DatasetWriter:
    """Writes a catalogue into one folder of shards, at once or in slices.

    Args:
        catalogue: patches to write.
        out: new or empty folder, or the folder of an earlier run.
        shard_bytes: approximate size of a shard. A small dataset gets several smaller shards, so that processes can
            share the work and readers can shuffle.
        samples_per_shard: number of samples in a shard; overrides ``shard_bytes``.
        order: order of the patches, see ``plan.order_rows``. With ``roi`` a ROI is split only if it is larger than a
            shard.
        seed: seed of the orders ``shuffled`` and ``stratified``.
        max_bad: fraction of the patches that may be unreadable; these are skipped and listed in ``dataset.json``. One
            unreadable patch is always allowed unless the fraction is 0.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        out: str | Path,
        *,
        shard_bytes: int = 512 << 20,
        samples_per_shard: int | None = None,
        order: WriteOrder = "shuffled",
        seed: int = 0,
        max_bad: float = 0.001,
    ) -> None:
        self.catalogue, self.out = catalogue, Path(out)
        self._order, self._seed = order, seed
        self._shard_bytes, self._samples_per_shard = shard_bytes, samples_per_shard
        self._settings = plan_settings(catalogue, order, seed, shard_bytes, samples_per_shard)
        self._max_skipped = max(1, int(max_bad * len(catalogue))) if max_bad > 0 else 0

    def write(
        self, *, workers: int = 1, scheduler: str | None = None, progress: WriteProgress | None = None
    ) -> Manifest:
        """Write the missing shards, then the manifest.

        In an unfinished folder of the same plan, this writes the missing shards, and rewrites shards that skipped a
        patch which is readable now. In a complete folder, it rewrites shards that were deleted or have the wrong size;
        they must get the hash that the manifest records.

        Args:
            workers: number of processes; 1 writes in this process.
            scheduler: address of a Dask scheduler whose workers write the shards instead.
            progress: progress callback, see ``WriteProgress``.

        Raises:
            InputError: ``out`` holds something else or another plan, is being written by another run, or cannot be
                written; the source is gone or too many patches are unreadable; a deleted shard cannot be rewritten to
                the same bytes; or a worker or the scheduler is lost.
        """
        with explain_write_errors(self.out):
            if not self._is_complete:
                plan = self._load_or_record_plan()
                shards = range(len(plan))
                with self._lock(shards):
                    if not self._is_complete:  # another run may have completed the folder in the meantime
                        self._write_missing(self._tasks(plan), shards, _task_runner(workers, scheduler), progress)
                        return self._build_manifest(plan)
            return self._restore_lost(_task_runner(workers, scheduler), progress)

    def write_slice(
        self,
        number: int,
        slices: int,
        *,
        workers: int = 1,
        scheduler: str | None = None,
        progress: WriteProgress | None = None,
    ) -> range:
        """Write one slice of the shards, without a manifest.

        Slices may run at the same time on any machines that share the folder.

        Args:
            number: number of the slice, from 1.
            slices: number of slices.
            workers: number of processes, see ``write``.
            scheduler: address of a Dask scheduler, see ``write``.
            progress: progress callback, see ``WriteProgress``.

        Returns:
            Indices of the shards of the slice.

        Raises:
            InputError: the shards cannot be written (see ``write``), or the dataset is already complete.
        """
        with explain_write_errors(self.out):
            if self._is_complete:
                raise InputError(f"{self.out}: is complete, no slice is left to write")
            plan = self._load_or_record_plan()
            shards = _slice_range(number, slices, len(plan))
            (self.out / PARTS_FOLDER / f"{_SLICES_PREFIX}{slices}").touch()
            if shards:
                with self._lock(shards):
                    self._write_missing(self._tasks(plan), shards, _task_runner(workers, scheduler), progress)
            return shards

    def merge(self) -> Manifest:
        """Write the manifest once all slices are written.

        Raises:
            InputError: slices are missing (the message names them); too many patches are unreadable; or ``out`` holds
                another plan, is being written, or cannot be written.
        """
        with explain_write_errors(self.out):
            if self._is_complete:
                read_recorded_plan(self.out / DATASET_FILE, self._settings)
                return Manifest.open(self.out)
            if not plan_path(self.out).is_file():
                raise InputError(f"{self.out}: holds no slices to merge; run `bocage shard SRC OUT --slice 1/N` first")
            plan = self._load_or_record_plan()
            with self._lock(range(len(plan))):
                parts = dict(self._tasks(plan).read_parts(range(len(plan))))
                missing = [index for index, part in parts.items() if part is None]
                if missing:
                    raise InputError(self._missing_shards_message(missing, len(plan)))
                skipped = {key: reason for part in parts.values() if part for key, reason in part.skipped.items()}
                if len(skipped) > self._max_skipped:
                    raise too_many_skipped(skipped, self._max_skipped)
                return self._build_manifest(plan)

    def estimate(self) -> Estimate:
        """Estimate what ``write`` would do by encoding a few patches. Nothing is written.

        Raises:
            InputError: no sampled patch is readable, the source is gone, or ``out`` holds something else or another
                plan.
        """
        with explain_write_errors(self.out):
            rows = order_rows(self.catalogue, self._order, self._seed)
            cost = measure_encoding(self.catalogue, rows)
            if self._is_complete:
                plan = self._plan(read_recorded_plan(self.out / DATASET_FILE, self._settings)[0])
                missing = find_lost_shards(Manifest.open(self.out))
            elif plan_path(self.out).is_file():
                plan = self._plan(read_recorded_plan(plan_path(self.out), self._settings)[0])
                parts = self._tasks(plan).read_parts(range(len(plan)))
                missing = [index for index, part in parts if part is None]
            else:
                check_output_folder(self.out)
                samples = choose_samples_per_shard(len(rows), cost.patch_bytes, self._shard_bytes)
                plan = self._plan(self._samples_per_shard or samples)
                missing = list(range(len(plan)))
            remaining = sum(plan.count_patches(range(index, index + 1)) for index in missing)
            size = int(cost.patch_bytes * len(rows))
            return Estimate(
                patches=len(rows),
                shards=len(plan),
                bytes=size,
                remaining=remaining,
                seconds=remaining * cost.patch_seconds,
                sampled=cost.sampled,
                unreadable=cost.unreadable,
            )

    @property
    def _is_complete(self) -> bool:
        return (self.out / DATASET_FILE).is_file()

    def _load_or_record_plan(self) -> ShardPlan:
        """Load the plan that the folder records; record one if the folder is new."""

        def choose_samples() -> int:
            if self._samples_per_shard:
                return self._samples_per_shard
            rows = order_rows(self.catalogue, self._order, self._seed)
            cost = measure_encoding(self.catalogue, rows)
            return choose_samples_per_shard(len(rows), cost.patch_bytes, self._shard_bytes)

        return self._plan(record_plan(self.out, self._settings, choose_samples))

    def _plan(self, samples_per_shard: int) -> ShardPlan:
        rows = order_rows(self.catalogue, self._order, self._seed)
        bounds = shard_bounds(self.catalogue, rows, self._order, samples_per_shard)
        return ShardPlan(self._settings, samples_per_shard, rows, bounds)

    def _lock(self, shards: range) -> FileLock:
        return FileLock(self.out / PARTS_FOLDER / _LOCK_FILE, shards, self.out)

    def _tasks(self, plan: ShardPlan) -> ShardTasks:
        return ShardTasks(self.catalogue, self.out, plan, self._max_skipped)

    def _write_missing(
        self, tasks: ShardTasks, shards: range, run_tasks: TaskRunner, progress: WriteProgress | None
    ) -> None:
        """Write the unfinished shards among ``shards``, and those that skipped a patch which is readable now."""
        tasks.remove_temporary_files(shards)
        missing: list[int] = []
        skipped: dict[str, str] = {}
        for index, part in tasks.read_parts(shards):
            if part is None or (part.skipped and tasks.has_repaired_patch(index, part)):
                tasks.discard(index)
                missing.append(index)
            else:
                skipped |= part.skipped
        if len(skipped) > self._max_skipped:
            raise too_many_skipped(skipped, self._max_skipped)
        parts = run_tasks(tasks, missing, accumulate_progress(progress, tasks.plan, shards, missing))
        for part in parts:
            skipped |= part.skipped
            if len(skipped) > self._max_skipped:
                parts.close()
                raise too_many_skipped(skipped, self._max_skipped)

    def _build_manifest(self, plan: ShardPlan) -> Manifest:
        build_manifest(
            self.out,
            [part_path(self.out, index) for index in range(len(plan))],
            self.catalogue.registry,
            list(self.catalogue.splits),
            dataset=self.catalogue.dataset,
            plan={**self._settings, "libraries": library_versions()},
            samples_per_shard=plan.samples_per_shard,
        )
        self._remove_parts()
        return Manifest.open(self.out)

    def _restore_lost(self, run_tasks: TaskRunner, progress: WriteProgress | None) -> Manifest:
        """Open the manifest of a complete folder and write its lost shards again."""
        samples_per_shard, library_differences = read_recorded_plan(self.out / DATASET_FILE, self._settings)
        manifest = Manifest.open(self.out)
        if find_lost_shards(manifest) or (self.out / PARTS_FOLDER).exists():
            plan = self._plan(samples_per_shard)
            with self._lock(range(len(plan))):
                lost = find_lost_shards(manifest)
                if lost:
                    on_progress = accumulate_progress(progress, plan, range(len(plan)), lost)
                    restore_shards(manifest, lost, self.catalogue, plan, library_differences, run_tasks, on_progress)
                self._remove_parts()
        return manifest

    def _remove_parts(self) -> None:
        """Remove the manifest parts, whose content the manifest now holds."""
        # A run that is just starting may create its lock file here; it then finds the folder complete and removes it.
        shutil.rmtree(self.out / PARTS_FOLDER, ignore_errors=True)

    def _missing_shards_message(self, missing: list[int], count: int) -> str:
        """Name the missing shards, and the slices to run again if all slices ran with the same N of ``--slice I/N``."""
        where = ""
        paths = (self.out / PARTS_FOLDER).glob(f"{_SLICES_PREFIX}*")
        counts = [path.name.removeprefix(_SLICES_PREFIX) for path in paths]
        if len(counts) == 1:
            slices = int(counts[0])
            incomplete = [
                number
                for number in range(1, slices + 1)
                if any(index in _slice_range(number, slices, count) for index in missing)
            ]
            where = f", in slices {_format_ranges(incomplete)} of {slices}"
        return (
            f"{self.out}: {len(missing):,} of {counted(count, 'shard')} not written yet: "
            f"{_format_ranges(missing)}{where}; run these slices again, then merge"
        )


def _task_runner(workers: int, scheduler: str | None) -> TaskRunner:
    if scheduler is not None:
        return partial(run_on_cluster, scheduler)
    return partial(run_locally, workers)


def _slice_range(number: int, slices: int, shards: int) -> range:
    return range(shards * (number - 1) // slices, shards * number // slices)


def _format_ranges(numbers: list[int]) -> str:
    """Format sorted numbers as ``0-3, 7``; a long list is cut."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ", ".join(texts[:_MAX_RANGES]) + (", ..." if len(texts) > _MAX_RANGES else "")
