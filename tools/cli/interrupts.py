"""Turn Ctrl-C and SIGTERM into an exception, so that a command cleans up; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# Launchers forward a terminal's Ctrl-C to processes that have already received it; that is not a second request.
_DEBOUNCE_SECONDS = 0.5
_SHOW_CURSOR = b"\x1b[?25h"


class InterruptedCommand(BaseException):
    """Raised in the main thread when a signal arrives.

    Attributes:
        exit_code: exit status of the process: 130 for Ctrl-C, 143 for SIGTERM, as shells report them.
        name: name of the signal, e.g. ``SIGINT``.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.name = signal.Signals(number).name


class Interrupts:
    """Context manager, for the main thread, in which SIGINT and SIGTERM raise ``InterruptedCommand``."""

    def __init__(self) -> None:
        self._received = 0
        self._when = 0.0
        self._is_deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise the exception again: Python drops one raised inside a destructor or a library's callback."""
        if self._received:
            raise InterruptedCommand(self._received)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager for a step that must be completed: a first signal raises the exception at its end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._when = number, now
            if self._is_deferred:
                return
            raise InterruptedCommand(number)
        if now - self._when > _DEBOUNCE_SECONDS:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR)
            os._exit(128 + number)
