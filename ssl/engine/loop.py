"""The one training loop: pretraining objectives and fine-tuning tasks differ only in ``loss, logs = task(batch)``."""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
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
from bocage.ssl.engine.collapse import Collapse
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.distributed import (
    build_accelerator,
    from_main,
    gathered,
    largest,
    micro_batch,
    prepared,
)
from bocage.ssl.engine.dumps import RankDump, write_dump
from bocage.ssl.engine.ema import MovingAverage
from bocage.ssl.engine.flops import Arithmetic
from bocage.ssl.engine.fsdp import learner_of, whole
from bocage.ssl.engine.optim import ParameterGroups, build_optimizer, learning_rate_factor, set_learning_rate
from bocage.ssl.engine.optimizer_state import load_optimizer
from bocage.ssl.engine.peers import Peers
from bocage.ssl.engine.profiling import profiled
from bocage.ssl.engine.provenance import digest, git_revision, library_versions, plain
from bocage.ssl.engine.randomness import preserved_random_state, random_state, restore_random_state
from bocage.ssl.engine.regions import compiled, recomputed
from bocage.ssl.engine.resume import checkpoint_to_resume, claimed
from bocage.ssl.engine.saving import Export, save
from bocage.ssl.engine.signals import StopSignals, exit_code
from bocage.ssl.engine.tracking import Journal, MetricWindow, check_tracker, finite_or_none
from bocage.ssl.engine.weights import Weights

Evaluate = Callable[[nn.Module, int], dict[str, float]]


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
        monitor: the name of an evaluated metric, the higher the better, that selects the best checkpoint.
        export: called on rank 0 at every save with the bare task and an empty folder of the checkpoint, ``export/``.
        parameter_groups: replaces the default groups of ``optim.decay_groups``.
        rebuild: what ``bocage replay`` needs to build the task again, kept with dumps of bad steps without secrets:
            ``command`` and ``config``.

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
    peers = Peers()
    with peers.watched(), claimed(output):
        folder = checkpoint_to_resume(output / "checkpoints", config, description, accelerator)
        if folder is not None:
            checkpoint.load_task(folder, task)
        with (
            learner_of(task, divides) as learner,
            compiled(learner, config.compile),
            recomputed(learner, config.activation_checkpointing),
            prepared(accelerator, learner, divides) as model,
            StopSignals() as signals,
        ):
            optimizer = build_optimizer(
                learner,
                config.optimizer,
                global_batch=description["samples_a_step"],
                device=accelerator.device,
                parameter_groups=parameter_groups,
            )
            run = _Run(
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
                monitor=monitor,
                export=export,
                signals=signals,
                peers=peers,
                state=TrainingState(run=from_main(uuid.uuid4().hex[:12])),
                window=MetricWindow(),
                arithmetic=Arithmetic(accelerator.device, config.precision, compiled=config.compile != "none"),
                collapse=Collapse(config.least_feature_std, config.least_rankme),
            )
            if folder is not None:
                run.restore(folder)
            outcome = run.go(source)
            if not outcome.stopped:
                run.weights.hand_over()
        accelerator.wait_for_everyone()  # ranks leave together: gloo aborts when a peer goes first
    return outcome


@dataclass(kw_only=True)
class _Run:
    """One run in progress: what its steps, reports and saves share."""

    accelerator: Accelerator
    weights: Weights
    model: nn.Module
    optimizer: Any
    config: EngineConfig
    output: Path
    description: dict[str, Any]
    rebuild: dict[str, Any] | None
    evaluate: Evaluate | None
    monitor: str | None
    export: Export | None
    signals: StopSignals
    peers: Peers
    state: TrainingState
    window: MetricWindow
    arithmetic: Arithmetic
    collapse: Collapse
    starvation: Starvation = field(default_factory=Starvation)
    followers: list[Callable[[], None]] = field(default_factory=list)
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
            self.weights.learner.train()
            parts = (getattr(module, "after_step", None) for module in self.weights.learner.modules())
            self.followers = [follow for follow in parts if follow is not None]
            buffers = Buffers(self.weights.learner)
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
        losses, logs, given = [], [], list[Batch]()
        random = random_state()
        for index in range(1, config.accumulation + 1):
            asked = time.perf_counter()
            # A DataLoader draws a seed from the global generator whenever it starts: a resumed run starts it at
            # another step than an undisturbed one, and its dropout must not notice.
            with preserved_random_state():
                given.append(next(batches))
            batch = given[-1].to(accelerator.device)
            waited += time.perf_counter() - asked
            if len(batch) != batch_size:
                raise RuntimeError(f"the source gave a batch of {len(batch)} samples; it promised {batch_size}")
            with micro_batch(accelerator, self.model, last=index == config.accumulation):
                with self.arithmetic.counted():
                    loss, terms = self.model(batch)
                accelerator.backward(loss / config.accumulation)
            losses.append(loss.detach().float())
            logs.append(terms)
        norm = whole(accelerator.clip_grad_norm_(self.weights.learner.parameters(), config.clip_norm or math.inf))
        loss = torch.stack(losses).mean()
        # The one wait of the host for the device in a step: whether to update is decided by all ranks, before it.
        bad, received, late = largest(
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
            self._bad_step(own, scale, journal)
        else:
            state.skipped_in_a_row = 0
        return received, bool(late)

    def _bad_step(self, own: RankDump, scale: float, journal: Journal) -> None:
        """Count, name and keep a step without update; ``own`` is what this rank had, ``scale`` that of its loss."""
        state, limit = self.state, self.config.max_bad_steps
        state.skipped += 1
        state.skipped_in_a_row += 1
        ranks = gathered((own.finite, [key for batch in own.batches for key in batch.keys]))
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
        try:
            kept = write_dump(
                self.output / "bad_steps", state.step, self.weights, own, limit=self.config.dump_bad_steps, facts=facts
            )
            if kept is not None:
                journal.message(f"what it had is kept: bocage replay {kept}")
        except InputError as error:  # training matters more
            journal.message(str(error))
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
            if "step_seconds" in values:
                values.update(self.arithmetic.figures(config.accumulation, values["step_seconds"]))
            for message in (*self.starvation.messages(values), *self.collapse.messages(values)):
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
        with preserved_random_state(), self.weights.evaluated() as task:
            result = evaluate(task, self.state.step)
        answer: dict[str, float] = from_main({name: float(value) for name, value in result.items()})
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

    def _save(self, journal: Journal) -> None:
        journal.flush()
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
