"""Interruption: a signal asks the loop to finish its step and save; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the polite kill of schedulers, and SLURM's warning before the time limit (``--signal=USR1@120``)."""

# Launchers pass a terminal's Ctrl-C on to processes that already had it: that is not a second request.
_DEBOUNCE_SECONDS = 0.5
_SHOW_CURSOR = b"\x1b[?25h"


def exit_code(received: int) -> int:
    """Exit status of a process stopped by signal ``received`` (0: not stopped): 130, 143, 138, as shells report."""
    return 128 + received if received else 0


class StopSignals:
    """Context in which ``STOP_SIGNALS`` set ``received`` instead of killing; earlier handlers return on exit.

    Outside the main thread Python cannot set handlers: then nothing is caught and ``received`` stays 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._process = os.getpid()
        self._when = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked data worker inherits the handler; the training process decides when workers end
        now = time.monotonic()
        if not self.received:
            self.received, self._when = number, now
            name = signal.Signals(number).name
            # A handler may interrupt a print: os.write is safe where print is not.
            os.write(2, f"\nbocage: {name}: finishing this step, then saving; once more stops at once\n".encode())
        elif now - self._when > _DEBOUNCE_SECONDS:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR)
            os._exit(exit_code(number))
