"""Options of an encoder against the arguments that its constructor takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from bocage.shards.errors import InputError


def check_options(given: Iterable[str], constructor: Callable[..., Any], *, reserved: Iterable[str], of: str) -> None:
    """Check that ``constructor`` takes the options.

    Args:
        given: names of the options.
        constructor: its parameters are the valid names,
        reserved: except for these, which are not for the user to set.
        of: what is built, for the sentence.

    Raises:
        InputError: it does not take one; the message gives the nearest valid name.
    """
    valid = [key for key in inspect.signature(constructor).parameters if key not in set(reserved)]
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid ones: {', '.join(valid)}"
            raise InputError(f"encoder option {key!r} is unknown to {of}; {hint}")
