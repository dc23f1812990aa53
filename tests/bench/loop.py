"""Compare the trainer with a bare PyTorch loop: ``python tests/bench/loop.py SHARDS``.

The model is that of ``recipe=quickstart``. Both loops run in turns on the same batches in memory: forward, backward,
gradient clipping, AdamW. The trainer additionally synchronises ranks, backs up running statistics over a step, keeps
the random state around data loading, records metrics and RankMe every 20 steps, and schedules the learning rate. Times
are means over the steps of a turn, in CPU seconds of one thread, which other processes disturb less. The ratio is the
median over turns. The script also measures the time to resume until the first step, and the time to save and exit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bocage import recipes
from bocage.shards.batch import Batch
from bocage.shards.format.manifest import Manifest
from bocage.shards.preprocess.inputs import required_modalities
from bocage.shards.read.dataset import TrainingStream
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.optim import OptimizerConfig, build_optimizer
from bocage.ssl.engine.trainer import Trainer
from bocage.ssl.pretrain import build_pretraining_model, export_encoders
from bocage.ssl.pretrain_config import PretrainConfig

_SETTINGS = OptimizerConfig(min_lr_ratio=1.0)


class CachedBatches:
    """Endless repetition of a few batches in memory.

    Attributes:
        batch_size: samples per batch.
        requests: wall-clock time and CPU time of each request for a batch.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batch_size = len(batches[0])
        self.cache = batches
        self.requests: list[tuple[float, float]] = []

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        """See ``BatchSource``."""
        for batch in itertools.cycle(self.cache):
            self.requests.append((time.perf_counter(), time.process_time()))
            yield batch


def seconds_per_step(requests: list[tuple[float, float]]) -> float:
    """Return the mean CPU seconds between requests, including the recording of metrics, without two warm-up steps."""
    return (requests[-1][1] - requests[2][1]) / (len(requests) - 3)


def train_bare(task: torch.nn.Module, source: CachedBatches, steps: int) -> None:
    """Train with a minimal PyTorch loop."""
    optimizer = build_optimizer(task, _SETTINGS, global_batch=source.batch_size, device=torch.device("cpu"))
    task.train()
    for batch in itertools.islice(source.batches(0, 0, 1), steps):
        loss, _ = task(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train_bocage(task: torch.nn.Module, source: CachedBatches, steps: int, output: Path) -> float:
    """Train with bocage's trainer; return the seconds from the call to the first request for a batch."""
    config = EngineConfig(steps=steps, save_every=0, log_every=20, optimizer=_SETTINGS)
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        Trainer(task, source, config, output=output, recipe="bench", resolved_config={}, export=export_encoders).fit()
    return source.requests[0][0] - started


def main() -> None:
    """Print the time of a step, of resuming and of saving."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of shards")
    parser.add_argument("--steps", type=int, default=43, help="steps per turn (default 43)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    manifest = Manifest.open(arguments.shards)
    config = recipes.resolve(PretrainConfig, ["recipe=quickstart", "batch_size=4"])
    task = build_pretraining_model(config, manifest)
    modalities = required_modalities(manifest.registry, list(task.encoders), [])
    stream = TrainingStream(
        manifest, manifest.split("all", ""), modalities, batch_size=4, window=config.window, seed=0, workers=0
    )
    batches = list(itertools.islice(stream.batches(0, 0, 1), 4))
    bocage, bare, ratios, resumes, saves = [], [], [], [], []
    for turn in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            source = CachedBatches(batches)
            train_bare(task, source, arguments.steps)
            bare.append(seconds_per_step(source.requests))
            source = CachedBatches(batches)
            train_bocage(task, source, arguments.steps, Path(folder))
            bocage.append(seconds_per_step(source.requests))
            ratios.append(bocage[-1] / bare[-1])
            # Resume for two more steps: the first measures resuming, the last is followed by a checkpoint.
            source = CachedBatches(batches)
            resumes.append(train_bocage(task, source, arguments.steps + 2, Path(folder)))
            saves.append(time.perf_counter() - source.requests[-1][0] - bocage[-1])
        print(f"turn {turn + 1}: bocage {bocage[-1]:.3f} s per step, bare loop {bare[-1]:.3f}, ratio {ratios[-1]:.3f}")
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"resume {statistics.median(resumes):.2f} s, save and exit {statistics.median(saves):.2f} s", end=" ")
    print(f"({sum(parameter.numel() for parameter in task.parameters()) / 1e6:.1f} M parameters, encoders exported)")


if __name__ == "__main__":
    main()
