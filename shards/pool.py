"""Run independent tasks in this process or in a pool of spawned processes, with progress and safe shutdown."""

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

ProgressCallback = Callable[[int, int], None]
"""Callback for the increments of two counts, which a task calls regularly. It may raise to stop the task."""

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_RUN, _STOP, _EXIT = 0, 1, 2  # commands of the main process to its workers

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class WorkerKilledError(InputError):
    """A worker process was killed."""


def run_in_pool(
    function: Callable[[_Task, ProgressCallback], _Result],
    tasks: Iterable[_Task],
    workers: int,
    on_progress: ProgressCallback,
) -> Generator[tuple[_Task, _Result], None, None]:
    """Run a function on each task, and yield (task, result) in order of completion.

    With ``workers=1``, tasks run in this process, in order. At most two tasks per worker are taken from ``tasks``
    before their results are yielded. An exception of a task is raised here. Closing the generator stops the running
    tasks at their next progress call.

    Args:
        function: module-level function, which worker processes import. Its arguments are a task and the progress
            callback.
        tasks: picklable tasks.
        workers: number of processes.
        on_progress: callback that is called in this process with the summed increments of all workers. It may raise to
            stop.

    Raises:
        WorkerKilledError: a worker process was killed.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task, on_progress)
        return
    # Spawn instead of fork: GDAL and other libraries with threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    shared = _SharedState(context, 2 * workers)
    pending = iter(tasks)
    running: dict[Future[_Result], tuple[_Task, int]] = {}
    pool = ProcessPoolExecutor(workers, context, _start_worker, (shared,))
    try:
        while True:
            while shared.free_slots and (next_task := next(pending, None)) is not None:
                slot = shared.free_slots.pop()
                with block_stop_signals():
                    running[pool.submit(_run_task, function, next_task, slot)] = (next_task, slot)
            if not running:
                return
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            on_progress(*shared.new_counts())
            for future in finished:
                task, slot = running.pop(future)
                shared.free_slots.append(slot)
                yield task, future.result()
    except BrokenProcessPool as error:
        shared.send(_EXIT)
        raise WorkerKilledError(
            "a worker process was killed, perhaps for lack of memory; run the same command with fewer --workers"
        ) from error
    except BaseException:
        shared.send(_STOP)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _SharedState:
    """Progress counts of the workers and the command of the main process, in shared memory.

    There is no lock, because a worker that is killed while it holds one would block all others. Instead, each running
    task has its own slot, which only one worker writes.
    """

    def __init__(self, context: SpawnContext, slots: int) -> None:
        self._numbers = context.RawArray("q", 2 * slots + 1)  # two counts per slot, then the command
        self._previous = [0, 0]
        self.free_slots = list(range(slots))

    def add(self, slot: int, first: int, second: int) -> None:
        """Add to both counts of a slot."""
        self._numbers[2 * slot] += first
        self._numbers[2 * slot + 1] += second

    def new_counts(self) -> tuple[int, int]:
        """Increments of both counts, summed over the slots, since the last call."""
        current = [sum(self._numbers[:-1:2]), sum(self._numbers[1:-1:2])]
        previous, self._previous = self._previous, current
        return current[0] - previous[0], current[1] - previous[1]

    def send(self, command: int) -> None:
        """Send a command to all workers."""
        self._numbers[-1] = command

    @property
    def command(self) -> int:
        """Last command of the main process."""
        return self._numbers[-1]


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block SIGINT and SIGTERM, so that processes started in the block inherit the mask.

    Ctrl-C and schedulers signal the whole process group. Workers ignore the signals, and the main process stops them.
    """
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


_shared: _SharedState  # in a worker process


class _StopError(Exception):
    """The main process needs no more results."""


def _start_worker(shared: _SharedState) -> None:
    global _shared
    _shared = shared
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the main process dies or sends ``_EXIT``.

    Without this thread, a worker whose main process was killed would wait for tasks forever. A worker of a broken pool
    would not end either, because it blocks the signal that the pool ends it with.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive() and _shared.command != _EXIT:
        parent.join(0.5)
    os._exit(1)


def _run_task(function: Callable[[_Task, ProgressCallback], _Result], task: _Task, slot: int) -> _Result:
    def on_progress(first: int, second: int) -> None:
        _shared.add(slot, first, second)
        if _shared.command != _RUN:
            raise _StopError

    return function(task, on_progress)
