"""Write the results of a command as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write


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
