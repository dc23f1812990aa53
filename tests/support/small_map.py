"""Small rasters, models and date files for tests of tiled inference."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import Affine
from tiny_segmentation import AERIAL, task

from bocage.finetune.models.segmentation import Segmentation, save_segmentation

LEFT, TOP = 700_000.0, 6_600_000.0
NODATA = 255
COMMAND = [sys.executable, "-m", "bocage", "map"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write(
    path: Path,
    values: np.ndarray,
    gsd: float,
    left: float = LEFT,
    top: float = TOP,
    crs: str | None = "EPSG:2154",
    nodata: float | None = None,
) -> Path:
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    profile |= {"crs": crs, "transform": Affine(gsd, 0, left, 0, -gsd, top), "nodata": nodata}
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)
    return path


def ground(height: int, width: int) -> np.ndarray:
    """Blobs of many sizes in four bands, uint8."""
    random = np.random.default_rng(0)
    total = np.zeros((4, height, width))
    for cell in (8, 40, 160):
        coarse = random.normal(size=(4, height // cell + 2, width // cell + 2))
        total += coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width]
    return np.clip(128 + 40 * total, 0, 255).astype(np.uint8)


def model(*names: str, **settings: Any) -> Segmentation:
    torch.set_num_threads(1)
    return task(*names, **settings).eval()


def saved(folder: Path, *names: str) -> Path:
    save_segmentation(model(*(names or (AERIAL,))), folder / "model")
    return folder


def dates_file(folder: Path, count: int) -> Path:
    path = folder / f"dates-{count}.txt"
    path.write_text("".join(f"2021-{month:02d}-15\n" for month in range(1, count + 1)))
    return path


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()
