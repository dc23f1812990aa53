"""``bocage describe FOLDER``: draft the description of a dataset that is not FLAIR-HUB."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rich.text import Text

from bocage.recipes.loader import parse_dataset
from bocage.shards.draft.folder import draft_folder
from bocage.shards.draft.yaml import Draft
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.source.described.description import build_registry
from bocage.tools.cli.image_options import add_image_options, check_image_options, draft_from_options
from bocage.tools.cli.reports import text_console

_EPILOG = """\
The command reads all file names, but headers and values of a sample of the files only. The draft says what was
sampled, and its comments say what is left to decide. It loads and shards as it is if the folder is unambiguous.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER", help="folder of rasters, or of Parquet tables of pixel series"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="new YAML file to write (default: print the draft)"
    )
    add_image_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print or write the draft; return the exit status."""
    check_image_options(arguments)
    if (arguments.folder is None) == (arguments.images is None):
        raise InputError("give either a FOLDER to describe, or --images DIR")
    if arguments.output is not None and arguments.output.exists():
        raise InputError(f"-o {arguments.output}: exists; give another name, or delete it")
    console = text_console(stderr=True)
    with console.status(Text(f"looking into {arguments.folder or arguments.images}")):
        draft = draft_folder(arguments.folder) if arguments.images is None else draft_from_options(arguments)
        _note_problem(draft)
    if arguments.output is None:
        print(draft.to_yaml(), end="")
        return 0
    try:
        with atomic_write(arguments.output) as temporary:
            temporary.write_text(draft.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"-o {arguments.output}: cannot be written: {error.strerror}") from error
    for note in draft.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    words = ["bocage", "shard", str(draft.root), "OUT", f"dataset={arguments.output}", "--dry-run", "--picture"]
    print(f"{arguments.output}: read its comments, then run {shlex.join([*words, 'sheet.png'])}")
    return 0


def _note_problem(draft: Draft) -> None:
    """Add a note if the draft does not load as it is."""
    try:
        build_registry(parse_dataset(draft.to_yaml(), [], "draft"))
    except InputError as error:
        draft.notes.append(f"the draft does not load before this is repaired: {error}")
