"""``bocage attention ENCODER SHARDS OUT``: draw and tabulate the temporal attention of a series encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from bocage.finetune.evaluation.predict import check_bands
from bocage.shards.errors import InputError, counted
from bocage.shards.files import check_new_folder
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.shards.read.open import open_shards
from bocage.ssl.encoders.export import load_encoder
from bocage.ssl.evaluation.attention import require_temporal, rows_for_keys, rows_with_dates
from bocage.ssl.evaluation.attention_figures import write_attention
from bocage.tools.cli.arguments import positive_int, split_value
from bocage.tools.cli.progress import ProgressBars

_COUNT = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("encoder", metavar="ENCODER", help="folder of a series encoder, or hf:org/name")
    parser.add_argument("shards", metavar="SHARDS", help="folder written by `bocage shard`, or its address")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for KEY.png and attention.csv")
    parser.add_argument(
        "--keys", nargs="+", metavar="KEY", help="keys of the patches to draw, instead of --count patches of a split"
    )
    parser.add_argument(
        "--count",
        type=positive_int,
        metavar="N",
        help=f"number of patches, spread evenly over the split (default: {_COUNT})",
    )
    parser.add_argument(
        "--split", metavar="COLUMN", help="draw only patches of this split column, e.g. split_1 (default: all patches)"
    )
    parser.add_argument("--value", help="with --split: value of the split column (default: test)")


def run(arguments: argparse.Namespace) -> int:
    """Draw the patches and print the paths of the files."""
    if arguments.keys is not None and (arguments.count is not None or arguments.split is not None):
        raise InputError("--keys names the patches: leave out --count and --split")
    check_new_folder(arguments.out)
    encoder = require_temporal(load_encoder(arguments.encoder), arguments.encoder)
    manifest = open_shards(arguments.shards)
    name = encoder.spec.modality
    if arguments.keys is not None:
        rows = rows_for_keys(manifest, name, arguments.keys)
    else:
        value = split_value(arguments.split is not None, arguments.value)
        rows = rows_with_dates(manifest, name, manifest.split(arguments.split or EVERY_SAMPLE, value))
        count = min(arguments.count or _COUNT, len(rows))
        rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
    check_bands(encoder.spec.bands, manifest, name)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with ProgressBars() as bars:
        bar = bars.add("attention", "patches", len(rows))
        table = write_attention(
            encoder,
            manifest,
            rows,
            arguments.out,
            device=device or "cpu",
            progress=bar.update,
        )
    print(f"{counted(len(rows), 'picture')} in {arguments.out}, table: {table}")
    return 0
