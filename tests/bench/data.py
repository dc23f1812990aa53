"""Compare the delivery of training batches with other readers: ``python tests/bench/data.py``.

Every loader delivers the same tensors: all inputs of the shards, each patch cropped to the same 256-pixel window, in
batches of 16, with native dtypes and padded series. The script first checks that the tensors are equal. Then the
loaders run in turns. Each turn measures some batches after a warm-up, so that the start and the end of an epoch do not
count. Rates are medians over turns. Ratios are medians of the ratios within one turn, because the speed of the machine
changes between turns. The files are in the page cache.

- rasterio: a map-style dataset that opens each GeoTIFF with rasterio, reads it completely, as the official code does,
  and crops it; ``rasterio, window`` reads only the window.
- litdata, mosaicml-streaming, where installed: their own file formats hold the encoded members of the shards and are
  read in order; bocage's codec decodes, and bocage's ``collate`` builds the batch.
- limits: ``pread`` of the same bytes, without and with decoding, in one process without a loader.

    python tests/bench/data.py                   simulates patches with 40 to 100 dates per series, as in FLAIR-HUB
    python tests/bench/data.py TREE SHARDS       uses a tree and the shards made from it
    python tests/bench/data.py --cpu             measures CPU time of one process, for a busy machine
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Both libraries would print between the lines of the table.
os.environ |= {"LITDATA_DISABLE_VERSION_CHECK": "1", "LIT_DATA_DISABLE_PROGRESS": "1"}

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from torch.utils.data import DataLoader, Dataset

from bocage.shards.batch import Batch, GroundWindow, Sample
from bocage.shards.format.codec import EncodedArray, decode
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import Modality
from bocage.shards.read.collate import collate
from bocage.shards.read.dataset import TrainingStream, days_since_may
from bocage.shards.read.windows import draw_windows, pixel_slices
from bocage.shards.sample_seed import sample_seed
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

BATCH, WINDOW, SEED = 16, 51.2, 0
WARM_UP = 3  # batches
COPIES = 5  # litdata and mosaicml-streaming get every patch five times, so that an epoch outlasts a measurement

Loader = Callable[[int], Iterator[Batch]]
ReadWindow = Callable[[Modality, GroundWindow], np.ndarray | None]


class BenchmarkData:
    """The patches to deliver, from a tree and from the shards made from it."""

    def __init__(self, tree: Path, shards: Path) -> None:
        self.manifest = Manifest.open(shards)
        self.modalities: list[Modality] = list(self.manifest.registry.inputs)
        self.keys = [self.manifest.index.key(row) for row in range(len(self.manifest))]
        catalogue = FlairHubCatalogue.open(tree)
        patches = [catalogue.patch(number) for number in range(len(catalogue))]
        sources = {patch.key: patch.sources for patch in patches}
        self.paths = [{name: str(source) for name, source in sources[key].items()} for key in self.keys]
        self.dates = [
            {
                item.name: days_since_may(self.manifest.index.dates(item.name, row))
                for item in self.modalities
                if item.has_time_axis
            }
            for row in range(len(self.keys))
        ]

    def sample(self, row: int, read_window: ReadWindow, dates: dict[str, Any]) -> Sample:
        """Crop a sample; ``read_window`` reads one modality in the window."""
        key = self.keys[row]
        seed = sample_seed(SEED, 0, key)
        [window] = draw_windows([seed], WINDOW, self.modalities)
        arrays = {item.name: array for item in self.modalities if (array := read_window(item, window)) is not None}
        return Sample(key, self.manifest.index.roi(row), seed, window, arrays, dates)

    def member(self, row: int, name: str) -> bytes:
        """Read an encoded member of a sample; empty if the modality is absent."""
        index = self.manifest.index
        length = int(index.length[name][row])
        if length == 0:
            return b""
        return self.manifest.files.read(int(index.shard[row]), int(index.offset[name][row]), length)

    def encode_sample(self, row: int) -> dict[str, Any]:
        """Build the record of a sample for litdata and mosaicml-streaming: its row and its encoded members."""
        return {"row": row, **{item.name: self.member(row, item.name) for item in self.modalities}}

    def decode_sample(self, record: dict[str, Any]) -> Sample:
        """Decode and crop a record of ``encode_sample``."""
        row = int(record["row"])

        def read_window(item: Modality, window: GroundWindow) -> np.ndarray | None:
            member = record[item.name]
            return EncodedArray(member).decode(pixel_slices(item, window)) if len(member) else None

        return self.sample(row, read_window, self.dates[row])

    def collate(self, samples: list[Sample]) -> Batch:
        """Collate samples with bocage's ``collate``."""
        return collate(samples, self.modalities)


class RasterioDataset(Dataset[Sample]):
    """Open each raster with rasterio; with ``windowed``, read only the window."""

    def __init__(self, data: BenchmarkData, windowed: bool) -> None:
        self.data, self.windowed = data, windowed

    def __getitem__(self, row: int) -> Sample:
        def read_window(item: Modality, window: GroundWindow) -> np.ndarray | None:
            path = self.data.paths[row].get(item.name)
            if path is None:
                return None
            rows, columns = pixel_slices(item, window)
            with rasterio.open(path) as file:
                if self.windowed:
                    values = file.read(window=Window.from_slices(rows, columns))
                else:
                    values = file.read()[:, rows, columns]
            return values.reshape(-1, len(item.bands), *values.shape[1:]) if item.has_time_axis else values

        return self.data.sample(row, read_window, self.data.dates[row])


def bocage_loader(data: BenchmarkData, threads: int) -> Loader:
    """The loader of bocage; with 0 workers it decodes in torch's threads."""

    def loader(workers: int) -> Iterator[Batch]:
        torch.set_num_threads(threads)
        rows = np.arange(len(data.keys))
        source = TrainingStream(
            data.manifest,
            rows,
            data.modalities,
            batch_size=BATCH,
            window=WINDOW,
            seed=SEED,
            workers=workers,
        )
        return source.batches(0, 0, 1)

    return loader


def rasterio_loader(data: BenchmarkData, windowed: bool) -> Loader:
    """A DataLoader over GeoTIFFs."""

    def loader(workers: int) -> Iterator[Batch]:
        endless = itertools.cycle(range(len(data.keys)))
        batches = iter(lambda: list(itertools.islice(endless, BATCH)), [])
        dataset = RasterioDataset(data, windowed)
        return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=data.collate))

    return loader


def litdata_loader(data: BenchmarkData, folder: Path) -> Loader | None:
    """Write the encoded members in litdata's format and return a loader; None if litdata is not installed."""
    try:
        import litdata
    except ImportError:
        return None
    litdata.optimize(
        fn=data.encode_sample,
        inputs=list(range(len(data.keys))) * COPIES,
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )

    class EncodedSamples(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Sample:
            return data.decode_sample(super().__getitem__(index))

    def loader(workers: int) -> Iterator[Batch]:
        return iter(
            litdata.StreamingDataLoader(
                EncodedSamples(str(folder)), batch_size=BATCH, num_workers=workers, collate_fn=data.collate
            )
        )

    return loader


def mosaicml_loader(data: BenchmarkData, folder: Path) -> Loader | None:
    """Write the encoded members in mosaicml-streaming's format and return a loader; None if it is not installed."""
    try:
        import streaming
    except ImportError:
        return None
    columns = {"row": "int", **{item.name: "bytes" for item in data.modalities}}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for row in list(range(len(data.keys))) * COPIES:
            writer.write(data.encode_sample(row))

    class EncodedSamples(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return data.decode_sample(super().__getitem__(index))

    def loader(workers: int) -> Iterator[Batch]:
        streaming.base.util.clean_stale_shared_memory()
        dataset = EncodedSamples(local=str(folder), batch_size=BATCH)
        return iter(DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=data.collate))

    return loader


def read_limit(data: BenchmarkData, decoding: bool, clock: Callable[[], float]) -> float:
    """Measure samples per second of reading the members and, with ``decoding``, of decoding them."""
    started = clock()
    for row in range(len(data.keys)):
        for item in data.modalities:
            member = data.member(row, item.name)
            if decoding and member:
                decode(member)
    return len(data.keys) / (clock() - started)


def samples_per_second(loader: Loader, workers: int, batches: int, clock: Callable[[], float]) -> float:
    """Measure the rate of a loader after its warm-up."""
    torch.set_num_threads(1)
    delivered = loader(workers)
    for _ in range(WARM_UP):
        next(delivered)
    started = clock()
    for _ in range(batches):
        next(delivered)
    return batches * BATCH / (clock() - started)


def sample_tensors(batch: Batch, index: int) -> dict[tuple[str, str], torch.Tensor]:
    """Return all tensors of one sample of a batch, without padding."""
    tensors = {("seeds", ""): batch.seeds[index], ("windows", ""): batch.windows[index]}
    for name, values in batch.values.items():
        tensors["present", name] = batch.present[name][index]
        if name in batch.padding:
            valid = ~batch.padding[name][index]
            tensors["dates", name] = batch.dates[name][index][valid]
            tensors["values", name] = values[index][valid]
        else:
            tensors["values", name] = values[index]
    return tensors


def check_equal(loaders: dict[str, Loader], count: int) -> None:
    """Exit with an error unless all loaders deliver bit-identical samples of all ``count`` patches."""
    samples: dict[str, dict[str, dict[tuple[str, str], torch.Tensor]]] = {}
    for name, loader in loaders.items():
        delivered = samples[name] = {}
        for batch in loader(0):
            for index, key in enumerate(batch.keys):
                delivered.setdefault(key, sample_tensors(batch, index))
            if len(delivered) == count:
                break
    reference = samples["bocage"]
    for name, delivered in samples.items():
        if delivered.keys() != reference.keys():
            raise SystemExit(f"{name} delivers other patches than bocage")
        for key, expected in reference.items():
            for field, tensor in expected.items():
                if delivered[key][field].dtype != tensor.dtype or not torch.equal(delivered[key][field], tensor):
                    raise SystemExit(f"{name} delivers other {' '.join(field)} than bocage for {key}")
    print(f"all {len(samples)} loaders deliver the same tensors for {len(reference)} patches", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, nargs="?", help="FLAIR-HUB tree; simulated by default")
    parser.add_argument("shards", type=Path, nargs="?", help="shards made from TREE")
    parser.add_argument("--patches", type=int, default=96, help="simulated patches, without TREE (default 96)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], help="numbers of DataLoader workers (default 0 2)"
    )
    parser.add_argument("--cpu", action="store_true", help="measure CPU time of this process, without workers")
    parser.add_argument(
        "--batches", type=int, default=20, help="batches per turn (default 20); a third of them for rasterio"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bocage-bench-"))
    try:
        if arguments.shards is None:
            arguments.tree, arguments.shards = folder / "tree", folder / "shards"
            write_tree(arguments.tree, patches=arguments.patches, seed=5, dates=(40, 100), workers=2)
            write_shards(FlairHubCatalogue.open(arguments.tree), arguments.shards, workers=2, samples_per_shard=16)
        data = BenchmarkData(arguments.tree, arguments.shards)
        loaders = {
            "bocage": bocage_loader(data, 1),
            "bocage, all cores": bocage_loader(data, os.cpu_count() or 1),
            "rasterio": rasterio_loader(data, windowed=False),
            "rasterio, window": rasterio_loader(data, windowed=True),
            "litdata": litdata_loader(data, folder / "litdata"),
            "mosaicml-streaming": mosaicml_loader(data, folder / "mosaicml"),
        }
        torch.multiprocessing.set_start_method("fork", force=True)  # litdata.optimize has set another one
        compare({name: loader for name, loader in loaders.items() if loader is not None}, data, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(loaders: dict[str, Loader], data: BenchmarkData, arguments: argparse.Namespace) -> None:
    """Check that the loaders agree, measure their rates and print the table."""
    size = sum(int(data.manifest.index.length[item.name].sum()) for item in data.modalities) / len(data.keys)
    dates = [len(days) for row in data.dates for days in row.values()]
    print(
        f"{len(data.keys)} patches, {size / 1e6:.2f} MB encoded, {min(dates)} to {max(dates)} dates per series, "
        f"{len(data.modalities)} modalities, windows of {WINDOW:g} m, batches of {BATCH}"
    )
    check_equal(loaders, len(data.keys))
    clock = time.process_time if arguments.cpu else time.perf_counter
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.repeats):
        for workers in [0] if arguments.cpu else arguments.workers:
            for name, loader in loaders.items():
                if (workers or arguments.cpu) and name == "bocage, all cores":
                    continue  # a DataLoader worker decodes in one thread
                batches = max(2, arguments.batches // 3) if name.startswith("rasterio") else arguments.batches
                rates.setdefault((name, workers), []).append(samples_per_second(loader, workers, batches, clock))
        for name, decoding in (("limit: pread", False), ("limit: pread and decode", True)):
            rates.setdefault((name, 0), []).append(read_limit(data, decoding, clock))
    print(f"{'':<26}{'workers':>8}{'samples/s':>11}{'bocage is':>11}   (min to max)")
    for (name, workers), values in rates.items():
        ratios = [bocage / other for bocage, other in zip(rates["bocage", workers], values)]
        print(
            f"{name:<26}{workers:>8}{statistics.median(values):>11.1f}{statistics.median(ratios):>10.2f}x"
            f"   ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
