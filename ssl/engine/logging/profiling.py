"""Where the time of a few steps goes: a trace and a table by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from bocage.shards.files import written_atomically

_WAIT, _WARM_UP = 2, 1  # steps before: the first ones allocate and compile
_SHOWN = 20
TRACE, TABLE = "trace.json", "operators.txt"


@contextmanager
def profiled(steps: int, folder: Path, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Context that records ``steps`` steps from the fourth on; gives what to call after each step.

    ``folder`` then holds ``trace.json`` for https://ui.perfetto.dev and ``operators.txt``, the 20 operators that took
    most time of their own; ``tell`` is told. A run that ends before has neither. With 0 steps nothing is recorded.
    """
    if steps == 0:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    time = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        time = "self_cuda_time_total"

    def write(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with written_atomically(folder / TRACE) as partial:
            found.export_chrome_trace(str(partial))
        with written_atomically(folder / TABLE) as partial:
            partial.write_text(found.key_averages().table(sort_by=time, row_limit=_SHOWN), encoding="utf-8")
        tell(f"profile of {steps} steps: {folder}")

    plan = schedule(wait=_WAIT, warmup=_WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as recording:
        yield recording.step
