"""``bocage sample OUT``: write simulated patches in the format of FLAIR-HUB."""

from __future__ import annotations

import argparse
from pathlib import Path

from bocage.shards.errors import counted
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.tools.cli.progress import ProgressBars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="new or empty folder, or the folder of an interrupted run"
    )
    parser.add_argument("--patches", type=int, default=64, metavar="N", help="number of patches (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default: 0)")
    parser.add_argument(
        "--gaps", type=float, default=0.0, metavar="F", help="probability that an input is missing (default: 0)"
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        metavar="NAME",
        help=f"modalities to simulate (default: {', '.join(FLAIR_HUB)}); labels show the day of the finest image",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Write the sample; return the exit status."""
    with ProgressBars() as bars:
        bar = bars.add("sample", "patches", max(arguments.patches, 1))
        write_tree(
            arguments.out,
            patches=arguments.patches,
            seed=arguments.seed,
            registry=FLAIR_HUB.subset(arguments.modalities) if arguments.modalities else FLAIR_HUB,
            gaps=arguments.gaps,
            workers=arguments.workers,
            progress=bar.advance,
        )
    print(f"{counted(arguments.patches, 'patch')} in {arguments.out}")
    return 0
