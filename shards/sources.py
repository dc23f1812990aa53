"""Where the bytes of one raster lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bocage.shards.errors import InputError


class RasterError(InputError):
    """A raster that is unreadable or is not what the registry says; the message names the file and the value."""


@dataclass(frozen=True)
class Source:
    """One raster's file. As text it is the name that messages give.

    Attributes:
        path: the GeoTIFF.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        """The GeoTIFF's bytes; raises ``RasterError``."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise RasterError(f"{self}: cannot be read: {error.strerror}") from error
