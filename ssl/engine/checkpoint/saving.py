"""One save of a run, in which all ranks take part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bocage.ssl.engine.checkpoint import files as checkpoint
from bocage.ssl.engine.checkpoint.files import TrainingState
from bocage.ssl.engine.checkpoint.optimizer_state import divided, gathered_whole, part_file
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.ema import substituted
from bocage.ssl.engine.parallel.distributed import all_gather_object, run_on_all_ranks
from bocage.ssl.engine.parallel.fsdp import is_sharded
from bocage.ssl.engine.rng import random_state
from bocage.ssl.engine.weights import Weights

Export = Callable[[nn.Module, Path], None]


def save(
    root: Path,
    state: TrainingState,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    *,
    window: dict[str, Any],
    description: dict[str, Any],
    config: EngineConfig,
    export: Export | None,
) -> None:
    """Write the checkpoint of ``state.step`` with what every rank needs to continue, and delete those not to be kept.

    Args:
        root: the folder of checkpoints.
        state: where the run stands.
        weights: of the run.
        optimizer: of the run.
        window: of this rank, ``MetricWindow.state``.
        description: facts about the run.
        config: of the run.
        export: called on rank 0 with the bare task as it would be evaluated and an empty folder.

    Raises:
        InputError: on all ranks, when one of them cannot write; earlier checkpoints are intact.
    """
    accelerator, step = weights.accelerator, state.step
    main, scaler = accelerator.is_main_process, accelerator.scaler
    shares = config.checkpoint == "sharded" and is_sharded(weights.learner)
    ranks = all_gather_object({"random": random_state(), "window": window})
    weights.gather()
    averaged = weights.average.tensors(keep=main) if weights.average is not None else None
    averages, own = divided(optimizer) if shares else (gathered_whole(optimizer, keep=main), {})

    def start() -> None:
        if main:
            checkpoint.start_checkpoint(root, step)

    def write_own() -> dict[str, checkpoint.Inventory]:
        name = part_file(accelerator.process_index, accelerator.num_processes)
        return checkpoint.write_part(root, step, name, own) if shares else {}

    def exported(task: nn.Module, folder: Path) -> None:
        assert export is not None
        with substituted(task, averaged):
            export(task, folder)

    def finish() -> None:
        if not main:
            return
        checkpoint.finish_checkpoint(
            root,
            state,
            task=weights.task,
            optimizer={"optimizer": averages, "scaler": scaler.state_dict() if scaler is not None else None},
            ranks=ranks,
            description=description,
            parts=parts,
            average=averaged,
            export=exported if export is not None else None,
        )
        checkpoint.prune(root, config.keep, state.best_step, config.milestone_every)

    try:
        run_on_all_ranks(start)
        parts = {name: entry for told in run_on_all_ranks(write_own) for name, entry in told.items()}
        run_on_all_ranks(finish)
    finally:
        if main:
            checkpoint.abandon_checkpoint(root, step)
