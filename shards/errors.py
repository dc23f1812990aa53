"""The exception for wrong user input, which commands print without a traceback, and the wording of messages."""

from __future__ import annotations

import re


class InputError(ValueError):
    """A value, file or key from the user cannot be used.

    The message is one sentence that names the file, key or value, and what to do. Commands print it and exit with
    status 2. Any other exception is an internal error and keeps its traceback.
    """


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or the plural, e.g. ``1 patch`` or ``2,000 patches``.

    Args:
        number: number of items.
        noun: noun in the singular, with its adjectives before it.
    """
    if number == 1 or noun.endswith("series"):
        return f"{number:,} {noun}"
    if re.search(r"[^aeiou]y$", noun):
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
