"""Launch the runs of a study: as parallel local processes, or as a SLURM array."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
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

from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.study_config import StudyConfig, StudyRun
from bocage.shards.errors import InputError
from bocage.shards.pool import STOP_SIGNALS, block_stop_signals

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 60.0  # time for interrupted runs to save a checkpoint

ExecuteRun = Callable[[StudyConfig, str], int]
"""Executes the run of a name and returns its exit status. It must be importable, since other processes call it."""


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        run: failed run.
        status: exit status of its process; negative for the signal that killed it.
        message: last line of its log.
    """

    run: StudyRun
    status: int
    message: str


class ParallelRunner:
    """Execute runs in separate processes, several at a time; a failed run does not stop the others.

    Without a GPU, processes are forked from a server that has already imported PyTorch, which saves seconds per run.
    A CUDA driver must not be forked once it is initialized, and an imported library may initialize it. With a GPU,
    every run is therefore spawned. Both methods import the main module of the program, so a script that runs studies
    needs ``if __name__ == "__main__"``, as with all of multiprocessing.

    Args:
        folders: folders of the study.
        execute: function that executes a run.
        processes: number of runs at a time.
    """

    def __init__(self, folders: RunFolders, execute: ExecuteRun, processes: int) -> None:
        self.folders, self.execute, self.processes = folders, execute, processes
        has_gpu = torch.cuda.is_available()
        self._context: SpawnContext | ForkServerContext = (
            multiprocessing.get_context("spawn") if has_gpu else multiprocessing.get_context("forkserver")
        )
        self._context.set_forkserver_preload([__name__, execute.__module__])
        self._running: set[int] = set()  # pidfds
        self._lock = threading.Lock()
        self._stopping = False
        self._free_slots: Queue[dict[str, str]] = Queue()
        for slot in _resource_slots(processes):
            self._free_slots.put(slot)

    def run(self, runs: Sequence[StudyRun], on_done: Callable[[StudyRun, Failure | None], None]) -> list[Failure]:
        """Execute the unfinished runs.

        When interrupted, it sends SIGTERM to the running ones so that they save a checkpoint, and starts no others.

        Args:
            runs: runs in the order of execution; finished ones are skipped.
            on_done: callback after each run, called in this thread.

        Returns:
            Failed runs.
        """
        for run in runs:  # prepare all runs before the first starts, so that invalid overrides fail at once
            self.folders.prepare(run)
        failures = []
        with ThreadPoolExecutor(self.processes) as pool:
            try:
                futures = {
                    pool.submit(self._execute_one, run): run for run in runs if not self.folders.is_finished(run)
                }
                for future in as_completed(futures):
                    failure = future.result()
                    if failure is not None:
                        failures.append(failure)
                    on_done(futures[future], failure)
            except BaseException:
                self._stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failures

    def _execute_one(self, run: StudyRun) -> Failure | None:
        log, slot = self.folders.path(run) / "log.txt", self._free_slots.get()
        pidfd: int | None = None
        try:
            with self._lock:
                if self._stopping:
                    return None
                arguments = (self.execute, self.folders.study, run.name, log, {**os.environ, **slot})
                process = self._context.Process(target=_process_main, args=arguments)
                resource_tracker.ensure_running()  # before signals are blocked, because it unblocks them
                try:
                    # A signal to the process group must not end the fork server or the runs.
                    with block_stop_signals(), _environment_variables(slot):
                        process.start()
                except (EOFError, OSError) as error:
                    return Failure(run, 1, f"its process could not be started: {error}")
                with suppress(ProcessLookupError):  # the process has already ended
                    # The sentinel of multiprocessing also fires when the fork server ends, so wait for the pidfd.
                    pidfd = os.pidfd_open(process.ident or 0)
                    self._running.add(pidfd)
            if pidfd is not None:
                wait([pidfd])
            # Starting a process polls all others, and only the first poll gets the exit status. Hence the lock.
            with self._lock:
                process.join()
                if pidfd is not None:
                    self._running.discard(pidfd)
                    os.close(pidfd)
        finally:
            self._free_slots.put(slot)
        status = process.exitcode or 0
        # multiprocessing reports 255 when the fork server ended before the process, since the status is then unknown.
        if self._stopping or (status in (0, 255) and self.folders.is_finished(run)):
            return None
        prefix = f"killed by signal {-status}, perhaps out of memory; last log line: " if status < 0 else ""
        return Failure(run, status, prefix + _last_line(log))

    def _stop(self) -> None:
        """Send SIGTERM to all running processes, wait for them, then send SIGKILL."""
        with self._lock:
            self._stopping = True
            self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            with self._lock:
                if not self._running:
                    return
            time.sleep(0.1)
        with self._lock:
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for pidfd in self._running:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)


@contextmanager
def _environment_variables(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables of this process temporarily."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _process_main(execute: ExecuteRun, study: StudyConfig, name: str, log: Path, environment: dict[str, str]) -> None:
    """Execute a run in a new process, with its own environment and log file."""
    os.setsid()  # signals to the terminal's or job's process group arrive once, through the parent
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.environ.clear()  # the fork server may have started with another environment
    os.environ.update(environment)
    torch.set_num_threads(_omp_threads(environment))  # PyTorch read the variable when the fork server imported it
    try:
        sys.exit(execute(study, name))
    except InputError as error:
        logger.error("error: %s", error)
        sys.exit(2)


def _resource_slots(processes: int) -> list[dict[str, str]]:
    """Divide the machine among processes: environment variables with the threads and the GPU of each."""
    threads = _omp_threads(os.environ) or max(1, len(os.sched_getaffinity(0)) // processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    slots = []
    for number in range(processes):
        slot = {"OMP_NUM_THREADS": str(threads)}
        if devices:
            slot["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        slots.append(slot)
    return slots


def _omp_threads(environment: Mapping[str, str]) -> int:
    """Parse ``OMP_NUM_THREADS`` like OpenMP: the first number of a list, 0 for anything else."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _last_line(path: Path) -> str:
    if not path.is_file():
        return "no output"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def slurm_script(
    folders: RunFolders, runs: Sequence[StudyRun], launcher: str, overrides: Sequence[str], options: Sequence[str]
) -> str:
    """Write a script for ``sbatch``: an array with one task per unfinished run.

    Args:
        folders: folders of the study.
        runs: runs of the study.
        launcher: command that starts bocage, e.g. ``bocage``, or ``accelerate launch -m bocage`` for several GPUs.
        overrides: arguments of ``bocage study run``: the recipe and its overrides.
        options: ``#SBATCH`` options, e.g. ``--gpus=1``.

    Returns:
        Text of the script.

    Raises:
        InputError: all runs are finished.
    """
    names = [run.name for run in runs if not folders.is_finished(run)]
    if not names:
        raise InputError(f"{folders.root}: all runs are finished; `bocage study report` shows their scores")
    lines = ["#!/bin/bash", f"#SBATCH --array=0-{len(names) - 1}", "#SBATCH --job-name=bocage-study"]
    lines += [f"#SBATCH {option}" for option in options]
    # The script contains the names, so that a task's run does not depend on which runs have finished meanwhile.
    lines += ["set -euo pipefail", "runs=(", *(f"  {shlex.quote(name)}" for name in names), ")"]
    # Since SLURM 22.05 srun ignores sbatch's --cpus-per-task: DataLoader workers and trainer would share one core.
    lines.append('export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"')
    lines.append(f'srun {launcher} study run {shlex.join(overrides)} "--run=${{runs[$SLURM_ARRAY_TASK_ID]}}"')
    return "\n".join(lines) + "\n"
