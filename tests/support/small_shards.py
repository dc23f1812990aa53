"""Small catalogues for tests of sharding, and hashes of the files in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from small_tree import write_tree

from bocage.shards.source.flair_hub.tree import FlairHubCatalogue

KEYS = [f"D012-2019_AF-S1-27_{row}-{column}" for row in range(2) for column in range(3)]
SMALL = ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC"]


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def small(folder: Path, patches: int = 6) -> FlairHubCatalogue:
    """Write a tree of patches with three small rasters each to ``folder/tree`` and open its catalogue."""
    return FlairHubCatalogue.open(write_tree(folder / "tree", KEYS[:patches], SMALL))
