"""Restore shards that a complete folder has lost, to the exact bytes that its manifest records."""

from __future__ import annotations

import os
import shutil

from bocage.shards.errors import InputError
from bocage.shards.files import fsync
from bocage.shards.format.manifest import Manifest
from bocage.shards.format.shard_files import PARTS_FOLDER, shard_path
from bocage.shards.pool import ProgressCallback
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.plan import ShardPlan
from bocage.shards.write.tasks import ShardTasks, TaskRunner

_STAGING_FOLDER = "restored"


def find_lost_shards(manifest: Manifest) -> list[int]:
    """Indices of the shards whose file is missing or has another size than the manifest records."""
    lost = []
    for index, shard in enumerate(manifest.shards):
        path = manifest.shard_path(index)
        if not path.is_file() or path.stat().st_size != shard.bytes:
            lost.append(index)
    return lost


def restore_shards(
    manifest: Manifest,
    lost: list[int],
    catalogue: Catalogue,
    plan: ShardPlan,
    library_differences: str,
    run_tasks: TaskRunner,
    on_progress: ProgressCallback,
) -> None:
    """Write the shards ``lost`` again.

    Args:
        manifest: manifest of the folder.
        lost: indices of the lost shards.
        catalogue: source that the shards were made from.
        plan: plan of the shards.
        library_differences: libraries whose version is not the one that wrote the shards, for messages; or empty.
        run_tasks: function that runs the tasks.
        on_progress: progress callback, see ``tasks.TaskRunner``.

    Raises:
        InputError: a patch is no longer readable, or a shard gets other bytes than the manifest records. That shard is
            then still missing.
    """
    # Shards are written to a staging folder first: in a complete folder, a shard has the recorded bytes or is missing.
    staging = manifest.path / PARTS_FOLDER / _STAGING_FOLDER
    shutil.rmtree(staging, ignore_errors=True)
    (staging / PARTS_FOLDER).mkdir(parents=True)
    # Tasks may skip every patch, so that an unreadable one is reported by the error below.
    tasks = ShardTasks(catalogue, staging, plan, len(plan.rows), excluded=manifest.skipped)
    parts = run_tasks(tasks, lost, on_progress)
    for part in parts:
        index = next(index for index in lost if shard_path(staging, index).name == part.shard.name)
        if part.skipped:
            parts.close()
            raise InputError(
                f"{next(iter(part.skipped.values()))}; {manifest.path / part.shard.name} contained this patch and "
                "cannot be restored without it: bring the file back and run the same command"
            )
        if part.shard.sha256 != manifest.shards[index].sha256:
            parts.close()
            cause = f"it was made with {library_differences}" if library_differences else "the source has changed"
            raise InputError(
                f"{manifest.path / part.shard.name}: cannot be restored, its bytes differ from the manifest: {cause}; "
                "shard into a new folder"
            )
        os.replace(shard_path(staging, index), manifest.shard_path(index))
        fsync(manifest.path)
