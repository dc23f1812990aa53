"""Small FLAIR-HUB trees with the shapes of the dataset, written by rasterio, for tests of the catalogue and writer."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyogrio
import rasterio
from rasterio import Affine

from bocage.shards.modality import FLAIR_HUB, Modality

CORNER = (650_000.0, 6_860_000.0)


def content(modality: Modality, dates: int, seed: int) -> np.ndarray:
    """Smooth values with some noise, (bands * dates, H, W) in the modality's dtype."""
    random = np.random.default_rng(seed)
    size, bands = modality.size, len(modality.bands) * (dates if modality.has_time_axis else 1)
    if modality.role == "label":
        return (
            np.stack([random.integers(0, len(scheme), (8, 8)) for scheme in modality.schemes])
            .repeat(size // 8, 1)
            .repeat(size // 8, 2)
            .astype(modality.dtype)
        )
    rows, columns = np.mgrid[:size, :size] / size
    waves = np.sin(random.uniform(1, 9, (bands, 1, 1)) * rows + random.uniform(1, 9, (bands, 1, 1)) * columns)
    values = waves + random.normal(0, 0.05, (bands, size, size))
    scale = {"uint8": 60.0, "uint16": 900.0, "float32": 40.0}[modality.dtype]
    if modality.role == "mask":
        scale = 25.0
    elif modality.representation == "decibel":
        scale = 0.05
    return ((values + 1.5) * scale).astype(modality.dtype)


def series_date(number: int) -> datetime.date:
    """Date of the ``number``-th (from 1) step of every series."""
    return datetime.date(2021, 1, 1) + datetime.timedelta(days=4 * number)


def write_raster(
    path: Path, bands: np.ndarray, gsd: float, corner: tuple[float, float] = CORNER, **options: object
) -> None:
    """Write a GeoTIFF in Lambert-93."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff",
        "compress": "lzw",
        "crs": "EPSG:2154",
        "transform": Affine(gsd, 0, corner[0], 0, -gsd, corner[1]),
    }
    profile |= {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype} | options
    with rasterio.open(path, "w", **profile) as file:
        file.write(bands)


def raster_path(root: Path, modality: Modality, key: str) -> Path:
    """Path of a raster of the patch ``key`` in the layout of the dataset."""
    domain, roi, cell = key.split("_")
    folder = f"{domain.split('-')[0]}-195X" if modality.historical else domain
    return root / f"{folder}_{modality.name}" / roi / f"{folder}_{modality.name}_{roi}_{cell}.tif"


def write_table(path: Path, columns: Mapping[str, Sequence[str | None]]) -> None:
    """Write a GeoPackage with text columns and no geometry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [np.array(values, object) for values in columns.values()]
    pyogrio.raw.write(path, geometry=None, field_data=arrays, fields=list(columns), driver="GPKG", geometry_type=None)


def write_tree(
    root: Path, keys: list[str], modalities: list[str] | None = None, dates: int = 3, metadata: bool = True
) -> Path:
    """Write rasters and metadata of the patches ``keys``; their splits are train, valid and test in turn."""
    chosen = [FLAIR_HUB[name] for name in modalities or FLAIR_HUB]
    for index, key in enumerate(keys):
        column = int(key.rsplit("-", 1)[1])
        for position, modality in enumerate(chosen):
            bands = content(modality, dates, seed=100 * index + position)
            corner = (CORNER[0] + 102.4 * column, CORNER[1])
            write_raster(raster_path(root, modality, key), bands, modality.gsd, corner)
    if metadata:
        folder = root / "GLOBAL_ALL_MTD"
        for modality in chosen:
            if modality.dates_table and modality.has_time_axis:
                texts = json.dumps(
                    {str(number): series_date(number).strftime("%Y%m%d") for number in range(1, dates + 1)}
                )
                columns = {"patch_id": keys, "acquisition_dates": [texts] * len(keys)}
            elif modality.dates_table:
                columns = {"patch_id": keys, "date": ["19550600" if modality.historical else "20190704"] * len(keys)}
            else:
                continue
            write_table(folder / f"GLOBAL_{modality.dates_table}_MTD_DATES.gpkg", columns)
        split = [("train", "valid", "test")[index % 3] for index in range(len(keys))]
        write_table(
            folder / "GLOBAL_ALL_MTD_SPLIT.gpkg", {"patch_id": keys, "split_1": split, "split_toy": [None] * len(keys)}
        )
    return root
