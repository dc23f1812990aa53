"""Seconds and memory that the catalogue of the whole of FLAIR-HUB takes, from folders and from zips.

    python tests/bench/opening.py FOLDER [--patches 241100] [--what folders zips] [--keep]

Makes trees of the dataset's names in ``FOLDER`` and GeoPackages with a row a patch, opens each tree in a process of its
own, and prints seconds, the process's peak memory, and the bytes that the catalogue keeps for a patch. Folders hold
empty files (2.4 million inodes); zips hold whole directories and a byte a raster, their metadata are deflated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from full_tree import write_folders, write_metadata, write_zips

_CHILD = """
import json, resource, sys, time
import numpy as np
from bocage.shards.source.catalogue import Catalogue

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, started, idle = peak(), time.perf_counter(), time.process_time()
catalogue = Catalogue.open(sys.argv[1])
seconds, busy, opened = time.perf_counter() - started, time.process_time() - idle, peak()
started = time.perf_counter()
fingerprint = catalogue.fingerprint()
dates = catalogue._dates.values()
arrays = [catalogue._codes, catalogue._presence, catalogue._places, catalogue._entries]
arrays += [array for each in dates for array in (each.days, each.bounds, each.index)]
kept = sum(array.nbytes for array in arrays) + sum(column.nbytes for column in catalogue.splits.values())
print(json.dumps({
    "patches": len(catalogue),
    "rasters": sum(catalogue.report().present.values()),
    "seconds": round(seconds, 1),
    "seconds of CPU": round(busy, 1),
    "MB imported": round(before),
    "MB peak": round(opened),
    "bytes kept a patch": round(kept / len(catalogue)),
    "seconds of fingerprint": round(time.perf_counter() - started, 1),
    "MB peak with it": round(peak()),
    "torch": "torch" in sys.modules,
    "fingerprint": fingerprint[:16],
}))
"""


def main() -> None:
    """Makes the trees, opens them, removes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder; needs 2.5 million free inodes and 4 GB at full size")
    parser.add_argument("--patches", type=int, default=241_100)
    parser.add_argument("--what", nargs="+", choices=("folders", "zips"), default=["folders", "zips"])
    parser.add_argument("--keep", action="store_true", help="leave the trees there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        started = time.perf_counter()
        write_metadata(arguments.folder / "metadata", arguments.patches)
        print(f"metadata made in {time.perf_counter() - started:.0f} s", flush=True)
        for what in arguments.what:
            tree, started = arguments.folder / what, time.perf_counter()
            (write_folders if what == "folders" else write_zips)(tree, arguments.patches)
            _place_metadata(arguments.folder.absolute() / "metadata", tree, zipped=what == "zips")
            print(f"{what} made in {time.perf_counter() - started:.0f} s", flush=True)
            done = subprocess.run([sys.executable, "-c", _CHILD, tree], capture_output=True, text=True, check=True)
            print(what, json.dumps(json.loads(done.stdout), indent=1), flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder)


def _place_metadata(metadata: Path, tree: Path, zipped: bool) -> None:
    if not zipped:
        (tree / "GLOBAL_ALL_MTD").symlink_to(metadata)
        return
    with zipfile.ZipFile(tree / "GLOBAL_ALL_MTD.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for path in sorted(metadata.iterdir()):
            file.write(path, f"GLOBAL_ALL_MTD/{path.name}")


if __name__ == "__main__":
    main()
