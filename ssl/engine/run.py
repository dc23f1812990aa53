"""One run in progress: steps, and when to report, evaluate and save."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.ssl.engine.checkpoint import files as checkpoint
from bocage.ssl.engine.checkpoint.files import TrainingState
from bocage.ssl.engine.checkpoint.optimizer_state import load_optimizer
from bocage.ssl.engine.checkpoint.saving import Export, save
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.health.bad_steps import RankDump, count_dumps, write_dump
from bocage.ssl.engine.health.buffer_snapshot import BufferSnapshot
from bocage.ssl.engine.health.collapse import CollapseMonitor
from bocage.ssl.engine.health.monitors import DataStarvationMonitor, ZeroLossMonitor
from bocage.ssl.engine.health.rank_heartbeat import RankHeartbeat
from bocage.ssl.engine.logging.flops import FlopCounter
from bocage.ssl.engine.logging.profiling import profiled
from bocage.ssl.engine.logging.run_logger import MetricWindow, RunLogger, finite_or_none, terms_of
from bocage.ssl.engine.optim import learning_rate_factor, set_learning_rate
from bocage.ssl.engine.parallel.distributed import (
    all_gather_object,
    all_reduce_max,
    broadcast_object,
    micro_batch,
    run_on_all_ranks,
)
from bocage.ssl.engine.parallel.fsdp import full_tensor
from bocage.ssl.engine.rng import preserved_random_state, random_state, restore_random_state
from bocage.ssl.engine.signals import StopSignals, exit_code
from bocage.ssl.engine.weights import Weights

Evaluate = Callable[[nn.Module, int], dict[str, float]]
Draw = Callable[[nn.Module, int], dict[str, Path]]


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


@dataclass(kw_only=True)
class Run:
    """One run in progress: what its steps, reports and saves share; made by ``loop.train``."""

    accelerator: Accelerator
    weights: Weights
    model: nn.Module
    optimizer: Any
    config: EngineConfig
    output: Path
    description: dict[str, Any]
    rebuild: dict[str, Any] | None
    evaluate: Evaluate | None
    draw: Draw | None
    monitor: str | None
    export: Export | None
    signals: StopSignals
    peers: RankHeartbeat
    state: TrainingState
    window: MetricWindow
    arithmetic: FlopCounter
    collapse: CollapseMonitor
    starvation: DataStarvationMonitor = field(default_factory=DataStarvationMonitor)
    idleness: ZeroLossMonitor = field(default_factory=ZeroLossMonitor)
    followers: list[Callable[[], None]] = field(default_factory=list)
    dumps_left: int = 0
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
        if self.weights.average is not None:
            self.weights.average.load(folder)
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
            journal = stack.enter_context(
                RunLogger(
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
            )
            batches = source.batches(state.position, self.accelerator.process_index, self.accelerator.num_processes)
            if hasattr(batches, "close"):
                stack.callback(batches.close)
            if state.step:
                journal.message(f"resuming at step {state.step} of {config.steps}")
            else:
                ranks = self.accelerator.num_processes
                journal.message(
                    f"{config.steps} steps of {self.description['samples_a_step']} samples on {ranks} rank"
                    f"{'s' * (ranks > 1)} ({self.accelerator.device.type}, {config.precision}), a record every "
                    f"{config.log_every}"
                )
            self.weights.learner.train()
            parts = (getattr(module, "after_step", None) for module in self.weights.learner.modules())
            self.followers = [follow for follow in parts if follow is not None]
            self.dumps_left = broadcast_object(max(0, config.dump_bad_steps - count_dumps(self.output / "bad_steps")))
            buffers = BufferSnapshot(self.weights.learner)
            profiling = profiled(config.profile_steps if main else 0, self.output / "profile", journal.message)
            step_is_done = stack.enter_context(profiling)
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
            if state.skipped and state.step >= config.steps:
                journal.message(f"{state.skipped} of {state.step} steps were left out: loss or gradient was not finite")
        return self._outcome(received)

    def _step(
        self, batches: Iterator[Batch], batch_size: int, buffers: BufferSnapshot, journal: RunLogger
    ) -> tuple[int, bool]:
        """One optimiser step; what all ranks agree on: the signal to stop on, or 0, and whether it is time to save."""
        config, state, accelerator = self.config, self.state, self.accelerator
        began, waited = time.perf_counter(), 0.0
        set_learning_rate(self.optimizer, learning_rate_factor(state.step, config.steps, config.optimizer))
        self.peers.step = state.step + 1
        buffers.remember()
        losses, logs, given, keys = [], [], list[Batch](), list[str]()
        random = random_state()
        for index in range(1, config.accumulation + 1):
            asked = time.perf_counter()
            # A DataLoader draws a seed from the global generator whenever it starts: a resumed run starts it at
            # another step than an undisturbed one, and its dropout must not notice.
            with preserved_random_state():
                taken = next(batches)
            keys += taken.keys
            if self.dumps_left:
                given.append(taken)
            batch = taken.to(accelerator.device)
            waited += time.perf_counter() - asked
            if len(batch) != batch_size:
                raise RuntimeError(f"the source gave a batch of {len(batch)} samples; it promised {batch_size}")
            with micro_batch(accelerator, self.model, last=index == config.accumulation):
                with self.arithmetic.counted():
                    loss, terms = self.model(batch)
                accelerator.backward(loss / config.accumulation)
            losses.append(loss.detach().float())
            logs.append(terms)
        norm = full_tensor(accelerator.clip_grad_norm_(self.weights.learner.parameters(), config.clip_norm or math.inf))
        loss = torch.stack(losses).mean()
        # The one wait of the host for the device in a step: whether to update is decided by all ranks, before it.
        bad, received, late = all_reduce_max(
            accelerator,
            ~(torch.isfinite(loss) & torch.isfinite(norm)),
            torch.tensor(self.signals.received),
            torch.tensor(0 < config.save_minutes * 60 <= time.monotonic() - self.saved),
        )
        scale = 1.0
        if bad:
            buffers.restore()
            if accelerator.scaler is not None:
                scale = accelerator.scaler.get_scale()
                accelerator.scaler.update()
        else:
            self.optimizer.step()
            for follow in self.followers:
                follow()
            if self.weights.average is not None:
                self.weights.average.update()
            self.window.add({"loss": loss, "gradient_norm": norm})
            for terms in logs:
                self.window.add({name: value for name, value in terms.items() if name != "loss"})
        self.optimizer.zero_grad()
        samples = batch_size * config.accumulation
        state.step += 1
        state.position += samples * accelerator.num_processes
        self.window.add_step(samples, time.perf_counter() - began, waited)
        if bad:
            told = [finite_or_none({"": float(value)})[""] for value in losses]
            own = RankDump(accelerator.process_index, math.isfinite(loss), told, given, random)
            self._bad_step(own, keys, scale, journal)
        else:
            state.skipped_in_a_row = 0
        return received, bool(late)

    def _bad_step(self, own: RankDump, keys: list[str], scale: float, journal: RunLogger) -> None:
        """Count, name and keep a step without update; ``own`` is what this rank had, ``scale`` that of its loss."""
        state, limit = self.state, self.config.max_bad_steps
        state.skipped += 1
        state.skipped_in_a_row += 1
        ranks = all_gather_object((own.finite, keys))
        what = [
            f"loss is not finite on rank {rank} (samples {', '.join(keys)})"
            for rank, (finite, keys) in enumerate(ranks)
            if not finite
        ]
        journal.message(
            f"step {state.step}: {'; '.join(what) or 'gradient is not finite'}; no update "
            f"({state.skipped_in_a_row} in a row)"
        )
        facts = {**self.description, "rebuild": self.rebuild, "scale": scale}
        if self.dumps_left:
            self.dumps_left -= 1
            try:
                kept = write_dump(self.output / "bad_steps", state.step, self.weights, own, facts)
                journal.message(f"what it had is kept: bocage replay {kept}")
            except InputError as error:  # training matters more
                journal.message(str(error))
        if state.skipped_in_a_row >= limit:
            raise DivergenceError(
                f"loss or gradient was not finite in {limit} steps in a row, up to step {state.step} of {self.output}: "
                "lower engine.optimizer.learning_rate or look for broken samples (bocage replay); "
                + (
                    "the weights before them are in the newest checkpoint"
                    if checkpoint.has_checkpoints(self.checkpoints)
                    else "no checkpoint was written yet"
                )
            )

    def _report(self, journal: RunLogger) -> bool:
        """Record and evaluate what is due after a step; returns whether the monitored metric is the best so far."""
        config, state = self.config, self.state
        final = state.step >= config.steps
        values: dict[str, float] = {}
        improved = False
        if final or state.step % config.log_every == 0:
            values.update(self.window.averages())
            if "step_seconds" in values:
                values.update(self.arithmetic.figures(config.accumulation, values["step_seconds"]))
            watched = {name: values[name] for name in ("gradient_norm", *terms_of(values)) if name in values}
            for message in (
                *self.starvation.messages(values),
                *self.collapse.messages(values, state.step),
                *self.idleness.messages(watched, state.step),
            ):
                journal.message(message)
            values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            values["skipped_steps"] = state.skipped
            self.window = MetricWindow()
        due = final or (config.evaluate_every > 0 and state.step % config.evaluate_every == 0)
        if due and (self.evaluate is not None or self.draw is not None):
            result = self._evaluated(journal)
            values.update({f"evaluation/{name}": value for name, value in result.items()})
            improved = self._is_best(result)
        if values:
            recorded = finite_or_none(values)
            run_on_all_ranks(lambda: journal.record(state.step, recorded))
            state.metrics.update(recorded)
        else:
            journal.step(state.step)
        state.reported_step = state.step
        return improved

    def _evaluated(self, journal: RunLogger) -> dict[str, float]:
        """What evaluation measures; pictures are drawn on the way."""
        draw = self.draw if self.accelerator.is_main_process else None
        with preserved_random_state(), self.weights.evaluated() as task:
            result = self.evaluate(task, self.state.step) if self.evaluate is not None else {}
            if draw is not None:
                try:
                    journal.pictures(self.state.step, draw(task, self.state.step))
                except Exception as error:  # training matters more
                    what = " ".join(str(error).split()) or type(error).__name__
                    journal.message(f"step {self.state.step}: pictures could not be drawn: {what}")
        answer: dict[str, float] = broadcast_object({name: float(value) for name, value in result.items()})
        return answer

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

    def _save(self, journal: RunLogger) -> None:
        run_on_all_ranks(journal.flush)
        save(
            self.checkpoints,
            self.state,
            self.weights,
            self.optimizer,
            window=self.window.state(),
            description=self.description,
            config=self.config,
            export=self.export,
        )
        journal.link(self.state.step, "checkpoint", checkpoint.step_folder(self.checkpoints, self.state.step))
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
