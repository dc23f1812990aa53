"""Delivery of training batches against other ways to read the same patches: ``python tests/bench/data.py``.

Every loader delivers the same tensors: all inputs of the shards, cut to the same 256-pixel window by key, native
dtypes, series padded, batches of 16. That they are equal is checked first. Then loaders take turns, each for some
batches after a warm-up, in the middle of its work, so that start and end of an epoch do not count; rates are medians,
and ratios are medians of the ratios of one turn, since the machine's speed changes from turn to turn. The files are in
the page cache.

- rasterio: a map-style dataset that opens each GeoTIFF with rasterio, reads it whole, as the official code does, and
  crops; ``rasterio, window`` reads the window only.
- litdata, mosaicml-streaming, where installed: the members of the shards, as they are, in those libraries' own files,
  read in order, decoded by our codec, cropped and collated by our ``collate``.
- limits: ``pread`` of the same bytes, and the same with decoding, in one process without loader.

    python tests/bench/data.py                   on a sample of its own, with 40 to 100 dates a series, as FLAIR-HUB has
    python tests/bench/data.py TREE SHARDS       on a tree and the shards made of it
    python tests/bench/data.py --cpu             by the CPU time of one process, for a machine that others use
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

# The libraries below shall not speak between the lines.
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
from bocage.shards.read.windows import draw_windows, lattice_step, pixel_slices
from bocage.shards.sample_seed import sample_seed
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards

BATCH, WINDOW, SEED = 16, 51.2, 0
WARM_UP = 3  # batches
REPEATS_OF_CONTENT = 5  # how often the peers' files hold every patch: an epoch must outlast what is measured

Loader = Callable[[int], Iterator[Batch]]
Read = Callable[[Modality, GroundWindow], np.ndarray | None]


class Content:
    """What is delivered: the patches of a tree and of the shards made of it."""

    def __init__(self, tree: Path, shards: Path) -> None:
        self.manifest = Manifest.open(shards)
        self.modalities: list[Modality] = list(self.manifest.registry.inputs)
        self.keys = [self.manifest.index.key(row) for row in range(len(self.manifest))]
        catalogue = Catalogue.open(tree)
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

    def sample(self, row: int, read: Read, dates: dict[str, Any]) -> Sample:
        """A cropped sample of what ``read`` gives for a modality and the window."""
        key = self.keys[row]
        seed = sample_seed(SEED, 0, key)
        [window] = draw_windows([seed], WINDOW, lattice_step(self.modalities))
        arrays = {item.name: array for item in self.modalities if (array := read(item, window)) is not None}
        return Sample(key, self.manifest.index.roi(row), seed, window, arrays, dates)

    def member(self, row: int, name: str) -> bytes:
        """The encoded member of a sample; nothing where it is missing."""
        index = self.manifest.index
        length = int(index.length[name][row])
        if length == 0:
            return b""
        return self.manifest.files.read(int(index.shard[row]), int(index.offset[name][row]), length)

    def encoded(self, row: int) -> dict[str, Any]:
        """A sample as the peers' files hold it."""
        return {"row": row, **{item.name: self.member(row, item.name) for item in self.modalities}}

    def decoded(self, stored: dict[str, Any]) -> Sample:
        """What the peers' datasets make of a stored sample."""
        row = int(stored["row"])

        def read(item: Modality, window: GroundWindow) -> np.ndarray | None:
            data = stored[item.name]
            return EncodedArray(data).decode(pixel_slices(item, window)) if len(data) else None

        return self.sample(row, read, self.dates[row])

    def collate(self, samples: list[Sample]) -> Batch:
        """The batch of some samples."""
        return collate(samples, self.modalities)


class RasterioDataset(Dataset[Sample]):
    """Each raster opened with rasterio; ``windowed`` reads no more than the window."""

    def __init__(self, content: Content, windowed: bool) -> None:
        self.content, self.windowed = content, windowed

    def __getitem__(self, row: int) -> Sample:
        def read(item: Modality, window: GroundWindow) -> np.ndarray | None:
            path = self.content.paths[row].get(item.name)
            if path is None:
                return None
            rows, columns = pixel_slices(item, window)
            with rasterio.open(path) as file:
                if self.windowed:
                    values = file.read(window=Window.from_slices(rows, columns))
                else:
                    values = file.read()[:, rows, columns]
            return values.reshape(-1, len(item.bands), *values.shape[1:]) if item.has_time_axis else values

        return self.content.sample(row, read, self.content.dates[row])


def ours(content: Content, threads: int) -> Loader:
    """The reader of this project; without reading processes it decodes in torch's threads."""

    def loader(workers: int) -> Iterator[Batch]:
        torch.set_num_threads(threads)
        rows = np.arange(len(content.keys))
        source = TrainingStream(
            content.manifest,
            rows,
            content.modalities,
            batch_size=BATCH,
            window=WINDOW,
            seed=SEED,
            workers=workers,
        )
        return source.batches(0, 0, 1)

    return loader


def by_rasterio(content: Content, windowed: bool) -> Loader:
    """Peer (a)."""

    def loader(workers: int) -> Iterator[Batch]:
        endless = itertools.cycle(range(len(content.keys)))
        batches = iter(lambda: list(itertools.islice(endless, BATCH)), [])
        dataset = RasterioDataset(content, windowed)
        return iter(
            DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=content.collate)  # type: ignore[arg-type]
        )

    return loader


def by_litdata(content: Content, folder: Path) -> Loader | None:
    """Peer (b), None when it is not installed."""
    try:
        import litdata
    except ImportError:
        return None
    litdata.optimize(
        fn=content.encoded,
        inputs=list(range(len(content.keys))) * REPEATS_OF_CONTENT,
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )

    class Stored(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Sample:
            return content.decoded(super().__getitem__(index))

    def loader(workers: int) -> Iterator[Batch]:
        return iter(
            litdata.StreamingDataLoader(
                Stored(str(folder)), batch_size=BATCH, num_workers=workers, collate_fn=content.collate
            )
        )

    return loader


def by_mosaicml(content: Content, folder: Path) -> Loader | None:
    """Peer (c), None when it is not installed."""
    try:
        import streaming
    except ImportError:
        return None
    columns = {"row": "int", **{item.name: "bytes" for item in content.modalities}}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for row in list(range(len(content.keys))) * REPEATS_OF_CONTENT:
            writer.write(content.encoded(row))

    class Stored(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            return content.decoded(super().__getitem__(index))

    def loader(workers: int) -> Iterator[Batch]:
        streaming.base.util.clean_stale_shared_memory()
        dataset = Stored(local=str(folder), batch_size=BATCH)
        return iter(DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=content.collate))

    return loader


def limit(content: Content, decoding: bool, clock: Callable[[], float]) -> float:
    """Samples a second of reading the members, and with ``decoding`` of decoding them as well."""
    started = clock()
    for row in range(len(content.keys)):
        for item in content.modalities:
            data = content.member(row, item.name)
            if decoding and data:
                decode(data)
    return len(content.keys) / (clock() - started)


def rate(loader: Loader, workers: int, batches: int, clock: Callable[[], float]) -> float:
    """Samples a second of a loader that is in full swing."""
    torch.set_num_threads(1)
    delivered = loader(workers)
    for _ in range(WARM_UP):
        next(delivered)
    started = clock()
    for _ in range(batches):
        next(delivered)
    return batches * BATCH / (clock() - started)


def tensors(batch: Batch, index: int) -> dict[tuple[str, str], torch.Tensor]:
    """Everything about one sample of a batch, padding left out."""
    found = {("seeds", ""): batch.seeds[index], ("windows", ""): batch.windows[index]}
    for name, values in batch.values.items():
        found["present", name] = batch.present[name][index]
        if name in batch.padding:
            kept = ~batch.padding[name][index]
            found["dates", name] = batch.dates[name][index][kept]
            found["values", name] = values[index][kept]
        else:
            found["values", name] = values[index]
    return found


def check_equal(loaders: dict[str, Loader], count: int) -> None:
    """Raise unless all loaders deliver the same samples, bit by bit; ``count`` is the number of patches."""
    samples: dict[str, dict[str, dict[tuple[str, str], torch.Tensor]]] = {}
    for name, loader in loaders.items():
        found = samples[name] = {}
        for batch in loader(0):
            for index, key in enumerate(batch.keys):
                found.setdefault(key, tensors(batch, index))
            if len(found) == count:
                break
    reference = samples["bocage"]
    for name, found in samples.items():
        if found.keys() != reference.keys():
            raise SystemExit(f"{name} delivers other patches")
        for key, wanted in reference.items():
            for what, tensor in wanted.items():
                if found[key][what].dtype != tensor.dtype or not torch.equal(found[key][what], tensor):
                    raise SystemExit(f"{name} delivers other {' '.join(what)} for {key}")
    print(f"all {len(samples)} loaders deliver the same tensors for {len(reference)} patches", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, nargs="?")
    parser.add_argument("shards", type=Path, nargs="?")
    parser.add_argument("--patches", type=int, default=96, help="size of a sample of its own")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--cpu", action="store_true", help="CPU time of this process in place of time; no workers")
    parser.add_argument("--batches", type=int, default=20, help="measured a turn; rasterio reads a third of them")
    words = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bocage-bench-"))
    try:
        if words.shards is None:
            words.tree, words.shards = folder / "tree", folder / "shards"
            write_tree(words.tree, patches=words.patches, seed=5, dates=(40, 100), workers=2)
            write_shards(Catalogue.open(words.tree), words.shards, workers=2, samples_per_shard=16)
        content = Content(words.tree, words.shards)
        candidates = {
            "bocage": ours(content, 1),
            "bocage, all cores": ours(content, os.cpu_count() or 1),
            "rasterio": by_rasterio(content, windowed=False),
            "rasterio, window": by_rasterio(content, windowed=True),
            "litdata": by_litdata(content, folder / "litdata"),
            "mosaicml-streaming": by_mosaicml(content, folder / "mosaicml"),
        }
        torch.multiprocessing.set_start_method("fork", force=True)  # litdata's writer leaves another one
        compare({name: loader for name, loader in candidates.items() if loader is not None}, content, words)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(loaders: dict[str, Loader], content: Content, words: argparse.Namespace) -> None:
    """Check, measure and print."""
    size = sum(int(content.manifest.index.length[item.name].sum()) for item in content.modalities) / len(content.keys)
    dates = [len(days) for row in content.dates for days in row.values()]
    print(
        f"{len(content.keys)} patches, {size / 1e6:.2f} MB encoded, {min(dates)} to {max(dates)} dates a series, "
        f"{len(content.modalities)} modalities, windows of {WINDOW:g} m, batches of {BATCH}"
    )
    check_equal(loaders, len(content.keys))
    clock = time.process_time if words.cpu else time.perf_counter
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(words.repeats):
        for workers in [0] if words.cpu else words.workers:
            for name, loader in loaders.items():
                if (workers or words.cpu) and name == "bocage, all cores":
                    continue  # a reading process has one thread
                batches = max(2, words.batches // 3) if name.startswith("rasterio") else words.batches
                rates.setdefault((name, workers), []).append(rate(loader, workers, batches, clock))
        for name, decoding in (("limit: pread", False), ("limit: pread and decode", True)):
            rates.setdefault((name, 0), []).append(limit(content, decoding, clock))
    print(f"{'':<26}{'workers':>8}{'samples/s':>11}{'bocage is':>11}   (least to most)")
    for (name, workers), values in rates.items():
        ratios = [mine / other for mine, other in zip(rates["bocage", workers], values)]
        print(
            f"{name:<26}{workers:>8}{statistics.median(values):>11.1f}{statistics.median(ratios):>10.2f}x"
            f"   ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
