"""``bocage verify SHARDS``: check shards against their manifest, and name broken files."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from bocage.shards.errors import counted
from bocage.shards.format.manifest import DATASET_FILE
from bocage.shards.inspect.verify import Verification, verify
from bocage.shards.inspect.verify_shard import Problem
from bocage.tools.cli.arguments import non_negative_int, positive_int
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import ProgressBar, ProgressBars
from bocage.tools.cli.reports import write_json

_SHOWN = 50  # problems printed
_MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder written by `bocage shard`")
    parser.add_argument(
        "--decode",
        type=_samples,
        default=8,
        metavar="N|all",
        help="samples per shard to decode and compare with the manifest (default: %(default)s); "
        "hashes, tar headers and JSON members of all samples are always checked",
    )
    parser.add_argument("--workers", type=positive_int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def _samples(text: str) -> int | None:
    return None if text == "all" else non_negative_int(text)


def run(arguments: argparse.Namespace) -> int:
    """Return 0 if all is intact, 1 if something is broken, 130 after Ctrl-C, 143 after SIGTERM."""
    try:
        with Interrupts() as interrupts:
            found = _verify(interrupts, arguments)
    except InterruptedCommand as stop:
        print(f"bocage: interrupted by {stop.name}; nothing was changed", file=sys.stderr)
        return stop.exit_code
    if arguments.json is not None:
        write_json(arguments.json, found.to_json())
    _print(found, arguments.shards)
    return 0 if found.sound else 1


def _verify(interrupts: Interrupts, arguments: argparse.Namespace) -> Verification:
    with ProgressBars() as bars:
        show = partial(show_verification, bars.add("verifying", "MB"), interrupts)
        return verify(arguments.shards, decode=arguments.decode, workers=arguments.workers, progress=show)


def show_verification(bar: ProgressBar, interrupts: Interrupts, done: int, total: int, problems: int) -> None:
    """Update the progress bar; a ``Progress`` callback of ``verify``."""
    interrupts.check()
    bar.update(int(done / _MEGABYTE), int(total / _MEGABYTE), f"{problems} broken" * bool(problems))


def _print(found: Verification, path: Path) -> None:
    print(
        f"{path}: {counted(found.samples, 'patch')} in {counted(found.shards, 'shard')}, "
        f"{found.bytes / _MEGABYTE:.1f} MB; {counted(found.decoded, 'patch')} decoded"
    )
    for problem in found.warnings[:_SHOWN]:
        print(f"warning: {_line(problem)}")
    for problem in found.problems[:_SHOWN]:
        print(f"broken: {_line(problem)}")
    hidden = len(found.problems[_SHOWN:]) + found.unlisted
    if hidden:
        print(f"broken: {hidden} more like these" + ("" if found.unlisted else "; --json FILE lists them"))
    if found.sound:
        print("sound")
        return
    tars = [name for name in found.broken if name.endswith(".tar")]
    if tars:
        shown = ", ".join(tars[:10]) + f" and {len(tars) - 10} more" * (len(tars) > 10)
        print(
            f"repair: delete {shown} and run the same `bocage shard SRC {path}` again; the rest can be used meanwhile"
        )
    if len(tars) < len(found.broken):
        others = ", ".join(name for name in found.broken if not name.endswith(".tar"))
        print(
            f"repair: copy {others} again from where the shards came from, or shard the tree again into a new folder "
            f"({DATASET_FILE} and both files that it describes belong together)"
        )


def _line(problem: Problem) -> str:
    return ": ".join(filter(None, (problem.file, problem.member, problem.message)))
