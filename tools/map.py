"""``bocage map RUN OUT --raster MODALITY=FILE ...``: maps of zones of any size from rasters of any size."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from bocage.finetune.mapping.grid import plan_map
from bocage.finetune.mapping.rasters import open_rasters
from bocage.finetune.mapping.tiled_inference import write_map
from bocage.finetune.models.segmentation import load_segmentation
from bocage.tools.cli.arguments import pairs, positive
from bocage.tools.cli.progress import Bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of `bocage finetune`")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the maps, one GeoTIFF (COG) a label")
    parser.add_argument(
        "--raster",
        nargs="+",
        required=True,
        metavar="MODALITY=FILE",
        help="what the model reads: GeoTIFFs or VRT mosaics in one metric coordinate system, of any pixel; of a series "
        "all bands of the first date, then of the second, ...",
    )
    parser.add_argument(
        "--dates", nargs="+", default=[], metavar="SERIES=FILE", help="text files with one date (YYYY-MM-DD) a line"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="a band a class, 0 to 254 for 0 to 1, in place of the class"
    )
    parser.add_argument(
        "--overlap", type=float, default=12.8, help="metres by which windows overlap (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=4, help="windows at a time (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Map the zone, or go on with it, and say where the maps are."""
    task = load_segmentation(arguments.run_folder / "model")
    files, dates = (
        {name: Path(value) for name, value in pairs(option, words).items()}
        for option, words in (("--raster", arguments.raster), ("--dates", arguments.dates))
    )
    rasters, reference = open_rasters(task, files, dates)
    plan = plan_map(task, reference, arguments.overlap)
    # Ranks wait for each other at the end only, and for the first to put the tiles together.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    with Bars(active=state.is_main_process) as bars:
        bar = bars.add("tiles", "tiles")
        paths = write_map(
            task,
            rasters,
            plan,
            arguments.out,
            kind="probabilities" if arguments.probabilities else "classes",
            batch_size=arguments.batch_size,
            device=state.device,
            progress=bar.update,
        )
    if state.is_main_process:
        for name, path in paths.items():
            print(f"{name}: {path}")
    state.destroy_process_group()
    return 0
