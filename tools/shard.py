"""``bocage shard SRC OUT``: FLAIR-HUB to WebDataset shards with a manifest, on one machine or on many."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.format.codec import lossy_dem
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.estimate import Estimate
from bocage.shards.write.plan import ORDERS
from bocage.shards.write.writer import Sharding
from bocage.tools.cli.arguments import pairs, positive, share
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import Bar, Bars, duration

_MEGABYTE = 1e6
_SKIPPED_SHOWN = 10
_REST = "rest"
_EPILOG = """\
The same command goes on after any interruption: finished shards are kept, and written again only when they had to
leave out a patch that can be read now. Given a complete OUT it rewrites shards that were deleted, bit for bit, and
leaves the rest alone. Exit status: 0 done, 2 wrong input or a fault that the message names, 130 ended by Ctrl-C,
143 by SIGTERM; a second one ends at once.

On SLURM, with SRC and OUT on a shared file system:
  sbatch --array=1-16 --wrap 'bocage shard SRC OUT --slice $SLURM_ARRAY_TASK_ID/16 --workers 8'
  bocage shard SRC OUT --merge      (when the array has ended; give both commands the same options)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EPILOG
    parser.add_argument("source", metavar="SRC", type=Path, help="FLAIR-HUB tree")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder, or that of an earlier run to go on with")

    content = parser.add_argument_group("what the shards hold")
    content.add_argument(
        "--modalities", nargs="+", metavar="NAME", help=f"what to keep (default: all of {', '.join(FLAIR_HUB)})"
    )
    content.add_argument(
        "--lossy-dem",
        action="store_true",
        help="round heights by at most 5 mm: height models take less than half the bytes; all else stays lossless",
    )
    content.add_argument(
        "--max-bad",
        type=share,
        default=0.001,
        metavar="SHARE",
        help="share of unreadable patches to leave out before giving up (default: %(default)s; one at least unless 0)",
    )
    content.add_argument(
        "--leave-out-unreadable",
        action="store_true",
        help="go on without folders and zips that cannot be read as a whole; otherwise they end the command",
    )
    splits = content.add_mutually_exclusive_group()
    splits.add_argument(
        "--split-csv",
        nargs="+",
        default=[],
        metavar="VALUE=FILE",
        help="one more split, from CSV files of the official code that list patches, e.g. train=TRAIN.csv "
        "valid=VALID.csv test=TEST.csv",
    )
    splits.add_argument(
        "--split-domains",
        nargs="+",
        default=[],
        metavar="VALUE=DOMAINS",
        help="one more split, by domain, e.g. test=D004-2021,D031-2019 valid=D012-2019 train=rest",
    )
    content.add_argument(
        "--split-name", metavar="NAME", help="its column (default: split_csv or split_domains, as it is made)"
    )

    layout = parser.add_argument_group("how they are cut")
    layout.add_argument(
        "--order",
        choices=ORDERS,
        default="shuffled",
        help="shuffled: patches anywhere, for training; stratified: as that, and every shard a fair mix of domains; "
        "roi: neighbours together, no ROI cut between shards unless it is larger than one (default: %(default)s)",
    )
    layout.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of a shuffled or stratified order (default: %(default)s)"
    )
    layout.add_argument(
        "--shard-mb", type=positive, metavar="MB", default=512, help="size of a shard (default: %(default)s)"
    )

    running = parser.add_argument_group("how they are made (does not change a byte)")
    running.add_argument("--workers", type=positive, metavar="N", default=1, help="processes (default: %(default)s)")
    running.add_argument("--scheduler", metavar="ADDRESS", help="Dask scheduler to work on, e.g. tcp://head:8786")
    running.add_argument("--report", metavar="FILE", type=Path, help="write what is wrong with SRC there, as JSON")
    stages = running.add_mutually_exclusive_group()
    stages.add_argument("--dry-run", action="store_true", help="only tell sizes and time, from encoding a few patches")
    stages.add_argument(
        "--slice", type=_slice, metavar="I/N", help="write only the I-th (from 1) of N slices of the shards"
    )
    stages.add_argument("--merge", action="store_true", help="only write the manifest of what slices have written")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; 130 or 143 when interrupted."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # against FORCE_COLOR
    try:
        with Interrupts() as interrupts:
            with console.status(f"reading the catalogue of {arguments.source}"):
                catalogue = _catalogue(arguments)
            _print_report(console, catalogue)
            if arguments.report is not None:
                _write_report(arguments.report, catalogue)
            _check_readable(arguments, catalogue)
            _shard(interrupts, catalogue, arguments)
    except InterruptedCommand as stopped:
        print(
            f"bocage: interrupted by {stopped.name}; finished shards are kept, the same command goes on from there",
            file=sys.stderr,
        )
        return stopped.exit_code
    return 0


def _catalogue(arguments: argparse.Namespace) -> Catalogue:
    registry = lossy_dem(FLAIR_HUB) if arguments.lossy_dem else FLAIR_HUB
    catalogue = Catalogue.open(arguments.source, registry, modalities=arguments.modalities)
    if arguments.split_csv:
        return catalogue.with_csv_split(
            arguments.split_name or "split_csv", pairs("--split-csv", arguments.split_csv, "VALUE=FILE")
        )
    if arguments.split_domains:
        found = pairs("--split-domains", arguments.split_domains, "VALUE=DOMAINS")
        rest = [value for value, text in found.items() if text == _REST]
        if len(rest) > 1:
            raise InputError(f"--split-domains: {' and '.join(rest)} cannot both take the rest")
        domains = {value: text.split(",") for value, text in found.items() if text != _REST}
        return catalogue.with_domain_split(
            arguments.split_name or "split_domains", domains, rest=rest[0] if rest else None
        )
    if arguments.split_name:
        raise InputError("--split-name: needs --split-csv or --split-domains")
    return catalogue


def _shard(interrupts: Interrupts, catalogue: Catalogue, arguments: argparse.Namespace) -> None:
    sharding = Sharding(
        catalogue,
        arguments.out,
        shard_bytes=arguments.shard_mb * 1_000_000,
        order=arguments.order,
        seed=arguments.seed,
        max_bad=arguments.max_bad,
    )
    if arguments.dry_run:
        _print_estimate(sharding.estimate(), arguments)
    elif arguments.merge:
        _print_summary(sharding.merge())
    else:
        how = {"workers": arguments.workers, "scheduler": arguments.scheduler}
        with Bars() as bars:
            show = partial(_show, bars.add("sharding", "patches"), interrupts)
            if arguments.slice is not None:
                shards = sharding.write_slice(*arguments.slice, **how, progress=show)
            else:
                manifest = sharding.write(**how, progress=show)
        if arguments.slice is None:
            _print_summary(manifest)
        else:
            number, of = arguments.slice
            print(f"slice {number} of {of}: {len(shards)} shards are written; --merge when all slices are")


def _show(bar: Bar, interrupts: Interrupts, done: int, total: int, written: int) -> None:
    """See ``writer.Progress``."""
    interrupts.check()
    bar.update(done, total, f"{written / _MEGABYTE:,.0f} MB written")


def _print_report(console: Console, catalogue: Catalogue) -> None:
    """What the catalogue did not understand or had to leave out; nothing when all is well."""
    for remark in catalogue.report().remarks():
        console.print(f"note: {remark}", highlight=False, markup=False, soft_wrap=True)


def _check_readable(arguments: argparse.Namespace, catalogue: Catalogue) -> None:
    """A zip that is still being downloaded must not become thousands of patches without a sensor."""
    report = catalogue.report()
    if report.unreadable and not arguments.leave_out_unreadable:
        others = f" (and {report.unreadable - 1} more, see the notes)" if report.unreadable > 1 else ""
        raise InputError(
            f"{report.unreadable_examples[0]}{others}; repair or download again, or pass --leave-out-unreadable to "
            "shard without what they hold"
        )


def _write_report(path: Path, catalogue: Catalogue) -> None:
    try:
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(catalogue.report().to_json(), indent=1), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--report {path}: cannot be written: {error.strerror}") from error


def _print_estimate(estimate: Estimate, arguments: argparse.Namespace) -> None:
    free = shutil.disk_usage(next(path for path in (arguments.out, *arguments.out.absolute().parents) if path.exists()))
    table = _table("dry run: nothing is written")
    table.add_row("patches", str(estimate.patches))
    table.add_row("shards", str(estimate.shards))
    table.add_row("size, about", _size(estimate.bytes))
    table.add_row("free there", _size(free.free))
    if estimate.waiting < estimate.patches:
        table.add_row("patches not written yet", str(estimate.waiting))
    if arguments.scheduler is None:
        table.add_row(f"time with --workers {arguments.workers}, about", duration(estimate.seconds / arguments.workers))
    else:
        table.add_row("time of one process, about", duration(estimate.seconds))
    Console().print(table)


def _print_summary(manifest: Manifest) -> None:
    counts = manifest.counts
    written = sum(shard.bytes for shard in manifest.shards)
    table = _table(str(manifest.path))
    table.add_row("patches", str(counts["samples"]))
    table.add_row("skipped as unreadable", str(counts["skipped"]))
    table.add_row("shards", str(manifest.shard_count))
    table.add_row("size", _size(written))
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


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    return table


def _size(count: int) -> str:
    megabytes = count / _MEGABYTE
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.1f} MB"


def _slice(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, e.g. 3/16")
    return int(number), int(of)
