"""FLAIR-HUB trees of any size with empty or tiny files, and conversion of folders to the hub's zips."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyogrio

from bocage.shards.modality import FLAIR_HUB

DATES = 91
_ROIS, _DOMAINS, _PATCHES = 2822, 74, 241_100


def zip_folders(root: Path, method: int = zipfile.ZIP_STORED, nested: bool = True) -> None:
    """Replace every folder of ``root`` by a zip; with ``nested``, member names begin with the folder's name."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        with zipfile.ZipFile(root / f"{folder.name}.zip", "w", method) as file:
            for path in sorted(folder.rglob("*.*")):
                file.write(path, path.relative_to(root if nested else folder))
        shutil.rmtree(folder)


def patches(count: int = _PATCHES) -> Iterator[tuple[str, str, range]]:
    """Domain, ROI and patch numbers of each ROI; as in the dataset, a ROI has about 85 patches."""
    rois = max(1, _ROIS * count // _PATCHES)
    domains = max(1, _DOMAINS * count // _PATCHES)
    bounds = np.linspace(0, count, rois + 1).astype(int).tolist()
    for roi, (start, end) in enumerate(itertools.pairwise(bounds)):
        domain = roi * domains // rois
        yield f"D{domain + 1:03}-{2018 + domain % 4}", f"{'AF'[roi % 2]}U-S{1 + roi % 3}-{roi}", range(end - start)


def rasters(count: int) -> Iterator[tuple[str, str, list[str]]]:
    """Folder, ROI and file names, for every modality and ROI."""
    for modality in FLAIR_HUB.values():
        for domain, roi, numbers in patches(count):
            folder = f"{domain.split('-')[0]}-195X" if modality.historical else domain
            folder = f"{folder}_{modality.name}"
            yield folder, roi, [f"{folder}_{roi}_{number // 10}-{number % 10}.tif" for number in numbers]


def write_folders(root: Path, count: int = _PATCHES) -> None:
    """Write the tree as folders with empty files."""
    for folder, roi, files in rasters(count):
        (root / folder / roi).mkdir(parents=True)
        for file in files:
            open(f"{root}/{folder}/{roi}/{file}", "wb").close()


def write_zips(root: Path, count: int = _PATCHES) -> None:
    """Write the tree as valid zips with one stored byte per raster."""
    root.mkdir(parents=True, exist_ok=True)
    members: dict[str, list[bytes]] = {}
    for folder, roi, files in rasters(count):
        members.setdefault(folder, []).extend(f"{folder}/{roi}/{file}".encode() for file in files)
    crc = 0xE8B7BE43  # of b"a"
    for folder, names in members.items():
        local, central, offset = [], [], 0
        for name in names:
            local.append(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, 1, 1, len(name), 0) + name + b"a")
            fields = (20, 20, 0, 0, 0, 0, crc, 1, 1, len(name), 0, 0, 0, 0, 0, offset)
            central.append(struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name)
            offset += len(local[-1])
        size = sum(map(len, central))
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(names), len(names), size, offset, 0)
        (root / f"{folder}.zip").write_bytes(b"".join([*local, *central, end]))


def write_metadata(root: Path, count: int = _PATCHES) -> None:
    """Write GLOBAL_ALL_MTD with one row per patch; all patches of a ROI share the dates of a series."""
    root.mkdir(parents=True, exist_ok=True)
    keys, texts = [], []
    for number, (domain, roi, numbers) in enumerate(patches(count)):
        keys += [f"{domain}_{roi}_{patch // 10}-{patch % 10}" for patch in numbers]
        dates = {
            str(step + 1): f"2021{1 + step * 12 // DATES:02}{1 + (number + step) % 28:02}" for step in range(DATES)
        }
        texts += [json.dumps(dates)] * len(numbers)
    for modality in FLAIR_HUB.values():
        if modality.dates_table is None:
            continue
        columns = {"patch_id": keys, "date": ["20190704"] * count}
        if modality.has_time_axis:
            columns = {"patch_id": keys, "acquisition_dates": texts}
        _write_table(root / f"GLOBAL_{modality.dates_table}_MTD_DATES.gpkg", columns)
    names = [*(f"split_{number}" for number in range(1, 6)), "split_flairchallenge", "split_toy"]
    turn = [("train", "valid", "test")[number % 3] for number in range(count)]
    _write_table(root / "GLOBAL_ALL_MTD_SPLIT.gpkg", {"patch_id": keys, **dict.fromkeys(names, turn)})


def _write_table(path: Path, columns: dict[str, list[str]]) -> None:
    arrays = [np.array(values, object) for values in columns.values()]
    pyogrio.raw.write(path, geometry=None, field_data=arrays, fields=list(columns), driver="GPKG", geometry_type=None)
