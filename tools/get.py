"""``bocage get OUT``: download FLAIR-HUB from the Hugging Face hub, all or a part of it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from bocage.shards.errors import InputError, counted
from bocage.shards.files import format_size
from bocage.shards.source.flair_hub.download import (
    LocalZips,
    download_zips,
    free_bytes,
    inspect_folder,
    locked_folder,
)
from bocage.shards.source.flair_hub.hub import REPOSITORY, RemoteZip, choose_zips, list_zips
from bocage.shards.source.flair_hub.toy import find_toy, is_unpacked, unpack_toy
from bocage.tools.cli.arguments import positive_int
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import ProgressBar, ProgressBars
from bocage.tools.cli.reports import text_console

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
        "--toy",
        action="store_true",
        help="download and unpack IGN's toy subset instead (about 750 MB, all modalities; from IGN's server)",
    )
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
    chosen = arguments.domains or arguments.modalities or arguments.revision or arguments.repo != REPOSITORY
    if arguments.toy and chosen:
        raise InputError("--toy: is one file; drop --domains, --modalities, --repo and --revision")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our messages name the zip rather than an address
    try:
        with Interrupts() as interrupts:
            if arguments.toy:
                _get_toy(interrupts, arguments)
                return 0
            zips = choose_zips(list_zips(arguments.repo, arguments.revision), arguments.domains, arguments.modalities)
            if arguments.dry_run:
                _print_plan(zips, inspect_folder(arguments.out, zips, check_hashes=False))
            else:
                with locked_folder(arguments.out):
                    count = _download(interrupts, arguments, zips)
                print(f"{counted(len(zips), 'zip')} in {arguments.out}, {_size(zips)}; {count} downloaded now")
    except InterruptedCommand as stopped:
        print(f"bocage: interrupted by {stopped.name}; run the same command to resume", file=sys.stderr)
        return stopped.exit_code
    return 0


def _get_toy(interrupts: Interrupts, arguments: argparse.Namespace) -> None:
    toy = find_toy()
    if is_unpacked(arguments.out, toy):
        print(f"the toy subset is in {arguments.out} already")
    elif arguments.dry_run:
        _print_plan([toy], inspect_folder(arguments.out, [toy], check_hashes=False))
    else:
        with locked_folder(arguments.out):
            # The files are compressed already: unpacked, they are about as large as the zip.
            _download(interrupts, arguments, [toy], unpacked_bytes=toy.size)
            names = unpack_toy(arguments.out, toy)
        print(f"{len(names)} folders and files of the toy subset in {arguments.out}")


def _download(
    interrupts: Interrupts, arguments: argparse.Namespace, zips: list[RemoteZip], unpacked_bytes: int = 0
) -> int:
    """Download the zips that are missing into the locked folder; return their number."""
    with ProgressBars() as bars:
        local = inspect_folder(arguments.out, zips, progress=_Bar(bars, "checking", interrupts))
        for name in local.differing:
            bars.say(f"note: {arguments.out / name} differs from the hub and is downloaded again")
        download_zips(
            local,
            unpacked_bytes=unpacked_bytes,
            workers=arguments.workers,
            progress=_Bar(bars, "downloading", interrupts),
        )
    return len(local.missing)


class _Bar:
    """Progress bar of bytes and zips, a ``Progress`` callback; drawn from the first call on."""

    def __init__(self, bars: ProgressBars, title: str, interrupts: Interrupts) -> None:
        self._bars, self._title, self._interrupts = bars, title, interrupts
        self._bar: ProgressBar | None = None

    def __call__(self, done: int, total: int, zips: int) -> None:
        self._interrupts.check()
        if self._bar is None:
            self._bar = self._bars.add(self._title, "MB")
        self._bar.update(int(done / _MEGABYTE), int(total / _MEGABYTE), f"{counted(zips, 'zip')} done")


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
    table.add_row("all", str(len(zips)), _size(zips), _size(local.missing))
    console = text_console()
    console.print(table)
    if local.partial_bytes:
        console.print(f"unfinished zips, to be resumed: {format_size(local.partial_bytes)}", highlight=False)
    console.print(f"free disk space: {format_size(free_bytes(local.folder))}", highlight=False)


def _size(zips: Iterable[RemoteZip]) -> str:
    return format_size(sum(item.size for item in zips))
