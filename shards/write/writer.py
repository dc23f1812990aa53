"""A catalogue to shards: plan, parallel packing, resume, slices of a cluster, manifest.

Every shard is one job, planned before anything is written, so bytes do not depend on the number of workers. A job
leaves its tar and then its part of the manifest (``parts/``), each under its final name only when whole. A run that is
broken off therefore leaves finished shards, and the same call goes on from there; ``dataset.json`` comes last.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import DATASET_FILE, Manifest
from bocage.shards.format.shard_files import PARTS_FOLDER, part_path
from bocage.shards.locks import FileLock
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.dask import run_cluster
from bocage.shards.write.estimate import Estimate, encode_sample
from bocage.shards.write.jobs import Progress, ShardTasks, TaskRunner, counted, faults_of, run_local
from bocage.shards.write.manifest_builder import assemble
from bocage.shards.write.packing import too_many_skipped
from bocage.shards.write.plan import (
    ShardPlan,
    WriteOrder,
    check_folder,
    cut,
    fitting_samples,
    libraries,
    order_rows,
    plan_path,
    record,
    recorded_size,
    settings_of,
)
from bocage.shards.write.restore import lost_shards, restore

_CLAIMS_FILE = "claims"
_LISTED = 20  # runs of numbers in a message
_SLICES = "slices-of-"  # a slice leaves an empty file of this name and its number of slices, for messages


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
    progress: Progress | None = None,
) -> Manifest:
    """Writes the patches of ``catalogue`` as WebDataset shards with a manifest into the folder ``out``.

    The arguments are those of ``Sharding`` and of ``Sharding.write``, which tell what is raised.
    """
    sharding = Sharding(
        catalogue,
        out,
        shard_bytes=shard_bytes,
        samples_per_shard=samples_per_shard,
        order=order,
        seed=seed,
        max_bad=max_bad,
    )
    return sharding.write(workers=workers, scheduler=scheduler, progress=progress)


class Sharding:
    """A catalogue, a folder and all that decides which bytes come to lie in it.

    Args:
        catalogue: what to write.
        out: a new or empty folder, or one of an earlier run.
        shard_bytes: how large a shard may become, roughly. A small dataset gets several smaller ones all the same, so
            that processes can share the work and readers can shuffle.
        samples_per_shard: number instead.
        order: see ``plan.order_rows``; with ``roi`` a ROI is not split unless it is larger than a shard.
        seed: of ``shuffled`` and ``stratified``.
        max_bad: share of the patches that may be unreadable; these are left out and listed in ``dataset.json``. One is
            always tolerated unless this is 0.
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
        self._order, self._seed, self._shard_bytes, self._samples = order, seed, shard_bytes, samples_per_shard
        self._settings = settings_of(catalogue, order, seed, shard_bytes, samples_per_shard)
        self._tolerated = max(1, int(max_bad * len(catalogue))) if max_bad > 0 else 0

    def write(self, *, workers: int = 1, scheduler: str | None = None, progress: Progress | None = None) -> Manifest:
        """Writes what is missing, then the manifest.

        Of an unfinished run of the same plan the missing shards are written, and those that had to leave out a patch
        that can be read now. Of a finished one only shards that were deleted or have another size, and they must get
        the hash that the manifest has for them.

        Args:
            workers: processes; 1 works in this one.
            scheduler: address of a Dask scheduler whose workers do it instead.
            progress: see ``Progress``.

        Raises:
            InputError: ``out`` belongs to something else or to another plan, is being written by another run or cannot
                be written to; the source has gone or too many patches are unreadable; a deleted shard cannot be
                rewritten to the same bytes; or a worker or the scheduler is lost.
        """
        with faults_of(self.out):
            if not self._complete:
                plan = self._planned()
                shards = range(len(plan))
                with self._claim(shards):
                    if not self._complete:  # another run may have finished it in between
                        self._write(self._jobs(plan), shards, _runner(workers, scheduler), progress)
                        return self._assembled(plan)
            return self._restored(_runner(workers, scheduler), progress)

    def write_slice(
        self,
        number: int,
        of: int,
        *,
        workers: int = 1,
        scheduler: str | None = None,
        progress: Progress | None = None,
    ) -> range:
        """Writes slice ``number``, from 1, ``of`` so many, and no manifest; the shards that make up the slice.

        Slices may run at the same time on any machines that share the folder.

        Raises:
            InputError: as ``write``; or the dataset is complete already.
        """
        with faults_of(self.out):
            if self._complete:
                raise InputError(f"{self.out}: is complete, there is nothing left for a slice")
            plan = self._planned()
            shards = _slice(number, of, len(plan))
            (self.out / PARTS_FOLDER / f"{_SLICES}{of}").touch()
            if shards:
                with self._claim(shards):
                    self._write(self._jobs(plan), shards, _runner(workers, scheduler), progress)
            return shards

    def merge(self) -> Manifest:
        """Joins what the slices wrote to the manifest.

        Raises:
            InputError: slices are missing, which are named; too many patches are unreadable; or ``out`` belongs to
                another plan, is being written or cannot be.
        """
        with faults_of(self.out):
            if self._complete:
                recorded_size(self.out / DATASET_FILE, self._settings)
                return Manifest.open(self.out)
            if not plan_path(self.out).is_file():
                raise InputError(f"{self.out}: no slice was written here; run `bocage shard SRC OUT --slice 1/N` first")
            plan = self._planned()
            with self._claim(range(len(plan))):
                parts = dict(self._jobs(plan).parts(range(len(plan))))
                missing = [index for index, part in parts.items() if part is None]
                if missing:
                    raise InputError(self._incomplete(missing, len(plan)))
                skipped = {key: why for part in parts.values() if part for key, why in part.skipped.items()}
                if len(skipped) > self._tolerated:
                    raise too_many_skipped(skipped, self._tolerated)
                return self._assembled(plan)

    def estimate(self) -> Estimate:
        """What ``write`` would do, from a few patches; writes nothing. Raises ``InputError`` where ``write`` would."""
        with faults_of(self.out):
            rows = order_rows(self.catalogue, self._order, self._seed)
            found = encode_sample(self.catalogue, rows)
            if self._complete:
                plan = self._plan(recorded_size(self.out / DATASET_FILE, self._settings)[0])
                missing = lost_shards(Manifest.open(self.out))
            elif plan_path(self.out).is_file():
                plan = self._plan(recorded_size(plan_path(self.out), self._settings)[0])
                missing = [index for index, part in self._jobs(plan).parts(range(len(plan))) if part is None]
            else:
                check_folder(self.out)
                plan = self._plan(self._samples or fitting_samples(len(rows), found.patch_bytes, self._shard_bytes))
                missing = list(range(len(plan)))
            waiting = sum(plan.patches(range(index, index + 1)) for index in missing)
            size = int(found.patch_bytes * len(rows))
            return Estimate(len(rows), len(plan), size, waiting, waiting * found.patch_seconds)

    @property
    def _complete(self) -> bool:
        return (self.out / DATASET_FILE).is_file()

    def _planned(self) -> ShardPlan:
        """The plan that the folder records, recorded now if it is new."""

        def size_of() -> int:
            if self._samples:
                return self._samples
            rows = order_rows(self.catalogue, self._order, self._seed)
            return fitting_samples(len(rows), encode_sample(self.catalogue, rows).patch_bytes, self._shard_bytes)

        return self._plan(record(self.out, self._settings, size_of))

    def _plan(self, size: int) -> ShardPlan:
        rows = order_rows(self.catalogue, self._order, self._seed)
        return ShardPlan(self._settings, size, rows, cut(self.catalogue, rows, self._order, size))

    def _claim(self, shards: range) -> FileLock:
        return FileLock(self.out / PARTS_FOLDER / _CLAIMS_FILE, shards, self.out)

    def _jobs(self, plan: ShardPlan) -> ShardTasks:
        return ShardTasks(self.catalogue, self.out, plan, self._tolerated)

    def _write(self, jobs: ShardTasks, shards: range, run: TaskRunner, progress: Progress | None) -> None:
        """Writes those of ``shards`` that are not finished."""
        jobs.remove_leftovers(shards)
        missing: list[int] = []
        skipped: dict[str, str] = {}
        for index, part in jobs.parts(shards):
            if part is None or (part.skipped and jobs.repaired(index, part)):
                jobs.discard(index)
                missing.append(index)
            else:
                skipped |= part.skipped
        if len(skipped) > self._tolerated:
            raise too_many_skipped(skipped, self._tolerated)
        parts = run(jobs, missing, counted(progress, jobs.plan, shards, missing))
        for part in parts:
            skipped |= part.skipped
            if len(skipped) > self._tolerated:
                parts.close()
                raise too_many_skipped(skipped, self._tolerated)

    def _assembled(self, plan: ShardPlan) -> Manifest:
        assemble(
            self.out,
            [part_path(self.out, index) for index in range(len(plan))],
            self.catalogue.registry,
            list(self.catalogue.splits),
            plan={**self._settings, "libraries": libraries()},
            samples_per_shard=plan.samples_per_shard,
        )
        self._remove_parts()
        return Manifest.open(self.out)

    def _restored(self, run: TaskRunner, progress: Progress | None) -> Manifest:
        """The manifest of a complete folder, whose lost shards are written again."""
        size, others = recorded_size(self.out / DATASET_FILE, self._settings)
        manifest = Manifest.open(self.out)
        if lost_shards(manifest) or (self.out / PARTS_FOLDER).exists():
            plan = self._plan(size)
            with self._claim(range(len(plan))):
                lost = lost_shards(manifest)
                if lost:
                    tick = counted(progress, plan, range(len(plan)), lost)
                    restore(manifest, lost, self.catalogue, plan, others, run, tick)
                self._remove_parts()
        return manifest

    def _remove_parts(self) -> None:
        """The manifest has taken over what the parts hold."""
        # Another run that just starts may put its claim there; it finds the folder complete and removes it.
        shutil.rmtree(self.out / PARTS_FOLDER, ignore_errors=True)

    def _incomplete(self, missing: list[int], count: int) -> str:
        """One sentence on what a merge lacks."""
        again = ""
        counts = [path.name.removeprefix(_SLICES) for path in (self.out / PARTS_FOLDER).glob(f"{_SLICES}*")]
        if len(counts) == 1:
            of = int(counts[0])
            slices = [
                number for number in range(1, of + 1) if any(index in _slice(number, of, count) for index in missing)
            ]
            again = f", in slices {_listed(slices)} of {of}"
        return (
            f"{self.out}: {len(missing)} of {count} shards are not written yet: {_listed(missing)}{again}; run these "
            "slices again, then merge"
        )


def _runner(workers: int, scheduler: str | None) -> TaskRunner:
    if scheduler is not None:
        return partial(run_cluster, scheduler)
    return partial(run_local, workers)


def _slice(number: int, of: int, shards: int) -> range:
    return range(shards * (number - 1) // of, shards * number // of)


def _listed(numbers: list[int]) -> str:
    """``0-3, 7``; a long list is cut."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(texts[:_LISTED]) + (", ..." if len(texts) > _LISTED else "")
