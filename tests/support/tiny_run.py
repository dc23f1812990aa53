"""A small training run for tests of the engine; also a script, for tests that start, kill and resume it.

python tiny_run.py OUTPUT [--steps N] [...]           one run; exits with the exit code of its outcome
torchrun --nproc_per_node 2 tiny_run.py OUTPUT ...    the same on two ranks
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.counter_rng import uniform
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.optim import OptimizerConfig
from bocage.ssl.engine.trainer import Outcome, Trainer
from bocage.tools.cli.logging_setup import configure_logging

MODALITY = "DEM_ELEV"


class TinySource:
    """An endless sequence of small rasters, each a function of its position.

    Args:
        batch_size: samples per rank and batch.
        broken: positions whose raster is NaN.
        interrupt_at: position before whose batch the process sends itself SIGTERM.
        pause: seconds to sleep before each batch.
    """

    def __init__(
        self,
        batch_size: int = 4,
        broken: frozenset[int] = frozenset(),
        interrupt_at: int | None = None,
        pause: float = 0.0,
    ) -> None:
        self.batch_size = batch_size
        self.broken, self.interrupt_at, self.pause = broken, interrupt_at, pause
        self.started_at: list[int] = []

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        self.started_at.append(position)
        while True:
            time.sleep(self.pause)
            if self.interrupt_at is not None and position == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGTERM)
            # A DataLoader draws from the global generator when it starts; this source does so at every batch.
            torch.rand(())
            positions = [position + rank + world * index for index in range(self.batch_size)]
            seeds = torch.tensor([sample_seed(0, 0, f"place {index}") for index in positions])
            values = uniform(seeds, "raster", 2, 8, 8)
            values[[index in self.broken for index in positions]] = torch.nan
            yield Batch(
                keys=[f"place {index}" for index in positions],
                rois=["D001-2020/AA-S1-1"] * len(positions),
                seeds=seeds,
                sample_ids=seeds,
                windows=torch.tensor([[0.0, 0.0, 102.4]]).repeat(len(positions), 1),
                values={MODALITY: values},
                present={MODALITY: torch.ones(len(positions), dtype=torch.bool)},
                dates={},
                padding={},
            )
            position += self.batch_size * world


class TinyTask(nn.Module):
    """Learns the local slope of a raster with the features of real tasks: dropout, running statistics, a tied weight,
    and a branch without a gradient in some steps. ``plain=True`` leaves out dropout, running statistics and branch."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8) if plain else nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.0 if plain else 0.1)
        self.head = nn.Conv2d(8, 1, 1)
        self.branch = nn.Linear(8, 1)
        self.tied = self.head

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = batch.values[MODALITY]
        slope = values[:, :1] - values[:, 1:].roll(1, dims=-1)
        hidden = self.dropout(torch.relu(self.norm(self.first(values))))
        error = (self.tied(hidden) - slope).square().mean()
        logs = {"error": error.detach()}
        if not self.plain and int(batch.seeds[0]) % 2:
            extra = (self.branch(hidden.mean(dim=(-2, -1))) - slope.mean(dim=(-2, -1))).square().mean()
            logs["extra"] = extra.detach()
            return error + extra, logs
        return error, logs


def run(
    output: Path,
    source: TinySource | None = None,
    *,
    task: TinyTask | None = None,
    plain: bool = False,
    options: dict[str, Any] | None = None,
    **engine: Any,
) -> tuple[Outcome, TinyTask]:
    """Train a ``TinyTask``; ``engine`` are keys of ``EngineConfig``, ``options`` further arguments of ``Trainer``."""
    configure_logging()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    task = task or TinyTask(plain)
    keys: dict[str, Any] = {
        "steps": 12,
        "save_every": 4,
        "log_every": 2,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    } | engine
    arguments: dict[str, Any] = {"recipe": "tiny", "resolved_config": {"batch_size": 4}} | (options or {})
    trainer = Trainer(task, source or TinySource(), EngineConfig(**keys), output=output, **arguments)
    return trainer.fit(), task


def records(output: Path) -> list[dict[str, Any]]:
    """Read the lines of the metrics file."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _slow_export(task: nn.Module, folder: Path) -> None:
    """Prolong a save, so that a kill can hit it."""
    (folder / "encoder").write_bytes(bytes(1 << 16))
    time.sleep(0.05)


def _no_picture(task: nn.Module, step: int) -> dict[str, Path]:
    raise RuntimeError("out of colours")


def _wait(child: int, output: Path, when: str) -> None:
    """Return when a run has done two more steps, or during its second save, so that the first one is complete."""
    start, saves = _record_count(output), set[str]()
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        saves.update(item.name for item in (output / "checkpoints").glob(".step-*.partial"))
        if len(saves) >= 2 if when == "save" else _record_count(output) >= start + 2:
            return
        time.sleep(0.001)
    raise RuntimeError("the run ended before the kill")


def _record_count(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--tracker", default="none")
    parser.add_argument("--rank-timeout", type=float, default=1800.0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--slow-export", action="store_true")
    parser.add_argument("--draw-fails", action="store_true")
    parser.add_argument("--broken", type=int, nargs="*", default=[])
    parser.add_argument(
        "--kill", choices=["step", "save"], nargs="*", default=[], help="kill a forked run at these points"
    )
    arguments = parser.parse_args()
    options: dict[str, Any] = {"resolved_config": {"hub_token": os.environ.get("TINY_TOKEN", "")}}
    if arguments.slow_export:
        options["export"] = _slow_export
    if arguments.draw_fails:
        options["draw"] = _no_picture

    def run_once() -> int:
        outcome, _ = run(
            arguments.output,
            TinySource(arguments.batch_size, broken=frozenset(arguments.broken), pause=arguments.pause),
            plain=arguments.plain,
            options=options,
            steps=arguments.steps,
            save_every=arguments.save_every,
            log_every=1,
            rank_timeout=arguments.rank_timeout,
            tracker=arguments.tracker,
        )
        return outcome.exit_code

    # Importing torch takes longer than a run, so killed runs are forks of this process.
    for when in arguments.kill:
        child = os.fork()
        if child == 0:
            os._exit(run_once())
        _wait(child, arguments.output, when)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return run_once()


if __name__ == "__main__":
    sys.exit(main())
