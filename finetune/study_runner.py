"""Runs the cells of a study: several at a time, each a process of its own, none twice, and one that fails alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue

import torch

from bocage.finetune.study import Cell, StudyConfig
from bocage.finetune.study_runs import CellFolders
from bocage.shards.errors import InputError

_GRACE = 60.0  # seconds that interrupted cells have to save a checkpoint

Act = Callable[[StudyConfig, str], int]
"""Runs the cell of a name; returns its exit status. A function of a module: other processes import it."""


@dataclass(frozen=True)
class Failure:
    """A cell that ended with an error: its status and the last line of its log."""

    cell: Cell
    status: int
    line: str


class Runner:
    """Runs cells as processes.

    Without a GPU they are forked from a process that has imported ``act``'s module, which spares each the seconds that
    PyTorch takes to import. A GPU's driver may not be forked once it has been asked anything, and nobody knows what
    libraries ask while they are imported: with one, every cell starts afresh.

    Args:
        folders: of the study.
        act: what runs a cell.
        processes: at a time.
    """

    def __init__(self, folders: CellFolders, act: Act, processes: int) -> None:
        self.folders, self.act, self.processes = folders, act, processes
        fresh = torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("spawn") if fresh else multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, act.__module__])
        self._start = context.Process
        self._running: set[BaseProcess] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._places: Queue[dict[str, str]] = Queue()
        for place in _places(processes):
            self._places.put(place)

    def run(self, cells: Sequence[Cell], done: Callable[[Cell, Failure | None], None]) -> list[Failure]:
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

    def _one(self, cell: Cell) -> Failure | None:
        log, place = self.folders.of(cell) / "log.txt", self._places.get()
        try:
            with self._lock:
                if self._stopping:
                    return None
                words = (self.act, self.folders.study, cell.name, log, {**os.environ, **place})
                process = self._start(target=_run, args=words)
                process.start()
                self._running.add(process)
            wait([process.sentinel])
            # Starting a process looks after all others, and only the first who asks is told how one has ended.
            with self._lock:
                process.join()
                self._running.discard(process)
        finally:
            self._places.put(place)
        status = process.exitcode or 0
        if self._stopping or (status == 0 and self.folders.finished(cell)):
            return None
        return Failure(cell, status, _last_line(log))

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for process in running:
            process.terminate()
        end = time.monotonic() + _GRACE
        for process in running:
            wait([process.sentinel], max(0.1, end - time.monotonic()))
            with self._lock:
                process.kill()  # of one that has ended it does nothing


def _run(act: Act, study: StudyConfig, name: str, log: Path, environment: dict[str, str]) -> None:
    """What a process does: run a cell in its environment, with a log for a terminal."""
    os.setsid()  # a terminal's Ctrl-C reaches it through the runner, once
    with log.open("ab") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    os.environ.clear()  # what a process is forked from may have started in another one
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # PyTorch has read the variable before
    try:
        sys.exit(act(study, name))
    except InputError as error:
        print(f"bocage: error: {error}", file=sys.stderr)
        sys.exit(2)


def _places(processes: int) -> list[dict[str, str]]:
    """For each process its part of the machine, as variables of the environment: threads, and one of the GPUs."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    found = []
    for number in range(processes):
        place = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        if devices:
            place["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        found.append(place)
    return found


def _last_line(path: Path) -> str:
    if not path.is_file():
        return "no output"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
