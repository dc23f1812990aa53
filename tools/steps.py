"""Runs bocage's own commands one after another, as a user would type them, and says which and since when."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bocage.shards.errors import InputError


@dataclass(frozen=True)
class Job:
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
        line = [sys.executable, "-m", *map(str, modules), *map(str, words)]
        if status := subprocess.run(line, env=self.environment, check=False).returncode:
            raise InputError(f"the step above ended with status {status}; mend its cause and run the same again")

    def side_by_side(self, jobs: Sequence[Job], processes: int) -> None:
        """Run those of the jobs that are not finished, ``processes`` at a time, with a bar each.

        Raises:
            InputError: one failed; the others are stopped, and go on the next time.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        waiting = [job for job in jobs if not (job.output / job.finished).exists()]
        for job in waiting:
            self.say(job.shown, job.words)
        active: dict[Job, tuple[subprocess.Popen[bytes], TaskID]] = {}
        with Progress(*columns, console=self.console) as progress:
            try:
                while waiting or active:
                    while waiting and len(active) < processes:
                        job = waiting.pop(0)
                        job.log.parent.mkdir(parents=True, exist_ok=True)
                        line = [sys.executable, "-m", *job.module, *job.words]
                        with job.log.open("ab") as output:
                            child = subprocess.Popen(line, env=self.environment, stdout=output, stderr=output)
                        active[job] = (child, progress.add_task(job.title, total=job.steps))
                    time.sleep(0.5)
                    for job, (child, bar) in list(active.items()):
                        progress.update(bar, completed=job.last_step())
                        if child.poll() is not None:
                            del active[job]
                            if child.returncode:
                                raise InputError(f"{job.title} ended with status {child.returncode}: see {job.log}")
            finally:
                for child, _ in active.values():
                    child.terminate()
                for child, _ in active.values():
                    child.wait()
