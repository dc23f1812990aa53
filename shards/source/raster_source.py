"""Where the bytes of one raster lie: in a file of its own or in a zip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bocage.shards.errors import InputError
from bocage.shards.source import zips


class RasterError(InputError):
    """A raster that is unreadable or is not what the registry says; the message names the file and the value."""


@dataclass(frozen=True)
class RasterSource:
    """One raster's file. As text it is the name that messages give.

    Attributes:
        path: the GeoTIFF, or the zip that holds it.
        member: where in the zip; None when ``path`` is the GeoTIFF.
    """

    path: Path
    member: zips.ZipMember | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member.name.decode('utf-8', 'replace')}"

    def read(self) -> bytes:
        """The GeoTIFF's bytes.

        Raises:
            RasterError: the file or the zip cannot be read, or the zip is refused.
        """
        try:
            return self.path.read_bytes() if self.member is None else zips.read(self.path, self.member)
        except zips.ZipError as error:
            raise RasterError(str(error)) from error
        except OSError as error:
            raise RasterError(f"{self}: cannot be read: {error.strerror}") from error
