"""Measure cutting large rasters into patches: ``python tests/bench/mosaics.py [--side 20000]``.

The script writes an RGB orthophoto of 0.2 m (tiled GeoTIFF, deflate), and rasters of 1.6 m and 10 m of the same ground,
to a temporary folder. Patches of 80 m are cut from them. It prints:

- seconds to open the catalogue, by the extents of the rasters and with a pass over their content (``nodata``);
- CPU time to read the sensors of a patch, in random order and in the order of the ground. The reference runs in turns:
  it opens each raster with ``rasterio.open`` for each patch and reads the same window;
- patches per second of one process that reads the content and writes all shards, and its peak resident memory.

At the full size it takes some 4 minutes on two idle cores, and 2.5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio import Affine
from rasterio.windows import Window

from bocage.recipes.loader import config_from_dict
from bocage.shards.source.described.description import DatasetDescription
from bocage.shards.source.described.mosaics import RasterCatalogue
from bocage.shards.source.described.raster_windows import WindowSource
from bocage.shards.source.raster import gdal_environment
from bocage.shards.write.writer import write_shards

_SIDE = 80.0  # of a patch, in metres
_BLOCK = 512
_SENSORS = {"ORTHO": (0.2, 3, "uint8"), "SPOT": (1.6, 4, "uint16"), "S2": (10.0, 10, "uint16")}


def write_rasters(folder: Path, side: int) -> None:
    """Write a raster of each sensor over ``side`` x ``side`` pixels of the finest: smooth values with some noise."""
    random = np.random.default_rng(0)
    for name, (pixel, bands, dtype) in _SENSORS.items():
        size = round(side * 0.2 / pixel)
        profile = {"driver": "GTiff", "width": size, "height": size, "count": bands, "dtype": dtype}
        profile |= {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate", "zlevel": 1}
        profile |= {"crs": "EPSG:32631", "transform": Affine(pixel, 0, 500_000, 0, -pixel, 5_000_000)}
        with rasterio.open(folder / f"{name}.tif", "w", **profile, bigtiff="if_safer") as file:
            for row in range(0, size, _BLOCK):
                height = min(_BLOCK, size - row)
                shape = (bands, -(-height // 32), -(-size // 32))
                smooth = random.integers(40, 200, shape).repeat(32, 1).repeat(32, 2)[:, :height, :size]
                values = smooth + random.integers(0, 8, (bands, height, size), dtype=np.uint8)
                file.write(values.astype(dtype), window=Window(0, row, size, height))


def describe(nodata: bool) -> DatasetDescription:
    """Description of the rasters, with or without a nodata value, which makes the catalogue read them."""
    sensors = {
        name: {
            "files": f"{name}.tif",
            "bands": dict.fromkeys([f"B{number}" for number in range(bands)], "other"),
            "dtype": dtype,
            "pixel": pixel,
            "nodata": [0.0] if nodata else [],
        }
        for name, (pixel, bands, dtype) in _SENSORS.items()
    }
    return config_from_dict(
        DatasetDescription, {"name": "bench", "kind": "rasters", "patch": _SIDE, "sensors": sensors}, "bench"
    )


def open_catalogue(folder: Path, nodata: bool) -> tuple[RasterCatalogue, float]:
    """Catalogue of the rasters, and the seconds to open it."""
    start = time.perf_counter()
    catalogue = RasterCatalogue.open(folder, describe(nodata), folder)
    return catalogue, time.perf_counter() - start


def read_sources(catalogue: RasterCatalogue, rows: list[int]) -> list[np.ndarray]:
    """Read the sensors of some patches as the writer does."""
    arrays = []
    with gdal_environment():
        for row in rows:
            sources = catalogue.patch(row).sources
            arrays += [source.read_raster(catalogue.registry[name]).array for name, source in sources.items()]
    return arrays


def read_with_rasterio(catalogue: RasterCatalogue, rows: list[int]) -> list[np.ndarray]:
    """Read the same windows with one ``rasterio.open`` for each patch and sensor."""
    arrays = []
    for row in rows:
        for source in catalogue.patch(row).sources.values():
            assert isinstance(source, WindowSource)
            size = source.grid.size
            with rasterio.open(source.frames[0][0].file.path) as file:
                arrays.append(file.read(window=Window(source.column * size, source.row * size, size, size)))
    return arrays


def compare_reading(catalogue: RasterCatalogue, patches: int, repeats: int) -> None:
    """Print the patches that one core reads in a second, against rasterio."""
    random = np.random.default_rng(0).choice(len(catalogue), patches, replace=False).tolist()
    for order, rows in (("random order", random), ("order of the ground", list(range(patches)))):
        times: dict[str, list[float]] = {"bocage": [], "rasterio": []}
        for repeat in range(repeats + 1):  # the first turn is a warm-up
            start = time.process_time()
            ours = read_sources(catalogue, rows)
            between = time.process_time()
            theirs = read_with_rasterio(catalogue, rows)
            end = time.process_time()
            if repeat:
                times["bocage"].append(between - start)
                times["rasterio"].append(end - between)
        same = all(np.array_equal(first, second) for first, second in zip(ours, theirs))
        ratios = [second / first for first, second in zip(times["bocage"], times["rasterio"])]
        speeds = {name: patches / statistics.median(seconds) for name, seconds in times.items()}
        print(f"reading in {order}: {speeds['bocage']:.0f} patches/s per core", end="; ")
        print(f"with one rasterio.open per patch and sensor {speeds['rasterio']:.0f}", end="; ")
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); same values: {same}")


def measure_sharding(folder: Path) -> dict[str, float]:
    """Write all shards in this process, which must be new, and return its speed and memory."""
    imported = peak_memory()
    catalogue, _ = open_catalogue(folder, nodata=True)
    opened = peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    manifest = write_shards(catalogue, folder / "out")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "patches": len(manifest),
        "patches/s": round(len(manifest) / wall, 1),
        "patches per CPU second": round(len(manifest) / cpu, 1),
        "MB of shards": round(sum(item.bytes for item in manifest.shards) / 1e6),
        "peak MiB after imports": round(imported),
        "peak MiB after the pass over the content": round(opened),
        "peak MiB": round(peak_memory()),
    }


def peak_memory() -> float:
    """Peak resident memory of this process, in MiB; getrusage would start from the parent's peak."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Write the rasters, measure, and remove them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000, help="side of the orthophoto, in pixels (default 20000)")
    parser.add_argument("--patches", type=int, default=100, help="patches to read in each turn (default 100)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        os.environ["XDG_CACHE_HOME"] = f"{arguments.measure}/cache"  # so that the content is read
        print(json.dumps(measure_sharding(Path(arguments.measure))))
        return
    folder = Path(tempfile.mkdtemp(prefix="bocage-mosaics-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "first-cache")
    try:
        start = time.perf_counter()
        write_rasters(folder, arguments.side)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        print(f"rasters written in {time.perf_counter() - start:.0f} s, {size:.0f} MB", flush=True)
        with_content = open_catalogue(folder, nodata=True)[1]
        catalogue, by_extents = open_catalogue(folder, nodata=False)
        print(
            f"{len(catalogue)} patches: opened in {by_extents:.2f} s, with a pass over the content {with_content:.1f} s"
        )
        compare_reading(catalogue, min(arguments.patches, len(catalogue)), arguments.repeats)
        command = [sys.executable, __file__, "--measure", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(f"sharding: {done.stdout.strip()}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
