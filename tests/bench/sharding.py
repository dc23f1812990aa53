"""Compare size and speed of sharding with GeoTIFF and rasterio: ``python tests/bench/sharding.py TREE``.

TREE is a FLAIR-HUB tree, for example from ``bocage sample``. The cost of reading a series depends on its number of
dates, and simulated series are short. Each series is therefore extended with dates of the next patches to the average
length in FLAIR-HUB (``--dates``; 0 keeps the files). The script prints three results:

- size of each modality relative to LZW GeoTIFF (the file itself if it is LZW, otherwise a rewritten copy), and CPU time
  of one core to encode and to decode;
- patches per CPU second of one core, from opening the files to bytes in a tar. The reference runs in turns and differs
  only in the reader: it opens each file with rasterio and reads all bands without checks, as data loaders do;
- patches per second of wall-clock time with one process and with two, and the peak resident memory of a process.

All files are read once before, so that only computation is measured. On a busy machine only the ratios are reliable.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import rasterio
import tifffile
from rasterio.io import MemoryFile

from bocage.shards.format.codec import EncodedArray, decode, encode, with_lossy_dem
from bocage.shards.format.shard_files import PARTS_FOLDER
from bocage.shards.modality import Modality, Registry
from bocage.shards.source.catalogue import Patch
from bocage.shards.source.flair_hub import rasters
from bocage.shards.source.flair_hub.rasters import RasterSource
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.source.raster import Raster
from bocage.shards.write.packing import ShardTask, write_shard

_GDAL = {"GDAL_CACHEMAX": 64, "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_NUM_THREADS": 1}
_MEGABYTE = 1e6

FlairHubPatch = Patch[RasterSource]


def extend_series(catalogue: FlairHubCatalogue, row: int, dates: int, folder: Path) -> FlairHubPatch:
    """Extend the series of a patch to ``dates`` dates from the next patches; the files are LZW, as simulated ones."""
    patch = catalogue.patch(row)
    sources = dict(patch.sources)
    for modality in catalogue.registry.values():
        if not modality.has_time_axis or modality.name not in sources:
            continue
        parts: list[np.ndarray] = []
        following = row
        while sum(map(len, parts)) < dates:
            source = catalogue.patch(following % len(catalogue)).sources.get(modality.name)
            parts += [rasters.read_raster(source, modality).array] if source is not None else []
            following += 1
        bands = np.concatenate(parts)[:dates].reshape(-1, modality.size, modality.size)
        with rasterio.open(sources[modality.name].path) as file:
            profile = {**file.profile, "count": len(bands)}
        path = folder / f"{patch.key}_{modality.name}.tif"
        with rasterio.open(path, "w", **profile) as file:
            file.write(bands)
        sources[modality.name] = RasterSource(path)
    return replace(patch, sources=sources, dates={})


def lzw_bytes(content: bytes, bands: np.ndarray) -> int:
    """Return the size of a raster as an LZW GeoTIFF."""
    with tifffile.TiffFile(BytesIO(content)) as file:
        if file.pages.first.compression == tifffile.COMPRESSION.LZW:
            return len(content)
    planes = bands.reshape(-1, *bands.shape[-2:])
    count, height, width = planes.shape
    with MemoryFile() as memory:
        profile = {"count": count, "height": height, "width": width, "dtype": planes.dtype}
        with memory.open(driver="GTiff", compress="lzw", interleave="pixel", **profile) as file:
            file.write(planes)
        return len(memory.read())


def cpu_time(run: Callable[[], Any], repeats: int) -> float:
    """Return the median CPU time of a run, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def compare_sizes(patches: list[FlairHubPatch], registry: Registry, repeats: int) -> None:
    """Print size, encoding time and decoding time of each modality, per patch."""
    print(f"{'modality':22}{'LZW MB':>9}{'shard MB':>9}{'ratio':>8}{'encode ms':>11}{'decode ms':>11}")
    totals = np.zeros(4)
    decoding_inputs = 0.0
    for modality in registry.values():
        sources = [patch.sources[modality.name] for patch in patches if modality.name in patch.sources]
        if not sources:
            continue
        arrays = [rasters.read_raster(source, modality).array for source in sources]
        lzw_size = sum(lzw_bytes(source.read(), array) for source, array in zip(sources, arrays))
        members = [encode(array, modality.codec) for array in arrays]
        for array, member in zip(arrays, members):
            assert modality.codec == "height-5mm" or decode(member).tobytes() == array.tobytes()
        shard_size = sum(map(len, members))
        # As in the writer and the reader, members are discarded and arrays are decoded into existing memory.
        encoding = cpu_time(lambda: deque((encode(array, modality.codec) for array in arrays), 0), repeats)  # noqa: B023
        decoding = cpu_time(lambda: deque(map(_decode_into, members, arrays), 0), repeats)  # noqa: B023
        row = np.array([lzw_size / _MEGABYTE, shard_size / _MEGABYTE, encoding * 1e3, decoding * 1e3]) / len(patches)
        totals += row
        decoding_inputs += row[3] if modality.is_input else 0.0
        print(_format_row(modality.name, row))
    print(_format_row("all, per patch", totals))
    print(f"encodes {1e3 / totals[2]:.1f} patches/s, decodes {1e3 / totals[3]:.1f}, inputs {1e3 / decoding_inputs:.1f}")


def _decode_into(member: bytes, out: np.ndarray) -> None:
    EncodedArray(member).decode(out=out)


def _format_row(name: str, row: np.ndarray) -> str:
    lzw_size, shard_size, encoding, decoding = row
    return f"{name:22}{lzw_size:9.4f}{shard_size:9.4f}{shard_size / lzw_size:8.3f}{encoding:11.2f}{decoding:11.2f}"


def read_with_rasterio(source: RasterSource, modality: Modality) -> Raster:
    """Read a raster as a data loader with rasterio does."""
    with rasterio.open(source.path) as file:
        bands, transform, crs = file.read(), file.transform, file.crs.to_string() if file.crs else ""
    if modality.has_time_axis:
        bands = bands.reshape(-1, len(modality.bands), modality.size, modality.size)
    return Raster(bands, crs, transform.c, transform.f, modality.patch_size, source.path.stat().st_size)


@contextmanager
def _bocage_reader() -> Iterator[None]:
    with rasterio.Env(**_GDAL):
        yield


@contextmanager
def _rasterio_reader() -> Iterator[None]:
    with mock.patch.object(rasters, "read_raster", read_with_rasterio):
        yield


def write_one_shard(patches: list[FlairHubPatch], registry: Registry, splits: list[str], folder: Path) -> Path:
    """Write the patches to one shard; return the path of the tar."""
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    task = ShardTask(0, folder, registry, splits, patches, max_skipped=0)
    write_shard(task, lambda _patches, _written: None)
    return task.shard_path


def compare_with_rasterio(patches: list[FlairHubPatch], registry: Registry, splits: list[str], repeats: int) -> None:
    """Print the sharding speed of one core with both readers."""
    times: dict[str, list[float]] = {"bocage": [], "rasterio": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):  # the first turn is a warm-up
            start = time.process_time()
            with _bocage_reader():
                bocage = write_one_shard(patches, registry, splits, Path(folder) / "bocage")
            between = time.process_time()
            with _rasterio_reader():
                reference = write_one_shard(patches, registry, splits, Path(folder) / "rasterio")
            end = time.process_time()
            if repeat:
                times["bocage"].append(between - start)
                times["rasterio"].append(end - between)
        same = bocage.read_bytes() == reference.read_bytes()
    speeds = {name: len(patches) / statistics.median(seconds) for name, seconds in times.items()}
    print(f"sharding: {speeds['bocage']:.1f} patches/s per core", end="; ")
    print(f"with one rasterio.open per file {speeds['rasterio']:.1f}", end="; ")
    print(f"ratio {speeds['bocage'] / speeds['rasterio']:.2f}; same bytes: {same}")


def _worker(patches: list[FlairHubPatch], registry: Registry, splits: list[str], barrier: Any, results: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, _bocage_reader():
        write_one_shard(patches[:2], registry, splits, Path(folder))
        barrier.wait()
        start = time.monotonic()
        write_one_shard(patches, registry, splits, Path(folder))
        barrier.wait()
    results.put((time.monotonic() - start, _peak_memory()))


def _peak_memory() -> float:
    """Return the peak resident memory of this process, in MiB; getrusage would start from the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compare_processes(patches: list[FlairHubPatch], registry: Registry, splits: list[str], repeats: int) -> None:
    """Print the speed of one process and of two; each process shards all patches."""
    context = multiprocessing.get_context("spawn")
    speeds: dict[int, list[float]] = {1: [], 2: []}
    memory = 0.0
    for _ in range(repeats):
        for count in speeds:
            barrier, results = context.Barrier(count), context.Queue()
            started = [
                context.Process(target=_worker, args=(patches, registry, splits, barrier, results))
                for _ in range(count)
            ]
            for process in started:
                process.start()
            measured = [results.get() for _ in started]
            for process in started:
                process.join()
            speeds[count].append(count * len(patches) / max(seconds for seconds, _ in measured))
            memory = max(memory, *(resident for _, resident in measured))
    one, two = (statistics.median(values) for values in speeds.values())
    print(f"one process {one:.1f} patches/s, two {two:.1f}: ratio {two / one:.2f}", end="; ")
    print(f"peak memory {memory:.0f} MiB per process")


def main() -> None:
    """Print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="FLAIR-HUB tree")
    parser.add_argument("--patches", type=int, default=40, help="patches to measure, spread over the tree (default 40)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--dates", type=int, default=91, help="dates per series (default 91; 0 keeps the files)")
    parser.add_argument("--lossy-dem", action="store_true", help="round heights by at most 5 mm")
    arguments = parser.parse_args()
    catalogue = FlairHubCatalogue.open(arguments.tree)
    registry = with_lossy_dem(catalogue.registry) if arguments.lossy_dem else catalogue.registry
    splits = list(catalogue.splits)
    rows = range(0, len(catalogue), max(1, len(catalogue) // arguments.patches))[: arguments.patches]
    with tempfile.TemporaryDirectory() as folder:
        patches = [catalogue.patch(row) for row in rows]
        if arguments.dates:
            patches = [extend_series(catalogue, row, arguments.dates, Path(folder)) for row in rows]
        with _bocage_reader():
            compare_sizes(patches, registry, arguments.repeats)
        compare_with_rasterio(patches, registry, splits, arguments.repeats)
        compare_processes(patches, registry, splits, arguments.repeats)


if __name__ == "__main__":
    main()
