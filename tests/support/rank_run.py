"""Train and evaluate from shards on every rank of a torchrun launch, and write the samples of each rank to a file.

torchrun --nproc_per_node 2 rank_run.py SHARDS OUTPUT STEPS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.format.manifest import Manifest
from bocage.shards.read.dataset import TrainingStream, evaluation_batches
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.parallel.distributed import all_gather_object, is_main, rank_and_world
from bocage.ssl.engine.trainer import Trainer


class KeyRecorder(nn.Module):
    """Module that records the keys of its batches and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batch_keys: list[list[str]] = []

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.batch_keys.append(batch.keys)
        return self.weight.square(), {}


def main() -> None:
    shards, output, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    manifest = Manifest.open(shards)
    rows, modalities = np.arange(len(manifest)), list(manifest.registry.values())
    task, evaluated = KeyRecorder(), list[str]()

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        rank, world = rank_and_world()
        batches = evaluation_batches(manifest, rows, modalities, batch_size=4, workers=1, rank=rank, world=world)
        # Accelerate leaves the batches unchanged.
        assert Accelerator().prepare(batches) is batches
        evaluated.extend(key for batch in batches for key in batch.keys)
        return {"patches": float(len(evaluated))}

    source = TrainingStream(manifest, rows, modalities, batch_size=3, seed=2, workers=1)
    config = EngineConfig(steps=steps, save_every=steps, evaluate_every=0)
    Trainer(task, source, config, output=output, recipe="ranks", resolved_config={}, evaluate=evaluate).fit()
    ranks = all_gather_object({"trained": task.batch_keys, "evaluated": evaluated})
    if is_main():
        (output / "ranks.json").write_text(json.dumps(ranks))


if __name__ == "__main__":
    main()
