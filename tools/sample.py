"""``bocage sample``: simulated patches in FLAIR-HUB's own format."""

from __future__ import annotations

import argparse
from pathlib import Path

from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.tools.cli.progress import Bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder; a stopped run continues in its own")
    parser.add_argument("--patches", type=int, default=64, metavar="N", help="how many patches (default 64)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed gives the same patches (default 0)"
    )
    parser.add_argument(
        "--gaps", type=float, default=0.0, metavar="F", help="probability that an input is missing (default 0)"
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        metavar="NAME",
        help=f"what to simulate (default: all of {', '.join(FLAIR_HUB)}); the finest image sets the day of labels",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Write the sample; returns the exit status."""
    with Bars() as bars:
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
    print(f"{arguments.patches} patches in {arguments.out}")
    return 0
