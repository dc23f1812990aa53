"""``bocage predict RUN SOURCE OUT``: write the label maps of a fine-tuned model as GeoTIFFs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from bocage.finetune.evaluation.predict import predict_patches, predictable_rows
from bocage.finetune.models.segmentation import Segmentation, load_segmentation
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import DATASET_FILE
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import Patches, ShardPatches, TreePatches
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.flair_hub import FlairHubCatalogue
from bocage.shards.source.naming import FOLDER
from bocage.tools.cli.arguments import non_negative_int, positive_int, split_value
from bocage.tools.cli.progress import ProgressBars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of `bocage finetune`")
    parser.add_argument(
        "source", metavar="SOURCE", help="folder that `bocage shard` wrote or its address, or a FLAIR-HUB tree"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the GeoTIFFs")
    parser.add_argument(
        "--split", metavar="COLUMN", help="predict only patches of a split, e.g. split_1 (default: all)"
    )
    parser.add_argument("--value", help="with --split: its value (default: test)")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="patches per batch (default: %(default)s)")
    parser.add_argument(
        "--preview",
        type=non_negative_int,
        default=6,
        metavar="N",
        help="patches in panels.png, with input, label, prediction and errors; 0: no picture (default: %(default)s)",
    )
    parser.add_argument("--workers", type=non_negative_int, default=0, help="DataLoader workers (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Write the maps and print their folder."""
    task = load_segmentation(arguments.run_folder / "model")
    patches = _patches(arguments.source, task)
    rows = np.arange(len(patches))
    value = split_value(arguments.split is not None, arguments.value)
    if arguments.split is not None:
        rows = patches.split(arguments.split, value)
    rows = predictable_rows(task, patches, rows)
    if arguments.out.resolve() == Path(arguments.source).resolve():
        raise InputError(f"{arguments.out} is the folder of the patches: give another folder for the maps")
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
    """Open shards, or the rasters of a dataset that is not sharded."""
    folder = Path(source)
    if folder.is_file():
        raise InputError(f"{source} is a file: give the folder of the shards or of the FLAIR-HUB tree")
    if not folder.is_dir() or (folder / DATASET_FILE).exists():
        return ShardPatches(open_shards(source))
    return TreePatches(_open_tree(folder, task))


def _open_tree(folder: Path, task: Segmentation) -> Catalogue:
    """Open the rasters below a folder. No other function tells one kind of dataset from another.

    Raises:
        InputError: the folder holds no known dataset, or one without the model's modalities.
    """
    if not any(map(FOLDER.match, os.listdir(folder))):
        raise InputError(
            f"{folder} has neither shards ({DATASET_FILE}) nor a FLAIR-HUB tree (folders like D012-2019_AERIAL_RGBI): "
            "give the folder that contains them"
        )
    if not any(name in FLAIR_HUB for name in task.modalities):
        raise InputError(
            f"{folder} is a FLAIR-HUB tree, and the model reads {', '.join(task.modalities)}, which FLAIR-HUB does not "
            "have"
        )
    names = [*task.modalities, *task.quality_masks.values(), *task.labels]
    return FlairHubCatalogue.open(folder, modalities=[name for name in names if name in FLAIR_HUB])
