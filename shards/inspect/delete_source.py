"""Delete the zips of a FLAIR-HUB tree whose rasters are all in verified shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards.errors import InputError
from bocage.shards.format.codec import CODECS
from bocage.shards.format.manifest import DATASET_FILE, Manifest
from bocage.shards.inspect.verify import Progress, verify
from bocage.shards.source.flair_hub import naming, zips
from bocage.shards.source.flair_hub.metadata import METADATA_FOLDER
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue

_ZIP = ".zip"


@dataclass(frozen=True)
class SourceZips:
    """Zips of a tree, divided by whether the shards replace them.

    Attributes:
        deletable: zips whose rasters are all in the shards, with their size in bytes.
        kept: reason why a zip must stay, by path.
    """

    deletable: dict[Path, int]
    kept: dict[Path, str]

    def delete(self) -> None:
        """Delete the deletable zips.

        Raises:
            InputError: a zip cannot be deleted; the zips before it are deleted.
        """
        for path in self.deletable:
            try:
                path.unlink()
            except OSError as error:
                raise InputError(f"{path}: cannot be deleted: {error.strerror}; delete it by hand") from error


def replaced_zips(
    catalogue: FlairHubCatalogue, shards: Path, *, workers: int = 1, progress: Progress | None = None
) -> SourceZips:
    """Verify shards, decoding every sample, and find the zips of their source that they replace. Nothing is deleted.

    A zip is replaced if every file in it is a raster that the shards hold, without loss, for every patch of the
    raster. Folders, links, metadata, and zips that were not read for these shards always stay, and so do zips that
    changed after the shards were written.

    Args:
        catalogue: source of the shards.
        shards: folder of the shards, complete.
        workers: number of processes that verify.
        progress: progress callback of the verification.

    Raises:
        InputError: the shards are not sound, or cannot be verified.
    """
    found = verify(shards, decode=None, workers=workers, progress=progress)
    if not found.sound:
        raise InputError(f"{shards}: {found.broken[0]} is broken, so nothing was deleted; see `bocage verify {shards}`")
    manifest = Manifest.open(shards)
    stored = catalogue.stored_by_zip(_stored_rasters(catalogue, manifest))
    lossy = {name for name, modality in manifest.registry.items() if _is_lossy(modality.codec)}
    written = (shards / DATASET_FILE).stat().st_mtime
    deletable: dict[Path, int] = {}
    kept: dict[Path, str] = {}
    for path in _zips(catalogue.root):
        reason = _reason_to_keep(path, stored, lossy, written)
        if reason:
            kept[path] = reason
        else:
            deletable[path] = path.stat().st_size
    return SourceZips(deletable, kept)


def _stored_rasters(catalogue: FlairHubCatalogue, manifest: Manifest) -> np.ndarray:
    """Whether the shards hold each raster, (patches, modalities) bool in the order of the catalogue."""
    stored = np.zeros((len(catalogue), len(catalogue.registry)), bool)
    keys = pa.array(catalogue.keys(), pa.string())
    names = [name for name in catalogue.registry if name in manifest.registry]
    columns = [list(catalogue.registry).index(name) for name in names]
    for batch in manifest.batches(["key", *(f"length.{name}" for name in names)]):
        rows = pc.fill_null(pc.index_in(batch["key"], value_set=keys), -1).to_numpy(zero_copy_only=False)
        for name, column in zip(names, columns):
            lengths = batch[f"length.{name}"].to_numpy(zero_copy_only=False)
            stored[rows[(rows >= 0) & (lengths > 0)], column] = True
    return stored


def _is_lossy(codec: str) -> bool:
    return any(step["id"] == "round" for step in CODECS[codec].transforms)


def _zips(root: Path) -> Iterator[Path]:
    """Zips directly in ``root``, by name."""
    yield from sorted(path for path in root.iterdir() if path.suffix == _ZIP and (path.is_file() or path.is_symlink()))


def _reason_to_keep(path: Path, stored: dict[str, int], lossy: set[str], written: float) -> str:
    """Reason why the zip must stay; empty if the shards replace it."""
    match = naming.FOLDER.fullmatch(path.stem)
    if path.is_symlink():
        return "is a link"
    if path.stem == METADATA_FOLDER:
        return "metadata"
    if match is None:
        return "not a zip of one modality"
    if path.name not in stored:
        return "not read for these shards"
    if path.stat().st_mtime > written:
        return "changed after the shards were written"
    if match["modality"] in lossy:
        return "the shards hold rounded values"
    if stored[path.name] < sum(1 for _ in zips.members(path)):
        return "the shards lack some of its files"
    return ""
