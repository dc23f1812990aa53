"""The published dataset as a catalogue of patches. Nothing else in bocage knows FLAIR-HUB's folder and file names.

A file is ``{D}-{YYYY}_{MODALITY}/{ROI}/{D}-{YYYY}_{MODALITY}_{ROI}_{row}-{column}.tif``. Historical modalities have
``195X`` in place of the year; where a domain has two image years, both share the historical file of the same place.

The catalogue keeps NumPy and Arrow columns, no Python object for a patch: paths and keys are computed when asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bocage.shards import metadata
from bocage.shards.errors import InputError
from bocage.shards.metadata import Dates
from bocage.shards.modality import FLAIR_HUB, Registry
from bocage.shards.sources import Source

_HISTORICAL_YEAR = "195X"
_FOLDER = re.compile(r"(?P<place>D[0-9A-Z]{3,6})-(?P<year>\d{4}|195X)_(?P<modality>.+)")
_ROI = re.compile(r"[A-Za-z0-9-]+")
_CELL = re.compile(r"(0|[1-9]\d{0,3})-(0|[1-9]\d{0,3})")
_EXAMPLES = 5
# A patch is one integer, in the order of the catalogue: domain (15 bits), ROI (20), row (14), column (14).
_DOMAIN_SHIFT, _ROI_SHIFT, _ROW_SHIFT = 48, 28, 14


@dataclass(frozen=True)
class Patch:
    """One patch: what there is of it and where.

    Attributes:
        key: ``D012-2019_AF-S1-27_5-10``.
        domain: ``D012-2019``.
        roi: ``D012-2019/AF-S1-27``.
        sources: GeoTIFFs by modality, in the registry's order; missing ones are not listed.
        dates: by modality, int32 days since 1970-01-01: one for an image, T for a series and its mask. Not listed where
            unknown. A day that the metadata leave open (``00``) is the first of the month.
        splits: by split name, ``train``, ``valid``, ``test`` or None.
    """

    key: str
    domain: str
    roi: str
    sources: dict[str, Source]
    dates: dict[str, np.ndarray]
    splits: dict[str, str | None]


@dataclass
class Report:
    """What a tree holds and what is wrong with it.

    Attributes:
        patches: number of patches.
        present: by modality, patches that have it.
        undated: by series and mask, files left out because the metadata give no dates for them.
        lone: by mask, files left out because their patch lacks the series.
        orphans: historical files whose place has no patch of any year.
        unparsable: files and folders inside modality folders whose names do not follow the pattern.
        examples: a few of these, relative to the root.
        unknown_folders: folders named like a modality's that the registry does not list.
        duplicate_rows: metadata rows about a patch that already had one; the first counts.
        unreadable_dates: metadata rows whose dates cannot be parsed.
    """

    patches: int = 0
    present: dict[str, int] = field(default_factory=dict)
    undated: dict[str, int] = field(default_factory=dict)
    lone: dict[str, int] = field(default_factory=dict)
    orphans: int = 0
    unparsable: int = 0
    examples: list[str] = field(default_factory=list)
    unknown_folders: list[str] = field(default_factory=list)
    duplicate_rows: int = 0
    unreadable_dates: int = 0

    @property
    def missing(self) -> dict[str, int]:
        """By modality, patches that lack it."""
        return {name: self.patches - count for name, count in self.present.items()}


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
    _codes: np.ndarray  # (patches,) int64, see above
    _presence: np.ndarray  # (patches,) uint64, bit k for the registry's k-th modality
    _dates: dict[str, Dates]
    _report: Report

    @classmethod
    def open(
        cls, root: str | Path, registry: Registry = FLAIR_HUB, modalities: tuple[str, ...] | list[str] | None = None
    ) -> Catalogue:
        """The catalogue of the unzipped tree at ``root``.

        Args:
            root: the folder that holds the ``D012-2019_AERIAL_RGBI``-like folders and, if there, ``GLOBAL_ALL_MTD``.
            registry: the modalities to look for.
            modalities: names of those to keep; all when None.

        Raises:
            InputError: no such folder, no patch in it, unknown modality name, or metadata that cannot be read.
        """
        root = Path(root)
        if modalities is not None:
            registry = registry.subset(modalities)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; expected an unzipped FLAIR-HUB tree")
        report = Report()
        tiles = list(_tiles(root, registry, report))
        domains, rois, codes, presence = _joined(tiles, list(registry), report)
        keys = pa.array(_keys(domains, rois, codes), pa.string())
        dates = _read_dates(root, registry, keys, report)
        # A series without dates cannot be placed in time: it counts as missing, and the report says so.
        for bit, modality in enumerate(registry.values()):
            if modality.has_dates:
                known = dates[modality.name].index >= 0 if modality.name in dates else np.zeros(len(codes), bool)
                undated = (presence >> np.uint64(bit) & np.uint64(1)).astype(bool) & ~known
                presence[undated] &= ~np.uint64(1 << bit)
                if undated.any():
                    report.undated[modality.name] = int(undated.sum())
        # A mask tells the quality of its series: without it, it has neither dates nor use.
        bits = {name: np.uint64(1 << bit) for bit, name in enumerate(registry)}
        for mask in registry.by_role("mask"):
            assert mask.mask_of is not None
            lone = ((presence & bits[mask.name]) != 0) & ((presence & bits[mask.mask_of]) == 0)
            presence[lone] &= ~bits[mask.name]
            if lone.any():
                report.lone[mask.name] = int(lone.sum())
        split_file = metadata.find(root, metadata.SPLIT_FILE)
        splits = metadata.read_splits(split_file, keys) if split_file else {}
        catalogue = cls(root, registry, splits, domains, rois, codes, presence, dates, report)
        return catalogue._trimmed()

    def _trimmed(self) -> Catalogue:
        """Without patches that hold nothing and modalities that do not occur."""
        kept = np.flatnonzero(self._presence)
        if len(kept) == 0:
            raise InputError(_why_empty(self.root, self._report))
        bits = {name: np.uint64(1 << bit) for bit, name in enumerate(self.registry)}
        present = {name: int(np.count_nonzero(self._presence & bit)) for name, bit in bits.items()}
        occurring = [name for name in self.registry if present[name]]
        presence = np.zeros(len(kept), np.uint64)
        for position, name in enumerate(occurring):
            presence |= ((self._presence[kept] & bits[name]) != 0).astype(np.uint64) << np.uint64(position)
        return replace(
            self,
            registry=self.registry.subset(occurring),
            splits={name: column.take(pa.array(kept)) for name, column in self.splits.items()},
            _codes=self._codes[kept],
            _presence=presence,
            _dates={
                name: replace(dates, index=dates.index[kept])
                for name, dates in self._dates.items()
                if name in occurring
            },
            _report=replace(self._report, patches=len(kept), present=present),
        )

    def __len__(self) -> int:
        return len(self._codes)

    def patch(self, index: int) -> Patch:
        """The patch at ``index``."""
        which_domain, which_roi, cell = _unpacked(int(self._codes[index]))
        domain, roi = self._domains[which_domain], self._rois[which_roi]
        sources, dates = {}, {}
        for bit, modality in enumerate(self.registry.values()):
            if int(self._presence[index]) >> bit & 1:
                year = f"{domain.split('-')[0]}-{_HISTORICAL_YEAR}" if modality.historical else domain
                folder = f"{year}_{modality.name}"
                sources[modality.name] = Source(self.root / folder / roi / f"{folder}_{roi}_{cell}.tif")
                known = self._dates.get(modality.name)
                if known is not None and known.index[index] >= 0:
                    dates[modality.name] = known.lists[known.index[index]]
        return Patch(
            key=f"{domain}_{roi}_{cell}",
            domain=domain,
            roi=f"{domain}/{roi}",
            sources=sources,
            dates=dates,
            splits={name: column[index].as_py() for name, column in self.splits.items()},
        )

    def keys(self) -> list[str]:
        """Keys of all patches, in order."""
        return _keys(self._domains, self._rois, self._codes)

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
        column: list[str | None] = [None] * len(self)
        for value, path in files.items():
            rows = pc.index_in(pa.array(read_csv_split(path), pa.string()), value_set=keys).drop_null().to_pylist()
            if not rows:
                raise InputError(f"{path}: none of its patches is in {self.root}")
            for row in rows:
                if column[row] not in (None, value):
                    raise InputError(f"{path}: patch {keys[row]} is listed as {column[row]} and as {value}")
                column[row] = value
        return replace(self, splits={**self.splits, name: pa.array(column, pa.string()).dictionary_encode()})

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
        """SHA-256 over everything a patch can tell but the location of the tree."""
        digest = hashlib.sha256()
        registry = [modality.to_json() for modality in self.registry.values()]
        digest.update(json.dumps([registry, self._domains, self._rois]).encode())
        for array in (self._codes, self._presence):
            digest.update(array.tobytes())
        for name, dates in self._dates.items():
            digest.update(f"{name} {[days.tolist() for days in dates.lists]}".encode() + dates.index.tobytes())
        for name, column in self.splits.items():
            digest.update(json.dumps([name, column.to_pylist()]).encode())
        return digest.hexdigest()


def read_csv_split(path: str | Path) -> list[str]:
    """Keys of the patches that a split CSV of the official code lists; raises ``InputError``."""
    keys = []
    for number, row in enumerate(metadata.read_csv_paths(Path(path)), start=2):
        found = [_key_of(cell) for cell in row.values() if isinstance(cell, str)]
        key = next((key for key in found if key is not None), None)
        if key is None:
            raise InputError(f"{path}, line {number}: no column holds the path of a patch's GeoTIFF")
        keys.append(key)
    return keys


def _key_of(cell: str) -> str | None:
    """Key of the patch that a path like ``../D012-2019_SPOT_RGBI/AF-S1-27/..._5-10.tif`` belongs to.

    None where the path does not tell: an empty cell, or a historical file, which has no image year.
    """
    parts = cell.strip().replace("\\", "/").split("/")
    if len(parts) < 3 or not parts[-1].endswith(".tif"):
        return None
    folder, roi, place = _FOLDER.fullmatch(parts[-3]), parts[-2], parts[-1][:-4].rsplit("_", 1)[-1]
    if folder is None or folder["year"] == _HISTORICAL_YEAR or not _CELL.fullmatch(place):
        return None
    return f"{folder['place']}-{folder['year']}_{roi}_{place}"


@dataclass(frozen=True)
class _Tile:
    """Files of one modality in one ROI: ``cells`` holds row << 14 | column, int64."""

    place: str
    year: str
    modality: str
    roi: str
    cells: np.ndarray


def _tiles(root: Path, registry: Registry, report: Report) -> Iterator[_Tile]:
    """What lies in the tree; fills the report's counts of names that are not understood."""
    for folder in sorted((entry for entry in os.scandir(root) if entry.is_dir()), key=lambda entry: entry.name):
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            continue
        name = match["modality"]
        if name not in registry:
            report.unknown_folders += [folder.name] if name not in FLAIR_HUB else []
            continue
        if registry[name].historical != (match["year"] == _HISTORICAL_YEAR):
            _not_understood(report, folder.name)
            continue
        for roi in os.scandir(folder):
            if not roi.is_dir() or not _ROI.fullmatch(roi.name):
                _not_understood(report, f"{folder.name}/{roi.name}")
                continue
            prefix = f"{folder.name}_{roi.name}_"
            cells = []
            for file in os.scandir(roi):
                inner = file.name.removeprefix(prefix).removesuffix(".tif")
                cell = _CELL.fullmatch(inner)
                if cell is None or len(inner) + len(prefix) + 4 != len(file.name):
                    _not_understood(report, f"{folder.name}/{roi.name}/{file.name}")
                else:
                    cells.append(int(cell[1]) << _ROW_SHIFT | int(cell[2]))
            yield _Tile(match["place"], match["year"], name, roi.name, np.array(cells, np.int64))


def _not_understood(report: Report, name: str) -> None:
    report.unparsable += 1
    if len(report.examples) < _EXAMPLES:
        report.examples.append(name)


def _joined(
    tiles: list[_Tile], modalities: list[str], report: Report
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Domains, ROI names, and (patches,) codes and presence bits, sorted."""
    dated = [tile for tile in tiles if tile.year != _HISTORICAL_YEAR]
    domains = sorted({f"{tile.place}-{tile.year}" for tile in dated})
    rois = sorted({tile.roi for tile in tiles}, key=_natural)
    domain_of = {domain: index for index, domain in enumerate(domains)}
    roi_of = {roi: index for index, roi in enumerate(rois)}
    if len(domains) >= 1 << 15 or len(rois) >= 1 << 20:
        raise InputError(f"{len(domains)} domains and {len(rois)} ROI names are too many for one catalogue")

    def codes_of(tile: _Tile, domain: str) -> np.ndarray:
        return tile.cells + (domain_of[domain] << _DOMAIN_SHIFT | roi_of[tile.roi] << _ROI_SHIFT)

    empty = np.zeros(0, np.int64)
    every = np.concatenate([empty, *(codes_of(tile, f"{tile.place}-{tile.year}") for tile in dated)])
    codes, inverse = np.unique(every, return_inverse=True)
    presence = np.zeros(len(codes), np.uint64)
    start = 0
    for tile in dated:
        # One modality of one ROI: its rows are distinct, so plain indexing sets every bit.
        rows = inverse[start : start + len(tile.cells)]
        presence[rows] |= np.uint64(1 << modalities.index(tile.modality))
        start += len(tile.cells)
    for tile in tiles:
        if tile.year == _HISTORICAL_YEAR:
            attached = np.zeros(len(tile.cells), bool)
            for domain in domains:
                if domain.split("-")[0] == tile.place:
                    wanted = codes_of(tile, domain)
                    rows = np.searchsorted(codes, wanted)
                    found = rows < len(codes)
                    found[found] = codes[rows[found]] == wanted[found]
                    presence[rows[found]] |= np.uint64(1 << modalities.index(tile.modality))
                    attached |= found
            report.orphans += int((~attached).sum())
    return domains, rois, codes, presence


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ``AF-S1-2`` before ``AF-S1-10``; the name itself decides between equal numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _unpacked(code: int) -> tuple[int, int, str]:
    """Index of the domain, index of the ROI name, and ``row-column`` of a patch."""
    return code >> _DOMAIN_SHIFT, code >> _ROI_SHIFT & 0xFFFFF, f"{code >> _ROW_SHIFT & 0x3FFF}-{code & 0x3FFF}"


def _keys(domains: list[str], rois: list[str], codes: np.ndarray) -> list[str]:
    patches = map(_unpacked, codes.tolist())
    return [f"{domains[domain]}_{rois[roi]}_{cell}" for domain, roi, cell in patches]


def _read_dates(root: Path, registry: Registry, keys: pa.Array, report: Report) -> dict[str, Dates]:
    """Dates by modality, those of a mask from its series."""
    dates: dict[str, Dates] = {}
    for modality in registry.values():
        path = metadata.find(root, f"GLOBAL_{modality.dates_table}_MTD_DATES.gpkg") if modality.dates_table else None
        if path is not None:
            dates[modality.name] = metadata.read_dates(path, modality, keys)
            report.duplicate_rows += dates[modality.name].duplicates
            report.unreadable_dates += dates[modality.name].unreadable
    for modality in registry.values():
        if modality.mask_of in dates:
            dates[modality.name] = dates[modality.mask_of]
    return dates


def _why_empty(root: Path, report: Report) -> str:
    """One sentence on why there is no patch in ``root`` and what to give instead."""
    expected = "expected folders like D012-2019_AERIAL_RGBI/AF-S1-27/D012-2019_AERIAL_RGBI_AF-S1-27_5-10.tif"
    if report.undated:
        return f"{root}: only series without dates ({', '.join(report.undated)}); {metadata.FOLDER} is missing"
    if report.lone:
        return f"{root}: only {', '.join(report.lone)} without its series"
    if report.orphans:
        return f"{root}: only historical images; they need a modality with an image year beside them"
    if _FOLDER.fullmatch(root.resolve().name):
        return f"{root}: this is the folder of one modality; give the one above, {root.resolve().parent}"
    if _FOLDER.fullmatch(root.resolve().parent.name):
        return f"{root}: this is one ROI of one modality; give {root.resolve().parent.parent}"
    children = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    for child in children:
        if any(_FOLDER.fullmatch(entry.name) for entry in os.scandir(root / child) if entry.is_dir()):
            return f"{root}: no patch here, but {root / child} looks like a FLAIR-HUB tree; give that folder"
    if any(entry.name.endswith(".zip") and _FOLDER.fullmatch(entry.name[:-4]) for entry in os.scandir(root)):
        return f"{root}: holds FLAIR-HUB's zips; unzip them first"
    if report.examples:
        return f"{root}: no patch found; names such as {report.examples[0]} are not understood; {expected}"
    return f"{root}: no patch of the chosen modalities found; {expected}"
