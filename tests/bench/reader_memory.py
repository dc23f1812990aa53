"""Memory of a reading process against the size of the dataset: ``python tests/bench/reader_memory.py``.

Real shards of a few simulated patches are repeated under other keys to manifests of 10^3, 10^5, 241,100 (FLAIR-HUB)
and 10^6 samples. For each, a fresh process opens the manifest, trains from it with one reading process, forked and
spawned, and reads from the kernel what that process holds after some batches:

- RSS: all its pages in memory, those shared with others included;
- private: what it alone holds (USS), the cost of one more reading process;
- anonymous: pages that are not of a file; a forked process shares some of them with its parent.
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

from bocage.shards.format.manifest import Manifest, schema
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.read.dataset import TrainingStream
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.manifest_builder import assemble
from bocage.shards.write.writer import write_shards

SIZES = (1_000, 100_000, 241_100, 1_000_000)
PER_SHARD = 500
MODALITIES = ("SPOT_RGBI", "SENTINEL2_TS", "SENTINEL1-ASC_TS")
BATCHES = 40


def write_large(small: Manifest, out: Path, count: int) -> None:
    """A dataset of ``count`` samples whose shards are all the one shard of ``small``."""
    parts = out / "parts"
    parts.mkdir(parents=True)
    columns = schema(small.registry, small.splits)
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
    assemble(out, paths, small.registry, small.splits, plan={}, samples_per_shard=PER_SHARD)
    shutil.rmtree(parts)


def held(process: int) -> dict[str, float]:
    """MB that a process holds."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    numbers = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {
        "rss": numbers["Rss"],
        "private": numbers["Private_Clean"] + numbers["Private_Dirty"],
        "anonymous": numbers["Anonymous"],
    }


def measure(folder: Path, method: str) -> dict[str, float]:
    """What a process that trains from ``folder`` and its reader hold; the caller is a fresh process."""
    torch.multiprocessing.set_start_method(method, force=True)
    before = held(os.getpid())["rss"]
    started = time.perf_counter()
    manifest = Manifest.open(folder)
    found = {"open_seconds": time.perf_counter() - started}
    opened = held(os.getpid())
    found |= {"open_rss": opened["rss"] - before, "open_private": opened["private"]}
    modalities = [manifest.registry[name] for name in MODALITIES]
    source = TrainingStream(manifest, np.arange(len(manifest)), modalities, batch_size=16, seed=0, workers=1)
    batches = source.batches(0, 0, 1)
    for _ in range(BATCHES):
        next(batches)
    [reader] = multiprocessing.active_children()
    assert reader.pid is not None
    found |= {f"reader_{name}": value for name, value in held(reader.pid).items()}
    found["trainer_anonymous"] = held(os.getpid())["anonymous"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        print(json.dumps(measure(Path(words.measure[0]), words.measure[1])))
        return
    folder = Path(tempfile.mkdtemp(prefix="bocage-memory-"))
    try:
        write_tree(folder / "tree", patches=8, seed=1, dates=(60, 90), registry=FLAIR_HUB.subset(MODALITIES))
        small = write_shards(Catalogue.open(folder / "tree"), folder / "small", samples_per_shard=8)
        print(
            f"{'samples':>9} {'start':<6}{'open s':>8}{'+RSS':>7}{'reader: RSS':>13}{'private':>9}{'anonymous':>11}  MB"
        )
        for count in words.sizes:
            write_large(small, folder / "large", count)
            for method in ("fork", "spawn"):
                command = [sys.executable, __file__, "--measure", str(folder / "large"), method]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{count:>9} {method:<6}{found['open_seconds']:>8.2f}{found['open_rss']:>7.0f}"
                    f"{found['reader_rss']:>13.0f}{found['reader_private']:>9.0f}{found['reader_anonymous']:>11.0f}",
                    flush=True,
                )
            shutil.rmtree(folder / "large")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
