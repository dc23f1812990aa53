"""FLAIR-HUB's folder and file names, and the integers that stand for patches. Nothing else in bocage knows them.

A file is ``{D}-{YYYY}_{MODALITY}/{ROI}/{D}-{YYYY}_{MODALITY}_{ROI}_{row}-{column}.tif``. Historical modalities have
``195X`` in place of the year; where a domain has two image years, both share the historical file of the same place.
On the hub, the folder is a zip of the same name.
"""

from __future__ import annotations

import re

import numpy as np

from bocage.shards.modality import Modality

HISTORICAL_YEAR = "195X"
FOLDER = re.compile(r"(?P<place>D[0-9A-Z]{3,6})-(?P<year>\d{4}|195X)_(?P<modality>.+)", re.ASCII)
ROI = re.compile(r"[A-Za-z0-9-]+")
CELL = re.compile(r"(0|[1-9]\d{0,3})-(0|[1-9]\d{0,3})", re.ASCII)
# A patch is one integer, in the order of the catalogue: domain (15 bits), ROI (20), row (14), column (14).
DOMAIN_SHIFT, ROI_SHIFT, ROW_SHIFT = 48, 28, 14
MOST_DOMAINS, MOST_ROIS = 1 << 15, 1 << 20


def folder_of(domain: str, modality: Modality) -> str:
    """Name of the folder of ``modality`` in ``domain`` (``D012-2019``)."""
    return (
        f"{domain.split('-')[0]}-{HISTORICAL_YEAR}_{modality.name}"
        if modality.historical
        else (f"{domain}_{modality.name}")
    )


def file_of(folder: str, roi: str, cell: str) -> str:
    """Path of a raster within ``folder``; ``cell`` is ``row-column``."""
    return f"{roi}/{folder}_{roi}_{cell}.tif"


def key_of_path(path: str) -> str | None:
    """Key of the patch that a path like ``../D012-2019_SPOT_RGBI/AF-S1-27/..._5-10.tif`` belongs to.

    None where the path does not tell: an empty cell, or a historical file, which has no image year.
    """
    parts = path.strip().replace("\\", "/").split("/")
    if len(parts) < 3 or not parts[-1].endswith(".tif"):
        return None
    folder, roi, place = FOLDER.fullmatch(parts[-3]), parts[-2], parts[-1][:-4].rsplit("_", 1)[-1]
    if folder is None or folder["year"] == HISTORICAL_YEAR or not CELL.fullmatch(place):
        return None
    return f"{folder['place']}-{folder['year']}_{roi}_{place}"


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ``AF-S1-2`` before ``AF-S1-10``; the name itself decides between equal numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def cell_of(code: int) -> str:
    """``row-column`` of a patch."""
    return f"{code >> ROW_SHIFT & 0x3FFF}-{code & 0x3FFF}"


def unpacked(code: int) -> tuple[int, int, str]:
    """Index of the domain, index of the ROI name, and ``row-column`` of a patch."""
    return code >> DOMAIN_SHIFT, code >> ROI_SHIFT & MOST_ROIS - 1, cell_of(code)


def keys_of(domains: list[str], rois: list[str], codes: np.ndarray) -> list[str]:
    """Keys of the patches ``codes``, (N,) int64: indices into ``domains`` and ``rois``, and cells, see ``unpacked``."""
    patches = map(unpacked, codes.tolist())
    return [f"{domains[domain]}_{rois[roi]}_{cell}" for domain, roi, cell in patches]
