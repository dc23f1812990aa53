"""Independent pieces of work, here or in spawned processes that end with the main process and leave signals to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from typing import TypeVar

from bocage.shards.errors import InputError

Tick = Callable[[int, int], None]
"""What a piece of work calls now and then with two counts of its own, done since the last call; may raise to stop."""

HELD_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_RUN, _STOP, _DIE = 0, 1, 2

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class WorkerKilledError(InputError):
    """A process ended that did not end by itself."""


def results(
    work: Callable[[_Job, Tick], _Result], jobs: Iterable[_Job], workers: int, tick: Tick
) -> Generator[tuple[_Job, _Result], None, None]:
    """Each job with its result, as they come; in this process and in order when ``workers`` is 1.

    At most two jobs a worker are taken from ``jobs`` ahead of their results. An exception of a job is raised here.
    Closed early, it stops the work at its next tick.

    Args:
        work: a function of a module: processes import it. Given the job and what to call now and then.
        jobs: picklable.
        workers: processes.
        tick: called in this process with the sums of the counts; may raise to stop.

    Raises:
        WorkerKilledError: as its name says.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job, tick)
        return
    # Spawned, not forked: GDAL and other libraries do not survive a fork with their threads.
    context = multiprocessing.get_context("spawn")
    board = _Board(context, 2 * workers)
    waiting = iter(jobs)
    running: dict[Future[_Result], tuple[_Job, int]] = {}
    pool = ProcessPoolExecutor(workers, context, _start_worker, (board,))
    try:
        while True:
            while board.free and (following := next(waiting, None)) is not None:
                slot = board.free.pop()
                with signals_held():
                    running[pool.submit(_work, work, following, slot)] = (following, slot)
            if not running:
                return
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            tick(*board.news())
            for future in finished:
                job, slot = running.pop(future)
                board.free.append(slot)
                yield job, future.result()
    except BrokenProcessPool as error:
        board.order(_DIE)
        raise WorkerKilledError(
            "a worker process was killed, perhaps for want of memory; run the same command with fewer --workers"
        ) from error
    except BaseException:
        board.order(_STOP)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Board:
    """What workers tell the main process, and it them, in shared memory.

    Without a lock, since a worker that is killed while it holds one would stop all others: each job under way has a
    slot of its own that one worker writes.
    """

    def __init__(self, context: SpawnContext, slots: int) -> None:
        self._numbers = context.RawArray("q", 2 * slots + 1)  # both counts by slot, then the order
        self._seen = [0, 0]
        self.free = list(range(slots))

    def count(self, slot: int, first: int, second: int) -> None:
        self._numbers[2 * slot] += first
        self._numbers[2 * slot + 1] += second

    def news(self) -> tuple[int, int]:
        """The counts since the last call."""
        now = [sum(self._numbers[:-1:2]), sum(self._numbers[1:-1:2])]
        before, self._seen = self._seen, now
        return now[0] - before[0], now[1] - before[1]

    def order(self, what: int) -> None:
        self._numbers[-1] = what

    @property
    def ordered(self) -> int:
        return self._numbers[-1]


@contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and schedulers reach the whole process group, but the main process decides: workers start with the signals
    blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_board: _Board


class _StopError(Exception):
    """The main process wants no more results."""


def _start_worker(board: _Board) -> None:
    global _board
    _board = board
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever; one whose pool is broken, too, because it
    holds the signal that the pool ends it with."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive() and _board.ordered != _DIE:
        parent.join(0.5)
    os._exit(1)


def _work(work: Callable[[_Job, Tick], _Result], job: _Job, slot: int) -> _Result:
    def tick(first: int, second: int) -> None:
        _board.count(slot, first, second)
        if _board.ordered != _RUN:
            raise _StopError

    return work(job, tick)
