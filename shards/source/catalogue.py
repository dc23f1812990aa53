"""The published dataset as a catalogue of patches: as folders, as the hub's zips, or a mix of both.

The catalogue keeps NumPy and Arrow columns, no Python object for a patch: paths and keys are computed when asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Registry
from bocage.shards.source import metadata, naming
from bocage.shards.source.metadata import Dates
from bocage.shards.source.naming import DOMAIN_SHIFT as _DOMAIN_SHIFT
from bocage.shards.source.naming import ROI_SHIFT as _ROI_SHIFT
from bocage.shards.source.raster_source import RasterSource
from bocage.shards.source.report import Report
from bocage.shards.source.scan import Joined, Scan, join
from bocage.shards.source.zips import ZipMember

_EXAMPLES = 5
_CHUNK = 1 << 16  # patches at a time


@dataclass(frozen=True)
class Patch:
    """One patch: what there is of it and where.

    Attributes:
        key: ``D012-2019_AF-S1-27_5-10``.
        domain: ``D012-2019``.
        roi: ``D012-2019/AF-S1-27``.
        sources: GeoTIFFs by modality, in the registry's order; missing ones are not listed.
        dates: by modality, int32 days since 1970-01-01: (1,) for an image, (T,) for a series and its mask. Not listed
            where unknown. A day that the metadata leave open (``00``) is the first of the month.
        splits: by split name, ``train``, ``valid``, ``test`` or None.
    """

    key: str
    domain: str
    roi: str
    sources: dict[str, RasterSource]
    dates: dict[str, np.ndarray]
    splits: dict[str, str | None]


@dataclass(frozen=True)
class Catalogue:
    """The patches of a FLAIR-HUB tree, sorted by domain, ROI, row and column.

    Attributes:
        root: the tree.
        registry: the modalities that occur, of those asked for.
        splits: by split name, a string for each patch or null.
    """

    root: Path
    registry: Registry
    splits: dict[str, pa.DictionaryArray]
    _domains: list[str]
    _rois: list[str]
    _codes: np.ndarray  # (patches,) int64, see naming
    _presence: np.ndarray  # (patches,) uint64, bit k for the registry's k-th modality
    _places: np.ndarray  # (patches, modalities) int32 into the entries; -1 for a file in a folder, or none
    _entries: np.ndarray  # what is in zips, see scan
    _zips: list[str]
    _dates: dict[str, Dates]
    _report: Report

    @classmethod
    def open(
        cls, root: str | Path, registry: Registry = FLAIR_HUB, modalities: tuple[str, ...] | list[str] | None = None
    ) -> Catalogue:
        """The catalogue of the tree at ``root``.

        What is missing, there twice or unreadable does not stop it: see ``report``.

        Args:
            root: the folder that holds the ``D012-2019_AERIAL_RGBI``-like folders, the zips of these names, or some of
                both, and, if there, ``GLOBAL_ALL_MTD`` or its zip.
            registry: the modalities to look for.
            modalities: names of those to keep; all when None.

        Raises:
            InputError: no such folder, no patch in it, unknown modality name, or metadata that cannot be read.
        """
        root = Path(root)
        if modalities is not None:
            registry = registry.subset(modalities)
        report = Report()
        scan = Scan(root, registry, report)
        joined = join(scan, registry, report)
        keys = pa.array(naming.keys_of(joined.domains, joined.rois, joined.codes), pa.string())
        dates = _read_dates(root, registry, keys, report)
        _drop_useless(joined.presence, registry, dates, report)
        split_file = metadata.find(root, metadata.SPLIT_FILE)
        splits = metadata.read_splits(split_file, keys) if split_file else {}
        return _trimmed(root, registry, joined, scan.zips, dates, splits, report)

    def __len__(self) -> int:
        return len(self._codes)

    def patch(self, index: int) -> Patch:
        """The patch at ``index``."""
        which_domain, which_roi, cell = naming.unpacked(int(self._codes[index]))
        domain, roi = self._domains[which_domain], self._rois[which_roi]
        sources, dates = {}, {}
        for bit, modality in enumerate(self.registry.values()):
            if int(self._presence[index]) >> bit & 1:
                folder = naming.folder_of(domain, modality)
                sources[modality.name] = self._source(folder, naming.file_of(folder, roi, cell), index, bit)
                known = self._dates[modality.name].of(index) if modality.name in self._dates else None
                if known is not None:
                    dates[modality.name] = known
        return Patch(
            key=f"{domain}_{roi}_{cell}",
            domain=domain,
            roi=f"{domain}/{roi}",
            sources=sources,
            dates=dates,
            splits={name: column[index].as_py() for name, column in self.splits.items()},
        )

    def _source(self, folder: str, file: str, index: int, bit: int) -> RasterSource:
        place = self._places[index, bit]
        if place < 0:
            return RasterSource(self.root / folder / file)
        entry = self._entries[place]
        name = f"{folder}/{file}" if entry["nested"] else file
        offset, stored, size, crc, method = (
            int(entry[field]) for field in ("offset", "stored", "size", "crc", "method")
        )
        return RasterSource(
            self.root / self._zips[entry["zip"]], ZipMember(name.encode(), offset, stored, size, crc, method)
        )

    def keys(self) -> list[str]:
        """Keys of all patches, in order."""
        return naming.keys_of(self._domains, self._rois, self._codes)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the domain and of the ROI of each patch, (patches,) int64 each; a ROI's is its alone."""
        return self._codes >> _DOMAIN_SHIFT, self._codes >> _ROI_SHIFT

    def report(self) -> Report:
        """Counts by modality, and what is missing, undated or not understood."""
        return self._report

    def with_csv_split(self, name: str, files: Mapping[str, str | Path]) -> Catalogue:
        """A copy with one more split.

        Args:
            name: of the split; it becomes a column of the manifest.
            files: by value (``train``, ``valid``, ``test``), the CSV that lists its patches.

        Raises:
            InputError: the name is taken or not ``split_...``, a CSV cannot be read, lists no patch of this tree, or
                lists one that another CSV lists too.
        """
        self._check_new_split(name)
        keys = pa.array(self.keys(), pa.string())
        values = list(files)
        column = np.full(len(self), -1, np.int32)  # into the values
        for code, path in enumerate(files.values()):
            found = pc.index_in(pa.array(read_csv_split(path), pa.string()), value_set=keys).drop_null()
            rows = found.to_numpy(zero_copy_only=False)
            if not len(rows):
                raise InputError(f"{path}: none of its patches is in {self.root}")
            taken = rows[column[rows] >= 0]
            if len(taken):
                other = values[column[taken[0]]]
                raise InputError(f"{path}: patch {keys[taken[0]]} is listed as {other} and as {values[code]}")
            column[rows] = code
        split = pa.array(values, pa.string()).take(pa.array(column, mask=column < 0)).dictionary_encode()
        return replace(self, splits={**self.splits, name: split})

    def with_domain_split(self, name: str, domains: Mapping[str, Sequence[str]], rest: str | None = None) -> Catalogue:
        """A copy with one more split, by domain.

        Args:
            name: of the split; it becomes a column of the manifest.
            domains: by value (``train``, ``valid``, ``test``), names like ``D012-2019``.
            rest: value of the patches of all other domains; None leaves them out of the split.

        Raises:
            InputError: the name is taken or not ``split_...``, or a domain is not in this tree or listed twice.
        """
        self._check_new_split(name)
        value_of: dict[str, str] = {}
        for value, listed in domains.items():
            for domain in listed:
                if domain not in self._domains:
                    raise InputError(f"{name}: domain {domain!r} is not in {self.root}")
                if value_of.setdefault(domain, value) != value:
                    raise InputError(f"{name}: domain {domain} is listed as {value_of[domain]} and as {value}")
        values = pa.array([value_of.get(domain, rest) for domain in self._domains], pa.string())
        column = values.take(pa.array(self._codes >> _DOMAIN_SHIFT)).dictionary_encode()
        return replace(self, splits={**self.splits, name: column})

    def _check_new_split(self, name: str) -> None:
        if name in self.splits or not name.startswith("split_"):
            raise InputError(
                f"split name {name!r}: must start with 'split_' and be new; taken: {', '.join(self.splits) or 'none'}"
            )

    def fingerprint(self) -> str:
        """SHA-256 over everything a patch can tell but where its files lie: in which tree, in folders or in zips."""
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
            for start in range(0, len(column), _CHUNK):
                digest.update(json.dumps(column.slice(start, _CHUNK).to_pylist()).encode())
        return digest.hexdigest()


def read_csv_split(path: str | Path) -> list[str]:
    """Keys of the patches that a split CSV of the official code lists.

    Raises:
        InputError: the file cannot be read as such a CSV, or a line has no path of a patch.
    """
    keys = []
    for number, row in enumerate(metadata.read_csv_paths(Path(path)), start=2):
        key = next((key for cell in row if (key := naming.key_of_path(cell)) is not None), None)
        if key is None:
            raise InputError(f"{path}, line {number}: no column holds the path of a patch's GeoTIFF")
        keys.append(key)
    return keys


def _drop_useless(presence: np.ndarray, registry: Registry, dates: dict[str, Dates], report: Report) -> None:
    """Takes out of ``presence`` what cannot be used, and counts it."""
    bits = {name: np.uint64(1 << bit) for bit, name in enumerate(registry)}
    # A series without dates cannot be placed in time: it counts as missing, and the report says so.
    for modality in registry.values():
        if modality.has_dates:
            known = dates[modality.name].index >= 0 if modality.name in dates else np.zeros(len(presence), bool)
            undated = ((presence & bits[modality.name]) != 0) & ~known
            presence[undated] &= ~bits[modality.name]
            if undated.any():
                report.undated[modality.name] = int(undated.sum())
    # A mask tells the quality of its series: without it, it has neither dates nor use.
    for mask in registry.by_role("mask"):
        assert mask.mask_of is not None
        lone = ((presence & bits[mask.name]) != 0) & ((presence & bits[mask.mask_of]) == 0)
        presence[lone] &= ~bits[mask.name]
        if lone.any():
            report.lone[mask.name] = int(lone.sum())


def _trimmed(
    root: Path,
    registry: Registry,
    joined: Joined,
    zips: list[str],
    dates: dict[str, Dates],
    splits: dict[str, pa.DictionaryArray],
    report: Report,
) -> Catalogue:
    """The catalogue without patches that hold nothing, and without modalities, domains and ROIs that do not occur."""
    kept = np.flatnonzero(joined.presence)
    if len(kept) == 0:
        raise InputError(_why_empty(root, report))
    domains, domain_of = np.unique(joined.codes[kept] >> _DOMAIN_SHIFT, return_inverse=True)
    rois, roi_of = np.unique(joined.codes[kept] >> _ROI_SHIFT & naming.MOST_ROIS - 1, return_inverse=True)
    codes = domain_of << _DOMAIN_SHIFT | roi_of << _ROI_SHIFT | joined.codes[kept] & (1 << _ROI_SHIFT) - 1
    names = ([joined.domains[index] for index in domains], [joined.rois[index] for index in rois])
    occurring: list[str] = []
    columns: list[int] = []
    presence = np.zeros(len(kept), np.uint64)
    for bit, name in enumerate(registry):
        held = (joined.presence[kept] & np.uint64(1 << bit)) != 0
        report.present[name] = int(held.sum())
        if report.present[name]:
            presence |= held.astype(np.uint64) << np.uint64(len(occurring))
            occurring.append(name)
            columns.append(bit)
        if 0 < report.present[name] < len(kept):
            report.missing_examples[name] = naming.keys_of(*names, codes[np.flatnonzero(~held)[:_EXAMPLES]])
    report.patches = len(kept)
    return Catalogue(
        root=root,
        registry=registry.subset(occurring),
        splits={name: column.take(pa.array(kept)) for name, column in splits.items()},
        _domains=names[0],
        _rois=names[1],
        _codes=codes,
        _presence=presence,
        _places=joined.places[kept][:, columns],
        _entries=joined.entries,
        _zips=zips,
        _dates={name: replace(dates[name], index=dates[name].index[kept]) for name in occurring if name in dates},
        _report=report,
    )


def _read_dates(root: Path, registry: Registry, keys: pa.Array, report: Report) -> dict[str, Dates]:
    """Dates by modality, those of a mask from its series."""
    dates: dict[str, Dates] = {}
    for modality in registry.values():
        table = metadata.find(root, f"GLOBAL_{modality.dates_table}_MTD_DATES.gpkg") if modality.dates_table else None
        if table is not None:
            dates[modality.name] = metadata.read_dates(table, modality, keys)
            report.duplicate_rows += dates[modality.name].duplicates
            report.unreadable_dates += dates[modality.name].unreadable
    for modality in registry.values():
        if modality.mask_of in dates:
            dates[modality.name] = dates[modality.mask_of]
    return dates


def _why_empty(root: Path, report: Report) -> str:
    """One sentence on why there is no patch in ``root`` and what to give instead."""
    expected = "expected folders like D012-2019_AERIAL_RGBI/AF-S1-27/D012-2019_AERIAL_RGBI_AF-S1-27_5-10.tif"
    expected += ", or zips of them"
    if report.unreadable:
        return report.unreadable_examples[0]
    if report.undated:
        return f"{root}: only series without dates ({', '.join(report.undated)}); {metadata.FOLDER} is missing"
    if report.lone:
        return f"{root}: only {', '.join(report.lone)} without its series"
    if report.orphans:
        return f"{root}: only historical images; they need a modality with an image year beside them"
    if naming.FOLDER.fullmatch(root.resolve().name):
        return f"{root}: this is the folder of one modality; give the one above, {root.resolve().parent}"
    if naming.FOLDER.fullmatch(root.resolve().parent.name):
        return f"{root}: this is one ROI of one modality; give {root.resolve().parent.parent}"
    children = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    for child in children:
        if any(naming.FOLDER.fullmatch(name.removesuffix(".zip")) for name in _names(root / child)):
            return f"{root}: no patch here, but {root / child} looks like a FLAIR-HUB tree; give that folder"
    if report.examples:
        return f"{root}: no patch found; names such as {report.examples[0]} are not understood; {expected}"
    return f"{root}: no patch of the chosen modalities found; {expected}"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
