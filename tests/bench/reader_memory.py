"""Measure the memory of a DataLoader worker by dataset size: ``python tests/bench/reader_memory.py``.

The script shards a few simulated patches and repeats them under other keys in manifests of 10^3, 10^5, 241,100
(FLAIR-HUB) and 10^6 samples. For each size, a new process opens the manifest and reads batches with one worker, forked
or spawned. After some batches the kernel reports the memory of the worker:

- RSS: all resident pages, including shared ones;
- private: pages of this process alone (USS), the cost of one more worker;
- anonymous: pages without a file; a forked worker shares some of them with its parent.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bocage.shards.format.manifest import Manifest, manifest_schema
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.read.dataset import TrainingStream
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.manifest_builder import build_manifest
from bocage.shards.write.writer import write_shards

SIZES = (1_000, 100_000, 241_100, 1_000_000)
PER_SHARD = 500
MODALITIES = ("SPOT_RGBI", "SENTINEL2_TS", "SENTINEL1-ASC_TS")
BATCHES = 40


def write_large(small: Manifest, out: Path, count: int) -> None:
    """Write a dataset of ``count`` samples; all shards are links to the only shard of ``small``."""
    parts = out / "parts"
    parts.mkdir(parents=True)
    columns = manifest_schema(small.registry, small.splits)
    table, [shard] = small.table, small.shards
    paths = []
    for number, first in enumerate(range(0, count, PER_SHARD)):
        rows = min(PER_SHARD, count - first)
        repeated = table.take(np.arange(rows) % len(table))
        keys = pa.array([f"D{index // 3000:03d}-2020_AA-S1-1_{index}" for index in range(first, first + rows)])
        repeated = repeated.set_column(columns.get_field_index("key"), columns.field("key"), keys)
        shards = pa.array(np.full(rows, number, np.int32))
        repeated = repeated.set_column(columns.get_field_index("shard"), columns.field("shard"), shards)
        name = f"shard-{number:06d}.tar"
        os.link(small.shard_path(0), out / name)
        entry = {"name": name, "samples": rows, "bytes": shard.bytes, "sha256": shard.sha256}
        description = {"shard": entry, "skipped": {}, "source_bytes": 0, "moments": {}}
        paths.append(parts / f"{name}.parquet")
        pq.write_table(repeated.replace_schema_metadata({b"bocage": json.dumps(description)}), paths[-1])
    build_manifest(
        out, paths, small.registry, small.splits, dataset=small.dataset, plan={}, samples_per_shard=PER_SHARD
    )
    shutil.rmtree(parts)


def memory_of(pid: int) -> dict[str, float]:
    """Read the memory of a process from the kernel, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    numbers = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {
        "rss": numbers["Rss"],
        "private": numbers["Private_Clean"] + numbers["Private_Dirty"],
        "anonymous": numbers["Anonymous"],
    }


def measure(folder: Path, method: str) -> dict[str, float]:
    """Measure the memory of this process, which must be new, and of its worker while they read ``folder``."""
    torch.multiprocessing.set_start_method(method, force=True)
    before = memory_of(os.getpid())["rss"]
    started = time.perf_counter()
    manifest = Manifest.open(folder)
    result = {"open_seconds": time.perf_counter() - started}
    opened = memory_of(os.getpid())
    result |= {"open_rss": opened["rss"] - before, "open_private": opened["private"]}
    modalities = [manifest.registry[name] for name in MODALITIES]
    stream = TrainingStream(manifest, np.arange(len(manifest)), modalities, batch_size=16, seed=0, workers=1)
    batches = stream.batches(0, 0, 1)
    for _ in range(BATCHES):
        next(batches)
    [worker] = multiprocessing.active_children()
    assert worker.pid is not None
    result |= {f"worker_{name}": value for name, value in memory_of(worker.pid).items()}
    result["trainer_anonymous"] = memory_of(os.getpid())["anonymous"]
    return result


def main() -> None:
    """Print the memory for each size and start method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of samples")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    folder = Path(tempfile.mkdtemp(prefix="bocage-memory-"))
    try:
        write_tree(folder / "tree", patches=8, seed=1, dates=(60, 90), registry=FLAIR_HUB.subset(MODALITIES))
        small = write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "small", samples_per_shard=8)
        print(
            f"{'samples':>9} {'method':<8}{'open s':>8}{'+RSS':>7}"
            f"{'worker: RSS':>13}{'private':>9}{'anonymous':>11}  MiB"
        )
        for count in arguments.sizes:
            write_large(small, folder / "large", count)
            for method in ("fork", "spawn"):
                command = [sys.executable, __file__, "--measure", str(folder / "large"), method]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{count:>9} {method:<8}{result['open_seconds']:>8.2f}{result['open_rss']:>7.0f}"
                    f"{result['worker_rss']:>13.0f}{result['worker_private']:>9.0f}{result['worker_anonymous']:>11.0f}",
                    flush=True,
                )
            shutil.rmtree(folder / "large")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
