"""Names of the files and members of a folder of shards."""

from __future__ import annotations

from pathlib import Path

MEMBER_EXTENSION = ".bin"
PARTS_FOLDER = "parts"


def shard_path(out: Path, index: int) -> Path:
    """The tar of shard ``index``."""
    return out / f"shard-{index:06d}.tar"


def part_path(out: Path, index: int) -> Path:
    """The manifest rows of shard ``index``, kept until the whole manifest is written."""
    return out / PARTS_FOLDER / f"shard-{index:06d}.parquet"


def member_name(key: str, modality: str) -> str:
    """Name of the member that holds the raster."""
    return f"{key}.{modality}{MEMBER_EXTENSION}"
