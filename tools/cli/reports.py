"""Report the results of a command: JSON files, notes about a source, and what was skipped."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.source.catalogue import Catalogue

_SKIPPED_SHOWN = 10


def text_console(*, stderr: bool = False) -> Console:
    """Open a console that prints text as it is, because names of classes and folders may look like rich's markup."""
    # With FORCE_COLOR, rich would draw a spinner in logs.
    is_terminal = sys.stderr.isatty() if stderr else None
    return Console(stderr=stderr, force_terminal=is_terminal, markup=False, emoji=False)


def print_notes(console: Console, catalogue: Catalogue) -> None:
    """Print a note for each problem of a source: missing, unreadable, unknown or repeated files."""
    for remark in catalogue.report().warnings():
        console.print(f"note: {remark}", highlight=False, soft_wrap=True)


def print_skipped(console: Console, reasons: Collection[str]) -> None:
    """Print why patches or images were skipped; of many, the first ones."""
    for reason in islice(reasons, _SKIPPED_SHOWN):
        console.print(f"skipped: {reason}", highlight=False, soft_wrap=True)
    if len(reasons) > _SKIPPED_SHOWN:
        console.print(f"skipped: {len(reasons) - _SKIPPED_SHOWN} more", highlight=False)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write ``report`` to ``path``.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
