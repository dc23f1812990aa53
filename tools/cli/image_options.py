"""Options that describe a folder of images and a folder of labels without ``dataset.yaml``."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from bocage.shards.draft.bands import parse_bands
from bocage.shards.draft.folder import draft_images
from bocage.shards.draft.rasters import Choices
from bocage.shards.draft.yaml import Draft
from bocage.shards.errors import InputError

_OPTIONS = ("labels", "bands", "classes", "ignore")
_NUMBERED = re.compile(r"(-?\d+)[\s,;:]+(\S.*)")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--images`` and the options that go with it."""
    group = parser.add_argument_group("images and labels without a description")
    group.add_argument("--images", type=Path, metavar="DIR", help="folder of images of one kind")
    group.add_argument(
        "--labels", type=Path, metavar="DIR", help="folder of label rasters with the names of the images"
    )
    group.add_argument(
        "--bands",
        metavar="LIST",
        help="bands of the images in order, e.g. R,G,B,NIR; NAME=NANOMETRES for others, NAME=other without a "
        "wavelength, NAME=unused to leave one out (default: as the files say)",
    )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with a class in each line: VALUE NAME, or NAME, where the first line has the value 0 (default: "
        "the values of the labels)",
    )
    group.add_argument(
        "--ignore",
        metavar="VALUES",
        help="label values without a class, e.g. 255 or 0,255; --ignore=-1,255 if the first is negative (default: as "
        "the files say, or none with --classes)",
    )


def check_image_options(arguments: argparse.Namespace) -> None:
    """Check that no option is given without the folder that it describes.

    Raises:
        InputError: an option lacks ``--images`` or ``--labels``.
    """
    for name in _OPTIONS:
        needed = "labels" if name in ("classes", "ignore") else "images"
        if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
            raise InputError(f"--{name}: needs --{needed} DIR")


def draft_from_options(arguments: argparse.Namespace) -> Draft:
    """Draft a description of the folders.

    Raises:
        InputError: an option is wrong, or the folders cannot be described.
    """
    return draft_images(
        arguments.images,
        arguments.labels,
        Choices(
            bands={} if arguments.bands is None else parse_bands(arguments.bands),
            classes={} if arguments.classes is None else read_classes(arguments.classes),
            ignore=None if arguments.ignore is None else _parse_values(arguments.ignore),
        ),
    )


def describe_command(arguments: argparse.Namespace) -> str:
    """Command line that writes the same description to a file."""
    words = ["bocage", "describe"]
    for name in ("images", *_OPTIONS):
        if (value := getattr(arguments, name)) is not None:
            # argparse takes a value such as -1,255 for an option.
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return shlex.join([*words, "-o", "dataset.yaml"])


def read_classes(path: Path) -> dict[int, str]:
    """Read the name of each class by value.

    Args:
        path: text file whose lines are all ``VALUE NAME``, or all names, where the first has the value 0. An empty line
            among names leaves a value without a class.

    Raises:
        InputError: the file cannot be read or names no class, only some lines have a value, or a value or a name is
            given twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"--classes {path}: cannot be read: {reason}") from error
    matches = {number: _NUMBERED.fullmatch(line) for number, line in enumerate(lines) if line}
    with_value = [number for number, match in matches.items() if match is not None]
    without = [number for number, match in matches.items() if match is None]
    if with_value and without:
        first, second = with_value[0], without[0]
        raise InputError(
            f"--classes {path}: line {second + 1}, {lines[second]!r}, has no value before its name, but line "
            f"{first + 1}, {lines[first]!r}, has one; write VALUE NAME in all lines, or NAME in all"
        )
    classes: dict[int, str] = {}
    for number, match in matches.items():
        line = lines[number]
        value, name = (number, line) if match is None else (int(match[1]), match[2])
        if value in classes or name in classes.values():
            raise InputError(f"--classes {path}: line {number + 1}: {line!r} repeats a value or a name")
        classes[value] = name
    if not classes:
        raise InputError(f"--classes {path}: has no line; write a class in each, such as background")
    return classes


def _parse_values(text: str) -> list[int]:
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise InputError(f"--ignore {text}: give whole numbers with commas between them, e.g. 0,255")
    return [int(value) for value in text.split(",")]
