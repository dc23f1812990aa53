"""``bocage shard SRC OUT``: a FLAIR-HUB tree to WebDataset shards with a manifest."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bocage.shards.errors import InputError
from bocage.shards.flairhub import Catalogue
from bocage.shards.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.writer import write_shards
from bocage.tools.arguments import positive, share

_MEGABYTE = 1e6
_SKIPPED_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", metavar="SRC", type=Path, help="unzipped FLAIR-HUB tree")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder, or that of an interrupted run to go on with")
    parser.add_argument(
        "--modalities", nargs="+", metavar="NAME", help=f"what to keep (default: all of {', '.join(FLAIR_HUB)})"
    )
    parser.add_argument(
        "--split-csv",
        nargs="+",
        default=[],
        metavar="VALUE=FILE",
        help="CSV files of the official code that list patches, e.g. train=TRAIN.csv valid=VALID.csv test=TEST.csv",
    )
    parser.add_argument("--split-name", default="split_csv", help="column for --split-csv (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--shard-mb", type=positive, default=512, help="size of a shard, MB (default: %(default)s)")
    parser.add_argument(
        "--order",
        choices=("shuffled", "roi"),
        default="shuffled",
        help="spread patches over the shards, or keep each ROI together (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled order (default: %(default)s)")
    parser.add_argument(
        "--max-bad",
        type=share,
        default=0.001,
        metavar="SHARE",
        help="share of unreadable patches to leave out before giving up (default: %(default)s; one at least unless 0)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; 130 when interrupted."""
    console = Console(stderr=True)
    try:
        with console.status(f"reading the catalogue of {arguments.source}"):
            catalogue = Catalogue.open(arguments.source, modalities=arguments.modalities)
            if arguments.split_csv:
                catalogue = catalogue.with_csv_split(arguments.split_name, _split_files(arguments.split_csv))
        _print_report(console, catalogue)
        manifest = _write(console, catalogue, arguments)
    except KeyboardInterrupt:
        print("bocage: interrupted; finished shards are kept, the same command goes on from there", file=sys.stderr)
        return 130
    _print_summary(manifest)
    return 0


def _write(console: Console, catalogue: Catalogue, arguments: argparse.Namespace) -> Manifest:
    """Writes the shards with a progress bar on a terminal, or one line every half minute elsewhere."""
    columns = (
        TextColumn("sharding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    first: int | None = None
    last_line = started
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(catalogue), rate="")

        def progress(done: int, total: int, written: int) -> None:
            nonlocal first, last_line
            first = done if first is None else first  # what an earlier run did says nothing about the rate
            now = time.monotonic()
            seconds = max(now - started, 1e-6)
            rate = f"{(done - first) / seconds:.1f} patches/s, {written / _MEGABYTE / seconds:.1f} MB/s"
            bar.update(task, completed=done, total=total, rate=rate)
            if not console.is_terminal and now - last_line >= 30:
                last_line = now
                console.print(f"sharding: {done} of {total} patches, {rate}", highlight=False)

        return write_shards(
            catalogue,
            arguments.out,
            shard_bytes=arguments.shard_mb * 1_000_000,
            order=arguments.order,
            seed=arguments.seed,
            workers=arguments.workers,
            max_bad=arguments.max_bad,
            progress=progress,
        )


def _print_report(console: Console, catalogue: Catalogue) -> None:
    """What the catalogue did not understand or had to leave out; nothing when all is well."""
    report = catalogue.report()
    remarks = [f"{count} files of {name} left out: no dates known" for name, count in report.undated.items()]
    remarks += [f"{count} files of {name} left out: no series beside them" for name, count in report.lone.items()]
    if report.unparsable:
        remarks.append(f"{report.unparsable} names not understood, e.g. {', '.join(report.examples)}")
    if report.unknown_folders:
        remarks.append(f"unknown modalities: {', '.join(report.unknown_folders)}")
    if report.orphans:
        remarks.append(f"{report.orphans} historical images without a patch")
    if report.duplicate_rows:
        remarks.append(f"{report.duplicate_rows} repeated metadata rows ignored")
    if report.unreadable_dates:
        remarks.append(f"{report.unreadable_dates} metadata rows without readable dates")
    for remark in remarks:
        console.print(f"note: {remark}", highlight=False)


def _print_summary(manifest: Manifest) -> None:
    counts = manifest.counts
    written = sum(shard.bytes for shard in manifest.shards)
    table = Table(title=str(manifest.path), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("patches", str(counts["samples"]))
    table.add_row("skipped as unreadable", str(counts["skipped"]))
    table.add_row("shards", str(manifest.shard_count))
    table.add_row("size", f"{written / _MEGABYTE:.1f} MB")
    if counts["samples"]:
        table.add_row("per patch", f"{written / counts['samples'] / _MEGABYTE:.2f} MB")
        table.add_row("share of the GeoTIFFs", f"{written / max(counts['source_bytes'], 1):.2f}")
    for name, present in counts["present"].items():
        if present < counts["samples"]:
            table.add_row(f"patches without {name}", str(counts["samples"] - present))
    absent = [name for name in FLAIR_HUB if name not in manifest.registry]
    if absent:
        table.add_row("not in these shards", "\n".join(absent))
    console = Console()
    console.print(table)
    for reason in list(manifest.skipped.values())[:_SKIPPED_SHOWN]:
        console.print(f"skipped: {reason}", highlight=False, soft_wrap=True)


def _split_files(words: list[str]) -> dict[str, str]:
    files = {}
    for word in words:
        value, separator, path = word.partition("=")
        if not separator or not value or not path or value in files:
            raise InputError(f"--split-csv {word}: expected VALUE=FILE, each value once, e.g. train=TRAIN.csv")
        files[value] = path
    return files
