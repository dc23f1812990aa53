"""The interface of a catalogue: the patches of a dataset, before they are shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards.dataset_info import DatasetInfo
from bocage.shards.errors import InputError
from bocage.shards.modality import Modality, Registry
from bocage.shards.source.raster import Raster
from bocage.shards.source.report import CatalogueReport


class PatchSource(Protocol):
    """Where one raster of a patch is stored; ``str()`` gives its name for messages."""

    @property
    def container(self) -> Path:
        """Folder or archive that holds the raster: if it is gone, the whole source is, not just one raster."""

    def read_raster(self, modality: Modality) -> Raster:
        """Read the raster and check it against ``modality``.

        Raises:
            RasterError: the raster cannot be read, or contradicts ``modality``.
        """


Source_co = TypeVar("Source_co", bound=PatchSource, covariant=True)


@dataclass(frozen=True)
class Patch(Generic[Source_co]):
    """One patch: its files, dates and splits.

    Attributes:
        key: patch id, such as ``D012-2019_AF-S1-27_5-10``.
        domain: domain, such as ``D012-2019``.
        roi: region of interest, such as ``D012-2019/AF-S1-27``.
        sources: sources of the rasters by modality, in the registry's order, without missing modalities.
        dates: acquisition dates by modality, int32 days since 1970-01-01: (1,) for an image, (T,) for a series and its
            mask. Modalities with unknown dates are not listed. An unknown day of the month (``00``) becomes the first.
        splits: ``train``, ``valid``, ``test`` or None, by split name.
    """

    key: str
    domain: str
    roi: str
    sources: Mapping[str, Source_co]
    dates: dict[str, np.ndarray]
    splits: dict[str, str | None]


@dataclass(frozen=True)
class Catalogue(ABC):
    """Patches of a dataset, sorted by domain, region and key.

    Attributes:
        root: folder of the dataset.
        registry: modalities of the patches.
        splits: split value of each patch, a string or null, by split name.
    """

    root: Path
    registry: Registry
    splits: dict[str, pa.DictionaryArray]

    @property
    @abstractmethod
    def dataset(self) -> DatasetInfo:
        """Name, licence and origin of the dataset."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def patch(self, index: int) -> Patch[PatchSource]:
        """Patch at ``index``."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Keys of all patches, in the order of the catalogue."""

    @property
    @abstractmethod
    def domains(self) -> list[str]:
        """Names of the domains by their id."""

    @abstractmethod
    def domain_and_roi_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Domain id and ROI id of each patch, (patches,) int64 each; ROI ids are unique across domains."""

    @abstractmethod
    def report(self) -> CatalogueReport:
        """Counts by modality, and problems of the files."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of keys, modalities, dates and splits; the same for any location of the dataset."""

    def with_listed_split(self, name: str, lists: Mapping[str, tuple[str, Sequence[str]]]) -> Self:
        """A copy of the catalogue with another split, defined by lists of keys.

        The report counts the keys that are not in the dataset.

        Args:
            name: name of the split, which becomes a column of the manifest.
            lists: file that lists the patches of a value, for messages, and their keys; by value (``train``,
                ``valid``, ``test``).

        Raises:
            InputError: the name is taken or does not start with ``split_``; or a list holds no patch of this dataset,
                or a patch of another list.
        """
        self._check_new_split(name)
        keys = pa.array(self.keys(), pa.string())
        known = set(keys.to_pylist())
        values = list(lists)
        column = np.full(len(self), -1, np.int32)  # index into the values
        for code, (path, listed_keys) in enumerate(lists.values()):
            listed = pc.index_in(pa.array(listed_keys, pa.string()), value_set=keys).drop_null()
            rows = listed.to_numpy(zero_copy_only=False)
            if not len(rows):
                raise InputError(f"{path}: none of its patches is in {self.root}")
            assigned = rows[column[rows] >= 0]
            self.report().add_unknown_keys(path, listed_keys, known)
            if len(assigned):
                other = values[column[assigned[0]]]
                raise InputError(f"{path}: patch {keys[assigned[0]]} is listed as {other} and as {values[code]}")
            column[rows] = code
        split = pa.array(values, pa.string()).take(pa.array(column, mask=column < 0)).dictionary_encode()
        return replace(self, splits={**self.splits, name: split})

    def with_domain_split(self, name: str, domains: Mapping[str, Sequence[str]], rest: str | None = None) -> Self:
        """A copy of the catalogue with another split, defined by domain.

        Args:
            name: name of the split, which becomes a column of the manifest.
            domains: domain names like ``D012-2019``, by value (``train``, ``valid``, ``test``).
            rest: value for the patches of all other domains; None leaves them out of the split.

        Raises:
            InputError: the name is taken or does not start with ``split_``, or a domain is unknown or listed twice.
        """
        self._check_new_split(name)
        value_of: dict[str, str] = {}
        for value, listed in domains.items():
            for domain in listed:
                if domain not in self.domains:
                    raise InputError(f"{name}: domain {domain!r} is not in {self.root}")
                if value_of.setdefault(domain, value) != value:
                    raise InputError(f"{name}: domain {domain} is listed as {value_of[domain]} and as {value}")
        values = pa.array([value_of.get(domain, rest) for domain in self.domains], pa.string())
        column = values.take(pa.array(self.domain_and_roi_ids()[0])).dictionary_encode()
        return replace(self, splits={**self.splits, name: column})

    def _check_new_split(self, name: str) -> None:
        if name in self.splits or not name.startswith("split_"):
            raise InputError(
                f"split name {name!r}: must start with 'split_' and be new; taken: {', '.join(self.splits) or 'none'}"
            )
