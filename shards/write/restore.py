"""Shards that a complete folder has lost are written again, to the very bytes that its manifest describes."""

from __future__ import annotations

import os
import shutil

from bocage.shards.errors import InputError
from bocage.shards.files import flush
from bocage.shards.format.manifest import Manifest
from bocage.shards.format.shard_files import PARTS_FOLDER, shard_path
from bocage.shards.pool import Tick
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.jobs import ShardTasks, TaskRunner
from bocage.shards.write.plan import ShardPlan

_ASIDE = "restored"


def lost_shards(manifest: Manifest) -> list[int]:
    """Indices of the shards that are not there, or not of the size that the manifest says."""
    lost = []
    for index, shard in enumerate(manifest.shards):
        path = manifest.shard_path(index)
        if not path.is_file() or path.stat().st_size != shard.bytes:
            lost.append(index)
    return lost


def restore(
    manifest: Manifest, lost: list[int], catalogue: Catalogue, plan: ShardPlan, others: str, run: TaskRunner, tick: Tick
) -> None:
    """Writes the shards ``lost``.

    Args:
        manifest: of the folder.
        lost: indices of shards.
        catalogue: the source that the shards were made from.
        plan: the one of the shards.
        others: which libraries here are not those that the shards were made with, for messages; or empty.
        run: runs jobs.
        tick: see ``jobs.TaskRunner``.

    Raises:
        InputError: a patch cannot be read any more, or a shard gets other bytes than the manifest says. That shard is
            then still missing.
    """
    # Written aside first: under its own name a shard of a complete folder is what the manifest says, or is not there.
    aside = manifest.path / PARTS_FOLDER / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    (aside / PARTS_FOLDER).mkdir(parents=True)
    # Every patch may fail to be read, so that the one that does is named here.
    jobs = ShardTasks(catalogue, aside, plan, len(plan.rows), left_out=manifest.skipped)
    parts = run(jobs, lost, tick)
    for part in parts:
        index = next(index for index in lost if shard_path(aside, index).name == part.shard.name)
        if part.skipped:
            parts.close()
            raise InputError(
                f"{next(iter(part.skipped.values()))}; {manifest.path / part.shard.name} held this patch and cannot be "
                "restored without it: bring the file back and run the same command"
            )
        if part.shard.sha256 != manifest.shards[index].sha256:
            parts.close()
            cause = f"it was made with {others}" if others else "the source is not what it was made from"
            raise InputError(
                f"{manifest.path / part.shard.name}: cannot be restored, its bytes are others than the manifest says: "
                f"{cause}; shard into a new folder"
            )
        os.replace(shard_path(aside, index), manifest.shard_path(index))
        flush(manifest.path)
