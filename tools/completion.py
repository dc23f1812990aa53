"""``bocage completion SHELL``: print a script for shell completion of commands, options and paths."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

_PATH_METAVARS = ("SHARDS", "FOLDER", "FILE")  # text options that may hold a path or an address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = (
        "Write it to the file that your shell reads, as in the examples. zsh needs fpath+=~/.zfunc before compinit in "
        "~/.zshrc."
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="shell to complete for")


def run(arguments: argparse.Namespace) -> int:
    """Print the script. It holds all options of this version, so completion does not start bocage."""
    from bocage.tools.main import build_parser

    parser = build_parser()
    _complete_paths(parser)
    print(shtab.complete(parser, arguments.shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Mark the arguments that hold paths, so that the shell completes file names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_paths(below)
        elif not action.choices and (
            action.type is Path or action.metavar in _PATH_METAVARS or not action.option_strings
        ):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
