"""The one training loop: pretraining objectives and fine-tuning tasks differ only in ``loss, logs = task(batch)``."""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.ssl.engine import checkpoint
from bocage.ssl.engine.alarms import Starvation
from bocage.ssl.engine.buffers import Buffers
from bocage.ssl.engine.checkpoint import TrainingState
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.distributed import build_accelerator, from_main, gathered, largest
from bocage.ssl.engine.ema import MovingAverage
from bocage.ssl.engine.optim import (
    ParameterGroups,
    build_optimizer,
    learning_rate_factor,
    load_optimizer,
    set_learning_rate,
)
from bocage.ssl.engine.peers import Peers
from bocage.ssl.engine.profiling import profiled
from bocage.ssl.engine.provenance import git_revision, library_versions, plain
from bocage.ssl.engine.randomness import preserved_random_state, random_state, restore_random_state
from bocage.ssl.engine.regions import compiled, recomputed
from bocage.ssl.engine.resume import checkpoint_to_resume
from bocage.ssl.engine.signals import StopSignals, exit_code
from bocage.ssl.engine.tracking import Journal, MetricWindow, check_tracker, finite_or_none

Evaluate = Callable[[nn.Module, int], dict[str, float]]
Export = Callable[[nn.Module, Path], None]


class BatchSource(Protocol):
    """Where training batches come from: one global order of samples without end.

    Attributes:
        batch_size: samples of each batch, that is per rank and micro-batch.
    """

    batch_size: int

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless batches of rank ``rank`` of ``world``, from sample ``position`` of the global order on.

        Of the global order, each round of ``batch_size * world`` samples makes one batch for every rank.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What ``train`` leaves.

    Attributes:
        step: optimiser steps done.
        stopped: a signal ended the run before it was complete; the same call resumes it.
        exit_code: status the process should end with: 0, or 130 (SIGINT), 143 (SIGTERM), 138 (SIGUSR1).
        last: the newest checkpoint.
        best: the checkpoint with the highest monitored metric, None when nothing is monitored.
        metrics: latest value of everything recorded; the names of evaluated metrics start with ``evaluation/``,
            values that are not finite are None.
    """

    step: int
    stopped: bool
    exit_code: int
    last: Path
    best: Path | None
    metrics: dict[str, float | None]


class DivergenceError(InputError):
    """Too many steps in a row whose loss or gradient is not finite."""


def train(
    task: nn.Module,
    source: BatchSource,
    config: EngineConfig,
    *,
    output: Path,
    recipe: str,
    resolved: dict[str, Any],
    evaluate: Evaluate | None = None,
    monitor: str | None = None,
    export: Export | None = None,
    parameter_groups: ParameterGroups | None = None,
) -> Outcome:
    """Train ``task``, or finish training it, and leave checkpoints and ``metrics.jsonl`` in ``output``.

    The call is the same for a new run, a resumed one and a finished one (which returns at once). On the CPU in fp32
    an interrupted and resumed run ends with the same bits as an undisturbed one.

    With ``engine.ema_decay`` the task of a finished run has the averaged weights.

    Args:
        task: ``loss, logs = task(batch)``: a scalar to minimise, and one-element tensors to record by name. Some
            parameters may receive no gradient in some steps. Every rank must build it with the same weights.
        source: see ``BatchSource``.
        config: how to train.
        output: folder of the run, on a file system all ranks see.
        recipe: its name, kept with the checkpoints.
        resolved: the resolved configuration, without keys that have no bearing on training. A resumed run must find
            it unchanged, but for ``provenance.CHANGEABLE_KEYS``. Secrets in it are replaced before it is written.
        evaluate: called on all ranks with the bare task in evaluation mode, without gradients, in ``precision``, and
            the step; rank 0's answer counts. Its random draws leave no trace in training.
        monitor: the name of an evaluated metric, the higher the better, that selects the best checkpoint.
        export: called on rank 0 at every save with the bare task and an empty folder of the checkpoint, ``export/``.
        parameter_groups: replaces the default groups of ``optim.decay_groups``.

    Raises:
        InputError: the output holds a run of another configuration, or cannot be written.
        DivergenceError: see ``EngineConfig.max_bad_steps``.
    """
    if monitor is not None and evaluate is None:
        raise ValueError(f"monitor={monitor!r} needs evaluate")
    check_tracker(config.tracker)
    accelerator = build_accelerator(config.precision, config.tracker, output, config.rank_timeout)
    set_seed(config.seed, device_specific=True)
    # What a run may change when resumed includes engine.*, wherever the caller keeps the engine's configuration.
    description = {
        "recipe": recipe,
        "config": plain({**resolved, "engine": asdict(config)}),
        "versions": library_versions(),
        "git": git_revision(),
        "ranks": accelerator.num_processes,
    }
    folder = checkpoint_to_resume(output / "checkpoints", config, description, accelerator)
    optimizer = build_optimizer(
        task,
        config.optimizer,
        global_batch=source.batch_size * config.accumulation * accelerator.num_processes,
        device=accelerator.device,
        parameter_groups=parameter_groups,
    )
    if folder is not None:
        checkpoint.load_task(folder, task)
    model, prepared = accelerator.prepare(task, optimizer)
    peers = Peers()
    try:
        with (
            compiled(task, config.compile),
            recomputed(task, config.activation_checkpointing),
            peers.watched(),
            StopSignals() as signals,
        ):
            run = _Run(
                accelerator=accelerator,
                task=task,
                model=model,
                optimizer=prepared,
                config=config,
                output=output,
                description=description,
                evaluate=evaluate,
                monitor=monitor,
                export=export,
                signals=signals,
                peers=peers,
                average=MovingAverage(task, config.ema_decay) if config.ema_decay else None,
                state=TrainingState(run=from_main(uuid.uuid4().hex[:12])),
                window=MetricWindow(),
            )
            if folder is not None:
                run.restore(folder)
            outcome = run.go(source)
            if run.average is not None and not outcome.stopped:
                run.average.apply()
        accelerator.wait_for_everyone()  # ranks leave together: gloo aborts when a peer goes first
        return outcome
    finally:
        # The task leaves as it came: Accelerate replaces its `forward` by one that runs under autocast.
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)


@dataclass(kw_only=True)
class _Run:
    """One run in progress: what its steps, reports and saves share."""

    accelerator: Accelerator
    task: nn.Module
    model: nn.Module
    optimizer: Any
    config: EngineConfig
    output: Path
    description: dict[str, Any]
    evaluate: Evaluate | None
    monitor: str | None
    export: Export | None
    signals: StopSignals
    peers: Peers
    average: MovingAverage | None
    state: TrainingState
    window: MetricWindow
    starvation: Starvation = field(default_factory=Starvation)
    saved: float = field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.output / "checkpoints"

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint whose weights are loaded already. A new rank keeps its fresh generators."""
        self.state, _ = checkpoint.read_state(folder)
        best = self.state.best_step
        if best is not None and not checkpoint.step_folder(self.checkpoints, best).is_dir():
            self.state.best_step = self.state.best_value = None
        saved = checkpoint.load_tensors(folder / "optimizer.pt")
        load_optimizer(self.optimizer, saved["optimizer"], folder)
        if self.average is not None:
            self.average.load(folder)
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        ranks = checkpoint.load_tensors(folder / "ranks.pt")
        if self.accelerator.process_index < len(ranks):
            rank = ranks[self.accelerator.process_index]
            restore_random_state(rank["random"])
            self.window = MetricWindow.from_state(rank["window"], self.accelerator.device)

    def go(self, source: BatchSource) -> Outcome:
        """Train to the end or to a signal."""
        config, state, main = self.config, self.state, self.accelerator.is_main_process
        if state.step >= config.steps and state.reported_step == state.step:
            if main:
                print(f"bocage: {self.output} is complete: all {state.step} steps are done", file=sys.stderr)
            return self._outcome(received=0)
        received = 0
        with ExitStack() as stack:
            journal = Journal(
                self.accelerator,
                self.output,
                steps=config.steps,
                step=state.step,
                reported_step=state.reported_step,
                tracker=config.tracker,
                project=config.project,
                run=state.run,
                config=self.description["config"],
            )
            stack.callback(journal.close)
            batches = source.batches(state.position, self.accelerator.process_index, self.accelerator.num_processes)
            if hasattr(batches, "close"):
                stack.callback(batches.close)
            if state.step:
                journal.message(f"resuming at step {state.step} of {config.steps}")
            self.task.train()
            buffers = Buffers(self.task)
            step_is_done = stack.enter_context(profiled(config.profile_steps if main else 0, self.output / "profile"))
            # A signal saved the run before its last step was recorded and evaluated.
            if state.reported_step < state.step and (self._report(journal) or state.step >= config.steps):
                self._save(journal)
            while state.step < config.steps:
                received, late = self._step(batches, source.batch_size, buffers, journal)
                step_is_done()
                if received:
                    self._save(journal)
                    journal.message(f"stopped at step {state.step} of {config.steps}, saved; the same command resumes")
                    break
                improved = self._report(journal)
                due = any(
                    every > 0 and state.step % every == 0 for every in (config.save_every, config.milestone_every)
                )
                if improved or due or late or state.step == config.steps:
                    self._save(journal)
        return self._outcome(received)

    def _step(self, batches: Iterator[Batch], batch_size: int, buffers: Buffers, journal: Journal) -> tuple[int, bool]:
        """One optimiser step; what all ranks agree on: the signal to stop on, or 0, and whether it is time to save."""
        config, state, accelerator = self.config, self.state, self.accelerator
        began, waited = time.perf_counter(), 0.0
        set_learning_rate(self.optimizer, learning_rate_factor(state.step, config.steps, config.optimizer))
        self.peers.step = state.step + 1
        buffers.remember()
        losses, logs, keys = [], [], list[str]()
        for micro_batch in range(1, config.accumulation + 1):
            asked = time.perf_counter()
            # A DataLoader draws a seed from the global generator whenever it starts: a resumed run starts it at
            # another step than an undisturbed one, and its dropout must not notice.
            with preserved_random_state():
                batch = next(batches).to(accelerator.device)
            waited += time.perf_counter() - asked
            if len(batch) != batch_size:
                raise RuntimeError(f"the source gave a batch of {len(batch)} samples; it promised {batch_size}")
            with nullcontext() if micro_batch == config.accumulation else accelerator.no_sync(self.model):
                loss, terms = self.model(batch)
                accelerator.backward(loss / config.accumulation)
            keys += batch.keys
            losses.append(loss.detach().float())
            logs.append(terms)
        norm = accelerator.clip_grad_norm_(self.task.parameters(), config.clip_norm or math.inf)
        loss = torch.stack(losses).mean()
        # The one wait of the host for the device in a step: whether to update is decided by all ranks, before it.
        bad, received, late = largest(
            accelerator,
            ~(torch.isfinite(loss) & torch.isfinite(norm)),
            torch.tensor(self.signals.received),
            torch.tensor(0 < config.save_minutes * 60 <= time.monotonic() - self.saved),
        )
        if bad:
            buffers.restore()
            if accelerator.scaler is not None:
                accelerator.scaler.update()
        else:
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self.window.add({"loss": loss, "gradient_norm": norm})
            for terms in logs:
                self.window.add({name: value for name, value in terms.items() if name != "loss"})
        self.optimizer.zero_grad()
        samples = batch_size * config.accumulation
        state.step += 1
        state.position += samples * accelerator.num_processes
        self.window.add_step(samples, time.perf_counter() - began, waited)
        self._count_bad(gathered((math.isfinite(loss), keys)) if bad else None, journal)
        return received, bool(late)

    def _count_bad(self, ranks: list[tuple[bool, list[str]]] | None, journal: Journal) -> None:
        """Count a step; for a bad one ``ranks`` say whether their loss was finite, and of which samples it was."""
        state, limit = self.state, self.config.max_bad_steps
        state.skipped += ranks is not None
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if ranks is not None else 0
        if ranks is None:
            return
        what = [
            f"loss is not finite on rank {rank} (samples {', '.join(keys)})"
            for rank, (finite, keys) in enumerate(ranks)
            if not finite
        ]
        journal.message(
            f"step {state.step}: {'; '.join(what) or 'gradient is not finite'}; no update "
            f"({state.skipped_in_a_row} in a row)"
        )
        if state.skipped_in_a_row >= limit:
            raise DivergenceError(
                f"loss or gradient was not finite in {limit} steps in a row, up to step {state.step} of {self.output}: "
                "lower engine.optimizer.learning_rate or look for broken samples; the weights before them are in the "
                "newest checkpoint"
            )

    def _report(self, journal: Journal) -> bool:
        """Record and evaluate what is due after a step; returns whether the monitored metric is the best so far."""
        config, state = self.config, self.state
        final = state.step >= config.steps
        values: dict[str, float] = {}
        improved = False
        if final or state.step % config.log_every == 0:
            values.update(self.window.averages())
            if message := self.starvation.message(values):
                journal.message(message)
            values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            values["skipped_steps"] = state.skipped
            self.window = MetricWindow()
        if self.evaluate is not None and (
            final or (config.evaluate_every > 0 and state.step % config.evaluate_every == 0)
        ):
            result = self._evaluated(self.evaluate)
            values.update({f"evaluation/{name}": value for name, value in result.items()})
            improved = self._is_best(result)
        if values:
            recorded = finite_or_none(values)
            journal.record(state.step, recorded)
            state.metrics.update(recorded)
        else:
            journal.step(state.step)
        state.reported_step = state.step
        return improved

    def _evaluated(self, evaluate: Evaluate) -> dict[str, float]:
        self.task.eval()
        with preserved_random_state(), torch.no_grad(), self.accelerator.autocast(), self._averaged():
            result = evaluate(self.task, self.state.step)
        self.task.train()
        answer: dict[str, float] = from_main({name: float(value) for name, value in result.items()})
        return answer

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def _exported(self, task: nn.Module, folder: Path) -> None:
        if self.export is not None:
            with self._averaged():
                self.export(task, folder)

    def _is_best(self, result: dict[str, float]) -> bool:
        if self.monitor is None:
            return False
        if self.monitor not in result:
            raise ValueError(f"monitor={self.monitor!r} is not among the evaluated metrics: {', '.join(result)}")
        value, best = result[self.monitor], self.state.best_value
        if not math.isfinite(value) or (best is not None and value <= best):
            return False
        self.state.best_step, self.state.best_value = self.state.step, value
        return True

    def _save(self, journal: Journal) -> None:
        """Write a checkpoint on rank 0 with what every rank needs to continue; all ranks raise when it fails."""
        scaler = self.accelerator.scaler
        ranks = gathered({"random": random_state(), "window": self.window.state()})
        problem = None
        if self.accelerator.is_main_process:
            journal.flush()
            try:
                checkpoint.save_checkpoint(
                    self.checkpoints,
                    self.state,
                    task=self.task,
                    optimizer={
                        "optimizer": self.optimizer.state_dict(),
                        "scaler": scaler.state_dict() if scaler is not None else None,
                    },
                    ranks=ranks,
                    description=self.description,
                    average=self.average.tensors() if self.average is not None else None,
                    export=self._exported if self.export is not None else None,
                )
                checkpoint.prune(self.checkpoints, self.config.keep, self.state.best_step, self.config.milestone_every)
            except InputError as error:
                problem = str(error)
        if problem := from_main(problem):
            raise InputError(problem)
        self.saved = time.monotonic()

    def _outcome(self, received: int) -> Outcome:
        best = self.state.best_step
        return Outcome(
            step=self.state.step,
            stopped=bool(received),
            exit_code=exit_code(received),
            last=checkpoint.step_folder(self.checkpoints, self.state.step),
            best=checkpoint.step_folder(self.checkpoints, best) if best is not None else None,
            metrics=dict(self.state.metrics),
        )
