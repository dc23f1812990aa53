"""Log a run: metrics file, progress bar or plain lines, and W&B or TensorBoard on request."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from accelerate import Accelerator
from matplotlib import image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.ssl.engine.logging.metrics import explained_ratios, loss_terms
from bocage.ssl.engine.logging.trackers import TrackerName, finish_trackers, link, start_tracker

_EVALUATIONS_SHOWN = 6
_BAR = 12  # characters


class RunLogger:
    """Write the log of a run on rank 0; on other ranks every method does nothing.

    ``metrics.jsonl`` in the output folder has one line per recorded step, ``{"step": 20, "loss": 0.61, ...}``, with
    null for values that are not finite. On a terminal, stderr shows a progress bar; otherwise each record is one plain
    line.
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
        run_id: str,
        config: Mapping[str, Any],
    ) -> None:
        """Open the log of a run that continues after ``step``; records later than ``reported_step`` are dropped.

        Args:
            accelerator: Accelerator that keeps the tracker.
            output: folder of the run.
            steps: optimiser steps of the whole run.
            step: optimiser steps done.
            reported_step: last step whose metrics were recorded.
            tracker: tracker to start beside the metrics file.
            project: name of the tracker's project.
            run_id: identifier of the run, the same after every resume.
            config: configuration to show in the tracker.

        Raises:
            InputError: the output folder cannot be written, or the tracker cannot start.
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
        notice = ""
        if tracker != "none":
            notice = start_tracker(accelerator, tracker, output, project, run_id, config, reported_step)
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step", table_column=Column(no_wrap=True)),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)),
                BarColumn(bar_width=_BAR, table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
                # On a narrow terminal only this column is shortened.
                TextColumn("{task.fields[summary]}", markup=False, table_column=Column(overflow="ellipsis")),
                console=Console(stderr=True),
            )
            self._summary_width = max(
                10, self._bar.console.width - len("step") - 2 * len(str(steps)) - 1 - _BAR - 7 - 4
            )
            self._task = self._bar.add_task("train", total=steps, completed=step, summary="")
            self._bar.start()
        if notice:
            self.message(notice)

    def step(self, step: int) -> None:
        """Move the progress bar to ``step``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the metrics of ``step`` to the file, the tracker and stderr.

        Raises:
            InputError: the metrics file cannot be written.
        """
        if self._file is None:
            return
        with self._disk_faults():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, summary=_shortened(_summary(values), self._summary_width))
        else:
            seconds = values.get("step_seconds")
            remaining = f"  left {_duration((self._steps - step) * seconds)}" if seconds else ""
            print(f"step {step}/{self._steps}  {_summary(values)}{remaining}", file=sys.stderr, flush=True)

    def pictures(self, step: int, paths: Mapping[str, Path]) -> None:
        """Upload PNG files of ``step``, by name, to the tracker."""
        for tracker in self._accelerator.trackers if self._active and paths else ():
            images = {name: np.uint8(255 * image.imread(path)[None, :, :, :3]) for name, path in paths.items()}
            tracker.log_images(images, step=step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))

    def link(self, step: int, name: str, path: Path) -> None:
        """Show the path of a file or folder in the tracker, at ``step``."""
        if self._active and self._accelerator.trackers:
            link(self._accelerator.trackers, step, name, str(path.resolve()))

    def message(self, text: str) -> None:
        """Print one line on stderr."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(f"bocage: {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"bocage: {text}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Sync the metrics file to disk. A checkpoint must not be newer than it."""
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
            with suppress(OSError):  # closing fails on the unwritten lines, which are lost
                self._file.close()
            self._file = None
            raise InputError(
                f"{name} cannot be written: {error.strerror}; free or change the disk, then run the same command again"
            ) from error

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the bar, the file and the tracker, which marks a failed run."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._active:
            finish_trackers(self._accelerator.trackers, failed=kind is not None)


def _drop_records_after(path: Path, step: int) -> None:
    """Rewrite a metrics file atomically with its complete lines of steps up to ``step``."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # an incomplete line of a killed process
            continue
    with atomic_write(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def _summary(values: Mapping[str, float | None]) -> str:
    """Format the main metrics for a line or the bar."""
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
    terms = loss_terms(values)
    if len(terms) > 1:  # a single term equals the loss
        shown[1:1] = [f"{name} {value:.4f}" for name in terms if (value := values[name]) is not None]
    shown += [
        f"{name.rpartition('/')[2]} {value:.1%} explained"
        for name in explained_ratios(values)
        if (value := values[name]) is not None
    ]
    evaluated = [
        (name, value)
        for name, value in values.items()
        if name.startswith("evaluation/") and name.count("/") <= 2 and value is not None  # no metrics by class
    ]
    shown += [f"{name.removeprefix('evaluation/')} {value:.4g}" for name, value in evaluated[:_EVALUATIONS_SHOWN]]
    return "  ".join(shown)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}\u2026"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
