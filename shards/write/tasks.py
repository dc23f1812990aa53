"""Run the shard tasks of a plan, in this process or in several.

A task writes its tar, then its manifest part. Each file appears under its final name only when complete, so an
interrupted run leaves finished shards and temporary files, never a damaged shard that counts as finished.
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
from bocage.shards.pool import ProgressCallback, WorkerKilledError, run_in_pool
from bocage.shards.source.catalogue import Catalogue, Patch, PatchSource
from bocage.shards.source.raster import RasterError, gdal_environment
from bocage.shards.write.packing import ManifestPart, ShardTask, encode_patch, read_part, write_shard
from bocage.shards.write.plan import ShardPlan

WriteProgress = Callable[[int, int, int], None]
"""Callback with the patches done, the total number of patches, and the bytes that this run wrote. May raise to stop."""

_WRITE_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ENXIO),
)


class ShardTasks:
    """The tasks of a plan by shard index, and the state of their files in the output folder.

    The patches of a task are looked up in the catalogue only when the task is requested.

    Args:
        catalogue: source of the patches.
        out: folder of the shards.
        plan: assignment of patches to shards.
        max_skipped: number of unreadable patches that may be skipped in the whole dataset.
        excluded: keys of planned patches to leave out of the shards.
    """

    def __init__(
        self, catalogue: Catalogue, out: Path, plan: ShardPlan, max_skipped: int, excluded: Collection[str] = ()
    ) -> None:
        self.catalogue, self.out, self.plan, self.max_skipped = catalogue, out, plan, max_skipped
        self._excluded = excluded

    def __getitem__(self, index: int) -> ShardTask:
        rows = self.plan.rows[self.plan.bounds[index] : self.plan.bounds[index + 1]]
        patches = [self.catalogue.patch(int(row)) for row in rows]
        patches = [patch for patch in patches if patch.key not in self._excluded]
        registry, splits = self.catalogue.registry, list(self.catalogue.splits)
        return ShardTask(index, self.out, registry, splits, patches, self.max_skipped)

    def read_parts(self, shards: range) -> Iterator[tuple[int, ManifestPart | None]]:
        """Read the manifest part of each of ``shards``; None if the shard is not finished."""
        # Listing the folders, unlike a stat of each file, also shows the files of other machines on NFS.
        names = {name for folder in (self.out, self.out / PARTS_FOLDER) for name in os.listdir(folder)}
        for index in shards:
            part_file, shard_file = part_path(self.out, index), shard_path(self.out, index)
            part = _read_part_or_none(part_file) if part_file.name in names and shard_file.name in names else None
            yield index, part if part is not None and part.shard.bytes == shard_file.stat().st_size else None

    def has_repaired_patch(self, index: int, part: ManifestPart) -> bool:
        """Whether a patch that a finished shard skipped is readable now."""
        return any(self._is_readable(patch) for patch in self[index].patches if patch.key in part.skipped)

    def _is_readable(self, patch: Patch[PatchSource]) -> bool:
        try:
            with gdal_environment():
                encode_patch(patch, self.catalogue.registry)
        except RasterError:
            return False
        return True

    def discard(self, index: int) -> None:
        """Remove a shard. The part goes first, because a tar without its part does not count as finished."""
        part_path(self.out, index).unlink(missing_ok=True)
        shard_path(self.out, index).unlink(missing_ok=True)

    def remove_temporary_files(self, shards: range) -> None:
        """Remove the temporary files of ``shards`` that killed processes left."""
        stems = {shard_path(self.out, index).stem for index in shards}
        for folder in (self.out, self.out / PARTS_FOLDER):
            for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                if path.name.split(".")[0] in stems:
                    path.unlink(missing_ok=True)


TaskRunner = Callable[[ShardTasks, list[int], ProgressCallback], Generator[ManifestPart, None, None]]
"""Writes the shards with the given indices and yields their manifest parts in any order. Closing the generator early
stops the work. Its progress callback receives the patches done and bytes written since the last call."""


def accumulate_progress(
    progress: WriteProgress | None, plan: ShardPlan, shards: range, missing: list[int]
) -> ProgressCallback:
    """Make a progress callback that sums up its counts and passes the totals to ``progress``.

    Args:
        progress: callback, or None.
        plan: plan of the shards.
        shards: shards of this run; their patches make up the total.
        missing: shards among them that are still to be written; the patches of the others count as done.
    """
    total = plan.count_patches(shards)
    done = total - sum(plan.count_patches(range(index, index + 1)) for index in missing)
    bytes_written = 0

    def on_progress(patches: int, written: int) -> None:
        nonlocal done, bytes_written
        done += patches
        bytes_written += written
        if progress is not None:
            progress(done, total, bytes_written)

    on_progress(0, 0)
    return on_progress


def _read_part_or_none(path: Path) -> ManifestPart | None:
    try:
        return read_part(path)
    except (pa.ArrowException, ValueError, KeyError, TypeError):  # a damaged part: the shard is written again
        return None


@contextmanager
def explain_write_errors(out: Path) -> Iterator[None]:
    """Turn an ``OSError`` about the folder ``out`` into an ``InputError`` that names it.

    The context must write nothing but ``out``. Other exceptions pass: readers of the source raise ``RasterError`` or
    ``InputError``, and an ``OSError`` that names a file elsewhere is not about ``out``.

    Raises:
        InputError: the operating system cannot write ``out``.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            concerns_out = error.errno in _WRITE_ERRNOS
        else:
            path = Path(os.fsdecode(error.filename))
            concerns_out = out in (path, *path.parents) or path in out.parents
        if not concerns_out:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = " (is the file system mounted?)" if error.errno in (errno.ENOTCONN, errno.ESTALE) else ""
        raise InputError(
            f"{out}: cannot be written: {reason}{hint}; finished shards are kept; run the same command to resume"
        ) from error


def check_source(root: Path, patches: Collection[Patch[PatchSource]] = ()) -> None:
    """Check that the source tree, and the folders and zips of ``patches``, still exist.

    This distinguishes an unmounted disk from unreadable patches.

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
        containers = {source.container for source in sources}
        missing = next((container for container in sorted(containers) if not container.exists()), None)
        reason = None if missing is None else f"{missing} no longer exists"
    if reason is not None:
        raise InputError(
            f"{root}: the source is gone ({reason}); finished shards are kept; bring it back and run the same command"
        )


def run_task(task: ShardTask, root: Path, on_progress: ProgressCallback) -> ManifestPart:
    """Write one shard from the tree at ``root``.

    Raises:
        InputError: the output folder cannot be written, the source is gone, or too many patches are unreadable.
    """

    def check_and_report(patches: int, written: int) -> None:
        if written == 0:  # the patch was skipped
            check_source(root, task.patches)
        on_progress(patches, written)

    try:
        with gdal_environment(), explain_write_errors(task.out):
            return write_shard(task, check_and_report)
    except InputError:
        check_source(root, task.patches)
        raise


def run_locally(
    workers: int, tasks: ShardTasks, missing: list[int], on_progress: ProgressCallback
) -> Generator[ManifestPart, None, None]:
    """Write the shards ``missing`` in ``workers`` processes and yield their parts as they finish.

    With one worker the tasks run in this process, in order.

    Raises:
        InputError: a task fails (see ``run_task``), or a worker process was killed.
    """
    root = tasks.catalogue.root
    jobs = ((tasks[index], root) for index in missing)
    try:
        with closing(run_in_pool(_run_job, jobs, min(workers, max(1, len(missing))), on_progress)) as results:
            for _, part in results:
                yield part
    except WorkerKilledError as error:
        raise InputError(f"{tasks.out}: {error}; finished shards are kept") from error


def _run_job(job: tuple[ShardTask, Path], on_progress: ProgressCallback) -> ManifestPart:
    return run_task(*job, on_progress)
