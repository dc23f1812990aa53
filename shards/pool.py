"""Independent pieces of work in spawned processes that end with the main process and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from bocage.shards.errors import InputError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class StopError(Exception):
    """The main process wants no more results: raised by ``check_stop`` in a worker."""


_stop: Any = None


def check_stop() -> None:
    """To be called now and then by work that takes long; raises ``StopError`` when it is in vain."""
    if _stop is not None and _stop.value:
        raise StopError


def results(
    work: Callable[[_Job], _Result], jobs: Iterable[_Job], workers: int
) -> Generator[tuple[_Job, _Result], None, None]:
    """Each job with its result, as they come; in this process and in order when ``workers`` is 1.

    At most two jobs a worker are taken from ``jobs`` ahead of their results. An exception of a job is raised here.

    Args:
        work: a function of a module: processes import it.
        jobs: picklable.
        workers: processes.

    Raises:
        InputError: a worker was killed.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job)
        return
    # Spawned, not forked: libraries with threads of their own do not survive a fork.
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)
    waiting = iter(jobs)
    running: dict[Future[_Result], _Job] = {}
    pool = ProcessPoolExecutor(workers, context, _start, (stop,))
    try:
        while True:
            for following in islice(waiting, 2 * workers - len(running)):
                with _signals_held():
                    running[pool.submit(work, following)] = following
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise InputError("a worker process was killed, perhaps for want of memory; use fewer --workers") from error
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C reaches the whole process group, but the main process decides: workers start with the signal blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(stop: Any) -> None:
    global _stop
    _stop = stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
