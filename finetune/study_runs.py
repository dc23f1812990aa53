"""Runs the cells of a study: several at a time, each a process of its own, none twice, and one that fails alone.

A cell is finished when its folder has its scores; a killed one goes on from its last checkpoint. ``cell.json``
beside it says which configuration it has, so that a folder is never taken for the result of another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from bocage.finetune.probing import CELL, KINDS
from bocage.finetune.study import Cell, StudyConfig, cell_config, cells, described, differing
from bocage.finetune.train import build_task
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.manifest import Manifest
from bocage.shards.modality import PATCH_SIZE
from bocage.shards.remote import open_shards

_GRACE = 60.0  # seconds that interrupted cells have to save a checkpoint
_SECONDS = "seconds.txt"
_BULKY = ("checkpoints", "model", "predictions", "pictures")


@dataclass(frozen=True)
class Failure:
    """A cell that ended with an error: its status and the last line of its log."""

    cell: Cell
    status: int
    line: str


class CellFolders:
    """Where the cells of a study lie, and which are done.

    Args:
        study: the study.

    Raises:
        InputError: the study has no output folder.
    """

    def __init__(self, study: StudyConfig) -> None:
        if not study.output:
            raise InputError("output=PATH is missing: give a folder for the study")
        self.study, self.root = study, Path(study.output)

    @property
    def features(self) -> Path:
        """Where features of probes are kept."""
        return self.root / "features"

    def of(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.root / "cells" / cell.name

    def finished(self, cell: Cell) -> bool:
        """Whether a cell has its scores, and those without sensors where the study wants them."""
        wanted = ["metrics.json"]
        if self.study.missing and cell.mode not in KINDS:
            wanted.append("missing.json")
        return all((self.of(cell) / name).is_file() for name in wanted)

    def add_seconds(self, cell: Cell, seconds: float) -> None:
        """Add to the time that a cell has taken."""
        path = self.of(cell) / _SECONDS
        with written_atomically(path) as temporary:
            temporary.write_text(f"{self.seconds(cell) + seconds:.1f}\n", encoding="utf-8")

    def seconds(self, cell: Cell) -> float:
        """The time that a cell has taken, restarts included; what a process that was killed did is not in it."""
        path = self.of(cell) / _SECONDS
        return float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0

    @cached_property
    def manifest(self) -> Manifest:
        """The shards, open."""
        first = next(iter(cells(self.study)))
        return open_shards(self.study.shards, cell_config(self.study, first, "").cache)

    def identity(self, cell: Cell) -> dict[str, Any]:
        """What decides the scores of a cell: its configuration, the shards, and the weights that it starts from.

        Of sources that are no folders, as ``hf:org/name``, only the name is known: give a revision.
        """
        return {
            "mode": cell.mode,
            "start": cell.start,
            "missing": self.study.missing and cell.mode not in KINDS,
            "shards": self.manifest.digest,
            "encoders": {name: _weights(source) for name, source in self.study.starts[cell.start].items()},
            "config": described(cell_config(self.study, cell, "")),
        }

    def feature_bytes(self) -> int:
        """What features of all patches by all encoders with a source would take."""
        first = next(iter(cells(self.study)))
        encoders = build_task(replace(cell_config(self.study, first, ""), encoders={}), self.manifest).model.encoders
        width = {name: sum(encoder.widths) for name, encoder in encoders.items()}  # type: ignore[arg-type]
        known = sum(width.get(name, 0) for sources in self.study.starts.values() for name in sources)
        return 2 * known * round(PATCH_SIZE / CELL) ** 2 * len(self.manifest)

    def prepare(self, cell: Cell) -> None:
        """Write ``cell.json``.

        Raises:
            InputError: the folder is that of another configuration, other shards or other weights.
        """
        folder, wanted = self.of(cell), self.identity(cell)
        path = folder / "cell.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            # The place of weights may change, what they are may not.
            found_config, wanted_config = ({**item["config"], "encoders": {}} for item in (found, wanted))
            other = [key for key in wanted if key != "config" and found.get(key) != wanted[key]]
            if keys := [*other, *differing(found_config, wanted_config)]:
                raise InputError(
                    f"{folder} is a cell of another study ({', '.join(keys)} differ): give another output, or delete "
                    "its folder to run it again"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        with written_atomically(path, contested=True) as temporary:  # ranks of one cell write the same
            temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")

    def check(self) -> None:
        """Build the model of every start, as its runs will: whatever is wrong with words or encoders is found here.

        Raises:
            InputError: what the runs would end with.
        """
        seen: set[str] = set()
        for cell in cells(self.study):
            config = cell_config(self.study, cell, "")
            if cell.start not in seen:
                seen.add(cell.start)
                build_task(config, self.manifest)

    def tidy(self, cell: Cell) -> None:
        """Delete what a finished cell need not keep."""
        if not self.study.keep_models:
            for name in _BULKY:
                shutil.rmtree(self.of(cell) / name, ignore_errors=True)


@cache
def _weights(source: str) -> str:
    """SHA-256 of the weights in a folder; of other sources their name."""
    path = Path(source) / "model.safetensors"
    if not path.is_file():
        return source
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Runner:
    """Runs cells as processes.

    Args:
        folders: of the study.
        command: words after the Python interpreter that run a cell; ``--cell=NAME`` is added.
        processes: at a time.
    """

    def __init__(self, folders: CellFolders, command: Sequence[str], processes: int) -> None:
        self.folders, self.command, self.processes = folders, list(command), processes
        self._running: set[subprocess.Popen[bytes]] = set()
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
                with log.open("ab") as output:
                    process = subprocess.Popen(
                        [sys.executable, *self.command, f"--cell={cell.name}"],
                        stdout=output,
                        stderr=output,
                        env={**os.environ, **place},
                        start_new_session=True,  # a terminal's Ctrl-C reaches it through us, once
                    )
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        finally:
            self._places.put(place)
        if self._stopping or (status == 0 and self.folders.finished(cell)):
            return None
        return Failure(cell, status, _last_line(log))

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for process in running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


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
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def slurm_script(
    folders: CellFolders, cells: Sequence[Cell], launcher: str, words: Sequence[str], options: Sequence[str]
) -> str:
    """A script for ``sbatch`` whose array runs the cells that are not finished, a task each.

    Args:
        folders: of the study.
        cells: of the study.
        launcher: what starts bocage, e.g. ``bocage``, or ``accelerate launch -m bocage.tools.main`` for several GPUs.
        words: those of ``bocage study run`` that name the study.
        options: of ``#SBATCH``, e.g. ``--gpus=1``.

    Raises:
        InputError: all cells are finished.
    """
    names = [cell.name for cell in cells if not folders.finished(cell)]
    if not names:
        raise InputError(f"{folders.root}: all cells are finished; `bocage study report` tells what they scored")
    lines = ["#!/bin/bash", f"#SBATCH --array=0-{len(names) - 1}", "#SBATCH --job-name=bocage-study"]
    lines += [f"#SBATCH {option}" for option in options]
    # The names are in the script, so that a task means the same cell whatever has finished since.
    lines += ["set -euo pipefail", "cells=(", *(f"  {shlex.quote(name)}" for name in names), ")"]
    lines.append(f'srun {launcher} study run {shlex.join(words)} "--cell=${{cells[$SLURM_ARRAY_TASK_ID]}}"')
    return "\n".join(lines) + "\n"
