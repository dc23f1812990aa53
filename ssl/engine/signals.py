"""Stop a run on SIGINT, SIGTERM or SIGUSR1 after the present step; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the schedulers' request to end, and SLURM's warning before the time limit (``--signal=USR1@120``)."""

# A launcher forwards the Ctrl-C of a terminal to ranks that already received it; that is no second request.
_DEBOUNCE_SECONDS = 0.5
_SHOW_CURSOR = b"\x1b[?25h"


def exit_code(signal_number: int) -> int:
    """Exit status of a process that a signal stopped, as shells report it: 130, 143 or 138; 0 for no signal."""
    return 128 + signal_number if signal_number else 0


class StopSignals:
    """Context in which ``STOP_SIGNALS`` set ``received`` instead of killing; a second signal ends the process at once.

    Previous handlers return on exit. Outside the main thread Python cannot set handlers, so ``received`` stays 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._process = os.getpid()
        self._received_at = 0.0
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
            return  # a forked DataLoader worker inherits the handler; the training process ends its workers
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            name = signal.Signals(number).name
            # A handler may interrupt a print; os.write is safe there.
            os.write(2, f"\nbocage: {name}: finishing this step, then saving; a second signal stops at once\n".encode())
        elif now - self._received_at > _DEBOUNCE_SECONDS:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR)
            os._exit(exit_code(number))
