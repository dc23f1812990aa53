"""Names of FLAIR-HUB's folders and files, and integer codes of patches. Only this module knows the names.

A file is ``{D}-{YYYY}_{MODALITY}/{ROI}/{D}-{YYYY}_{MODALITY}_{ROI}_{row}-{column}.tif``, where ``D012`` is a department
and ``D012-2019`` a domain. Historical modalities have ``195X`` instead of the year; domains of one department with
different years share its historical files. On the hub, each folder is a zip of the same name.
"""

from __future__ import annotations

import re

import numpy as np

from bocage.shards.modality import Modality

HISTORICAL_YEAR = "195X"
FOLDER = re.compile(r"(?P<department>D[0-9A-Z]{3,6})-(?P<year>\d{4}|195X)_(?P<modality>.+)", re.ASCII)
ROI = re.compile(r"[A-Za-z0-9-]+")
CELL = re.compile(r"(0|[1-9]\d{0,3})-(0|[1-9]\d{0,3})", re.ASCII)
# The code of a patch is one integer that sorts like the catalogue: domain (15 bits), ROI (20), row (14), column (14).
DOMAIN_SHIFT, ROI_SHIFT, ROW_SHIFT = 48, 28, 14
MAX_DOMAINS, MAX_ROIS = 1 << 15, 1 << 20


def modality_folder(domain: str, modality: Modality) -> str:
    """Name of the folder of ``modality`` in ``domain`` (``D012-2019``)."""
    return (
        f"{domain.split('-')[0]}-{HISTORICAL_YEAR}_{modality.name}"
        if modality.historical
        else (f"{domain}_{modality.name}")
    )


def raster_file(folder: str, roi: str, cell: str) -> str:
    """Path of a raster within ``folder``; ``cell`` is ``row-column``."""
    return f"{roi}/{folder}_{roi}_{cell}.tif"


def key_from_path(path: str) -> str | None:
    """Key of the patch that owns a path like ``../D012-2019_SPOT_RGBI/AF-S1-27/..._5-10.tif``.

    None for an empty cell, and for a historical file, whose path has no image year.
    """
    parts = path.strip().replace("\\", "/").split("/")
    if len(parts) < 3 or not parts[-1].endswith(".tif"):
        return None
    folder, roi, cell = FOLDER.fullmatch(parts[-3]), parts[-2], parts[-1][:-4].rsplit("_", 1)[-1]
    if folder is None or folder["year"] == HISTORICAL_YEAR or not CELL.fullmatch(cell):
        return None
    return f"{folder['department']}-{folder['year']}_{roi}_{cell}"


def natural_sort_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ``AF-S1-2`` before ``AF-S1-10``; names with equal numbers sort as text."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def cell_from_code(code: int) -> str:
    """``row-column`` of a patch code."""
    return f"{code >> ROW_SHIFT & 0x3FFF}-{code & 0x3FFF}"


def unpack_code(code: int) -> tuple[int, int, str]:
    """Domain index, ROI index, and ``row-column`` of a patch code."""
    return code >> DOMAIN_SHIFT, code >> ROI_SHIFT & MAX_ROIS - 1, cell_from_code(code)


def patch_keys(domains: list[str], rois: list[str], codes: np.ndarray) -> list[str]:
    """Keys of the patches ``codes``, (N,) int64, whose domain and ROI indices refer to ``domains`` and ``rois``."""
    patches = map(unpack_code, codes.tolist())
    return [f"{domains[domain]}_{rois[roi]}_{cell}" for domain, roi, cell in patches]
