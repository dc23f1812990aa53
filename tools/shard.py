"""``bocage shard SRC OUT``: write FLAIR-HUB as WebDataset shards with a manifest, on one machine or many."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bocage.recipes.loader import DATASET_KEY, load_dataset, parse_dataset, parse_dataset_argument
from bocage.shards.dataset_info import FLAIR_HUB_INFO
from bocage.shards.errors import InputError, counted
from bocage.shards.files import atomic_write, format_size
from bocage.shards.format.codec import with_lossy_dem
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.delete_source import replaced_zips
from bocage.shards.inspect.summary import preferred_patches
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.source.described.open import open_described
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.estimate import Estimate
from bocage.shards.write.plan import ORDERS
from bocage.shards.write.writer import DatasetWriter
from bocage.tools.cli.arguments import parse_pairs, positive_int, unit_fraction
from bocage.tools.cli.dry_run import catalogue_tables
from bocage.tools.cli.image_options import (
    add_image_options,
    check_image_options,
    describe_command,
    draft_from_options,
)
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import ProgressBar, ProgressBars, format_duration
from bocage.tools.cli.reports import print_notes, print_skipped, text_console
from bocage.tools.verify import show_verification

_MEGABYTE = 1e6
_ZIPS_SHOWN = 20
_PATCHES_DRAWN = 4
_REST = "rest"

SomeCatalogue = TypeVar("SomeCatalogue", bound=Catalogue)
_EPILOG = """\
After an interruption the same command resumes: finished shards are kept, and only those that skipped a patch that
is readable now are written again. With a complete OUT it rewrites deleted shards, bit for bit, and nothing else.
Exit status: 0 done, 2 wrong input or an error that the message names, 130 after Ctrl-C, 143 after SIGTERM. A second
signal ends the command at once.

On SLURM, with SRC and OUT on a shared file system:
  sbatch --array=1-16 --wrap 'bocage shard SRC OUT --slice $SLURM_ARRAY_TASK_ID/16 --workers 8'
  bocage shard SRC OUT --merge      (after the array has ended; give both commands the same options)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EPILOG
    parser.usage = (
        "bocage shard [options] SRC OUT [dataset=FILE] [key=value ...]\n"
        "       bocage shard [options] --images DIR [--labels DIR] OUT [key=value ...]"
    )
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="PATH",
        help="SRC: FLAIR-HUB tree, or the folder that dataset=FILE describes; OUT: new folder, or the folder of a run "
        "to resume; key=value: values of the description to override",
    )
    add_image_options(parser)

    content = parser.add_argument_group("content")
    content.add_argument(
        "--modalities", nargs="+", metavar="NAME", help=f"modalities to write (default: {', '.join(FLAIR_HUB)})"
    )
    content.add_argument(
        "--lossy-dem",
        action="store_true",
        help="round heights by at most 3.9 mm: height models take less than half the bytes; the rest stays lossless",
    )
    content.add_argument(
        "--max-bad",
        type=unit_fraction,
        default=0.001,
        metavar="FRACTION",
        help="fraction of unreadable patches to skip before giving up (default: %(default)s; at least one unless 0)",
    )
    content.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="skip folders and zips that cannot be read at all, instead of stopping",
    )
    splits = content.add_mutually_exclusive_group()
    splits.add_argument(
        "--split-csv",
        nargs="+",
        default=[],
        metavar="VALUE=FILE",
        help="add a split from CSV files of the official code that list patches, e.g. train=TRAIN.csv "
        "valid=VALID.csv test=TEST.csv",
    )
    splits.add_argument(
        "--split-domains",
        nargs="+",
        default=[],
        metavar="VALUE=DOMAINS",
        help="add a split by domain, e.g. test=D004-2021,D031-2019 valid=D012-2019 train=rest",
    )
    content.add_argument(
        "--split-name", metavar="NAME", help="column name of the added split (default: split_csv or split_domains)"
    )

    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--order",
        choices=ORDERS,
        default="shuffled",
        help="order of patches. shuffled: random, for training; stratified: random, with the dataset's mix of "
        "domains in every shard; roi: neighbours together, no ROI in two shards unless it is larger than a shard "
        "(default: %(default)s)",
    )
    layout.add_argument(
        "--seed", type=int, metavar="N", default=0, help="random seed of the order (default: %(default)s)"
    )
    layout.add_argument(
        "--shard-mb", type=positive_int, metavar="MB", default=512, help="size of a shard, MB (default: %(default)s)"
    )

    running = parser.add_argument_group("execution (does not change the shards)")
    running.add_argument(
        "--workers", type=positive_int, metavar="N", default=1, help="processes (default: %(default)s)"
    )
    running.add_argument(
        "--scheduler", metavar="ADDRESS", help="address of a Dask scheduler to run on, e.g. tcp://head:8786"
    )
    running.add_argument("--report", metavar="FILE", type=Path, help="write the problems found in SRC as JSON")
    running.add_argument(
        "--picture", metavar="FILE.png", type=Path, help="with --dry-run: draw a few patches in all their modalities"
    )
    running.add_argument(
        "--delete-source",
        action="store_true",
        help="verify the written shards as `bocage verify --decode all` does, then delete the zips of SRC whose files "
        "they all hold; folders and metadata stay",
    )
    stages = running.add_mutually_exclusive_group()
    stages.add_argument(
        "--dry-run",
        action="store_true",
        help="print what was understood, estimate sizes and time from a few patches, and write nothing",
    )
    stages.add_argument(
        "--slice", type=_slice, metavar="I/N", help="write only the I-th (from 1) of N slices of the shards"
    )
    stages.add_argument(
        "--merge", action="store_true", help="write the manifest of the shards that all slices have written"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the shards; return 130 or 143 when interrupted."""
    if arguments.delete_source and (arguments.dry_run or arguments.slice is not None):
        raise InputError("--delete-source: needs complete shards; give it without --dry-run, or with --merge")
    if arguments.picture is not None and not arguments.dry_run:
        raise InputError("--picture: needs --dry-run; `bocage inspect OUT --picture FILE` draws a patch of shards")
    _read_positionals(arguments)
    console = text_console(stderr=True)
    try:
        with Interrupts() as interrupts:
            with console.status(Text(f"reading the catalogue of {arguments.source}")):
                catalogue = _open_catalogue(arguments, console)
            print_notes(console, catalogue)
            if arguments.report is not None:
                _write_report(arguments.report, catalogue)
            _check_readable(arguments, catalogue)
            _shard(interrupts, catalogue, arguments)
            if arguments.delete_source and isinstance(catalogue, FlairHubCatalogue):
                _delete_source(interrupts, catalogue, arguments)
    except InterruptedCommand as stopped:
        print(
            f"bocage: interrupted by {stopped.name}; finished shards are kept; run the same command to resume",
            file=sys.stderr,
        )
        return stopped.exit_code
    return 0


def _read_positionals(arguments: argparse.Namespace) -> None:
    """Set ``source``, ``out``, ``dataset`` and ``settings`` from the positional arguments."""
    check_image_options(arguments)
    paths = [argument for argument in arguments.overrides if "=" not in argument]
    settings = [argument for argument in arguments.overrides if "=" in argument]
    if arguments.images is not None:
        if any(argument.startswith(DATASET_KEY) for argument in settings):
            raise InputError(f"{' '.join(settings)}: --images describes the dataset already; leave {DATASET_KEY} out")
        if len(paths) != 1:
            raise InputError(
                f"{counted(len(paths), 'path')} given; with --images give one, OUT: the folder of the shards"
            )
        arguments.source, arguments.out, arguments.dataset = arguments.images, Path(paths[0]), None
        arguments.settings = settings
        return
    if len(paths) != 2:
        raise InputError(
            f"{counted(len(paths), 'path')} given; give two, SRC and OUT: the source and the folder of the shards"
        )
    arguments.source, arguments.out = map(Path, paths)
    arguments.dataset, arguments.settings = parse_dataset_argument(settings)


def _open_catalogue(arguments: argparse.Namespace, console: Console) -> Catalogue:
    """Open the catalogue of a described dataset or of FLAIR-HUB."""
    if arguments.dataset is None and arguments.images is None:
        return _flair_hub_catalogue(arguments)
    for option in ("modalities", "split_csv", "lossy_dem", "delete_source"):
        if getattr(arguments, option):
            raise InputError(
                f"--{option.replace('_', '-')} applies to FLAIR-HUB only, not to a described dataset; leave it out"
            )
    if arguments.dataset is not None:
        description = load_dataset(arguments.dataset, arguments.settings)
        folder = Path(arguments.dataset).parent
    else:
        draft = draft_from_options(arguments)
        keep = f"to keep or edit this description: {describe_command(arguments)}"
        for note in (*draft.notes, keep):
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        description = parse_dataset(draft.to_yaml(), arguments.settings, f"--images {arguments.images}")
        arguments.source, folder = draft.root, Path()
    return _with_domain_split(open_described(arguments.source, description, folder), arguments)


def _flair_hub_catalogue(arguments: argparse.Namespace) -> FlairHubCatalogue:
    registry = with_lossy_dem(FLAIR_HUB) if arguments.lossy_dem else FLAIR_HUB
    catalogue = FlairHubCatalogue.open(arguments.source, registry, modalities=arguments.modalities)
    if arguments.split_csv:
        return catalogue.with_csv_split(
            arguments.split_name or "split_csv", parse_pairs("--split-csv", arguments.split_csv, "VALUE=FILE")
        )
    return _with_domain_split(catalogue, arguments)


def _with_domain_split(catalogue: SomeCatalogue, arguments: argparse.Namespace) -> SomeCatalogue:
    """Add the split of ``--split-domains``, if given."""
    if arguments.split_domains:
        domains_by_value = parse_pairs("--split-domains", arguments.split_domains, "VALUE=DOMAINS")
        rest = [value for value, text in domains_by_value.items() if text == _REST]
        if len(rest) > 1:
            raise InputError(f"--split-domains: {' and '.join(rest)} cannot both be the rest")
        domains = {value: text.split(",") for value, text in domains_by_value.items() if text != _REST}
        return catalogue.with_domain_split(
            arguments.split_name or "split_domains", domains, rest=rest[0] if rest else None
        )
    if arguments.split_name:
        raise InputError("--split-name: needs --split-csv or --split-domains")
    return catalogue


def _shard(interrupts: Interrupts, catalogue: Catalogue, arguments: argparse.Namespace) -> None:
    sharding = DatasetWriter(
        catalogue,
        arguments.out,
        shard_bytes=arguments.shard_mb * 1_000_000,
        order=arguments.order,
        seed=arguments.seed,
        max_bad=arguments.max_bad,
    )
    if arguments.dry_run:
        _print_dry_run(catalogue, sharding.estimate(), arguments)
    elif arguments.merge:
        _print_summary(sharding.merge())
    else:
        how = {"workers": arguments.workers, "scheduler": arguments.scheduler}
        with ProgressBars() as bars:
            show = partial(_show, bars.add("sharding", "patches"), interrupts)
            if arguments.slice is not None:
                shards = sharding.write_slice(*arguments.slice, **how, progress=show)
            else:
                manifest = sharding.write(**how, progress=show)
        if arguments.slice is None:
            _print_summary(manifest)
        else:
            number, of = arguments.slice
            print(
                f"slice {number} of {of}: {counted(len(shards), 'shard')} written; run --merge when all slices are done"
            )


def _delete_source(interrupts: Interrupts, catalogue: FlairHubCatalogue, arguments: argparse.Namespace) -> None:
    """Delete the zips of SRC that the verified shards replace, and print why others stay."""
    with ProgressBars() as bars:
        show = partial(show_verification, bars.add("verifying", "MB"), interrupts)
        found = replaced_zips(catalogue, arguments.out, workers=arguments.workers, progress=show)
    with interrupts.deferred():  # with half of the zips, the same command would find another dataset
        found.delete()
        size = format_size(sum(found.deletable.values()))
        print(f"deleted {counted(len(found.deletable), 'zip')} of {arguments.source}, {size}{_names(found.deletable)}")
        for reason in dict.fromkeys(found.kept.values()):
            kept = [path for path, why in found.kept.items() if why == reason]
            print(f"kept {len(kept)}, {reason}{_names(kept)}")


def _names(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    more = f" and {len(names) - _ZIPS_SHOWN} more" if len(names) > _ZIPS_SHOWN else ""
    return f": {', '.join(names[:_ZIPS_SHOWN])}{more}" if names else ""


def _show(bar: ProgressBar, interrupts: Interrupts, done: int, total: int, written: int) -> None:
    """Update the progress bar; a ``WriteProgress`` callback."""
    interrupts.check()
    bar.update(done, total, f"{written / _MEGABYTE:,.0f} MB written")


def _check_readable(arguments: argparse.Namespace, catalogue: Catalogue) -> None:
    """Refuse unreadable zips and folders, so that an unfinished download does not drop a sensor from many patches."""
    report = catalogue.report()
    if report.unreadable and not arguments.skip_unreadable:
        others = f" (and {report.unreadable - 1} more, see the notes)" if report.unreadable > 1 else ""
        raise InputError(
            f"{report.unreadable_examples[0]}{others}; repair or download again, or pass --skip-unreadable to "
            "write shards without their content"
        )


def _write_report(path: Path, catalogue: Catalogue) -> None:
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(catalogue.report().to_json(), indent=1), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--report {path}: cannot be written: {error.strerror}") from error


def _print_dry_run(catalogue: Catalogue, estimate: Estimate, arguments: argparse.Namespace) -> None:
    """Print what was understood and an estimate, and draw a few patches if asked to."""
    for table in catalogue_tables(catalogue):
        text_console().print(table)
    _print_estimate(estimate, arguments)
    if arguments.picture is not None:
        from bocage.shards.inspect.contact_sheet import catalogue_sheet, save_sheet  # imports matplotlib

        save_sheet(catalogue_sheet(catalogue, preferred_patches(catalogue), _PATCHES_DRAWN), arguments.picture)
        print(f"patches: {arguments.picture}")


def _print_estimate(estimate: Estimate, arguments: argparse.Namespace) -> None:
    free = shutil.disk_usage(next(path for path in (arguments.out, *arguments.out.absolute().parents) if path.exists()))
    table = _table("dry run: nothing is written")
    table.add_row("patches", str(estimate.patches))
    table.add_row("shards", str(estimate.shards))
    table.add_row("estimated size", format_size(estimate.bytes))
    table.add_row("free disk space", format_size(free.free))
    if estimate.remaining < estimate.patches:
        table.add_row("patches still to write", str(estimate.remaining))
    if arguments.scheduler is None:
        table.add_row(
            f"estimated time with --workers {arguments.workers}", format_duration(estimate.seconds / arguments.workers)
        )
    else:
        table.add_row("estimated time of one process", format_duration(estimate.seconds))
    if estimate.unreadable:
        table.add_row("sampled patches that cannot be read", f"{len(estimate.unreadable)} of {estimate.sampled}")
    console = text_console()
    console.print(table)
    print_skipped(console, estimate.unreadable.values())


def _print_summary(manifest: Manifest) -> None:
    counts = manifest.counts
    written = sum(shard.bytes for shard in manifest.shards)
    table = _table(str(manifest.path))
    table.add_row("patches", str(counts["samples"]))
    table.add_row("skipped as unreadable", str(counts["skipped"]))
    table.add_row("shards", str(manifest.shard_count))
    table.add_row("size", format_size(written))
    if counts["samples"]:
        table.add_row("per patch", f"{written / counts['samples'] / _MEGABYTE:.2f} MB")
        table.add_row("size relative to the source", f"{written / max(counts['source_bytes'], 1):.2f}")
    for name, present in counts["present"].items():
        if present < counts["samples"]:
            table.add_row(f"patches without {name}", str(counts["samples"] - present))
    absent = [name for name in FLAIR_HUB if name not in manifest.registry]
    if absent and manifest.dataset == FLAIR_HUB_INFO:
        table.add_row("not in these shards", "\n".join(absent))
    console = text_console()
    console.print(table)
    print_skipped(console, manifest.skipped.values())


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    return table


def _slice(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, e.g. 3/16")
    return int(number), int(of)
