"""``bocage predict RUN SOURCE OUT``: write the label maps of a fine-tuned model as GeoTIFFs.

The source is shards, a dataset that is not sharded, an image, or a folder of images of any size. Classes of pixel
series are written as a table.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bocage.finetune.evaluation.predict import TABLE_FILE, predict_patches, predictable_rows, writes_table
from bocage.finetune.mapping.map_grid import plan_grid
from bocage.finetune.mapping.map_rasters import open_rasters
from bocage.finetune.mapping.tiled_inference import write_map
from bocage.finetune.models.segmentation import Segmentation, load_segmentation
from bocage.recipes.loader import load_dataset, parse_dataset_argument
from bocage.shards.errors import InputError, counted
from bocage.shards.format.manifest import DATASET_FILE
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import Patches, ShardPatches, TreePatches
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.described.file_patterns import RASTER_EXTENSIONS, check_name, choose_rasters, list_files
from bocage.shards.source.described.open import open_described
from bocage.shards.source.flair_hub.scan import has_flair_hub_names
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.tools.cli.arguments import non_negative_int, positive_int, split_value
from bocage.tools.cli.progress import ProgressBars
from bocage.tools.cli.reports import print_notes, print_skipped, text_console

_BATCH_SIZE, _PREVIEW = 4, 6


_EPILOG = """\
Values of the maps are the class numbers of the shards, from 0 in the order of the description's classes, not the
values of label files. Each GeoTIFF has the names of the classes as tags CLASS_0, CLASS_1 ... and their colours.
Patches and images that cannot be read are named and left out, and the others are predicted.
Exit status: 0 done, 2 wrong input, or a patch or an image that cannot be read.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = _EPILOG
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of `bocage finetune`")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder that `bocage shard` wrote or its address, a FLAIR-HUB tree, or a folder that dataset=FILE "
        "describes; for a model of one image sensor, also an image of any size, or a folder of images",
    )
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder for the GeoTIFFs, or for predictions.csv of pixel series"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dataset=FILE: description of SOURCE, as for `bocage shard`; and values of it to override",
    )
    parser.add_argument(
        "--split", metavar="COLUMN", help="predict only patches of a split, e.g. split_1 (default: all)"
    )
    parser.add_argument("--value", help="with --split: its value (default: test)")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        help=f"patches per batch (default: {_BATCH_SIZE}), or windows of images (default: by their size)",
    )
    parser.add_argument(
        "--preview",
        type=non_negative_int,
        metavar="N",
        help="patches in panels.png, with input, label, prediction and errors; 0: no picture; not for images "
        f"(default: {_PREVIEW})",
    )
    parser.add_argument("--workers", type=non_negative_int, help="DataLoader workers; not for images (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Write the maps and print their folder."""
    task = load_segmentation(arguments.run_folder / "model")
    source, out = Path(arguments.source).resolve(), arguments.out.resolve()
    if source in (out, *out.parents):  # another run would read the maps as images
        raise InputError(f"{arguments.out} is {arguments.source} or inside it: give another folder for the maps")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    images = _images(Path(arguments.source)) if not arguments.overrides else []
    if images:
        return _map_images(arguments, task, images, device or torch.device("cpu"))
    patches = _patches(arguments, task)
    console = text_console(stderr=True)
    unreadable = 0
    if isinstance(patches, TreePatches):
        print_notes(console, patches.catalogue)
        unreadable = patches.catalogue.report().unreadable
    rows = np.arange(len(patches))
    value = split_value(arguments.split is not None, arguments.value)
    if arguments.split is not None:
        rows = patches.split(arguments.split, value)
    rows = predictable_rows(task, patches, rows)
    with ProgressBars() as bars:
        bar = bars.add("predicting", "patches", len(rows))
        picture = predict_patches(
            task,
            patches,
            rows,
            arguments.out,
            batch_size=arguments.batch_size or _BATCH_SIZE,
            workers=arguments.workers or 0,
            device=device or "cpu",
            preview=_PREVIEW if arguments.preview is None else arguments.preview,
            progress=bar.update,
        )
    written = len(rows) - len(patches.skipped)
    if writes_table(patches):
        print(f"classes of {counted(written, 'series')}: {arguments.out / TABLE_FILE}")
    else:
        print(f"{counted(written, 'map')} in {arguments.out}" + (f", picture: {picture}" if picture else ""))
    if patches.skipped:
        print_skipped(console, patches.skipped.values())
        raise InputError(
            f"{arguments.source}: {len(patches.skipped):,} of {counted(len(rows), 'patch')} without a "
            "prediction, because their files cannot be read; repair those that the lines above name, and run the same "
            "command again"
        )
    if unreadable:
        raise InputError(
            f"{arguments.source}: unreadable folders or zips: {unreadable}, see the notes above; patches may "
            "lack predictions or sensors; repair them, and run the same command again"
        )
    return 0


def _images(source: Path) -> list[Path]:
    """The image, or the images of a folder that is neither shards nor a FLAIR-HUB tree; empty for other sources."""
    if not source.exists() and source.name.lower().endswith(RASTER_EXTENSIONS):
        raise InputError(f"{source}: no such file")
    if source.is_file():
        if not source.name.lower().endswith(RASTER_EXTENSIONS):
            raise InputError(f"{source} is a file: give an image, or the folder of the shards or of the images")
        check_name(source)
        return [source]
    if not source.is_dir() or (source / DATASET_FILE).exists() or has_flair_hub_names(source):
        return []
    return [source / name for name in choose_rasters(list_files(source))]


def _map_images(arguments: argparse.Namespace, task: Segmentation, images: list[Path], device: torch.device) -> int:
    """Map each image by tiled inference, into a folder of its name."""
    if len(task.modalities) != 1 or task.model.encoder(task.modalities[0]).spec.series:
        raise InputError(
            f"{arguments.source}: the model reads {', '.join(task.modalities)}, so images alone do not suffice: name "
            "them with `bocage map RUN OUT --raster SENSOR=FILE ...`, or describe the folder with dataset=FILE"
        )
    for option in ("split", "preview", "workers"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option}: is not for images; leave it out, or describe the folder with dataset=FILE")
    root = Path(arguments.source)
    root = root.parent if root.is_file() else root
    folders = [arguments.out / path.relative_to(root).with_suffix("") for path in images]
    first: dict[Path, Path] = {}
    for path, folder in zip(images, folders):
        if first.setdefault(folder, path) != path:
            raise InputError(f"{first[folder]} and {path}: their maps would share the folder {folder}; rename one")
    skipped: list[str] = []
    with ProgressBars() as bars:
        bar = bars.add("predicting", "images", len(images))
        for done, (path, folder) in enumerate(zip(images, folders)):
            bar.update(done, len(images))
            try:
                rasters, reference = open_rasters(task, {task.modalities[0]: path}, {})
                grid = plan_grid(task, reference)
                batch_size = arguments.batch_size or grid.batch_size
                write_map(task, rasters, grid, folder, batch_size=batch_size, device=device)
            except InputError as error:
                if len(images) == 1:
                    raise
                skipped.append(str(error))
        bar.update(len(images), len(images))
    print(f"maps of {counted(len(images) - len(skipped), 'image')} in {arguments.out}")
    if skipped:
        print_skipped(text_console(stderr=True), skipped)
        raise InputError(
            f"{arguments.source}: {len(skipped):,} of {counted(len(images), 'image')} without a map, for the "
            "reasons above; repair or remove them, and run the same command again"
        )
    return 0


def _patches(arguments: argparse.Namespace, task: Segmentation) -> Patches:
    """Open shards, or the rasters of a dataset that is not sharded."""
    folder = Path(arguments.source)
    file, settings = parse_dataset_argument(arguments.overrides)
    if file is not None:
        description = load_dataset(file, settings)
        # Splits name the regions of the training data, which another folder need not have.
        description = description if arguments.split else replace(description, splits={})
        if description.kind == "table":  # its labels are columns, which a table to predict need not have
            description = replace(description, labels={})
        return TreePatches(open_described(folder, description, Path(file).parent))
    if not folder.is_dir() or (folder / DATASET_FILE).exists():
        return ShardPatches(open_shards(arguments.source))
    return TreePatches(_open_tree(folder, task))


def _open_tree(folder: Path, task: Segmentation) -> Catalogue:
    """Open a FLAIR-HUB tree.

    Raises:
        InputError: the folder is no FLAIR-HUB tree, or FLAIR-HUB lacks the model's modalities.
    """
    if not has_flair_hub_names(folder):
        raise InputError(
            f"{folder} has neither shards ({DATASET_FILE}) nor a FLAIR-HUB tree (folders like D012-2019_AERIAL_RGBI) "
            "nor images: give the folder that contains them"
        )
    if not any(name in FLAIR_HUB for name in task.modalities):
        raise InputError(
            f"{folder} is a FLAIR-HUB tree, and the model reads {', '.join(task.modalities)}, which FLAIR-HUB does not "
            "have"
        )
    names = [*task.modalities, *task.quality_masks.values(), *task.labels]
    return FlairHubCatalogue.open(folder, modalities=[name for name in names if name in FLAIR_HUB])
