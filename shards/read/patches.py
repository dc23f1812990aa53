"""Read whole patches in batches, with their location, from shards or directly from the files of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.compute as pc

from bocage.shards.batch import Batch, Sample
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import EVERY_SAMPLE, Manifest
from bocage.shards.modality import Modality, Registry
from bocage.shards.read.collate import collate
from bocage.shards.read.dataset import days_since_may, evaluation_batches
from bocage.shards.read.windows import whole_patch
from bocage.shards.sample_seed import sample_seed
from bocage.shards.source.catalogue import Catalogue, Patch, PatchSource
from bocage.shards.source.patch_rasters import read_patch
from bocage.shards.source.raster import RasterError, gdal_environment
from bocage.shards.write.tasks import check_source


@dataclass(frozen=True)
class PatchLocation:
    """Position of a patch.

    Attributes:
        key: key of the patch.
        crs: coordinate reference system as EPSG code or WKT; empty if unknown.
        left: x coordinate of the upper-left corner, in the CRS.
        top: y coordinate of the upper-left corner, in the CRS.
        side: side of the patch, in units of the CRS.
    """

    key: str
    crs: str
    left: float
    top: float
    side: float


class Patches(Protocol):
    """Source of patches, addressed by row."""

    @property
    def path(self) -> Path:
        """Folder or address of the patches, for messages."""

    @property
    def registry(self) -> Registry:
        """Modalities of the patches."""

    @property
    def skipped(self) -> dict[str, str]:
        """Reason why a patch could not be read, by key, of the patches that ``batches`` has left out so far."""

    def __len__(self) -> int: ...

    def split(self, column: str, value: str) -> np.ndarray:
        """Rows with ``value`` in split ``column``, (N,) int64 ascending; every row for the column ``all``.

        Raises:
            InputError: the column does not exist, or no row has the value.
        """

    def has_modality(self, name: str) -> np.ndarray:
        """Whether each patch has modality ``name``, (patches,) bool; a series counts if it has at least one date."""

    def batches(
        self, rows: np.ndarray, modalities: Sequence[Modality], *, batch_size: int, workers: int
    ) -> Iterator[tuple[Batch, list[PatchLocation]]]:
        """Read whole patches and their locations in the order of ``rows``, (N,) int64.

        The last batch may be short, and batches from files lack the patches that cannot be read.
        """


class ShardPatches:
    """Patches of shards.

    Args:
        manifest: an open manifest.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @property
    def path(self) -> Path:
        """Folder or address of the shards."""
        return self.manifest.path

    @property
    def registry(self) -> Registry:
        """Modalities of the shards."""
        return self.manifest.registry

    @property
    def skipped(self) -> dict[str, str]:
        """See ``Patches``: empty, because an unreadable shard is an error."""
        return {}

    def __len__(self) -> int:
        return len(self.manifest)

    def split(self, column: str, value: str) -> np.ndarray:
        """See ``Patches``: (N,) int64."""
        return self.manifest.split(column, value)

    def has_modality(self, name: str) -> np.ndarray:
        """See ``Patches``: (patches,) bool."""
        present: np.ndarray = self.manifest.column(f"length.{name}").to_numpy() > 0
        if self.registry[name].has_time_axis:
            counts = pc.fill_null(pc.list_value_length(self.manifest.column(f"dates.{name}")), 0).to_numpy()
            present = present & (counts > 0)
        return present

    def batches(
        self, rows: np.ndarray, modalities: Sequence[Modality], *, batch_size: int, workers: int
    ) -> Iterator[tuple[Batch, list[PatchLocation]]]:
        """See ``Patches``; ``rows`` are (N,) int64."""
        done = 0
        for batch in evaluation_batches(self.manifest, rows, modalities, batch_size=batch_size, workers=workers):
            records = [self.manifest.row(int(row)) for row in rows[done : done + len(batch)]]
            yield (
                batch,
                [PatchLocation(row["key"], row["crs"] or "", row["left"], row["top"], row["side"]) for row in records],
            )
            done += len(batch)


class TreePatches:
    """Patches of a dataset that is not sharded, read in this process: fast enough to predict, too slow to train.

    Args:
        catalogue: catalogue of a FLAIR-HUB tree or of a described dataset.

    Attributes:
        skipped: see ``Patches``.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.skipped: dict[str, str] = {}

    @property
    def path(self) -> Path:
        """Folder of the tree."""
        return self.catalogue.root

    @property
    def registry(self) -> Registry:
        """Modalities of the tree."""
        return self.catalogue.registry

    def __len__(self) -> int:
        return len(self.catalogue)

    def split(self, column: str, value: str) -> np.ndarray:
        """See ``Patches``: (N,) int64.

        Raises:
            InputError: the column does not exist, or no patch has the value.
        """
        if column == EVERY_SAMPLE:
            return np.arange(len(self), dtype=np.int64)
        splits = self.catalogue.splits
        if column not in splits:
            raise InputError(f"{self.path}: no split {column!r}; splits: {', '.join(splits) or 'none'}")
        rows = np.flatnonzero(pc.fill_null(pc.equal(splits[column].cast("string"), value), False).to_numpy(False))
        if len(rows) == 0:
            raise InputError(f"{self.path}: no patch has {column} = {value!r}")
        return rows.astype(np.int64)

    def has_modality(self, name: str) -> np.ndarray:
        """See ``Patches``: (patches,) bool."""
        return np.array([name in self.catalogue.patch(row).sources for row in range(len(self))])

    def batches(
        self, rows: np.ndarray, modalities: Sequence[Modality], *, batch_size: int, workers: int
    ) -> Iterator[tuple[Batch, list[PatchLocation]]]:
        """See ``Patches``; ``rows`` are (N,) int64, ``workers`` is ignored.

        Raises:
            InputError: the source is gone.
        """
        for start in range(0, len(rows), batch_size):
            found = [self._read_or_skip(int(row), modalities) for row in rows[start : start + batch_size]]
            if patches := [patch for patch in found if patch is not None]:
                yield collate([sample for sample, _ in patches], modalities), [location for _, location in patches]

    def _read_or_skip(self, row: int, modalities: Sequence[Modality]) -> tuple[Sample, PatchLocation] | None:
        """The patch and its location; None if it cannot be read."""
        patch = self.catalogue.patch(row)
        try:
            with gdal_environment():
                return self._read(patch, modalities)
        except RasterError as error:
            check_source(self.catalogue.root, [patch])
            self.skipped[patch.key] = str(error)
            return None

    def _read(self, patch: Patch[PatchSource], modalities: Sequence[Modality]) -> tuple[Sample, PatchLocation]:
        rasters, reference = read_patch(patch, self.registry, modalities)
        arrays = {name: raster.array for name, raster in rasters.items()}
        dates = {name: days_since_may(patch.dates[name]) for name in rasters if self.registry[name].has_time_axis}
        location = PatchLocation(patch.key, reference.crs, reference.left, reference.top, reference.side)
        seed = sample_seed(0, 0, patch.key)
        sample = Sample(patch.key, patch.roi, seed, whole_patch(modalities[0]), arrays, dates)
        return sample, location
