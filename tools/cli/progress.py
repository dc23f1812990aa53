"""How far long work is: bars on a terminal, elsewhere a plain line every half minute and at the end."""

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


def duration(seconds: float) -> str:
    """A time as people say it, rounded up."""
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds > 60 else f"{math.ceil(seconds)} s"


class Bar:
    """One piece of work; made by ``Bars.add``."""

    def __init__(self, bars: Bars, title: str, unit: str, total: int | None) -> None:
        self.title, self.unit, self.total, self.done, self.note = title, unit, total, 0, ""
        self._bars = bars
        self._first: int | None = None
        self._began = self.told = time.monotonic()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show that ``done`` of ``total`` are done. The first call says what an earlier run did, if any."""
        self.done, self.note = done, note
        self.total = self.total if total is None else total
        if self._first is None:
            self._first, self._began = done, time.monotonic()  # what was done before says nothing about the rate
        self._bars.show(self)

    def advance(self, count: int = 1) -> None:
        """Show that ``count`` more are done."""
        self.update(self.done + count)

    def summary(self) -> str:
        """Numbers, rate and time left."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} {self.unit}"]
        seconds, made = time.monotonic() - self._began, self.done - (self._first or 0)
        if made > 0 and seconds > 0:
            rate = made / seconds
            parts.append(f"{rate:.3g} {self.unit}/s" if rate >= 0.1 else f"{duration(1 / rate)} each")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self.note] if self.note else parts)


class Bars:
    """Bars on stderr, as a context.

    Whether stderr is a terminal decides, and nothing else: FORCE_COLOR, which notebooks and CI set, asks for colours,
    not for a cursor that moves.

    Args:
        active: False shows nothing, on ranks that keep quiet.
    """

    def __init__(self, *, active: bool = True) -> None:
        self._active = active
        self._rich: Progress | None = None
        self._tasks: dict[Bar, int] = {}
        if active and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            cut = Column(no_wrap=True, overflow="ellipsis")  # of a narrow terminal the end of the text
            columns = (
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(12),
                TextColumn("{task.fields[summary]}", markup=False, table_column=cut),
            )
            self._rich = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> Bars:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._active:
            for bar in self._tasks if kind is None else ():  # otherwise what ended it is said, and nothing else
                if bar.done:
                    self._line(bar)

    def add(self, title: str, unit: str, total: int | None = None) -> Bar:
        """A new bar.

        Args:
            title: what is done.
            unit: of what is counted, in the plural.
            total: how many there are, where it is known.
        """
        bar = Bar(self, title, unit, total)
        self._tasks[bar] = -1 if self._rich is None else self._rich.add_task(title, total=total, summary="")
        return bar

    def show(self, bar: Bar) -> None:
        """Called by a bar that has changed."""
        if self._rich is not None:
            self._rich.update(self._tasks[bar], completed=bar.done, total=bar.total, summary=bar.summary())  # type: ignore[arg-type]
        elif self._active and time.monotonic() - bar.told >= _LINE_SECONDS:
            self._line(bar)

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._active:
            print(text, file=sys.stderr, flush=True)

    def _line(self, bar: Bar) -> None:
        bar.told = time.monotonic()
        print(f"{bar.title}: {bar.summary()}", file=sys.stderr, flush=True)
