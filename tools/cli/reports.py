"""What commands found, as files for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes ``report``; raises ``InputError`` when the file cannot be written."""
    try:
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
