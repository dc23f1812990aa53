"""``bocage get OUT``: download FLAIR-HUB from the Hugging Face hub, all or a part of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bocage.shards.source.download import (
    LocalZips,
    check_disk,
    download_zips,
    format_size,
    free_bytes,
    inspect_folder,
)
from bocage.shards.source.hub import REPOSITORY, RemoteZip, choose_zips, list_zips
from bocage.tools.cli.arguments import positive_int
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import ProgressBar, ProgressBars

_MEGABYTE = 1e6
_EPILOG = """\
After an interruption the same command resumes, also within a zip. Zips are checked against the SHA-256 of the hub,
once; zips that are in OUT from elsewhere are checked and kept. `bocage shard OUT SHARDS` reads them in place.
Exit status: 0 done, 2 wrong input or an error that the message names, 130 after Ctrl-C, 143 after SIGTERM.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EPILOG
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the zips")
    parser.add_argument(
        "--domains",
        nargs="+",
        metavar="NAME",
        help="domains to download, e.g. D004-2021, with the historical images of their departments (default: all)",
    )
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="modalities to download (default: all)")
    parser.add_argument(
        "--repo", default=REPOSITORY, metavar="ORG/NAME", help="dataset repository on the hub (default: %(default)s)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the newest commit)")
    parser.add_argument(
        "--workers", type=positive_int, default=4, metavar="N", help="zips at a time (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be downloaded, and write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Download the zips; return 130 or 143 when interrupted."""
    try:
        with Interrupts() as interrupts:
            zips = choose_zips(list_zips(arguments.repo, arguments.revision), arguments.domains, arguments.modalities)
            if arguments.dry_run:
                _print_plan(zips, inspect_folder(arguments.out, zips, check_hashes=False))
            else:
                _download(interrupts, arguments, zips)
    except InterruptedCommand as stopped:
        print(f"bocage: interrupted by {stopped.name}; run the same command to resume", file=sys.stderr)
        return stopped.exit_code
    return 0


def _download(interrupts: Interrupts, arguments: argparse.Namespace, zips: list[RemoteZip]) -> None:
    with ProgressBars() as bars:
        local = inspect_folder(arguments.out, zips, progress=_Bar(bars, "checking", interrupts))
        check_disk(local)
        for name in local.differing:
            bars.say(f"note: {arguments.out / name} differs from the hub and is downloaded again")
        download_zips(local, workers=arguments.workers, progress=_Bar(bars, "downloading", interrupts))
    print(f"{len(zips)} zips in {arguments.out}, {_size(zips)}; {len(local.missing)} of them downloaded now")


class _Bar:
    """Progress bar of bytes and zips, a ``Progress`` callback; drawn from the first call on."""

    def __init__(self, bars: ProgressBars, title: str, interrupts: Interrupts) -> None:
        self._bars, self._title, self._interrupts = bars, title, interrupts
        self._bar: ProgressBar | None = None

    def __call__(self, done: int, total: int, zips: int) -> None:
        self._interrupts.check()
        if self._bar is None:
            self._bar = self._bars.add(self._title, "MB")
        self._bar.update(int(done / _MEGABYTE), int(total / _MEGABYTE), f"{zips} zips done")


def _print_plan(zips: list[RemoteZip], local: LocalZips) -> None:
    """Print the number and size of the zips by modality, and the free disk space."""
    table = Table(title="dry run: nothing is written", title_justify="left")
    table.add_column("modality")
    for heading in ("zips", "size", "to download"):
        table.add_column(heading, justify="right")
    for modality in dict.fromkeys(item.modality for item in zips):
        chosen = [item for item in zips if item.modality == modality]
        missing = [item for item in local.missing if item.modality == modality]
        table.add_row(modality, str(len(chosen)), _size(chosen), _size(missing))
    table.add_section()
    table.add_row("all", str(len(zips)), _size(zips), format_size(local.remaining_bytes))
    console = Console()
    console.print(table)
    console.print(f"free disk space: {format_size(free_bytes(local.folder))}", highlight=False)


def _size(zips: Iterable[RemoteZip]) -> str:
    return format_size(sum(item.size for item in zips))
