"""Scan the folders and zips of a FLAIR-HUB tree, and join their rasters into patches.

The results are NumPy columns, because a Python object for each of millions of rasters would take too much memory.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Modality, Registry
from bocage.shards.source.flair_hub import naming, zips
from bocage.shards.source.report import CatalogueReport

# Entry of a raster in a zip: index of the zip, whether member names begin with the folder, and fields of ``ZipMember``.
ZIP_ENTRY = np.dtype(
    [
        ("zip", np.uint32),
        ("nested", np.uint8),
        ("method", np.uint8),
        ("crc", np.uint32),
        ("stored", np.uint32),
        ("size", np.uint32),
        ("offset", np.uint64),
    ]
)
_ZIP = ".zip"
_MAX_DATES = 4096
# A GeoTIFF holds its values, at worst doubled by a failed compression, and tags of some 100 bytes per band.
_MAX_GROWTH, _MAX_TAG_BYTES = 2, 1 << 20
_MEMBER_NAME = re.compile(rb"(?:(?P<folder>[^/]+)/)?(?P<roi>[A-Za-z0-9-]+)/(?P<file>[^/]+)\.tif")
_FOLDER_KIND, _ZIP_KIND = 0, 1  # candidates sort by kind: folders take precedence over zips


@dataclass(frozen=True)
class ModalityRasters:
    """Rasters of one modality in one folder or zip.

    Attributes:
        department: department, such as ``D012``.
        year: image year, such as ``2019``; ``195X`` for historical images.
        modality: name of the modality.
        cells: (rasters,) int64, ROI number << 28 | row << 14 | column.
        entries: (rasters,) ``ZIP_ENTRY`` of a zip; None for a folder.
    """

    department: str
    year: str
    modality: str
    cells: np.ndarray
    entries: np.ndarray | None


class Scan:
    """Rasters of a FLAIR-HUB tree, found by walking its folders and zips.

    Args:
        root: folder of the tree.
        registry: modalities to look for.
        report: report that receives unparsable, unreadable and empty files.

    Attributes:
        sources: rasters of each folder and zip: folders first, then zips, each by name.
        zips: file names of the zips; ``ZIP_ENTRY`` refers to them by index.

    Raises:
        InputError: ``root`` is no folder or cannot be listed.
    """

    def __init__(self, root: Path, registry: Registry, report: CatalogueReport) -> None:
        self.sources: list[ModalityRasters] = []
        self.zips: list[str] = []
        self._root, self._registry, self._report = root, registry, report
        self._roi_numbers: dict[str, int] = {}
        try:
            candidates = sorted(_candidates(root))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{root}: no such folder; expected a FLAIR-HUB tree, unzipped or not") from None
        except OSError as error:
            raise InputError(f"{root}: cannot be read: {error.strerror}") from error
        for kind, name, suffix in candidates:
            match = naming.FOLDER.fullmatch(name)
            if match is None:
                continue
            if match["modality"] not in registry:
                report.unknown_folders += [name + suffix] if match["modality"] not in FLAIR_HUB else []
                continue
            modality = registry[match["modality"]]
            if modality.historical != (match["year"] == naming.HISTORICAL_YEAR):
                report.add_unparsable(name + suffix)
            elif suffix not in ("", _ZIP):
                report.add_unreadable(f"{root / (name + suffix)}: unfinished download")
            else:
                is_zip = kind == _ZIP_KIND
                cells, entries = self._scan_zip(name, modality) if is_zip else (self._scan_folder(name), None)
                self.sources.append(ModalityRasters(match["department"], match["year"], modality.name, cells, entries))

    @property
    def rois(self) -> list[str]:
        """Names of ROIs by their number, unsorted."""
        return list(self._roi_numbers)

    def _roi_number(self, roi: str) -> int:
        number = self._roi_numbers.setdefault(roi, len(self._roi_numbers))
        if number >= naming.MAX_ROIS:
            raise InputError(f"{self._root}: more than {naming.MAX_ROIS} ROI names, the limit of a catalogue")
        return number

    def _scan_folder(self, name: str) -> np.ndarray:
        """Cells of the rasters in the folder of a modality."""
        cells = array("q")
        report = self._report
        for roi in self._list(self._root / name):
            if not _is_folder(roi) or not naming.ROI.fullmatch(roi.name):
                report.add_unparsable(f"{name}/{roi.name}")
                continue
            base = self._roi_number(roi.name) << naming.ROI_SHIFT
            prefix = f"{name}_{roi.name}_"
            for file in self._list(Path(roi.path)):
                cell = _cell(file.name, prefix)
                if cell is None:
                    report.add_unparsable(f"{name}/{roi.name}/{file.name}")
                    continue
                cells.append(base | cell)
                if _is_empty(file):
                    report.add_empty(f"{name}/{roi.name}/{file.name}")
        return np.frombuffer(cells, np.int64) if cells else np.zeros(0, np.int64)

    def _list(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except OSError as error:
            self._report.add_unreadable(f"{folder}: cannot be read: {error.strerror}")

    def _scan_zip(self, folder: str, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
        """Cells and entries of the rasters in the zip of a modality; empty if the zip cannot be used."""
        path = self._root / (folder + _ZIP)
        report, limit = self._report, _max_file_bytes(modality)
        cells = array("q")
        columns = {name: array("Q") for name in ("nested", "method", "crc", "stored", "size", "offset")}
        expected = folder.encode()
        try:
            for member in zips.members(path):
                match = _MEMBER_NAME.fullmatch(member.name)
                cell = None
                if match is not None and match["folder"] in (None, expected):
                    roi = match["roi"].decode("ascii")
                    cell = _cell(f"{match['file'].decode('utf-8', 'replace')}.tif", f"{folder}_{roi}_")
                if match is None or cell is None:
                    report.add_unparsable(f"{path.name}/{member.name.decode('utf-8', 'replace')}")
                    continue
                if member.size > limit or member.stored > limit:
                    raise zips.ZipError(
                        f"{path}: member {member.name.decode('ascii', 'replace')} declares {member.size} bytes, but a "
                        f"raster of {modality.name} takes at most {limit}; the zip is not read"
                    )
                cells.append(self._roi_number(roi) << naming.ROI_SHIFT | cell)
                columns["nested"].append(match["folder"] is not None)
                for field in ("method", "crc", "stored", "size", "offset"):
                    columns[field].append(getattr(member, field))
                if member.size == 0:
                    report.add_empty(f"{path.name}/{member.name.decode('ascii', 'replace')}")
        except zips.ZipError as error:
            report.add_unreadable(str(error))
            return np.zeros(0, np.int64), np.zeros(0, ZIP_ENTRY)
        entries = np.zeros(len(cells), ZIP_ENTRY)
        entries["zip"] = len(self.zips)
        self.zips.append(path.name)
        for field, column in columns.items():
            entries[field] = column
        return np.array(cells, np.int64), entries


@dataclass(frozen=True)
class PatchTable:
    """Sorted patches and the rasters of each.

    Attributes:
        domains: names of domains by index.
        rois: names of ROIs by index.
        codes: (patches,) int64 patch codes, see ``naming``.
        presence: (patches,) uint64, bit k for the k-th modality of the registry.
        entry_index: (patches, modalities) int32, index into ``zip_entries``; -1 for a file in a folder, or no file.
        zip_entries: (rasters in zips,) ``ZIP_ENTRY``.
    """

    domains: list[str]
    rois: list[str]
    codes: np.ndarray
    presence: np.ndarray
    entry_index: np.ndarray
    zip_entries: np.ndarray


def join_rasters(scan: Scan, registry: Registry, report: CatalogueReport) -> PatchTable:
    """Join the rasters of all folders and zips into patches. Of duplicate rasters, the first counts.

    Raises:
        InputError: there are more domains or departments than patch codes can number.
    """
    rois = sorted(scan.rois, key=naming.natural_sort_key)
    index_of = {roi: index for index, roi in enumerate(rois)}
    roi_index = np.array([index_of[name] for name in scan.rois], np.int64)  # by number of the ROI
    with_year = [source for source in scan.sources if source.year != naming.HISTORICAL_YEAR]
    domains = sorted({f"{source.department}-{source.year}" for source in with_year})
    departments = sorted({source.department for source in scan.sources})
    if len(domains) >= naming.MAX_DOMAINS or len(departments) >= naming.MAX_DOMAINS:
        raise InputError(f"{len(domains)} domains are too many for one catalogue")
    # Historical rasters belong to a department, all others to a domain.
    area_index = {name: index for names in (domains, departments) for index, name in enumerate(names)}

    rasters: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by modality: codes, and indices into the zip entries
    start = 0
    for name in registry:
        codes, entry_indices = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for source in scan.sources:
            if source.modality != name:
                continue
            is_historical = source.year == naming.HISTORICAL_YEAR
            area = area_index[source.department if is_historical else f"{source.department}-{source.year}"]
            cells = source.cells & (1 << naming.ROI_SHIFT) - 1
            roi = roi_index[source.cells >> naming.ROI_SHIFT] if len(source.cells) else source.cells
            codes.append(area << naming.DOMAIN_SHIFT | roi << naming.ROI_SHIFT | cells)
            count = len(source.cells)
            entry_indices.append(np.full(count, -1) if source.entries is None else np.arange(start, start + count))
            start += 0 if source.entries is None else count
        rasters[name] = _drop_duplicates(
            np.concatenate(codes),
            np.concatenate(entry_indices).astype(np.int32),
            report,
            (departments if registry[name].historical else domains, rois, registry[name]),
        )

    images = [rasters[name][0] for name, modality in registry.items() if not modality.historical]
    patch_codes = np.unique(np.concatenate([np.zeros(0, np.int64), *images]))
    presence = np.zeros(len(patch_codes), np.uint64)
    entry_index = np.full((len(patch_codes), len(registry)), -1, np.int32)
    for bit, (name, modality) in enumerate(registry.items()):
        raster_codes, entries = rasters[name]
        has_patch = np.zeros(len(raster_codes), bool)
        for owners, chosen in _owners(raster_codes, modality, departments, domains):
            rows = np.searchsorted(patch_codes, owners)
            exists = rows < len(patch_codes)
            exists[exists] = patch_codes[rows[exists]] == owners[exists]
            presence[rows[exists]] |= np.uint64(1 << bit)
            entry_index[rows[exists], bit] = entries[chosen][exists]
            has_patch[chosen] |= exists
        report.historical_without_patch += int((~has_patch).sum())
    zip_entries = [source.entries for name in registry for source in scan.sources if source.modality == name]
    joined = np.concatenate([np.zeros(0, ZIP_ENTRY), *(entries for entries in zip_entries if entries is not None)])
    return PatchTable(domains, rois, patch_codes, presence, entry_index, joined)


def _drop_duplicates(
    codes: np.ndarray,
    entry_index: np.ndarray,
    report: CatalogueReport,
    names: tuple[list[str], list[str], Modality],
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted unique codes, and the entry index of the first raster of each; counts the other rasters."""
    unique, first = np.unique(codes, return_index=True)
    if len(unique) < len(codes):
        is_duplicate = np.ones(len(codes), bool)
        is_duplicate[first] = False
        areas, rois, modality = names
        examples = []
        for code in codes[is_duplicate][:5].tolist():
            area, roi, cell = naming.unpack_code(code)
            folder = naming.modality_folder(areas[area], modality)
            examples.append(f"{folder}/{naming.raster_file(folder, rois[roi], cell)}")
        report.add_duplicates(len(codes) - len(unique), examples)
    return unique, entry_index[first]


def _owners(
    codes: np.ndarray, modality: Modality, departments: list[str], domains: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes of the patches that own rasters, and the indices of these rasters in ``codes``.

    A historical raster belongs to the patches of all years of its department.
    """
    if not modality.historical:
        yield codes, np.arange(len(codes))
        return
    department_of = codes >> naming.DOMAIN_SHIFT
    for index, domain in enumerate(domains):
        chosen = np.flatnonzero(department_of == departments.index(domain.split("-")[0]))
        yield codes[chosen] & (1 << naming.DOMAIN_SHIFT) - 1 | index << naming.DOMAIN_SHIFT, chosen


def has_flair_hub_names(root: Path) -> bool:
    """Whether a folder holds folders, or zips of folders, with the names of FLAIR-HUB.

    False if the folder cannot be listed.
    """
    try:
        return any(naming.FOLDER.fullmatch(name) for _, name, _ in _candidates(root))
    except OSError:
        return False


def _candidates(root: Path) -> Iterator[tuple[int, str, str]]:
    """Folders and zips of ``root``: kind, name without ``.zip``, and the rest of the file name."""
    with os.scandir(root) as entries:
        for entry in entries:
            if _is_folder(entry):
                yield _FOLDER_KIND, entry.name, ""
            elif _ZIP in entry.name:
                name, _, rest = entry.name.partition(_ZIP)
                yield _ZIP_KIND, name, _ZIP + rest


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link with an invalid target
        return False


def _is_empty(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.stat().st_size == 0
    except OSError:  # a broken link: reading it fails later
        return True


def _cell(file: str, prefix: str) -> int | None:
    """row << 14 | column from a file name; None if the name does not follow the pattern."""
    inner = file.removeprefix(prefix).removesuffix(".tif")
    match = naming.CELL.fullmatch(inner)
    if match is None or len(inner) + len(prefix) + 4 != len(file):
        return None
    return int(match[1]) << naming.ROW_SHIFT | int(match[2])


def _max_file_bytes(modality: Modality) -> int:
    """Largest plausible size of a GeoTIFF of ``modality``, in bytes."""
    values = len(modality.bands) * modality.size**2 * (_MAX_DATES if modality.has_time_axis else 1)
    return _MAX_GROWTH * values * np.dtype(modality.dtype).itemsize + _MAX_TAG_BYTES
