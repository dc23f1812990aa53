"""Catalogue of the patches of a FLAIR-HUB tree, stored as folders, as the hub's zips, or as a mix of both.

It keeps NumPy and Arrow columns rather than a Python object per patch, and computes paths and keys on demand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from bocage.shards.dataset_info import FLAIR_HUB_INFO, DatasetInfo
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Registry
from bocage.shards.source.catalogue import Catalogue, Patch
from bocage.shards.source.flair_hub import metadata, naming
from bocage.shards.source.flair_hub.metadata import Dates
from bocage.shards.source.flair_hub.naming import DOMAIN_SHIFT as _DOMAIN_SHIFT
from bocage.shards.source.flair_hub.naming import ROI_SHIFT as _ROI_SHIFT
from bocage.shards.source.flair_hub.rasters import RasterSource
from bocage.shards.source.flair_hub.scan import PatchTable, Scan, has_flair_hub_names, join_rasters
from bocage.shards.source.flair_hub.zips import ZipMember
from bocage.shards.source.report import CatalogueReport

_MAX_EXAMPLES = 5
_HASH_CHUNK = 1 << 16  # patches


@dataclass(frozen=True)
class FlairHubCatalogue(Catalogue):
    """Patches of a FLAIR-HUB tree, sorted by domain, ROI, row and column; see ``Catalogue``."""

    _domains: list[str]
    _rois: list[str]
    _codes: np.ndarray  # (patches,) int64 patch codes, see naming
    _presence: np.ndarray  # (patches,) uint64, bit k for the k-th modality of the registry
    _entry_index: np.ndarray  # (patches, modalities) int32 into the zip entries; -1 for a file in a folder, or no file
    _zip_entries: np.ndarray  # (rasters in zips,) scan.ZIP_ENTRY
    _zips: list[str]
    _dates: dict[str, Dates]
    _report: CatalogueReport

    @classmethod
    def open(
        cls, root: str | Path, registry: Registry = FLAIR_HUB, modalities: tuple[str, ...] | list[str] | None = None
    ) -> FlairHubCatalogue:
        """Open the catalogue of the tree at ``root``.

        Missing, duplicate or unreadable rasters are no error; ``report`` counts them.

        Args:
            root: folder that holds folders like ``D012-2019_AERIAL_RGBI``, zips of these names, or a mix of both, and
                optionally ``GLOBAL_ALL_MTD`` or its zip.
            registry: modalities to look for.
            modalities: names of the modalities to keep; None keeps all.

        Raises:
            InputError: the folder does not exist or holds no patch, a modality is unknown, or metadata cannot be read.
        """
        root = Path(root)
        if modalities is not None:
            registry = registry.subset(modalities)
        report = CatalogueReport()
        scan = Scan(root, registry, report)
        patches = join_rasters(scan, registry, report)
        keys = pa.array(naming.patch_keys(patches.domains, patches.rois, patches.codes), pa.string())
        dates = _read_dates(root, registry, keys, report)
        _drop_unusable(patches.presence, registry, dates, report)
        split_file = metadata.find_table(root, metadata.SPLIT_FILE)
        splits = metadata.read_splits(split_file, keys) if split_file else {}
        return _remove_unused(root, registry, patches, scan.zips, dates, splits, report)

    @property
    def dataset(self) -> DatasetInfo:
        """Name, licence and origin of FLAIR-HUB."""
        return FLAIR_HUB_INFO

    @property
    def domains(self) -> list[str]:
        """Names of the domains by their id."""
        return self._domains

    def __len__(self) -> int:
        return len(self._codes)

    def patch(self, index: int) -> Patch[RasterSource]:
        """Patch at ``index``."""
        domain_index, roi_index, cell = naming.unpack_code(int(self._codes[index]))
        domain, roi = self._domains[domain_index], self._rois[roi_index]
        sources, dates = {}, {}
        for bit, modality in enumerate(self.registry.values()):
            if int(self._presence[index]) >> bit & 1:
                folder = naming.modality_folder(domain, modality)
                sources[modality.name] = self._source(folder, naming.raster_file(folder, roi, cell), index, bit)
                days = self._dates[modality.name].of_patch(index) if modality.name in self._dates else None
                if days is not None:
                    dates[modality.name] = days
        return Patch(
            key=f"{domain}_{roi}_{cell}",
            domain=domain,
            roi=f"{domain}/{roi}",
            sources=sources,
            dates=dates,
            splits={name: column[index].as_py() for name, column in self.splits.items()},
        )

    def _source(self, folder: str, file: str, index: int, bit: int) -> RasterSource:
        entry_index = self._entry_index[index, bit]
        if entry_index < 0:
            return RasterSource(self.root / folder / file)
        entry = self._zip_entries[entry_index]
        name = f"{folder}/{file}" if entry["nested"] else file
        offset, stored, size, crc, method = (
            int(entry[field]) for field in ("offset", "stored", "size", "crc", "method")
        )
        return RasterSource(
            self.root / self._zips[entry["zip"]], ZipMember(name.encode(), offset, stored, size, crc, method)
        )

    def keys(self) -> list[str]:
        """Keys of all patches, in the order of the catalogue."""
        return naming.patch_keys(self._domains, self._rois, self._codes)

    def domain_and_roi_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Domain id and ROI id of each patch, (patches,) int64 each; ROI ids are unique across domains."""
        return self._codes >> _DOMAIN_SHIFT, self._codes >> _ROI_SHIFT

    def report(self) -> CatalogueReport:
        """Counts by modality, and missing, undated and unparsable files."""
        return self._report

    def stored_by_zip(self, stored: np.ndarray) -> dict[str, int]:
        """Number of rasters that shards hold, by file name of the zip.

        A raster of several patches, such as a historical one, counts if the shards hold it for all of them.

        Args:
            stored: (patches, modalities) bool, whether the shards hold the raster of a patch, in the catalogue's order.
        """
        bits = np.arange(len(self.registry), dtype=np.uint64)
        wanted = (self._presence[:, None] >> bits & np.uint64(1)).astype(bool) & (self._entry_index >= 0)
        is_stored = np.zeros(len(self._zip_entries), bool)
        is_stored[self._entry_index[wanted & stored]] = True
        is_stored[self._entry_index[wanted & ~stored]] = False
        counts = np.bincount(self._zip_entries["zip"][is_stored], minlength=len(self._zips))
        return dict(zip(self._zips, counts.tolist()))

    def with_csv_split(self, name: str, files: Mapping[str, str | Path]) -> Self:
        """A copy of the catalogue with another split, defined by CSV files of the official code.

        Args:
            name: name of the split, which becomes a column of the manifest.
            files: CSV that lists the patches of a value, by value (``train``, ``valid``, ``test``).

        Raises:
            InputError: a CSV cannot be read, or the split cannot be made, see ``with_listed_split``.
        """
        return self.with_listed_split(name, {value: (str(path), read_csv_split(path)) for value, path in files.items()})

    def fingerprint(self) -> str:
        """SHA-256 of keys, modalities, dates and splits; the same for any location of the tree, zipped or not."""
        digest = hashlib.sha256()
        registry = [modality.to_json() for modality in self.registry.values()]
        digest.update(json.dumps([registry, self._domains, self._rois]).encode())
        for array in (self._codes, self._presence):
            digest.update(array.tobytes())
        for name, dates in self._dates.items():
            digest.update(name.encode())
            for array in (dates.days, dates.bounds, dates.index):
                digest.update(array.tobytes())
        for name, column in self.splits.items():
            digest.update(name.encode())
            for start in range(0, len(column), _HASH_CHUNK):
                digest.update(json.dumps(column.slice(start, _HASH_CHUNK).to_pylist()).encode())
        return digest.hexdigest()


def read_csv_split(path: str | Path) -> list[str]:
    """Read the keys of the patches in a split CSV of the official code.

    Raises:
        InputError: the file cannot be read as such a CSV, or a line holds no path of a patch.
    """
    keys = []
    for number, row in enumerate(metadata.read_csv_paths(Path(path)), start=2):
        key = next((key for cell in row if (key := naming.key_from_path(cell)) is not None), None)
        if key is None:
            raise InputError(f"{path}, line {number}: no column holds the path of a patch's GeoTIFF")
        keys.append(key)
    return keys


def _drop_unusable(presence: np.ndarray, registry: Registry, dates: dict[str, Dates], report: CatalogueReport) -> None:
    """Remove series without dates and masks without series from ``presence``, and count them."""
    bits = {name: np.uint64(1 << bit) for bit, name in enumerate(registry)}
    # Models need the date of every image of a series, so a series without dates counts as missing.
    for modality in registry.values():
        if modality.has_time_axis:
            is_dated = dates[modality.name].index >= 0 if modality.name in dates else np.zeros(len(presence), bool)
            undated = ((presence & bits[modality.name]) != 0) & ~is_dated
            presence[undated] &= ~bits[modality.name]
            if undated.any():
                report.undated[modality.name] = int(undated.sum())
    # A quality mask takes its dates from its series.
    for mask in registry.by_role("mask"):
        assert mask.mask_of is not None
        without_series = ((presence & bits[mask.name]) != 0) & ((presence & bits[mask.mask_of]) == 0)
        presence[without_series] &= ~bits[mask.name]
        if without_series.any():
            report.masks_without_series[mask.name] = int(without_series.sum())


def _remove_unused(
    root: Path,
    registry: Registry,
    patches: PatchTable,
    zips: list[str],
    dates: dict[str, Dates],
    splits: dict[str, pa.DictionaryArray],
    report: CatalogueReport,
) -> FlairHubCatalogue:
    """The catalogue without empty patches, and without modalities, domains and ROIs that do not occur."""
    rows = np.flatnonzero(patches.presence)
    if len(rows) == 0:
        raise InputError(_explain_empty(root, report))
    domains, domain_of = np.unique(patches.codes[rows] >> _DOMAIN_SHIFT, return_inverse=True)
    rois, roi_of = np.unique(patches.codes[rows] >> _ROI_SHIFT & naming.MAX_ROIS - 1, return_inverse=True)
    codes = domain_of << _DOMAIN_SHIFT | roi_of << _ROI_SHIFT | patches.codes[rows] & (1 << _ROI_SHIFT) - 1
    names = ([patches.domains[index] for index in domains], [patches.rois[index] for index in rois])
    occurring: list[str] = []
    columns: list[int] = []
    presence = np.zeros(len(rows), np.uint64)
    for bit, name in enumerate(registry):
        has_modality = (patches.presence[rows] & np.uint64(1 << bit)) != 0
        report.present[name] = int(has_modality.sum())
        if report.present[name]:
            presence |= has_modality.astype(np.uint64) << np.uint64(len(occurring))
            occurring.append(name)
            columns.append(bit)
        if 0 < report.present[name] < len(rows):
            missing = np.flatnonzero(~has_modality)
            report.missing_examples[name] = naming.patch_keys(*names, codes[missing[:_MAX_EXAMPLES]])
    report.patches = len(rows)
    return FlairHubCatalogue(
        root=root,
        registry=registry.subset(occurring),
        splits={name: column.take(pa.array(rows)) for name, column in splits.items()},
        _domains=names[0],
        _rois=names[1],
        _codes=codes,
        _presence=presence,
        _entry_index=patches.entry_index[rows][:, columns],
        _zip_entries=patches.zip_entries,
        _zips=zips,
        _dates={name: replace(dates[name], index=dates[name].index[rows]) for name in occurring if name in dates},
        _report=report,
    )


def _read_dates(root: Path, registry: Registry, keys: pa.Array, report: CatalogueReport) -> dict[str, Dates]:
    """Read dates by modality; a mask has those of its series."""
    dates: dict[str, Dates] = {}
    for modality in registry.values():
        if modality.dates_table is None:
            continue
        table = metadata.find_table(root, f"GLOBAL_{modality.dates_table}_MTD_DATES.gpkg")
        if table is not None:
            dates[modality.name] = metadata.read_dates(table, modality, keys)
            report.duplicate_rows += dates[modality.name].duplicates
            report.unreadable_dates += dates[modality.name].unreadable
    for modality in registry.values():
        if modality.mask_of in dates:
            dates[modality.name] = dates[modality.mask_of]
    return dates


def _explain_empty(root: Path, report: CatalogueReport) -> str:
    """Message on why ``root`` holds no patch and which folder to give instead."""
    expected = "expected folders like D012-2019_AERIAL_RGBI/AF-S1-27/D012-2019_AERIAL_RGBI_AF-S1-27_5-10.tif"
    expected += ", or zips of them"
    if report.unreadable:
        return report.unreadable_examples[0]
    if report.undated:
        return f"{root}: only series without dates ({', '.join(report.undated)}); {metadata.METADATA_FOLDER} is missing"
    if report.masks_without_series:
        return f"{root}: only {', '.join(report.masks_without_series)} without its series"
    if report.historical_without_patch:
        return f"{root}: only historical images; they need a modality with an image year beside them"
    if naming.FOLDER.fullmatch(root.resolve().name):
        return f"{root}: this is the folder of one modality; give its parent folder {root.resolve().parent}"
    if naming.FOLDER.fullmatch(root.resolve().parent.name):
        return f"{root}: this is one ROI of one modality; give the folder {root.resolve().parent.parent}"
    children = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    for child in children:
        if has_flair_hub_names(root / child):
            return f"{root}: no patch here, but {root / child} looks like a FLAIR-HUB tree; give that folder"
    if report.unparsable_examples:
        return f"{root}: no patch found; names such as {report.unparsable_examples[0]} are not understood; {expected}"
    return (
        f"{root}: no patch of the chosen modalities found; {expected}; for another dataset, draft a description with "
        f"`bocage describe {root} -o FILE` and add dataset=FILE"
    )
