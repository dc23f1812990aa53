"""What lies in a FLAIR-HUB tree, folders and zips alike, as NumPy columns: no Python object for a raster is kept."""

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
from bocage.shards.source import naming, zips
from bocage.shards.source.report import Report

# A raster in a zip: number of the zip, whether names in it begin with the folder, and what the zip's directory says.
ENTRY = np.dtype(
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
_MOST_DATES = 4096
# A raster's file holds its values, at worst doubled by a failed compression, and tags of some 100 bytes a band.
_GROWTH, _TAGS = 2, 1 << 20
_IN_ZIP = re.compile(rb"(?:(?P<folder>[^/]+)/)?(?P<roi>[A-Za-z0-9-]+)/(?P<file>[^/]+)\.tif")
_FOLDER_FIRST, _ZIP_NEXT = 0, 1


@dataclass(frozen=True)
class Found:
    """Rasters of one modality in one folder or zip.

    Attributes:
        place: ``D012``.
        year: ``2019``, or ``195X``.
        cells: (rasters,) int64, ROI number << 28 | row << 14 | column.
        entries: (rasters,) ``ENTRY`` in a zip, None in a folder.
    """

    place: str
    year: str
    modality: str
    cells: np.ndarray
    entries: np.ndarray | None


class Scan:
    """Walks the tree at ``root``; counts what is not understood or cannot be read in ``report``.

    Attributes:
        found: folders first, then zips, each by name.
        rois: names of ROIs by their number, in no order.
        zips: file names of zips by their number.

    Raises:
        InputError: ``root`` is no folder or cannot be listed.
    """

    def __init__(self, root: Path, registry: Registry, report: Report) -> None:
        self.found: list[Found] = []
        self.zips: list[str] = []
        self._root, self._registry, self._report = root, registry, report
        self._numbers: dict[str, int] = {}
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
                report.not_understood(name + suffix)
            elif suffix not in ("", _ZIP):
                report.cannot_be_read(f"{root / (name + suffix)}: part of a download that has not ended")
            else:
                cells, entries = self._zip(name, modality) if kind == _ZIP_NEXT else (self._folder(name), None)
                self.found.append(Found(match["place"], match["year"], modality.name, cells, entries))

    @property
    def rois(self) -> list[str]:
        """Names of ROIs by their number, in no order."""
        return list(self._numbers)

    def _number(self, roi: str) -> int:
        number = self._numbers.setdefault(roi, len(self._numbers))
        if number >= naming.MOST_ROIS:
            raise InputError(f"{self._root}: more than {naming.MOST_ROIS} names of ROIs are too many for one catalogue")
        return number

    def _folder(self, name: str) -> np.ndarray:
        """Cells of the rasters in a modality's folder."""
        cells = array("q")
        report = self._report
        for roi in self._listed(self._root / name):
            if not _is_folder(roi) or not naming.ROI.fullmatch(roi.name):
                report.not_understood(f"{name}/{roi.name}")
                continue
            base = self._number(roi.name) << naming.ROI_SHIFT
            prefix = f"{name}_{roi.name}_"
            for file in self._listed(Path(roi.path)):
                cell = _cell(file.name, prefix)
                if cell is None:
                    report.not_understood(f"{name}/{roi.name}/{file.name}")
                    continue
                cells.append(base | cell)
                if _is_empty(file):
                    report.found_empty(f"{name}/{roi.name}/{file.name}")
        return np.frombuffer(cells, np.int64) if cells else np.zeros(0, np.int64)

    def _listed(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except OSError as error:
            self._report.cannot_be_read(f"{folder}: cannot be read: {error.strerror}")

    def _zip(self, folder: str, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
        """Cells and entries of the rasters in a modality's zip; none of them when it is refused."""
        path = self._root / (folder + _ZIP)
        report, limit = self._report, _largest_file(modality)
        cells = array("q")
        columns = {name: array("Q") for name in ("nested", "method", "crc", "stored", "size", "offset")}
        expected = folder.encode()
        try:
            for member in zips.members(path):
                match = _IN_ZIP.fullmatch(member.name)
                cell = None
                if match is not None and match["folder"] in (None, expected):
                    roi = match["roi"].decode("ascii")
                    cell = _cell(f"{match['file'].decode('utf-8', 'replace')}.tif", f"{folder}_{roi}_")
                if match is None or cell is None:
                    report.not_understood(f"{path.name}/{member.name.decode('utf-8', 'replace')}")
                    continue
                if member.size > limit or member.stored > limit:
                    raise zips.ZipError(
                        f"{path}: member {member.name.decode('ascii', 'replace')} declares {member.size} bytes, but a "
                        f"raster of {modality.name} takes at most {limit}; such a zip is not read"
                    )
                cells.append(self._number(roi) << naming.ROI_SHIFT | cell)
                columns["nested"].append(match["folder"] is not None)
                for field in ("method", "crc", "stored", "size", "offset"):
                    columns[field].append(getattr(member, field))
                if member.size == 0:
                    report.found_empty(f"{path.name}/{member.name.decode('ascii', 'replace')}")
        except zips.ZipError as error:
            report.cannot_be_read(str(error))
            return np.zeros(0, np.int64), np.zeros(0, ENTRY)
        entries = np.zeros(len(cells), ENTRY)
        entries["zip"] = len(self.zips)
        self.zips.append(path.name)
        for field, column in columns.items():
            entries[field] = column
        return np.array(cells, np.int64), entries


@dataclass(frozen=True)
class Joined:
    """Patches, sorted, and which rasters there are of each.

    Attributes:
        domains: names by index.
        rois: names of ROIs by index.
        codes: (patches,) int64, see ``naming``.
        presence: (patches,) uint64, bit k for the registry's k-th modality.
        places: (patches, modalities) int32 into ``entries``; -1 for a file in a folder, or none.
        entries: (rasters in zips,) ``ENTRY``.
    """

    domains: list[str]
    rois: list[str]
    codes: np.ndarray
    presence: np.ndarray
    places: np.ndarray
    entries: np.ndarray


def join(scan: Scan, registry: Registry, report: Report) -> Joined:
    """Brings together what folders and zips hold of each patch. Of a raster that is there twice the first counts.

    Raises:
        InputError: there are more domains than a patch's number can tell apart.
    """
    names = scan.rois
    rois = sorted(names, key=naming.natural)
    index_of = {roi: index for index, roi in enumerate(rois)}
    ranks = np.array([index_of[name] for name in names], np.int64)
    dated = [found for found in scan.found if found.year != naming.HISTORICAL_YEAR]
    domains = sorted({f"{found.place}-{found.year}" for found in dated})
    places = sorted({found.place for found in scan.found})
    if len(domains) >= naming.MOST_DOMAINS or len(places) >= naming.MOST_DOMAINS:
        raise InputError(f"{len(domains)} domains are too many for one catalogue")
    owner = {name: index for names in (domains, places) for index, name in enumerate(names)}

    held: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    start = 0
    for name in registry:
        codes, wheres = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for found in scan.found:
            if found.modality != name:
                continue
            number = owner[found.place if found.year == naming.HISTORICAL_YEAR else f"{found.place}-{found.year}"]
            within = found.cells & (1 << naming.ROI_SHIFT) - 1
            ranked = ranks[found.cells >> naming.ROI_SHIFT] if len(found.cells) else found.cells
            codes.append(number << naming.DOMAIN_SHIFT | ranked << naming.ROI_SHIFT | within)
            count = len(found.cells)
            wheres.append(np.full(count, -1) if found.entries is None else np.arange(start, start + count))
            start += 0 if found.entries is None else count
        held[name] = _first_of_each(
            np.concatenate(codes),
            np.concatenate(wheres).astype(np.int32),
            report,
            (places if registry[name].historical else domains, rois, registry[name]),
        )

    images = [held[name][0] for name, modality in registry.items() if not modality.historical]
    codes_all = np.unique(np.concatenate([np.zeros(0, np.int64), *images]))
    presence = np.zeros(len(codes_all), np.uint64)
    table = np.full((len(codes_all), len(registry)), -1, np.int32)
    for bit, (name, modality) in enumerate(registry.items()):
        codes_held, where = held[name]
        attached = np.zeros(len(codes_held), bool)
        for wanted, chosen in _owners(codes_held, modality, places, domains):
            rows = np.searchsorted(codes_all, wanted)
            there = rows < len(codes_all)
            there[there] = codes_all[rows[there]] == wanted[there]
            presence[rows[there]] |= np.uint64(1 << bit)
            table[rows[there], bit] = where[chosen][there]
            attached[chosen] |= there
        report.orphans += int((~attached).sum())
    entries = [found.entries for name in registry for found in scan.found if found.modality == name]
    joined = np.concatenate([np.zeros(0, ENTRY), *(entry for entry in entries if entry is not None)])
    return Joined(domains, rois, codes_all, presence, table, joined)


def _first_of_each(
    codes: np.ndarray, where: np.ndarray, report: Report, names: tuple[list[str], list[str], Modality]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes without repetitions, sorted, and where the first of each is."""
    unique, first = np.unique(codes, return_index=True)
    if len(unique) < len(codes):
        again = np.ones(len(codes), bool)
        again[first] = False
        owners, rois, modality = names
        examples = []
        for code in codes[again][:5].tolist():
            owner, roi, cell = naming.unpacked(code)
            folder = naming.folder_of(owners[owner], modality)
            examples.append(f"{folder}/{naming.file_of(folder, rois[roi], cell)}")
        report.found_again(len(codes) - len(unique), examples)
    return unique, where[first]


def _owners(
    codes: np.ndarray, modality: Modality, places: list[str], domains: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes of the patches that the rasters ``codes`` belong to, and which of these rasters they are.

    A historical raster belongs to the patches of all years of its place.
    """
    if not modality.historical:
        yield codes, np.arange(len(codes))
        return
    owners = codes >> naming.DOMAIN_SHIFT
    for index, domain in enumerate(domains):
        chosen = np.flatnonzero(owners == places.index(domain.split("-")[0]))
        yield codes[chosen] & (1 << naming.DOMAIN_SHIFT) - 1 | index << naming.DOMAIN_SHIFT, chosen


def _candidates(root: Path) -> Iterator[tuple[int, str, str]]:
    """Folders and zips of ``root``: kind, name without ``.zip``, and what follows the name."""
    with os.scandir(root) as entries:
        for entry in entries:
            if _is_folder(entry):
                yield _FOLDER_FIRST, entry.name, ""
            elif _ZIP in entry.name:
                name, _, rest = entry.name.partition(_ZIP)
                yield _ZIP_NEXT, name, _ZIP + rest


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere good
        return False


def _is_empty(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.stat().st_size == 0
    except OSError:  # a broken link: reading it will tell
        return True


def _cell(file: str, prefix: str) -> int | None:
    """row << 14 | column of a file's name; None when it does not follow the pattern."""
    inner = file.removeprefix(prefix).removesuffix(".tif")
    match = naming.CELL.fullmatch(inner)
    if match is None or len(inner) + len(prefix) + 4 != len(file):
        return None
    return int(match[1]) << naming.ROW_SHIFT | int(match[2])


def _largest_file(modality: Modality) -> int:
    """Bytes that a GeoTIFF of ``modality`` can take."""
    values = len(modality.bands) * modality.size**2 * (_MOST_DATES if modality.has_dates else 1)
    return _GROWTH * values * np.dtype(modality.dtype).itemsize + _TAGS
