"""``bocage map RUN OUT --raster MODALITY=FILE ...``: map a whole area by tiled inference on rasters of any size."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from bocage.finetune.mapping.map_grid import plan_grid
from bocage.finetune.mapping.map_rasters import open_rasters
from bocage.finetune.mapping.tiled_inference import write_map
from bocage.finetune.models.segmentation import load_segmentation
from bocage.tools.cli.arguments import parse_pairs, positive_int
from bocage.tools.cli.progress import ProgressBars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of `bocage finetune`")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="folder for the maps, one cloud-optimised GeoTIFF per label; values are the class numbers of the shards, "
        "from 0, named by the tags CLASS_0, CLASS_1 ...; 255 is nodata",
    )
    parser.add_argument(
        "--raster",
        nargs="+",
        required=True,
        metavar="MODALITY=FILE",
        help="input rasters: GeoTIFFs or VRT mosaics of any pixel size in one projected coordinate system; the bands "
        "of a series are ordered by date: all bands of the first date, then all bands of the second, ...",
    )
    parser.add_argument(
        "--dates", nargs="+", default=[], metavar="SERIES=FILE", help="text files with one date (YYYY-MM-DD) per line"
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="write one band per class, with 0 to 254 for probabilities 0 to 1, instead of the class",
    )
    parser.add_argument(
        "--overlap", type=float, metavar="METRES", help="overlap of windows (default: an eighth of a window)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="windows per batch (default: 4 windows of 512 pixels, more of smaller ones)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the maps, or resume writing them, and print their paths."""
    task = load_segmentation(arguments.run_folder / "model")
    files, dates = (
        {name: Path(value) for name, value in parse_pairs(option, pairs).items()}
        for option, pairs in (("--raster", arguments.raster), ("--dates", arguments.dates))
    )
    rasters, reference = open_rasters(task, files, dates)
    plan = plan_grid(task, reference, arguments.overlap)
    # Ranks meet only at the end, where the others wait for rank 0 to merge the tiles.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    with ProgressBars(active=state.is_main_process) as bars:
        bar = bars.add("tiles", "tiles")
        paths = write_map(
            task,
            rasters,
            plan,
            arguments.out,
            kind="probabilities" if arguments.probabilities else "classes",
            batch_size=arguments.batch_size or plan.batch_size,
            device=state.device,
            progress=bar.update,
        )
    if state.is_main_process:
        for name, path in paths.items():
            print(f"{name}: {path}")
    state.destroy_process_group()
    return 0
