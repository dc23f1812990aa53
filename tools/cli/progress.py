"""Show progress: bars on a terminal, otherwise a plain line every 30 s and at the end."""

from __future__ import annotations

import math
import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

_LINE_SECONDS = 30.0


def format_duration(seconds: float) -> str:
    """Format a duration in seconds as hours and minutes, minutes, or seconds, rounded up."""
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds > 60 else f"{math.ceil(seconds)} s"


class ProgressBar:
    """The progress of one task; created by ``ProgressBars.add``."""

    def __init__(self, bars: ProgressBars, title: str, unit: str, total: int | None) -> None:
        self.title, self.unit, self.total, self.done, self.note = title, unit, total, 0, ""
        self._bars = bars
        self._first: int | None = None
        self._began = self.printed = time.monotonic()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set the progress to ``done`` of ``total``. The first call sets what an earlier run had done."""
        self.done, self.note = done, note
        self.total = self.total if total is None else total
        if self._first is None:
            self._first, self._began = done, time.monotonic()  # work of an earlier run does not count for the rate
        self._bars.show(self)

    def advance(self, count: int = 1) -> None:
        """Add ``count`` to the progress."""
        self.update(self.done + count)

    def summary(self) -> str:
        """Counts, rate and remaining time as text."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} {self.unit}"]
        seconds, made = time.monotonic() - self._began, self.done - (self._first or 0)
        if made > 0 and seconds > 0:
            rate = made / seconds
            parts.append(f"{rate:.3g} {self.unit}/s" if rate >= 0.1 else f"{format_duration(1 / rate)} each")
            if self.total is not None and self.done < self.total:
                parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self.note] if self.note else parts)


class ProgressBars:
    """Context manager that shows progress bars on stderr.

    It draws bars if stderr is a terminal and prints lines otherwise. FORCE_COLOR, which notebooks and CI set, does not
    matter: it asks for colours, not for cursor movement.

    Args:
        active: False shows nothing, e.g. on ranks other than 0.
    """

    def __init__(self, *, active: bool = True) -> None:
        self._active = active
        self._rich: Progress | None = None
        self._tasks: dict[ProgressBar, int] = {}
        if active and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            cut = Column(no_wrap=True, overflow="ellipsis")  # a narrow terminal cuts the end of the text
            columns = (
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(12),
                TextColumn("{task.fields[summary]}", markup=False, table_column=cut),
            )
            self._rich = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> ProgressBars:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._active:
            for bar in self._tasks if kind is None else ():  # after an error, only the error is printed
                if bar.done:
                    self._line(bar)

    def add(self, title: str, unit: str, total: int | None = None) -> ProgressBar:
        """Add a bar.

        Args:
            title: name of the task.
            unit: name of the counted items, in the plural.
            total: number of units; None when it is unknown.
        """
        bar = ProgressBar(self, title, unit, total)
        self._tasks[bar] = -1 if self._rich is None else self._rich.add_task(title, total=total, summary="")
        return bar

    def show(self, bar: ProgressBar) -> None:
        """Redraw a bar; bars call it when they change."""
        if self._rich is not None:
            self._rich.update(self._tasks[bar], completed=bar.done, total=bar.total, summary=bar.summary())  # type: ignore[arg-type]
        elif self._active and time.monotonic() - bar.printed >= _LINE_SECONDS:
            self._line(bar)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._active:
            print(text, file=sys.stderr, flush=True)

    def _line(self, bar: ProgressBar) -> None:
        bar.printed = time.monotonic()
        print(f"{bar.title}: {bar.summary()}", file=sys.stderr, flush=True)
