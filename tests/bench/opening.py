"""Measure time and memory to open the catalogue of a tree of FLAIR-HUB's size, from folders and from zips.

    python tests/bench/opening.py NEWFOLDER [--patches 241100] [--what folders zips] [--keep]

The script writes trees with the names of the dataset, and GeoPackages with one row per patch, to NEWFOLDER. It opens
each tree in a new process and prints seconds, the peak memory of the process, and the size of the catalogue per patch.
Folders hold empty files (2.4 million inodes). Zips hold complete central directories and one byte per raster; those of
the metadata are deflated.
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

from bocage.shards.source.flair_hub.tree import FlairHubCatalogue

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))  # tests import full_tree, too

from full_tree import write_folders, write_metadata, write_zips


def measure(tree: Path) -> dict[str, float | str | bool]:
    """Open the catalogue of a tree; the process must be new, because peak memory is that of the whole process."""
    imported, started, cpu_started = _peak_memory(), time.perf_counter(), time.process_time()
    catalogue = FlairHubCatalogue.open(tree)
    seconds, cpu_seconds, opened = time.perf_counter() - started, time.process_time() - cpu_started, _peak_memory()
    started = time.perf_counter()
    fingerprint = catalogue.fingerprint()
    fingerprint_seconds = time.perf_counter() - started
    arrays = [catalogue._codes, catalogue._presence, catalogue._entry_index, catalogue._zip_entries]
    arrays += [array for dates in catalogue._dates.values() for array in (dates.days, dates.bounds, dates.index)]
    size = sum(array.nbytes for array in arrays) + sum(column.nbytes for column in catalogue.splits.values())
    return {
        "patches": len(catalogue),
        "rasters": sum(catalogue.report().present.values()),
        "seconds": round(seconds, 1),
        "CPU seconds": round(cpu_seconds, 1),
        "peak MiB after imports": round(imported),
        "peak MiB after opening": round(opened),
        "catalogue bytes per patch": round(size / len(catalogue)),
        "seconds for the fingerprint": round(fingerprint_seconds, 1),
        "peak MiB after the fingerprint": round(_peak_memory()),
        "torch imported": "torch" in sys.modules,
        "fingerprint": fingerprint[:16],
    }


def _peak_memory() -> float:
    """Peak of this process, in MiB. getrusage would not do: a new process inherits the peak of its parent."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def main() -> None:
    """Write the trees, open them and remove them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder; needs 2.5 million free inodes and 4 GB at full size")
    parser.add_argument("--patches", type=int, default=241_100, help="patches of the trees (default 241100)")
    parser.add_argument(
        "--what", nargs="+", choices=("folders", "zips"), default=["folders", "zips"], help="trees (default both)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the trees")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder)))
        return
    arguments.folder.mkdir(parents=True)
    try:
        started = time.perf_counter()
        write_metadata(arguments.folder / "metadata", arguments.patches)
        print(f"metadata written in {time.perf_counter() - started:.0f} s", flush=True)
        for kind in arguments.what:
            tree, started = arguments.folder / kind, time.perf_counter()
            (write_folders if kind == "folders" else write_zips)(tree, arguments.patches)
            _add_metadata(arguments.folder.absolute() / "metadata", tree, zipped=kind == "zips")
            print(f"{kind} written in {time.perf_counter() - started:.0f} s", flush=True)
            command = [sys.executable, __file__, str(tree), "--measure"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(kind, json.dumps(json.loads(done.stdout), indent=1), flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder)


def _add_metadata(metadata: Path, tree: Path, zipped: bool) -> None:
    if not zipped:
        (tree / "GLOBAL_ALL_MTD").symlink_to(metadata)
        return
    with zipfile.ZipFile(tree / "GLOBAL_ALL_MTD.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for path in sorted(metadata.iterdir()):
            file.write(path, f"GLOBAL_ALL_MTD/{path.name}")


if __name__ == "__main__":
    main()
