"""``bocage predict RUN SOURCE OUT``: label maps of a fine-tuned model as GeoTIFFs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from bocage.finetune.evaluation.predict import predictable_rows, predict_patches
from bocage.finetune.models.segmentation import Segmentation, load_segmentation
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import DATASET_FILE
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import Patches, ShardPatches, TreePatches
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.naming import FOLDER
from bocage.tools.cli.arguments import non_negative_int, positive_int, split_value
from bocage.tools.cli.progress import ProgressBars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of `bocage finetune`")
    parser.add_argument(
        "source", metavar="SOURCE", help="folder that `bocage shard` wrote or its address, or a FLAIR-HUB tree"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the GeoTIFFs")
    parser.add_argument(
        "--split", metavar="COLUMN", help="predict only patches of a split, e.g. split_1 (default: all)"
    )
    parser.add_argument("--value", help="with --split: its value (default: test)")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="patches at a time (default: %(default)s)")
    parser.add_argument(
        "--preview",
        type=non_negative_int,
        default=6,
        metavar="N",
        help="rows of panels.png, with input, label, prediction and errors; 0 for no picture (default: %(default)s)",
    )
    parser.add_argument("--workers", type=non_negative_int, default=0, help="reading processes (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Predict and say where the files are."""
    task = load_segmentation(arguments.run_folder / "model")
    patches = _patches(arguments.source, task)
    rows = np.arange(len(patches))
    value = split_value(arguments.split is not None, arguments.value)
    if arguments.split is not None:
        rows = patches.split(arguments.split, value)
    rows = predictable_rows(task, patches, rows)
    if arguments.out.resolve() == Path(arguments.source).resolve():
        raise InputError(f"{arguments.out} is where the patches are: give another folder for the maps")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with ProgressBars() as bars:
        bar = bars.add("predicting", "patches", len(rows))
        picture = predict_patches(
            task,
            patches,
            rows,
            arguments.out,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            device=device or "cpu",
            preview=arguments.preview,
            progress=bar.update,
        )
    print(f"{len(rows)} maps in {arguments.out}" + (f", picture: {picture}" if picture else ""))
    return 0


def _patches(source: str, task: Segmentation) -> Patches:
    """Patches of shards, or of a tree where the folder holds one."""
    folder = Path(source)
    if folder.is_file():
        raise InputError(f"{source} is a file: give the folder of shards or of a FLAIR-HUB tree that it lies in")
    if folder.is_dir() and not (folder / DATASET_FILE).exists() and not any(map(FOLDER.match, os.listdir(folder))):
        raise InputError(
            f"{source} holds neither shards ({DATASET_FILE}) nor a FLAIR-HUB tree (folders as D012-2019_AERIAL_RGBI): "
            "give the folder that has them"
        )
    if not (folder.is_dir() and any(FOLDER.match(name) for name in os.listdir(folder))):
        return ShardPatches(open_shards(source))
    wanted = [*task.modalities, *task.quality_masks.values(), *task.labels]
    return TreePatches(Catalogue.open(folder, modalities=wanted))
