"""``bocage completion SHELL``: a script that lets a shell complete sub-commands, options and paths."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

_PLACES = ("SHARDS", "FOLDER", "FILE")  # that are text, since they may be addresses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = "To have it in every shell; zsh needs fpath+=~/.zfunc before compinit in ~/.zshrc."
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="for which shell")


def run(arguments: argparse.Namespace) -> int:
    """Print the script, which runs without bocage: it knows all options of this version."""
    from bocage.tools.main import build_parser

    parser = build_parser()
    _complete_paths(parser)
    print(shtab.complete(parser, arguments.shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Have words that are places completed as files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_paths(below)
        elif not action.choices and (action.type is Path or action.metavar in _PLACES or not action.option_strings):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
