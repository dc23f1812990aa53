"""Runs bocage's own commands one after another, as a user would type them, and says which and since when."""

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
from bocage.shards.files import written_atomically
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import Bar, Bars


@dataclass(frozen=True)
class TrainingProcess:
    """A training that runs beside others.

    Attributes:
        title: for its bar.
        shown: what a user would type in place of ``module``.
        module: what Python runs, with words before the job's own.
        words: of its command line.
        output: its folder; its log lies beside it.
        finished: the file that it leaves last, in ``output``.
        steps: of the training.
    """

    title: str
    shown: str
    module: tuple[str, ...]
    words: tuple[str, ...]
    output: Path
    finished: str
    steps: int

    @property
    def log(self) -> Path:
        """What it says."""
        return self.output.with_name(f"{self.output.name}.log")

    def check(self) -> None:
        """Raise ``InputError`` where its folder is that of other words."""
        if self._command.exists() and self._command.read_text(encoding="utf-8") != shlex.join(self.words) + "\n":
            raise InputError(f"{self.output} holds another run, see {self._command}: delete it or give another folder")

    def claim(self) -> None:
        """Say beside its folder whose it is."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(self._command) as path:
            path.write_text(shlex.join(self.words) + "\n", encoding="utf-8")

    @property
    def _command(self) -> Path:
        return self.output.with_name(f"{self.output.name}.words")

    def last_step(self) -> int:
        """The newest step recorded in its ``metrics.jsonl``; 0 before there is one."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last may be half there
        return int(json.loads(lines[-1])["step"]) if lines else 0


class Steps:
    """Steps of a demonstration.

    Args:
        console: where they are told.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()
        # One thread a process: the processes already fill the cores.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def announce(self, title: str) -> None:
        """Begin a step; tells the time since the start."""
        self.console.rule(f"[bold]{title}[/bold]  ({time.monotonic() - self._began:.0f} s)", align="left")

    def say(self, shown: str, words: Sequence[Any]) -> None:
        """Print a command."""
        self.console.print(f"$ {shown} {shlex.join(map(str, words))}", style="dim", soft_wrap=True, markup=False)

    def command(self, shown: str, module: str | Sequence[Any], words: Sequence[Any]) -> None:
        """Run a module to its end; ``shown`` is what a user would type in its place.

        Raises:
            InputError: it failed.
        """
        self.say(shown, words)
        modules = [module] if isinstance(module, str) else module
        child = subprocess.Popen([sys.executable, "-m", *map(str, modules), *map(str, words)], env=self.environment)
        try:
            status = child.wait()
        except BaseException:
            _ended([child])
            raise
        if status:
            raise InputError(f"the step above ended with status {status}; mend its cause and run the same again")

    def side_by_side(self, jobs: Sequence[TrainingProcess], processes: int) -> None:
        """Run those of the jobs that are not finished, ``processes`` at a time, with a bar each.

        Raises:
            InputError: one failed; the others are stopped, and go on the next time.
        """
        for job in jobs:
            job.check()
        waiting = [job for job in jobs if not (job.output / job.finished).exists()]
        for job in waiting:
            self.say(job.shown, job.words)
        active: dict[TrainingProcess, tuple[subprocess.Popen[bytes], Bar]] = {}
        with Bars() as bars:
            try:
                while waiting or active:
                    while waiting and len(active) < processes:
                        job = waiting.pop(0)
                        job.claim()
                        line = [sys.executable, "-m", *job.module, *job.words]
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
                _ended([child for child, _ in active.values()])


def _ended(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask children to end, and wait until they have saved what they are doing."""
    for child in children:
        child.terminate()
    for child in children:
        child.wait()


def interruptible(steps: Callable[[], int]) -> int:
    """Run steps; when a signal stops them, their children save first, and the status is that of the signal."""
    try:
        with Interrupts():
            return steps()
    except InterruptedCommand as interruption:
        print(f"\nbocage: stopped; the same command goes on with what is missing ({interruption.name})")
        return interruption.exit_code
