"""What a run tells: a metrics file always, a progress bar or plain lines, and W&B or TensorBoard on request."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from matplotlib import image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.ssl.engine.health.collapse import LEAST_VECTORS, MOST_VECTORS, feature_std, rankme
from bocage.ssl.engine.logging.trackers import TrackerName, finish, link, start_tracker
from bocage.ssl.engine.parallel.distributed import all_gather_object, broadcast_object, is_main

_EVALUATIONS_SHOWN = 6
_BAR = 12  # characters
# What the loop records itself; other names without a slash are terms of the task's loss.
_ENGINE = {
    "loss",
    "gradient_norm",
    "learning_rate",
    "skipped_steps",
    "samples_per_second",
    "step_seconds",
    "data_wait",
    "memory_gb",
    "tflops",
    "mfu",
}


class MetricWindow:
    """Sums of what a task logged since the last record, kept on the device so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._seconds = self._waited = 0.0
        self._samples = self._steps = 0

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add one-element tensors; a name may be missing from some steps or ranks and is averaged over the rest.

        Of feature vectors (N, C), for ``collapse``, the first ``MOST_VECTORS`` or a few more are kept.
        """
        for name, value in values.items():
            if value.ndim == 2:
                kept = self._vectors.get(name, value[:0].detach())
                if len(kept) < MOST_VECTORS:
                    self._vectors[name] = torch.cat([kept, value.detach()])
                continue
            value = value.detach().float().reshape(())
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_step(self, samples: int, seconds: float, waited: float) -> None:
        """Count one step of this rank: samples seen, wall time, and how much of it was spent waiting for data."""
        self._steps += 1
        self._samples += samples
        self._seconds += seconds
        self._waited += waited

    def state(self) -> dict[str, Any]:
        """The window for a checkpoint; ``from_state`` reads it back."""
        return {
            "vectors": {name: value.cpu() for name, value in self._vectors.items()} if is_main() else {},
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "counts": dict(self._counts),
            "times": [self._seconds, self._waited],
            "steps": [self._samples, self._steps],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> MetricWindow:
        """The window that ``state`` described, on ``device``."""
        window = cls()
        window._sums = {name: value.to(device) for name, value in state["sums"].items()}
        window._vectors = {name: value.to(device) for name, value in state.get("vectors", {}).items()}
        window._counts = dict(state["counts"])
        window._seconds, window._waited = state["times"]
        window._samples, window._steps = state["steps"]
        return window

    def averages(self) -> dict[str, float]:
        """Means over the window and all ranks (a collective call), with throughput; empty without any step.

        Spread and effective rank are of rank 0's feature vectors, where there are ``LEAST_VECTORS`` of an encoder.
        """
        names = list(self._sums)
        values = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        sums = dict(zip(names, values, strict=True))
        ranks = all_gather_object((sums, self._counts, self._samples, memory_in_use(), self._seconds, self._waited))
        averages = {}
        for name in sorted({name for rank_sums, *_ in ranks for name in rank_sums}):
            total = sum(rank_sums.get(name, 0.0) for rank_sums, *_ in ranks)
            averages[name] = total / sum(counts.get(name, 0) for _, counts, *_ in ranks)
        if self._steps:
            seconds = max(1e-9, *(rank_seconds for *_, rank_seconds, _ in ranks))
            averages["samples_per_second"] = sum(samples for _, _, samples, *_ in ranks) / seconds
            averages["step_seconds"] = seconds / self._steps
            averages["data_wait"] = max(waited for *_, waited in ranks) / seconds
            averages["memory_gb"] = max(memory for *_, memory, _, _ in ranks)
        spread: dict[str, float] = {}
        for name, vectors in self._vectors.items() if is_main() else ():
            if len(vectors) >= LEAST_VECTORS:
                spread |= {f"feature_std/{name}": feature_std(vectors), f"rankme/{name}": rankme(vectors)}
        averages.update(broadcast_object(spread))
        return averages


def memory_in_use() -> float:
    """GB of this rank: the most its accelerator ever held, without one what the process has now."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


class RunLogger:
    """Everything rank 0 writes about a run; on other ranks every method does nothing.

    ``metrics.jsonl`` in the output folder has one line a recorded step, ``{"step": 20, "loss": 0.61, ...}``; values
    that are not finite are null. The progress bar is drawn when stderr is a terminal; otherwise each record is one
    plain line.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path,
        *,
        steps: int,
        step: int,
        reported_step: int,
        tracker: TrackerName,
        project: str,
        run: str,
        config: Mapping[str, Any],
    ) -> None:
        """Open the journal of a run that continues after ``step``: records later than ``reported_step`` are dropped.

        Raises:
            InputError: the output folder cannot be written.
        """
        self._active = accelerator.is_main_process
        self._accelerator = accelerator
        self._steps = steps
        self._bar: Progress | None = None
        self._file: TextIO | None = None
        if not self._active:
            return
        path = output / "metrics.jsonl"
        try:
            output.mkdir(parents=True, exist_ok=True)
            _drop_records_after(path, reported_step)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InputError(f"output folder {output} cannot be written: {error}") from error
        told = ""
        if tracker != "none":
            told = start_tracker(accelerator, tracker, output, project, run, config, reported_step)
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step", table_column=Column(no_wrap=True)),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)),
                BarColumn(bar_width=_BAR, table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
                # Only this one gives way where the terminal is narrow.
                TextColumn("{task.fields[summary]}", markup=False, table_column=Column(overflow="ellipsis")),
                console=Console(stderr=True),
            )
            self._room = max(10, self._bar.console.width - len("step") - 2 * len(str(steps)) - 1 - _BAR - 7 - 4)
            self._task = self._bar.add_task("train", total=steps, completed=step, summary="")
            self._bar.start()
        if told:
            self.message(told)

    def step(self, step: int) -> None:
        """Show that ``step`` optimiser steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the metrics of ``step`` everywhere.

        Raises:
            InputError: the metrics file cannot be written.
        """
        if self._file is None:
            return
        with self._disk_faults():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, summary=_shortened(_summary(values), self._room))
        else:
            seconds = values.get("step_seconds")
            left = f"  left {_duration((self._steps - step) * seconds)}" if seconds else ""
            print(f"step {step}/{self._steps}  {_summary(values)}{left}", file=sys.stderr, flush=True)

    def pictures(self, step: int, paths: Mapping[str, Path]) -> None:
        """Show pictures (PNG) of ``step`` by name in the tracker; they are on disk already."""
        for tracker in self._accelerator.trackers if self._active and paths else ():
            shown = {name: np.uint8(255 * image.imread(path)[None, :, :, :3]) for name, path in paths.items()}
            tracker.log_images(shown, step=step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))

    def link(self, step: int, name: str, path: Path) -> None:
        """Say in the tracker where something of the run lies since ``step``."""
        link(self._accelerator.trackers if self._active else (), step, name, str(path.resolve()))

    def message(self, text: str) -> None:
        """One line for the user on stderr."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(f"bocage: {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"bocage: {text}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Put the metrics file on disk: a checkpoint must not be ahead of it."""
        if self._file is not None:
            with self._disk_faults():
                os.fsync(self._file.fileno())

    @contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            assert self._file is not None
            name = self._file.name
            with suppress(OSError):  # what could not be written is given up with it
                self._file.close()
            self._file = None
            raise InputError(
                f"{name} cannot be written: {error.strerror}; free or change the disk, then run the same command again"
            ) from error

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the bar, the file and the tracker, which learns whether the run failed."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._active:
            finish(self._accelerator.trackers, failed=kind is not None)


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity: such values become None."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _drop_records_after(path: Path, step: int) -> None:
    """Keep the whole lines of a metrics file that belong to steps up to ``step``; replaced atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the half line of a killed process
            continue
    with written_atomically(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def terms_of(values: Mapping[str, float | None]) -> list[str]:
    """Those of the recorded names that are terms of the task's loss."""
    return [name for name in values if "/" not in name and name not in _ENGINE]


def _summary(values: Mapping[str, float | None]) -> str:
    """The few numbers worth a glance."""
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "gradient_norm": "grad {:.3g}",
        "samples_per_second": "{:.1f} samples/s",
        "step_seconds": "{:.3g} s/step",
        "data_wait": "wait {:.0%}",
        "memory_gb": "{:.1f} GB",
        "mfu": "mfu {:.0%}",
    }
    shown = [text.format(value) for name, text in formats.items() if (value := values.get(name)) is not None]
    terms = terms_of(values)
    if len(terms) > 1:  # one term is the loss
        shown[1:1] = [f"{name} {value:.4f}" for name in terms if (value := values[name]) is not None]
    evaluated = [
        (name, value)
        for name, value in values.items()
        if name.startswith("evaluation/") and name.count("/") <= 2 and value is not None  # not those by class
    ]
    shown += [f"{name.removeprefix('evaluation/')} {value:.4g}" for name, value in evaluated[:_EVALUATIONS_SHOWN]]
    return "  ".join(shown)


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}\u2026"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
