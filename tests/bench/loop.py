"""What the training loop costs over a bare PyTorch loop: ``python tests/bench/loop.py SHARDS``.

The model is that of ``recipe=quickstart``. Both loops take the same batches from memory, in turns: forward, backward,
clipping, AdamW. The loop of bocage adds the agreement of ranks, running statistics kept over a step, random state
around data, metrics and RankMe every 20 steps, and the learning rate. Times are processor seconds of one thread, which
other work on the machine disturbs less, as means over the steps of a turn; the ratio is the median of the turns'
ratios. Then: how long resuming takes to the first step, and how long saving and leaving.
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


class Kept:
    """The same few batches for ever; remembers when each was asked for."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batch_size = len(batches[0])
        self.kept = batches
        self.asked: list[tuple[float, float]] = []  # wall clock and processor time

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        """See ``BatchSource``."""
        for batch in itertools.cycle(self.kept):
            self.asked.append((time.perf_counter(), time.process_time()))
            yield batch


def step_times(asked: list[tuple[float, float]]) -> float:
    """Mean processor seconds between requests, records of metrics among them; the first ones warm up."""
    return (asked[-1][1] - asked[2][1]) / (len(asked) - 3)


def bare(task: torch.nn.Module, source: Kept, steps: int) -> None:
    """The loop that everybody writes."""
    optimizer = build_optimizer(task, _SETTINGS, global_batch=source.batch_size, device=torch.device("cpu"))
    task.train()
    for batch in itertools.islice(source.batches(0, 0, 1), steps):
        loss, _ = task(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def looped(task: torch.nn.Module, source: Kept, steps: int, output: Path) -> float:
    """bocage's; returns seconds from the call to the first batch."""
    config = EngineConfig(steps=steps, save_every=0, log_every=20, optimizer=_SETTINGS)
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        Trainer(
            task, source, config, output=output, recipe="bench", resolved_config={}, export=export_encoders
        ).fit()
    return source.asked[0][0] - began


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--steps", type=int, default=43)
    parser.add_argument("--repeats", type=int, default=5)
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
    ours, theirs, ratios, resumes, saves = [], [], [], [], []
    for turn in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            source = Kept(batches)
            bare(task, source, arguments.steps)
            theirs.append(step_times(source.asked))
            source = Kept(batches)
            looped(task, source, arguments.steps, Path(folder))
            ours.append(step_times(source.asked))
            ratios.append(ours[-1] / theirs[-1])
            # Two more steps: the first is reached by resuming, the last is followed by a checkpoint.
            source = Kept(batches)
            resumes.append(looped(task, source, arguments.steps + 2, Path(folder)))
            saves.append(time.perf_counter() - source.asked[-1][0] - ours[-1])
        print(f"turn {turn + 1}: bocage {ours[-1]:.3f} s a step, bare {theirs[-1]:.3f}, ratio {ratios[-1]:.3f}")
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"resuming {statistics.median(resumes):.2f} s, saving and leaving {statistics.median(saves):.2f} s", end=" ")
    print(f"({sum(parameter.numel() for parameter in task.parameters()) / 1e6:.1f} M parameters, encoders exported)")


if __name__ == "__main__":
    main()
