"""Send the library's log messages to stderr, for commands."""

from __future__ import annotations

import logging
import sys


class _StderrHandler(logging.Handler):
    """Writes ``bocage: MESSAGE`` to the present ``sys.stderr``, which tests and progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"bocage: {record.getMessage()}", file=sys.stderr, flush=True)


def configure_logging() -> None:
    """Show messages of level INFO and above of the ``bocage`` loggers on stderr; calling it again changes nothing."""
    logger = logging.getLogger("bocage")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
