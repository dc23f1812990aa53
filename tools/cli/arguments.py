"""Parse and check values of command-line options.

argparse names the option in front of the message of an ``ArgumentTypeError``.
"""

from __future__ import annotations

import argparse

from bocage.shards.errors import InputError


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    return _parse_integer(1, text)


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0."""
    return _parse_integer(0, text)


def unit_fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def split_value(split: bool, value: str | None) -> str:
    """Return the value of ``--value``, by default ``test``.

    Args:
        split: whether ``--split`` was given.
        value: the option's value, None when it was not given.

    Raises:
        InputError: ``--value`` was given without ``--split``.
    """
    if value is not None and not split:
        raise InputError(f"--value {value} needs --split, e.g. --split split_1")
    return "test" if value is None else value


def parse_pairs(option: str, arguments: list[str], form: str = "MODALITY=VALUE") -> dict[str, str]:
    """Parse the ``KEY=VALUE`` arguments of an option into a dictionary.

    Args:
        option: name of the option, for error messages.
        arguments: arguments of the option.
        form: expected form, for error messages.

    Raises:
        InputError: an argument of another form, or a repeated key.
    """
    parsed: dict[str, str] = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator or not name or not value or name in parsed:
            raise InputError(f"{option} {argument}: expected {form}, each {form.partition('=')[0].lower()} once")
        parsed[name] = value
    return parsed


def _parse_integer(minimum: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is not at least {minimum}")
    return value
