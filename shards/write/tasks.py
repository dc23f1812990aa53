"""Running the jobs of a plan, one for each shard, in this process or in several.

A job leaves its tar and then its part of the manifest, each under its final name only when whole. Whatever breaks off a
run therefore leaves finished shards and nothing else that counts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pyarrow as pa

from bocage.shards.errors import InputError
from bocage.shards.files import TEMPORARY_SUFFIX
from bocage.shards.format.shard_files import PARTS_FOLDER, part_path, shard_path
from bocage.shards.pool import Tick, WorkerKilledError, results
from bocage.shards.source.catalogue import Catalogue, Patch
from bocage.shards.source.raster_source import RasterError
from bocage.shards.source.rasters import gdal_environment
from bocage.shards.write.packing import ShardPart, ShardTask, encode_patch, read_part, write_shard
from bocage.shards.write.plan import ShardPlan

Progress = Callable[[int, int, int], None]
"""Called with patches done, patches in all, bytes of shards written by this run; may raise to stop."""

_NOT_WRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ENXIO),
)


class ShardTasks:
    """The planned shards; patches of a job are looked up only when it is asked for.

    Args:
        catalogue: where the patches come from.
        out: the folder of the shards.
        plan: which patches go into which shard.
        tolerated: unreadable patches that may be skipped in the whole dataset.
        left_out: keys of planned patches that shall not be in the shards.
    """

    def __init__(
        self, catalogue: Catalogue, out: Path, plan: ShardPlan, tolerated: int, left_out: Collection[str] = ()
    ) -> None:
        self.catalogue, self.out, self.plan, self.tolerated = catalogue, out, plan, tolerated
        self._left_out = left_out

    def __getitem__(self, index: int) -> ShardTask:
        rows = self.plan.rows[self.plan.bounds[index] : self.plan.bounds[index + 1]]
        patches = [self.catalogue.patch(int(row)) for row in rows]
        patches = [patch for patch in patches if patch.key not in self._left_out]
        registry, splits = self.catalogue.registry, list(self.catalogue.splits)
        return ShardTask(index, self.out, registry, splits, patches, self.tolerated)

    def parts(self, shards: range) -> Iterator[tuple[int, ShardPart | None]]:
        """The part of each of ``shards``, or None where it is not written."""
        # Folders are listed, not asked for each file: on NFS that is also what shows the files of other machines.
        names = {name for folder in (self.out, self.out / PARTS_FOLDER) for name in os.listdir(folder)}
        for index in shards:
            part, shard = part_path(self.out, index), shard_path(self.out, index)
            found = _part_or_none(part) if part.name in names and shard.name in names else None
            yield index, found if found is not None and found.shard.bytes == shard.stat().st_size else None

    def repaired(self, index: int, part: ShardPart) -> bool:
        """Whether a patch that a finished shard had to leave out can be read now."""
        return any(self._readable(patch) for patch in self[index].patches if patch.key in part.skipped)

    def _readable(self, patch: Patch) -> bool:
        try:
            with gdal_environment():
                encode_patch(patch, self.catalogue.registry)
        except RasterError:
            return False
        return True

    def discard(self, index: int) -> None:
        """Removes a shard, the part first: a tar without its part does not count."""
        part_path(self.out, index).unlink(missing_ok=True)
        shard_path(self.out, index).unlink(missing_ok=True)

    def remove_leftovers(self, shards: range) -> None:
        """Removes what killed processes left half-written of ``shards``."""
        stems = {shard_path(self.out, index).stem for index in shards}
        for folder in (self.out, self.out / PARTS_FOLDER):
            for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                if path.name.split(".")[0] in stems:
                    path.unlink(missing_ok=True)


TaskRunner = Callable[[ShardTasks, list[int], Tick], Generator[ShardPart, None, None]]
"""Writes the shards that the list names and yields their parts in any order; closed early, it stops the work. What it
ticks are patches done and bytes written."""


def counted(progress: Progress | None, plan: ShardPlan, shards: range, missing: list[int]) -> Tick:
    """A tick that passes ``progress`` on for ``shards``, of which only ``missing`` are to be written."""
    total = plan.patches(shards)
    state = [total - sum(plan.patches(range(index, index + 1)) for index in missing), 0]

    def tick(patches: int, written: int) -> None:
        state[0] += patches
        state[1] += written
        if progress is not None:
            progress(state[0], total, state[1])

    tick(0, 0)
    return tick


def _part_or_none(path: Path) -> ShardPart | None:
    try:
        return read_part(path)
    except (pa.ArrowException, ValueError, KeyError, TypeError):  # damaged: written again
        return None


@contextmanager
def faults_of(out: Path) -> Iterator[None]:
    """What the system refuses inside, where only ``out`` is written, becomes one sentence that names it.

    Readers of the source raise ``RasterError`` or ``InputError``, which pass; so do faults that name other files.

    Raises:
        InputError: the system refuses to write ``out``.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            blamed = error.errno in _NOT_WRITABLE
        else:
            named = Path(os.fsdecode(error.filename))
            blamed = out in (named, *named.parents) or named in out.parents
        if not blamed:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = " (is the file system mounted?)" if error.errno in (errno.ENOTCONN, errno.ESTALE) else ""
        raise InputError(
            f"{out}: cannot be written: {reason}{hint}; finished shards are kept, the same command resumes"
        ) from error


def check_source(root: Path, patches: Collection[Patch] = ()) -> None:
    """Check that the tree, and folders and zips of ``patches``, are there still.

    Where they are not, as when a disk is unmounted, no patch is to blame.

    Raises:
        InputError: the tree is empty or cannot be listed, or a folder or zip is gone.
    """
    try:
        with os.scandir(root) as entries:
            reason = None if next(entries, None) is not None else "it is empty"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is None:
        sources = [source for patch in patches for source in patch.sources.values()]
        holders = {source.path.parent if source.member is None else source.path for source in sources}
        lost = next((holder for holder in sorted(holders) if not holder.exists()), None)
        reason = None if lost is None else f"{lost} is not there any more"
    if reason is not None:
        raise InputError(
            f"{root}: the source is gone ({reason}); finished shards are kept, bring it back and run the same command"
        )


def run_job(job: ShardTask, root: Path, tick: Tick) -> ShardPart:
    """Writes one shard from the tree at ``root``.

    Raises:
        InputError: the shards' folder cannot be written, the tree is gone, or too many patches are unreadable.
    """

    def watched(patches: int, written: int) -> None:
        if written == 0:  # the patch was left out
            check_source(root, job.patches)
        tick(patches, written)

    try:
        with gdal_environment(), faults_of(job.out):
            return write_shard(job, watched)
    except InputError:
        check_source(root, job.patches)
        raise


def run_local(workers: int, jobs: ShardTasks, missing: list[int], tick: Tick) -> Generator[ShardPart, None, None]:
    """Parts of the shards ``missing`` as ``workers`` processes finish them; 1 works in this one, in order.

    Raises:
        InputError: as ``run_job``, or a worker was killed.
    """
    root = jobs.catalogue.root
    tasks = ((jobs[index], root) for index in missing)
    try:
        with closing(results(_run_task, tasks, min(workers, max(1, len(missing))), tick)) as parts:
            for _, part in parts:
                yield part
    except WorkerKilledError as error:
        raise InputError(f"{jobs.out}: {error}; finished shards are kept") from error


def _run_task(task: tuple[ShardTask, Path], tick: Tick) -> ShardPart:
    return run_job(*task, tick)
