"""Runs the cells of a study: several at a time, each a process of its own, none twice, and one that fails alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from queue import Queue

import torch

from bocage.finetune.study.study_config import StudyConfig, StudyRun
from bocage.finetune.study.run_folders import RunFolders
from bocage.shards.errors import InputError
from bocage.shards.pool import STOP_SIGNALS, block_stop_signals

_GRACE = 60.0  # seconds that interrupted cells have to save a checkpoint

ExecuteRun = Callable[[StudyConfig, str], int]
"""Runs the cell of a name; returns its exit status. A function of a module: other processes import it."""


@dataclass(frozen=True)
class Failure:
    """A cell that ended with an error: its status and the last line of its log."""

    cell: StudyRun
    status: int
    line: str


class ParallelRunner:
    """Runs cells as processes.

    Without a GPU they are forked from a process that has imported ``act``'s module, which spares each the seconds that
    PyTorch takes to import. A GPU's driver may not be forked once it has been asked anything, and nobody knows what
    libraries ask while they are imported: with one, every cell starts afresh. Either way they import the program's
    main module: a script that runs studies needs its ``if __name__ == "__main__"``, as for all of multiprocessing.

    Args:
        folders: of the study.
        act: what runs a cell.
        processes: at a time.
    """

    def __init__(self, folders: RunFolders, act: ExecuteRun, processes: int) -> None:
        self.folders, self.act, self.processes = folders, act, processes
        fresh = torch.cuda.is_available()
        self._context: SpawnContext | ForkServerContext = (
            multiprocessing.get_context("spawn") if fresh else multiprocessing.get_context("forkserver")
        )
        self._context.set_forkserver_preload([__name__, act.__module__])
        self._running: set[int] = set()  # file descriptors of processes
        self._lock = threading.Lock()
        self._stopping = False
        self._places: Queue[dict[str, str]] = Queue()
        for place in _places(processes):
            self._places.put(place)

    def run(self, cells: Sequence[StudyRun], done: Callable[[StudyRun, Failure | None], None]) -> list[Failure]:
        """Run those of the cells that are not finished.

        Interrupted, it lets running cells save a checkpoint, and starts no other.

        Args:
            cells: in this order.
            done: called in this thread after each.

        Returns:
            The cells that failed.
        """
        for cell in cells:  # all of them before the first: a wrong word is found at once
            self.folders.prepare(cell)
        failures = []
        with ThreadPoolExecutor(self.processes) as pool:
            try:
                futures = {pool.submit(self._one, cell): cell for cell in cells if not self.folders.finished(cell)}
                for future in as_completed(futures):
                    failure = future.result()
                    if failure is not None:
                        failures.append(failure)
                    done(futures[future], failure)
            except BaseException:
                self._stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failures

    def _one(self, cell: StudyRun) -> Failure | None:
        log, place = self.folders.of(cell) / "log.txt", self._places.get()
        handle: int | None = None
        try:
            with self._lock:
                if self._stopping:
                    return None
                words = (self.act, self.folders.study, cell.name, log, {**os.environ, **place})
                process = self._context.Process(target=_run, args=words)
                resource_tracker.ensure_running()  # not below: it lets signals through again
                try:
                    # A signal to all processes of a job must end neither the one that cells are forked from nor these.
                    with block_stop_signals(), _environment(place):
                        process.start()
                except (EOFError, OSError) as error:
                    return Failure(cell, 1, f"its process could not be started: {error}")
                with suppress(ProcessLookupError):  # it has ended already
                    # The process itself: what multiprocessing waits for also ends with the one it was forked from.
                    handle = os.pidfd_open(process.ident or 0)
                    self._running.add(handle)
            if handle is not None:
                wait([handle])
            # Starting a process looks after all others, and only the first who asks is told how one has ended.
            with self._lock:
                process.join()
                if handle is not None:
                    self._running.discard(handle)
                    os.close(handle)
        finally:
            self._places.put(place)
        status = process.exitcode or 0
        # Where what it was forked from has ended before it, nobody knows its status, and multiprocessing says 255.
        if self._stopping or (status in (0, 255) and self.folders.finished(cell)):
            return None
        killed = f"killed by signal {-status}, perhaps for want of memory; last said: " if status < 0 else ""
        return Failure(cell, status, killed + _last_line(log))

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._signal(signal.SIGTERM)
        end = time.monotonic() + _GRACE
        while time.monotonic() < end:
            with self._lock:
                if not self._running:
                    return
            time.sleep(0.1)
        with self._lock:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for handle in self._running:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)


@contextmanager
def _environment(place: dict[str, str]) -> Iterator[None]:
    """Variables of this process's environment for a while."""
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(act: ExecuteRun, study: StudyConfig, name: str, log: Path, environment: dict[str, str]) -> None:
    """What a process does: run a cell in its environment, with a log for a terminal."""
    os.setsid()  # signals to all processes of a terminal or job reach it through the runner, once
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.environ.clear()  # what a process is forked from may have started in another one
    os.environ.update(environment)
    torch.set_num_threads(_threads(environment))  # PyTorch has read the variable before
    try:
        sys.exit(act(study, name))
    except InputError as error:
        print(f"bocage: error: {error}", file=sys.stderr)
        sys.exit(2)


def _places(processes: int) -> list[dict[str, str]]:
    """For each process its part of the machine, as variables of the environment: threads, and one of the GPUs."""
    threads = _threads(os.environ) or max(1, len(os.sched_getaffinity(0)) // processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    found = []
    for number in range(processes):
        place = {"OMP_NUM_THREADS": str(threads)}
        if devices:
            place["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        found.append(place)
    return found


def _threads(environment: Mapping[str, str]) -> int:
    """``OMP_NUM_THREADS``, of several numbers the first, or 0: like OpenMP, it heeds no other words."""
    word = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(word) if word.isdecimal() else 0


def _last_line(path: Path) -> str:
    if not path.is_file():
        return "no output"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
