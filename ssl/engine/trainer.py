"""The one training loop: pretraining objectives and fine-tuning tasks differ only in ``loss, logs = task(batch)``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from bocage.ssl.engine.checkpoint import files as checkpoint
from bocage.ssl.engine.checkpoint.files import TrainingState
from bocage.ssl.engine.checkpoint.resume import checkpoint_to_resume, run_lock
from bocage.ssl.engine.checkpoint.saving import Export
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.ema import MovingAverage
from bocage.ssl.engine.health.collapse import CollapseMonitor
from bocage.ssl.engine.health.rank_heartbeat import RankHeartbeat
from bocage.ssl.engine.logging.flops import FlopCounter
from bocage.ssl.engine.logging.provenance import digest, git_revision, library_versions, plain
from bocage.ssl.engine.logging.run_logger import MetricWindow
from bocage.ssl.engine.logging.trackers import check_tracker
from bocage.ssl.engine.optim import ParameterGroups, build_optimizer
from bocage.ssl.engine.parallel.block_compile import activation_checkpointing, compiled_blocks
from bocage.ssl.engine.parallel.distributed import (
    broadcast_object,
    build_accelerator,
    prepared_model,
)
from bocage.ssl.engine.parallel.fsdp import train_module
from bocage.ssl.engine.run import BatchSource, Draw, Evaluate, Outcome, Run
from bocage.ssl.engine.signals import StopSignals
from bocage.ssl.engine.weights import Weights


def train(
    task: nn.Module,
    source: BatchSource,
    config: EngineConfig,
    *,
    output: Path,
    recipe: str,
    resolved: dict[str, Any],
    evaluate: Evaluate | None = None,
    draw: Draw | None = None,
    monitor: str | None = None,
    export: Export | None = None,
    parameter_groups: ParameterGroups | None = None,
    rebuild: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train ``task``, or finish training it, and leave checkpoints and ``metrics.jsonl`` in ``output``.

    The call is the same for a new run, a resumed one and a finished one (which returns at once). On the CPU in fp32
    an interrupted and resumed run ends with the same bits as an undisturbed one.

    With ``engine.ema_decay`` the task of a finished run has the averaged weights.

    Args:
        task: ``loss, logs = task(batch)``: a scalar to minimise, and what to record by name: one-element tensors, and
            feature vectors (N, C) whose spread is watched. Some parameters may receive no gradient in some steps, but
            see ``EngineConfig.parallel``. Every rank must build it with the same weights. Where a module in it has a
            method ``after_step()``, that is called after every update of the weights.
        source: see ``BatchSource``.
        config: how to train.
        output: folder of the run, on a file system all ranks see.
        recipe: its name, kept with the checkpoints.
        resolved: the resolved configuration, without keys that have no bearing on training. A resumed run must find
            it unchanged, but for ``provenance.CHANGEABLE_KEYS``. Secrets in it are replaced before it is written.
        evaluate: called on all ranks with the bare task in evaluation mode, without gradients, in ``precision``, and
            the step; rank 0's answer counts. Its random draws leave no trace in training.
        draw: called on rank 0 where ``evaluate`` is, with the same; writes pictures and returns their paths by name,
            which the tracker shows. Where it fails a message says so, and training goes on.
        monitor: the name of an evaluated metric, the higher the better, that selects the best checkpoint.
        export: called on rank 0 at every save with the bare task and an empty folder of the checkpoint, ``export/``.
        parameter_groups: replaces the default groups of ``optim.decay_groups``.
        rebuild: what ``bocage replay`` needs to build the task again, kept with dumps of bad steps without secrets:
            ``command`` and ``config``.

    Raises:
        InputError: the output holds a run of another configuration or cannot be written, or a package is missing.
        DivergenceError: see ``EngineConfig.max_bad_steps``.
        ValueError: ``monitor`` is no metric of ``evaluate``, or the task has no parameter to train.
    """
    if monitor is not None and evaluate is None:
        raise ValueError(f"monitor={monitor!r} needs evaluate")
    check_tracker(config.tracker)
    accelerator = build_accelerator(config.precision, config.tracker, output, config.rank_timeout)
    set_seed(config.seed, device_specific=True)
    # What a run may change when resumed includes engine.*, wherever the caller keeps the engine's configuration.
    settings = plain({**resolved, "engine": asdict(config)})
    description = {
        "recipe": recipe,
        "config": settings,
        "config_sha256": digest(settings),
        "versions": library_versions(),
        "git": git_revision(),
        "ranks": accelerator.num_processes,
        "samples_a_step": source.batch_size * config.accumulation * accelerator.num_processes,
    }
    divides = config.parallel == "fsdp" and accelerator.num_processes > 1
    peers = RankHeartbeat()
    with peers.watched(), run_lock(output):
        folder = checkpoint_to_resume(output / "checkpoints", config, description)
        if folder is not None:
            checkpoint.load_task(folder, task)
        with (
            train_module(task, divides) as learner,
            compiled_blocks(learner, config.compile),
            activation_checkpointing(learner, config.activation_checkpointing),
            prepared_model(accelerator, learner, divides) as model,
            StopSignals() as signals,
        ):
            optimizer = build_optimizer(
                learner,
                config.optimizer,
                global_batch=description["samples_a_step"],
                device=accelerator.device,
                parameter_groups=parameter_groups,
            )
            run = Run(
                accelerator=accelerator,
                weights=Weights(
                    accelerator=accelerator,
                    task=task,
                    learner=learner,
                    average=MovingAverage(learner, config.ema_decay) if config.ema_decay else None,
                ),
                model=model,
                optimizer=accelerator.prepare_optimizer(optimizer),
                config=config,
                output=output,
                description=description,
                rebuild=plain(rebuild) if rebuild is not None else None,
                evaluate=evaluate,
                draw=draw,
                monitor=monitor,
                export=export,
                signals=signals,
                peers=peers,
                state=TrainingState(run=broadcast_object(uuid.uuid4().hex[:12])),
                window=MetricWindow(),
                arithmetic=FlopCounter(accelerator.device, config.precision, compiled=config.compile != "none"),
                collapse=CollapseMonitor(config.least_feature_std, config.least_rankme),
            )
            if folder is not None:
                run.restore(folder)
            outcome = run.go(source)
            if not outcome.stopped:
                run.weights.hand_over()
        accelerator.wait_for_everyone()  # ranks leave together: gloo aborts when a peer goes first
    return outcome
