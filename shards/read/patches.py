"""Whole patches to be looked at once, as batches: from shards, or straight from a FLAIR-HUB tree."""

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
from bocage.shards.read.windows import WHOLE_PATCH
from bocage.shards.sample_seed import sample_seed
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.rasters import gdal_environment, read


@dataclass(frozen=True)
class PatchLocation:
    """Where a patch lies: EPSG code or WKT (empty without one), and its upper-left corner there."""

    key: str
    crs: str
    left: float
    top: float


class Patches(Protocol):
    """Patches by row."""

    @property
    def path(self) -> Path:
        """What they come from, for messages."""

    @property
    def registry(self) -> Registry:
        """The modalities that occur."""

    def __len__(self) -> int: ...

    def split(self, column: str, value: str) -> np.ndarray:
        """Rows whose split has a value, (N,) int64 ascending; every row for the column ``all``.

        Raises:
            InputError: there is no such column, or no such row.
        """

    def held(self, name: str) -> np.ndarray:
        """(patches,) bool: which have a modality, a series with at least one date."""

    def batches(
        self, rows: np.ndarray, modalities: Sequence[Modality], *, batch_size: int, workers: int
    ) -> Iterator[tuple[Batch, list[PatchLocation]]]:
        """Whole patches in the order of ``rows``, (N,) int64, and where they lie; the last batch may be short."""


class ShardPatches:
    """The samples of shards."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @property
    def path(self) -> Path:
        """The folder of the shards, or their address."""
        return self.manifest.path

    @property
    def registry(self) -> Registry:
        """The modalities of the shards."""
        return self.manifest.registry

    def __len__(self) -> int:
        return len(self.manifest)

    def split(self, column: str, value: str) -> np.ndarray:
        """See ``Patches``: (N,) int64."""
        return self.manifest.split(column, value)

    def held(self, name: str) -> np.ndarray:
        """See ``Patches``: (patches,) bool."""
        there: np.ndarray = self.manifest.column(f"length.{name}").to_numpy() > 0
        if self.registry[name].has_dates:
            counts = pc.fill_null(pc.list_value_length(self.manifest.column(f"dates.{name}")), 0).to_numpy()
            there = there & (counts > 0)
        return there

    def batches(
        self, rows: np.ndarray, modalities: Sequence[Modality], *, batch_size: int, workers: int
    ) -> Iterator[tuple[Batch, list[PatchLocation]]]:
        """See ``Patches``; ``rows`` are (N,) int64."""
        done = 0
        for batch in evaluation_batches(self.manifest, rows, modalities, batch_size=batch_size, workers=workers):
            found = [self.manifest.row(int(row)) for row in rows[done : done + len(batch)]]
            yield batch, [PatchLocation(row["key"], row["crs"] or "", row["left"], row["top"]) for row in found]
            done += len(batch)


class TreePatches:
    """The patches of a FLAIR-HUB tree, read in this process: enough to predict, too slow to train."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    @property
    def path(self) -> Path:
        """The folder of the tree."""
        return self.catalogue.root

    @property
    def registry(self) -> Registry:
        """The modalities that occur in the tree."""
        return self.catalogue.registry

    def __len__(self) -> int:
        return len(self.catalogue)

    def split(self, column: str, value: str) -> np.ndarray:
        """See ``Patches``: (N,) int64.

        Raises:
            InputError: there is no such column, or no such patch.
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

    def held(self, name: str) -> np.ndarray:
        """See ``Patches``: (patches,) bool."""
        return np.array([name in self.catalogue.patch(row).sources for row in range(len(self))])

    def batches(
        self, rows: np.ndarray, modalities: Sequence[Modality], *, batch_size: int, workers: int
    ) -> Iterator[tuple[Batch, list[PatchLocation]]]:
        """See ``Patches``; ``rows`` are (N,) int64, ``workers`` is not heeded."""
        for start in range(0, len(rows), batch_size):
            with gdal_environment():
                found = [self._read(int(row), modalities) for row in rows[start : start + batch_size]]
            yield collate([sample for sample, _ in found], modalities), [place for _, place in found]

    def _read(self, row: int, modalities: Sequence[Modality]) -> tuple[Sample, PatchLocation]:
        patch = self.catalogue.patch(row)
        arrays, dates, place = {}, {}, None
        for modality in modalities:
            if modality.name not in patch.sources:
                continue
            raster = read(patch.sources[modality.name], modality)
            arrays[modality.name] = raster.array
            place = place or PatchLocation(patch.key, raster.crs, raster.left, raster.top)
            if modality.has_dates:
                dates[modality.name] = days_since_may(patch.dates[modality.name])
        seed = sample_seed(0, 0, patch.key)
        sample = Sample(patch.key, patch.roi, seed, WHOLE_PATCH, arrays, dates)
        return sample, place or PatchLocation(patch.key, "", 0.0, 0.0)
