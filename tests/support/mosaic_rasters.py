"""Rasters of three sensors for mosaics, their descriptions, and what their shards hold."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.windows import Window

from bocage.recipes.loader import config_from_dict
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.verify import verify
from bocage.shards.read.dataset import ShardDataset
from bocage.shards.source.described.description import DatasetDescription
from bocage.shards.source.described.mosaics import RasterCatalogue
from bocage.shards.source.described.open import open_described
from bocage.shards.write.writer import write_shards

LEFT, TOP = 500_000.0, 5_000_000.0
SENSORS: dict[str, dict[str, Any]] = {
    "ORTHO": {"files": "ortho/*.tif", "bands": {"R": 650, "G": 550, "B": 460}, "dtype": "uint8", "pixel": 0.2},
    "SPOT": {"files": "spot/*.tif", "bands": {"R": 650, "N": 830}, "dtype": "uint16", "pixel": 1.6},
    "S2": {"files": "s2/*.tif", "bands": {"R": 650, "N": 830}, "dtype": "uint16", "pixel": 10.0},
}
LABEL: dict[str, Any] = {"files": "label/*.tif", "pixel": 0.2, "classes": {0: "ground", 7: "roof"}}


def describe(*sensors: str, label: bool = False, **changes: Any) -> DatasetDescription:
    """Description of the sensors; ``ORTHO__nodata`` sets a key of a sensor or of the label."""
    chosen: dict[str, Any] = {
        "name": "mosaic",
        "kind": "rasters",
        "patch": 80.0,
        "sensors": copy.deepcopy({name: SENSORS[name] for name in sensors}),
        "labels": {"ROOFS": copy.deepcopy(LABEL)} if label else {},
    }
    for key, value in changes.items():
        name, _, part = key.partition("__")
        if part:
            chosen["labels" if name == "ROOFS" else "sensors"][name][part] = value
        else:
            chosen[key] = value
    return config_from_dict(DatasetDescription, chosen, "the description")


def open_catalogue(root: Path, description: DatasetDescription) -> RasterCatalogue:
    catalogue = open_described(root, description, root)
    assert isinstance(catalogue, RasterCatalogue)
    return catalogue


def noise(bands: int, height: int, width: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 250, (bands, height, width)).astype(dtype)


def roofs(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 7], np.uint8), (1, height, width))


def write(
    path: Path,
    array: np.ndarray,
    pixel: float,
    left: float = LEFT,
    top: float = TOP,
    crs: str | None = "EPSG:32631",
    mask: np.ndarray | None = None,
    alpha: bool = False,
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"count": len(array), "height": array.shape[1], "width": array.shape[2], "dtype": array.dtype.name}
    options = {"driver": "GTiff", "crs": crs, "transform": Affine(pixel, 0, left, 0, -pixel, top), **options}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile, **options) as file:
        if alpha:
            file.colorinterp = [ColorInterp.gray] * (len(array) - 1) + [ColorInterp.alpha]
        file.write(array)
        if mask is not None:
            file.write_mask(mask)
    return path


def write_three(root: Path, left: float = LEFT, top: float = TOP) -> None:
    """The orthophoto covers 4 x 3 patches and some pixels more, SPOT 3 x 4, Sentinel-2 all of them and a margin."""
    write(root / "ortho/a.tif", noise(3, 1250, 1650), 0.2, left, top, tiled=True, blockxsize=256, blockysize=256)
    write(root / "spot/a.tif", noise(2, 200, 160, "uint16"), 1.6)
    write(root / "s2/a.tif", noise(2, 48, 48, "uint16"), 10.0, LEFT - 80, TOP + 80)


def read_back(manifest: Manifest) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of all patches by key and modality, as training reads them."""
    dataset = ShardDataset(manifest, list(manifest.registry.values()), None, 0)
    samples = [dataset[0, row] for row in range(len(dataset))]
    return {sample.key: sample.arrays for sample in samples}


def shard(root: Path, description: DatasetDescription, out: Path, **options: Any) -> Manifest:
    manifest = write_shards(open_catalogue(root, description), out, **options)
    assert not verify(out, decode=None).problems
    return manifest


def direct(path: Path, left: float, top: float, size: int) -> np.ndarray:
    """A window of a raster whose pixels lie on the grid of the patches."""
    with rasterio.open(path) as file:
        column, row = (left - file.transform.c) / file.transform.a, (top - file.transform.f) / file.transform.e
        assert abs(column - round(column)) < 0.01 and abs(row - round(row)) < 0.01
        values: np.ndarray = file.read(window=Window(round(column), round(row), size, size))
        return values


def positions(manifest: Manifest) -> dict[str, tuple[float, float]]:
    columns = (manifest.column(name).to_pylist() for name in ("key", "left", "top"))
    return {key: (left, top) for key, left, top in zip(*columns)}
