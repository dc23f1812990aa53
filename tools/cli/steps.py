"""Run bocage's commands one after another for demonstrations, and print each as a user would type it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import ProgressBar, ProgressBars


@dataclass(frozen=True)
class TrainingProcess:
    """One of several training runs in parallel processes.

    Attributes:
        title: title of its progress bar.
        shown: command that a user would type in place of ``module``.
        module: module that Python runs, followed by leading arguments.
        arguments: command-line arguments.
        output: output folder of the run; the log file lies beside it.
        finished: file in ``output`` that the run writes last.
        steps: number of training steps.
    """

    title: str
    shown: str
    module: tuple[str, ...]
    arguments: tuple[str, ...]
    output: Path
    finished: str
    steps: int

    @property
    def log(self) -> Path:
        """Log file with the output of the process."""
        return self.output.with_name(f"{self.output.name}.log")

    def check(self) -> None:
        """Check that the output folder does not hold a run with other arguments.

        Raises:
            InputError: the folder holds a run with other arguments.
        """
        if self._command.exists() and self._command.read_text(encoding="utf-8") != shlex.join(self.arguments) + "\n":
            raise InputError(f"{self.output} holds another run, see {self._command}: delete it or give another folder")

    def record_command(self) -> None:
        """Write the command line to a file beside the output folder."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._command) as path:
            path.write_text(shlex.join(self.arguments) + "\n", encoding="utf-8")

    @property
    def _command(self) -> Path:
        return self.output.with_name(f"{self.output.name}.command")

    def last_step(self) -> int:
        """Return the last step in ``metrics.jsonl``, 0 before the first."""
        path = self.output / "metrics.jsonl"
        # The last line may be incomplete.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0


class DemoSteps:
    """Runs the steps of a demonstration and prints them.

    Args:
        console: console to print to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()
        # One thread per process: the processes already fill the cores.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def announce(self, title: str) -> None:
        """Print the title of a step and the seconds since the start."""
        self.console.rule(f"[bold]{title}[/bold]  ({time.monotonic() - self._began:.0f} s)", align="left")

    def print_command(self, shown: str, arguments: Sequence[Any]) -> None:
        """Print a command."""
        self.console.print(f"$ {shown} {shlex.join(map(str, arguments))}", style="dim", soft_wrap=True, markup=False)

    def command(self, shown: str, module: str | Sequence[Any], arguments: Sequence[Any]) -> None:
        """Run a module and wait for it.

        Args:
            shown: command that a user would type in place of ``module``.
            module: module that Python runs, or the module and leading arguments.
            arguments: command-line arguments.

        Raises:
            InputError: the module ended with a non-zero status.
        """
        self.print_command(shown, arguments)
        modules = [module] if isinstance(module, str) else module
        child = subprocess.Popen([sys.executable, "-m", *map(str, modules), *map(str, arguments)], env=self.environment)
        try:
            status = child.wait()
        except BaseException:
            _terminate([child])
            raise
        if status:
            raise InputError(f"the step above ended with status {status}; fix its cause and run the same command again")

    def side_by_side(self, jobs: Sequence[TrainingProcess], processes: int) -> None:
        """Run the unfinished jobs, ``processes`` at a time, with a progress bar each.

        Raises:
            InputError: a job failed; the others are stopped, and resume the next time.
        """
        for job in jobs:
            job.check()
        waiting = [job for job in jobs if not (job.output / job.finished).exists()]
        for job in waiting:
            self.print_command(job.shown, job.arguments)
        active: dict[TrainingProcess, tuple[subprocess.Popen[bytes], ProgressBar]] = {}
        with ProgressBars() as bars:
            try:
                while waiting or active:
                    while waiting and len(active) < processes:
                        job = waiting.pop(0)
                        job.record_command()
                        line = [sys.executable, "-m", *job.module, *job.arguments]
                        with job.log.open("ab") as output:
                            child = subprocess.Popen(line, env=self.environment, stdout=output, stderr=output)
                        active[job] = (child, bars.add(job.title, "steps", job.steps))
                    time.sleep(0.5)
                    for job, (child, bar) in list(active.items()):
                        bar.update(job.last_step())
                        if child.poll() is not None:
                            del active[job]
                            if child.returncode:
                                raise InputError(f"{job.title} ended with status {child.returncode}: see {job.log}")
            finally:
                _terminate([child for child, _ in active.values()])


def _terminate(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send SIGTERM to child processes and wait until they have saved and ended."""
    for child in children:
        child.terminate()
    for child in children:
        child.wait()


def interruptible(steps: Callable[[], int]) -> int:
    """Run ``steps`` and return the exit status; on a signal, child processes save first."""
    try:
        with Interrupts():
            return steps()
    except InterruptedCommand as interruption:
        print(f"\nbocage: stopped; run the same command to resume ({interruption.name})")
        return interruption.exit_code
