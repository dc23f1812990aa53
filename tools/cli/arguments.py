"""Types of command-line arguments: argparse names the option and prints the message of what they raise."""

from __future__ import annotations

import argparse

from bocage.shards.errors import InputError


def positive(text: str) -> int:
    """A whole number from 1."""
    return _from(1, text)


def not_negative(text: str) -> int:
    """A whole number from 0."""
    return _from(0, text)


def share(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def split_value(split: bool, value: str | None) -> str:
    """What ``--value`` says, ``test`` where it is not given.

    Args:
        split: whether ``--split`` is given.
        value: of the option.

    Raises:
        InputError: a value without a split, which would be all patches.
    """
    if value is not None and not split:
        raise InputError(f"--value {value} is of a split: give it with --split, e.g. --split split_1")
    return "test" if value is None else value


def pairs(option: str, words: list[str], form: str = "MODALITY=VALUE") -> dict[str, str]:
    """What the words ``KEY=VALUE`` of an option say, by key.

    Args:
        option: whose words they are, for the message.
        words: of the command line.
        form: what they look like, for the message.

    Raises:
        InputError: another word, or a key twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name or not value or name in found:
            raise InputError(f"{option} {word}: expected {form}, each {form.partition('=')[0].lower()} once")
        found[name] = value
    return found


def _from(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
    return value
