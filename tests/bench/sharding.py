"""Size and speed of sharding against plain GeoTIFF and plain rasterio: ``python tests/bench/sharding.py TREE``.

TREE is a FLAIR-HUB tree, such as ``bocage sample`` writes. Simulated series are short, and what a reader costs depends
on their length: series get as many dates as FLAIR-HUB's have on average, borrowed from the patches that follow
(``--dates``; 0 takes the files as they are). Three tables:

- bytes of each modality against LZW GeoTIFF (the file's own size where it is LZW, else written anew), and how many
  patches a second one core encodes and decodes, in process CPU time;
- patches a second that one core shards, from opening files to bytes in a tar, against a peer that differs in one thing:
  it opens each file with rasterio and reads all bands, as data loaders do, and checks nothing. They take turns;
- the same in one process and in two, in wall-clock time, and the largest resident memory of a process.

Files are read once before, so that all of it is about the processor. Figures of a busy machine are good for ratios
only.
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
from bocage.shards.source import rasters
from bocage.shards.source.catalogue import Catalogue, Patch
from bocage.shards.source.rasters import Raster, RasterSource
from bocage.shards.write.packing import ShardTask, write_shard

_GDAL = {"GDAL_CACHEMAX": 64, "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_NUM_THREADS": 1}
_MEGABYTE = 1e6


def lengthened(catalogue: Catalogue, row: int, dates: int, folder: Path) -> Patch:
    """The patch with series of so many dates, taken from the patches that follow; LZW, as the simulator writes."""
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
    """Size of the raster as an LZW GeoTIFF."""
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
    """Median process CPU time, seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def encodings(patches: list[Patch], registry: Registry, repeats: int) -> None:
    """Table of bytes, encoding and decoding."""
    print(f"{'modality':22}{'LZW MB':>9}{'here MB':>9}{'ratio':>8}{'encode ms':>11}{'decode ms':>11}")
    totals = np.zeros(4)
    decoding_inputs = 0.0
    for modality in registry.values():
        sources = [patch.sources[modality.name] for patch in patches if modality.name in patch.sources]
        if not sources:
            continue
        arrays = [rasters.read_raster(source, modality).array for source in sources]
        before = sum(lzw_bytes(source.read(), array) for source, array in zip(sources, arrays))
        members = [encode(array, modality.codec) for array in arrays]
        for array, member in zip(arrays, members):
            assert modality.codec == "height-5mm" or decode(member).tobytes() == array.tobytes()
        after = sum(map(len, members))
        # As the writer and the reader do: members are not kept, arrays go where a batch has its place for them.
        encoding = cpu_time(lambda: deque((encode(array, modality.codec) for array in arrays), 0), repeats)  # noqa: B023
        decoding = cpu_time(lambda: deque(map(_decode_into, members, arrays), 0), repeats)  # noqa: B023
        row = np.array([before / _MEGABYTE, after / _MEGABYTE, encoding * 1e3, decoding * 1e3]) / len(patches)
        totals += row
        decoding_inputs += row[3] if modality.is_input else 0.0
        print(_row(modality.name, row))
    print(_row("all, per patch", totals))
    print(f"encodes {1e3 / totals[2]:.1f} patches/s, decodes {1e3 / totals[3]:.1f}, inputs {1e3 / decoding_inputs:.1f}")


def _decode_into(member: bytes, place: np.ndarray) -> None:
    EncodedArray(member).decode(out=place)


def _row(name: str, row: np.ndarray) -> str:
    before, after, encoding, decoding = row
    return f"{name:22}{before:9.4f}{after:9.4f}{after / before:8.3f}{encoding:11.2f}{decoding:11.2f}"


def read_with_rasterio(source: RasterSource, modality: Modality) -> Raster:
    """What a loader that opens each file with rasterio does."""
    with rasterio.open(source.path) as file:
        bands, transform, crs = file.read(), file.transform, file.crs.to_string() if file.crs else ""
    if modality.has_time_axis:
        bands = bands.reshape(-1, len(modality.bands), modality.size, modality.size)
    return Raster(bands, crs, transform.c, transform.f, source.path.stat().st_size)


@contextmanager
def _here() -> Iterator[None]:
    with rasterio.Env(**_GDAL):
        yield


@contextmanager
def _peer() -> Iterator[None]:
    with mock.patch.object(rasters, "read_raster", read_with_rasterio):
        yield


def shard(patches: list[Patch], registry: Registry, splits: list[str], folder: Path) -> Path:
    """One shard of these patches; the tar."""
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    job = ShardTask(0, folder, registry, splits, patches, max_skipped=0)
    write_shard(job, lambda _patches, _written: None)
    return job.shard_path


def against_rasterio(patches: list[Patch], registry: Registry, splits: list[str], repeats: int) -> None:
    """Table of sharding speed on one core."""
    times: dict[str, list[float]] = {"here": [], "rasterio": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):  # the first turn only warms up
            start = time.process_time()
            with _here():
                here = shard(patches, registry, splits, Path(folder) / "here")
            between = time.process_time()
            with _peer():
                peer = shard(patches, registry, splits, Path(folder) / "rasterio")
            end = time.process_time()
            if repeat:
                times["here"].append(between - start)
                times["rasterio"].append(end - between)
        same = here.read_bytes() == peer.read_bytes()
    speeds = {name: len(patches) / statistics.median(seconds) for name, seconds in times.items()}
    print(f"shards {speeds['here']:.1f} patches/s a core; one rasterio open a file {speeds['rasterio']:.1f};", end=" ")
    print(f"ratio {speeds['here'] / speeds['rasterio']:.2f}; same bytes: {same}")


def _worker(patches: list[Patch], registry: Registry, splits: list[str], barrier: Any, results: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, _here():
        shard(patches[:2], registry, splits, Path(folder))
        barrier.wait()
        start = time.monotonic()
        shard(patches, registry, splits, Path(folder))
        barrier.wait()
    results.put((time.monotonic() - start, _peak()))


def _peak() -> float:
    """Largest resident memory of this process, MiB; what getrusage says began with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def processes(patches: list[Patch], registry: Registry, splits: list[str], repeats: int) -> None:
    """Table of one process against two on the same number of patches each."""
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
            found = [results.get() for _ in started]
            for process in started:
                process.join()
            speeds[count].append(count * len(patches) / max(seconds for seconds, _ in found))
            memory = max(memory, *(resident for _, resident in found))
    one, two = (statistics.median(found) for found in speeds.values())
    print(f"one process {one:.1f} patches/s, two {two:.1f}: ratio {two / one:.2f}; at most {memory:.0f} MiB a process")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--patches", type=int, default=40, help="that many, spread over the tree (default 40)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dates", type=int, default=91, help="dates of every series (default 91; 0: as they are)")
    parser.add_argument("--lossy-dem", action="store_true", help="heights rounded by at most 5 mm")
    arguments = parser.parse_args()
    catalogue = Catalogue.open(arguments.tree)
    registry = with_lossy_dem(catalogue.registry) if arguments.lossy_dem else catalogue.registry
    splits = list(catalogue.splits)
    rows = range(0, len(catalogue), max(1, len(catalogue) // arguments.patches))[: arguments.patches]
    with tempfile.TemporaryDirectory() as folder:
        patches = [catalogue.patch(row) for row in rows]
        if arguments.dates:
            patches = [lengthened(catalogue, row, arguments.dates, Path(folder)) for row in rows]
        with _here():
            encodings(patches, registry, arguments.repeats)
        against_rasterio(patches, registry, splits, arguments.repeats)
        processes(patches, registry, splits, arguments.repeats)


if __name__ == "__main__":
    main()
