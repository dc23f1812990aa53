"""Real Sentinel series (TreeSatAI, PASTIS-R) as FLAIR-HUB trees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pyogrio
import rasterio
from rasterio.transform import from_origin

from bocage.shards.modality import FLAIR_HUB

DATA = Path(__file__).parents[1] / "data"
_TREESAT = {
    "SENTINEL2_TS": ("sen-2-data", "sen-2-products"),
    "SENTINEL2_MSK-SC": ("sen-2-masks", None),
    "SENTINEL1-ASC_TS": ("sen-1-asc-data", "sen-1-asc-products"),
    "SENTINEL1-DESC_TS": ("sen-1-des-data", "sen-1-des-products"),
}
_PASTIS = {"SENTINEL2_TS": "s2", "SENTINEL1-ASC_TS": "s1a", "SENTINEL1-DESC_TS": "s1d"}
_PASTIS_DAYS = ["20190112", "20190521", "20190903"]  # invented, because the files have no dates


def treesat_tree(root: Path) -> dict[tuple[str, str], np.ndarray]:
    """Write one patch of 6 x 6 pixels mirrored to 10 x 10, with real dates; returns arrays by (key, modality)."""
    key = "D900-2019_AA-S1-1_0-0"
    written: dict[tuple[str, str], np.ndarray] = {}
    with h5py.File(DATA / "treesatai_ts" / "Betula_spec._1_15679_WEFL_NLF_2019.h5") as source:
        for name, (values, products) in _TREESAT.items():
            series = np.pad(source[values][:], ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
            written[key, name] = _write(root, key, name, series.astype(FLAIR_HUB[name].dtype))
            if products is not None:
                days = [re.search(r"_(\d{8})T", product.decode())[1] for product in source[products][:]]  # type: ignore[index]
                _write_dates(root, name, [key], days)
    return written


def pastis_tree(root: Path) -> dict[tuple[str, str], np.ndarray]:
    """Write nine patches of 10 x 10 pixels from each 32 x 32 sample, with linear radar; returns arrays likewise."""
    written: dict[tuple[str, str], np.ndarray] = {}
    for name, band in _PASTIS.items():
        keys = []
        for domain, number in (("D901-2019", 619), ("D902-2019", 1616)):
            with h5py.File(DATA / "pastis" / f"sample_{number}_{band}.h5") as source:
                series = source["data"][:]
            if band != "s2":
                series = 10 ** (series[:, :2].astype(np.float32) / 10)
            for row, column in np.ndindex(3, 3):
                keys.append(f"{domain}_AA-S1-1_{row}-{column}")
                cut = series[:, :, 10 * row : 10 * row + 10, 10 * column : 10 * column + 10]
                written[keys[-1], name] = _write(root, keys[-1], name, cut.astype(FLAIR_HUB[name].dtype))
        _write_dates(root, name, keys, _PASTIS_DAYS)
    return written


def _write(root: Path, key: str, name: str, series: np.ndarray) -> np.ndarray:
    domain, roi, cell = key.split("_")
    row, column = map(int, cell.split("-"))
    path = root / f"{domain}_{name}" / roi / f"{domain}_{name}_{roi}_{cell}.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = series.reshape(-1, 10, 10)
    profile = {"driver": "GTiff", "width": 10, "height": 10, "count": len(bands), "dtype": series.dtype}
    corner = from_origin(9e5 + 102.4 * column, 6.8e6 - 102.4 * row, 10.24, 10.24)
    with rasterio.open(path, "w", crs="EPSG:2154", transform=corner, **profile) as target:
        target.write(bands)
    return series


def _write_dates(root: Path, name: str, keys: list[str], days: list[str]) -> None:
    folder = root / "GLOBAL_ALL_MTD"
    folder.mkdir(parents=True, exist_ok=True)
    dates = json.dumps({str(index): day for index, day in enumerate(days, start=1)})
    pyogrio.raw.write(
        folder / f"GLOBAL_{FLAIR_HUB[name].dates_table}_MTD_DATES.gpkg",
        geometry=None,
        field_data=[np.array(keys, object), np.array([dates] * len(keys), object)],
        fields=["patch_id", "acquisition_dates"],
    )
