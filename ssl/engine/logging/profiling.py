"""Profile a few steps with torch's profiler: a trace and a table of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from bocage.shards.files import atomic_write

_WAIT, _WARM_UP = 2, 1  # unrecorded first steps, which allocate memory and compile
_TABLE_ROWS = 20
TRACE, TABLE = "trace.json", "operators.txt"


@contextmanager
def profiled_steps(steps: int, folder: Path, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Context that profiles ``steps`` steps from the fourth on, and yields a function to call after each step.

    It writes ``trace.json`` for https://ui.perfetto.dev and ``operators.txt``, the 20 operators with the largest self
    time. A run that ends earlier writes neither.

    Args:
        steps: number of steps to profile; 0: no profiling.
        folder: folder of both files.
        log: function that prints a message when the files are written.
    """
    if steps == 0:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    sort_key = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        sort_key = "self_cuda_time_total"

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / TRACE) as partial:
            profiler.export_chrome_trace(str(partial))
        with atomic_write(folder / TABLE) as partial:
            partial.write_text(profiler.key_averages().table(sort_by=sort_key, row_limit=_TABLE_ROWS), encoding="utf-8")
        log(f"profile of {steps} steps: {folder}")

    plan = schedule(wait=_WAIT, warmup=_WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
