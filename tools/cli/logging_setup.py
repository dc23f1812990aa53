"""Send the library's log messages to stderr, for commands."""

from __future__ import annotations

import logging
import sys
import warnings


class _StderrHandler(logging.Handler):
    """Writes ``bocage: MESSAGE`` to the present ``sys.stderr``, which tests and progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"bocage: {record.getMessage()}", file=sys.stderr, flush=True)


def configure_logging() -> None:
    """Show messages of level INFO and above of the ``bocage`` loggers on stderr; calling it again changes nothing.

    Warnings of rasterio about rasters without georeference are hidden: bocage says itself what it makes of them.
    """
    for message in ("Dataset has no geotransform", "The given matrix is equal to Affine.identity"):
        warnings.filterwarnings("ignore", message=message)
    logger = logging.getLogger("bocage")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
