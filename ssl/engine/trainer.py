"""Train a task: steps, metrics, evaluation, checkpoints and resume, for pretraining and fine-tuning alike."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError, counted
from bocage.ssl.engine.checkpoint.reader import (
    checkpoint_to_resume,
    has_checkpoints,
    load_optimizer,
    load_task,
    load_tensors,
    read_state,
)
from bocage.ssl.engine.checkpoint.writer import CheckpointWriter, Export, TrainingState, step_folder
from bocage.ssl.engine.ema import MovingAverage, copy_weights, swapped_weights
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.health.bad_steps import RankDump, count_dumps, write_dump
from bocage.ssl.engine.health.rank_heartbeat import RankHeartbeat
from bocage.ssl.engine.logging.metrics import (
    CollapseMonitor,
    DataStarvationMonitor,
    ExplainedMonitor,
    FlopCounter,
    MetricWindow,
    ZeroLossMonitor,
    finite_or_none,
    loss_terms,
)
from bocage.ssl.engine.logging.profiling import profiled_steps
from bocage.ssl.engine.logging.provenance import digest, git_revision, library_versions, plain
from bocage.ssl.engine.logging.run_logger import RunLogger
from bocage.ssl.engine.logging.trackers import check_tracker
from bocage.ssl.engine.optim import ParameterGroups, build_optimizer, learning_rate_factor, set_learning_rate
from bocage.ssl.engine.parallel.block_compile import activation_checkpointing, compiled_blocks
from bocage.ssl.engine.parallel.distributed import (
    all_gather_object,
    all_reduce_max,
    broadcast_,
    broadcast_object,
    build_accelerator,
    gradient_sync,
    prepared_model,
    run_lock,
    run_on_all_ranks,
)
from bocage.ssl.engine.parallel.fsdp import full_tensor, gather_into, train_module_of
from bocage.ssl.engine.rng import preserved_random_state, random_state, restore_random_state
from bocage.ssl.engine.signals import StopSignals, exit_code

Evaluate = Callable[[nn.Module, int], dict[str, float]]
Draw = Callable[[nn.Module, int], dict[str, Path]]

logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """Source of training batches: one endless global order of samples.

    Attributes:
        batch_size: samples per batch, that is, per rank and micro-batch.
    """

    batch_size: int

    def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
        """Iterate over the batches of rank ``rank`` of ``world``, from sample ``position`` of the global order on.

        Each round of ``batch_size * world`` samples makes one batch for every rank.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of ``Trainer.fit``.

    Attributes:
        step: optimiser steps done.
        stopped: whether a signal ended the run early; the same call resumes it.
        exit_code: exit status for the process: 0, or 130 (SIGINT), 143 (SIGTERM), 138 (SIGUSR1).
        last: newest checkpoint.
        best: checkpoint with the highest monitored metric; None without a monitor.
        metrics: latest value of every recorded metric; None if it is not finite. Evaluated metrics have the prefix
            ``evaluation/``.
    """

    step: int
    stopped: bool
    exit_code: int
    last: Path
    best: Path | None
    metrics: dict[str, float | None]


class DivergenceError(InputError):
    """The loss or gradient was not finite in too many consecutive steps."""


class Trainer:
    """Train a task, or resume its training; call ``fit`` once.

    The calls are the same for a new run, a resumed run and a finished run, which returns at once. On the CPU in fp32,
    an interrupted and resumed run ends with the same bits as an uninterrupted one.

    Args:
        task: module with ``loss, logs = task(batch)``. The loss is a scalar. The logs have one-element tensors to
            record and feature vectors (N, C) whose spread is monitored, by name. Some parameters may get no gradient in
            some steps, but see ``EngineConfig.parallel``. Every rank must build the task with the same weights. If a
            sub-module has a method ``after_step()``, it is called after every update of the weights.
        source: source of the training batches.
        config: settings of the run.
        output: folder of the run, on a file system that all ranks share. Checkpoints and ``metrics.jsonl`` go there.
        recipe: name of the recipe, stored in checkpoints.
        resolved_config: resolved configuration, without keys that do not affect training. A resumed run must have the
            same values, except for ``provenance.CHANGEABLE_KEYS``. Secrets are replaced before it is written.
        evaluate: function of the bare task and the step that returns metrics. It runs on all ranks in evaluation mode,
            without gradients, in ``precision``; rank 0's result counts. It may use the global random generators, whose
            state is restored.
        draw: function of the same arguments that writes pictures and returns their paths by name, for the tracker. It
            runs on rank 0 at every evaluation. If it fails, training continues with a message.
        monitor: name of the evaluated metric, higher is better, that selects the best checkpoint.
        export: function that rank 0 calls at every save, with the bare task and an empty folder of the checkpoint,
            ``export/``.
        parameter_groups: function that replaces the default parameter groups, ``optim.decay_groups``.
        rebuild: information from which ``bocage replay`` rebuilds the task: ``command`` and ``config``. Dumps of bad
            steps contain it, without secrets.

    Raises:
        InputError: a package is missing, or the precision does not fit the device.
        ValueError: ``monitor`` without ``evaluate``.
    """

    # Set while `fit` runs.
    train_module: nn.Module  # the module that the optimiser updates: `task`, or a sharded copy
    model: nn.Module  # the train module in its DDP and autocast wrappers
    optimizer: Any
    average: MovingAverage | None
    signals: StopSignals
    state: TrainingState
    run_logger: RunLogger
    buffers: BufferSnapshot
    after_step_hooks: list[Callable[[], None]]
    dumps_left: int
    last_save: float  # time.monotonic()

    def __init__(
        self,
        task: nn.Module,
        source: BatchSource,
        config: EngineConfig,
        *,
        output: Path,
        recipe: str,
        resolved_config: Mapping[str, Any],
        evaluate: Evaluate | None = None,
        draw: Draw | None = None,
        monitor: str | None = None,
        export: Export | None = None,
        parameter_groups: ParameterGroups | None = None,
        rebuild: Mapping[str, Any] | None = None,
    ) -> None:
        if monitor is not None and evaluate is None:
            raise ValueError(f"monitor={monitor!r} needs evaluate")
        check_tracker(config.tracker)
        self.task = task
        self.source = source
        self.config = config
        self.output = output
        self.evaluate = evaluate
        self.draw = draw
        self.monitor = monitor
        self.parameter_groups = parameter_groups
        self.rebuild = plain(rebuild) if rebuild is not None else None

        self.accelerator = build_accelerator(config.precision, config.tracker, output, config.rank_timeout)
        set_seed(config.seed, device_specific=True)
        ranks = self.accelerator.num_processes
        self.sharded = config.parallel == "fsdp" and ranks > 1
        self.samples_per_step = source.batch_size * config.accumulation * ranks
        # CHANGEABLE_KEYS list engine.*, so the engine's settings get this name whatever the caller calls them.
        settings = plain({**resolved_config, "engine": asdict(config)})
        self.description = {
            "recipe": recipe,
            "config": settings,
            "config_sha256": digest(settings),
            "versions": library_versions(),
            "git": git_revision(),
            "ranks": ranks,
            "samples_a_step": self.samples_per_step,
        }

        self.writer = CheckpointWriter(
            output / "checkpoints",
            self.accelerator,
            keep_last=config.keep_last,
            milestone_every=config.milestone_every,
            sharded_optimizer=self.sharded and config.checkpoint == "sharded",
            export=export,
        )
        self.heartbeat = RankHeartbeat()
        self.window = MetricWindow()
        self.flop_counter = FlopCounter(self.accelerator.device, config.precision, compiled=config.compile != "none")
        self.collapse_monitor = CollapseMonitor(config.min_feature_std, config.min_rankme)
        self.explained_monitor = ExplainedMonitor(config.min_explained)
        self.zero_loss_monitor = ZeroLossMonitor()
        self.starvation_monitor = DataStarvationMonitor()

    def fit(self) -> Outcome:
        """Train to the last step or to a signal, from the newest checkpoint if there is one.

        After a finished run the task has the weights of the last step, or their moving average with
        ``engine.ema_decay``.

        Raises:
            InputError: the output holds a run of another configuration, another run writes there, or it cannot be
                written; or a rank is lost.
            DivergenceError: see ``EngineConfig.max_bad_steps``.
            ValueError: ``monitor`` is not among the metrics of ``evaluate``, or the task has no parameter to train.
        """
        with self.heartbeat.watch(), run_lock(self.output):
            folder = checkpoint_to_resume(self.writer.root, self.config, self.description)
            if folder is not None:
                load_task(folder, self.task)
            with self._prepared():
                if folder is not None:
                    self._resume(folder)
                signal_number = self._train()
                if not signal_number:
                    self._finalize()
            self.accelerator.wait_for_everyone()  # gloo aborts if a rank exits before the others
        best = self.state.best_step
        return Outcome(
            step=self.state.step,
            stopped=bool(signal_number),
            exit_code=exit_code(signal_number),
            last=step_folder(self.writer.root, self.state.step),
            best=step_folder(self.writer.root, best) if best is not None else None,
            metrics=dict(self.state.metrics),
        )

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Context with the train module, the optimiser, a fresh state and the signal handlers."""
        config = self.config
        with (
            train_module_of(self.task, self.sharded) as self.train_module,
            compiled_blocks(self.train_module, config.compile),
            activation_checkpointing(self.train_module, config.activation_checkpointing),
            prepared_model(self.accelerator, self.train_module, self.sharded) as self.model,
            StopSignals() as self.signals,
        ):
            optimizer = build_optimizer(
                self.train_module,
                config.optimizer,
                global_batch=self.samples_per_step,
                device=self.accelerator.device,
                parameter_groups=self.parameter_groups,
            )
            self.average = MovingAverage(self.train_module, config.ema_decay) if config.ema_decay else None
            self.optimizer = self.accelerator.prepare_optimizer(optimizer)
            self.state = TrainingState(run=broadcast_object(uuid.uuid4().hex[:12]))
            self.last_save = time.monotonic()
            yield

    def _resume(self, folder: Path) -> None:
        """Restore everything but the weights from a checkpoint. A rank without saved state keeps its fresh seed."""
        self.state, _ = read_state(folder)
        best = self.state.best_step
        if best is not None and not step_folder(self.writer.root, best).is_dir():
            self.state.best_step = self.state.best_value = None
        saved = load_tensors(folder / "optimizer.pt")
        load_optimizer(self.optimizer, saved["optimizer"], folder)
        if self.average is not None:
            self.average.load(folder)
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        ranks = load_tensors(folder / "ranks.pt")
        if self.accelerator.process_index < len(ranks):
            rank = ranks[self.accelerator.process_index]
            restore_random_state(rank["random"])
            self.window = MetricWindow.from_state(rank["window"], self.accelerator.device)

    def _train(self) -> int:
        """Run the steps; return the number of the signal that stopped them, or 0."""
        config, state, accelerator = self.config, self.state, self.accelerator
        if state.step >= config.steps and state.reported_step == state.step:
            if accelerator.is_main_process:
                logger.info("%s is complete: all %d steps are done", self.output, state.step)
            return 0
        signal_number = 0
        with ExitStack() as stack:
            self.run_logger = stack.enter_context(
                RunLogger(
                    accelerator,
                    self.output,
                    steps=config.steps,
                    step=state.step,
                    reported_step=state.reported_step,
                    tracker=config.tracker,
                    project=config.project,
                    run_id=state.run,
                    config=self.description["config"],
                )
            )
            batches = self.source.batches(state.position, accelerator.process_index, accelerator.num_processes)
            if hasattr(batches, "close"):
                stack.callback(batches.close)
            if state.step:
                self.run_logger.message(f"resuming at step {state.step} of {config.steps}")
            else:
                ranks = accelerator.num_processes
                self.run_logger.message(
                    f"{counted(config.steps, 'step')} of {counted(self.samples_per_step, 'sample')} on "
                    f"{counted(ranks, 'rank')} ({accelerator.device.type}, {config.precision}), a record every "
                    f"{config.log_every}"
                )
            if config.optimizer.warmup_steps > config.steps:
                self.run_logger.message(
                    f"the warm-up does not end: engine.optimizer.warmup_steps={config.optimizer.warmup_steps} exceeds "
                    f"engine.steps={config.steps}; lower it, e.g. to {config.steps // 10}"
                )
            self.train_module.train()
            hooks = (getattr(module, "after_step", None) for module in self.train_module.modules())
            self.after_step_hooks = [hook for hook in hooks if hook is not None]
            self.buffers = BufferSnapshot(self.train_module)
            self.dumps_left = broadcast_object(max(0, config.dump_bad_steps - count_dumps(self.output / "bad_steps")))
            profiled = profiled_steps(
                config.profile_steps if accelerator.is_main_process else 0,
                self.output / "profile",
                self.run_logger.message,
            )
            profiler_step = stack.enter_context(profiled)
            # A signal may have stopped the run after a step and before its record and evaluation.
            if state.reported_step < state.step and (self._report() or state.step >= config.steps):
                self._save()
            while state.step < config.steps:
                signal_number, time_to_save = self._train_step(batches)
                profiler_step()
                if signal_number:
                    self._save()
                    self.run_logger.message(
                        f"stopped at step {state.step} of {config.steps}, saved; the same command resumes"
                    )
                    break
                improved = self._report()
                if improved or time_to_save or self._save_is_due():
                    self._save()
            if state.skipped and state.step >= config.steps:
                self.run_logger.message(
                    f"{state.skipped} of {state.step} steps were skipped: loss or gradient was not finite"
                )
        return signal_number

    def _train_step(self, batches: Iterator[Batch]) -> tuple[int, bool]:
        """Run one optimiser step.

        Returns:
            Number of the signal to stop on, or 0, and whether ``save_minutes`` have passed; the same on all ranks.
        """
        config, state, accelerator = self.config, self.state, self.accelerator
        start, waited = time.perf_counter(), 0.0
        factor = learning_rate_factor(state.step, config.steps, config.optimizer)
        set_learning_rate(self.optimizer, factor, state.step)
        self.heartbeat.step = state.step + 1
        self.buffers.capture()
        losses, logs, dumped_batches, keys = [], [], list[Batch](), list[str]()
        random = random_state()
        for index in range(1, config.accumulation + 1):
            wait_start = time.perf_counter()
            # A DataLoader draws a seed from the global generator when it starts. A resumed run starts it at another
            # step than an uninterrupted one, and that must not change dropout.
            with preserved_random_state():
                cpu_batch = next(batches)
            keys += cpu_batch.keys
            if self.dumps_left:
                dumped_batches.append(cpu_batch)
            batch = cpu_batch.to(accelerator.device)
            waited += time.perf_counter() - wait_start
            if len(batch) != self.source.batch_size:
                raise RuntimeError(
                    f"the source returned a batch of {len(batch)} samples instead of {self.source.batch_size}"
                )
            # With FSDP every micro-batch must reduce its gradients, or each rank would keep full ones.
            last = index == config.accumulation
            with gradient_sync(accelerator, self.model, enabled=last or self.sharded):
                with self.flop_counter.count():
                    loss, terms = self.model(batch)
                accelerator.backward(loss / config.accumulation)
            losses.append(loss.detach().float())
            logs.append(terms)
        norm = accelerator.clip_grad_norm_(self.train_module.parameters(), config.clip_norm or math.inf)
        if self.sharded:
            norm = full_tensor(norm)
        loss = torch.stack(losses).mean()
        # The host waits for the device only here: all ranks decide together, before the update, whether to do it.
        bad, signal_number, time_to_save = all_reduce_max(
            accelerator,
            ~(torch.isfinite(loss) & torch.isfinite(norm)),
            torch.tensor(self.signals.received),
            torch.tensor(0 < config.save_minutes * 60 <= time.monotonic() - self.last_save),
        )
        loss_scale = 1.0
        if bad:
            self.buffers.restore()
            if accelerator.scaler is not None:
                loss_scale = accelerator.scaler.get_scale()
                accelerator.scaler.update()
        else:
            self.optimizer.step()
            for hook in self.after_step_hooks:
                hook()
            if self.average is not None:
                self.average.update()
            self.window.add({"loss": loss, "gradient_norm": norm})
            for terms in logs:
                self.window.add({name: value for name, value in terms.items() if name != "loss"})
        self.optimizer.zero_grad()
        samples = self.source.batch_size * config.accumulation
        state.step += 1
        state.position += samples * accelerator.num_processes
        self.window.add_step(samples, time.perf_counter() - start, waited)
        if bad:
            rank_losses = [finite_or_none({"loss": float(value)})["loss"] for value in losses]
            finite = math.isfinite(loss)
            dump = RankDump(accelerator.process_index, finite, rank_losses, dumped_batches, random)
            self._handle_bad_step(dump, keys, loss_scale)
        else:
            state.skipped_in_a_row = 0
        return signal_number, bool(time_to_save)

    def _handle_bad_step(self, dump: RankDump, keys: list[str], loss_scale: float) -> None:
        """Count, report and dump a skipped step, whose samples on this rank have these ``keys``."""
        state, limit = self.state, self.config.max_bad_steps
        state.skipped += 1
        state.skipped_in_a_row += 1
        ranks = all_gather_object((dump.finite, keys))
        causes = [
            f"loss is not finite on rank {rank} (samples {', '.join(rank_keys)})"
            for rank, (finite, rank_keys) in enumerate(ranks)
            if not finite
        ]
        self.run_logger.message(
            f"step {state.step}: {'; '.join(causes) or 'gradient is not finite'}; no update "
            f"({state.skipped_in_a_row} in a row)"
        )
        if self.dumps_left:
            self.dumps_left -= 1
            self._gather_weights()
            facts = {**self.description, "rebuild": self.rebuild, "scale": loss_scale}
            try:
                folder = write_dump(self.output / "bad_steps", state.step, self.task, dump, facts)
                self.run_logger.message(f"dumped step {state.step}; to find the cause: bocage replay {folder}")
            except InputError as error:  # training goes on without the dump
                self.run_logger.message(str(error))
        if state.skipped_in_a_row >= limit:
            raise DivergenceError(
                f"loss or gradient was not finite in {limit} steps in a row, up to step {state.step} of {self.output}: "
                "lower engine.optimizer.learning_rate or look for broken samples (bocage replay); "
                + (
                    "the weights before them are in the newest checkpoint"
                    if has_checkpoints(self.writer.root)
                    else "no checkpoint was written yet"
                )
            )

    def _report(self) -> bool:
        """Record metrics and evaluate if the step is due; return whether the monitored metric improved."""
        config, state = self.config, self.state
        final = state.step >= config.steps
        values: dict[str, float] = {}
        improved = False
        if final or state.step % config.log_every == 0:
            values.update(self._training_metrics())
        evaluation_due = final or (config.evaluate_every > 0 and state.step % config.evaluate_every == 0)
        if evaluation_due and (self.evaluate is not None or self.draw is not None):
            metrics = self._evaluate()
            values.update({f"evaluation/{name}": value for name, value in metrics.items()})
            improved = self._update_best(metrics)
        if values:
            record = finite_or_none(values)
            run_on_all_ranks(lambda: self.run_logger.record(state.step, record))
            state.metrics.update(record)
        else:
            self.run_logger.step(state.step)
        state.reported_step = state.step
        return improved

    def _training_metrics(self) -> dict[str, float]:
        """Average the metrics since the last record, warn where they look wrong, and start a new window."""
        step = self.state.step
        values = self.window.averages()
        if "step_seconds" in values:
            values.update(self.flop_counter.metrics(self.config.accumulation, values["step_seconds"]))
        terms = {name: values[name] for name in ("gradient_norm", *loss_terms(values)) if name in values}
        for warning in (
            *self.starvation_monitor.warnings(values),
            *self.collapse_monitor.warnings(values, step),
            *self.explained_monitor.warnings(values, step),
            *self.zero_loss_monitor.warnings(terms, step),
        ):
            self.run_logger.message(warning)
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["skipped_steps"] = self.state.skipped
        self.window = MetricWindow()
        return values

    def _evaluate(self) -> dict[str, float]:
        """Evaluate and draw pictures; return rank 0's metrics on all ranks."""
        step = self.state.step
        draw = self.draw if self.accelerator.is_main_process else None
        with preserved_random_state(), self._evaluation_mode():
            metrics = self.evaluate(self.task, step) if self.evaluate is not None else {}
            if draw is not None:
                try:
                    self.run_logger.pictures(step, draw(self.task, step))
                except Exception as error:  # training goes on without pictures
                    message = " ".join(str(error).split()) or type(error).__name__
                    self.run_logger.message(f"step {step}: pictures could not be drawn: {message}")
        shared: dict[str, float] = broadcast_object({name: float(value) for name, value in metrics.items()})
        return shared

    def _update_best(self, metrics: dict[str, float]) -> bool:
        if self.monitor is None:
            return False
        if self.monitor not in metrics:
            raise ValueError(f"monitor={self.monitor!r} is not among the evaluated metrics: {', '.join(metrics)}")
        value, best = metrics[self.monitor], self.state.best_value
        if not math.isfinite(value) or (best is not None and value <= best):
            return False
        self.state.best_step, self.state.best_value = self.state.step, value
        return True

    def _save_is_due(self) -> bool:
        step, config = self.state.step, self.config
        intervals = (config.save_every, config.milestone_every)
        return step == config.steps or any(every > 0 and step % every == 0 for every in intervals)

    def _save(self) -> None:
        run_on_all_ranks(self.run_logger.flush)
        self._gather_weights()
        folder = self.writer.save(
            self.state,
            task=self.task,
            optimizer=self.optimizer,
            average=self.average,
            window=self.window.state(),
            description=self.description,
        )
        self.run_logger.link(self.state.step, "checkpoint", folder)
        self.last_save = time.monotonic()

    def _gather_weights(self) -> None:
        """Bring ``task`` up to date, with rank 0's running statistics on all ranks (a collective).

        Without FSDP ``task`` is the train module, and its weights are not copied.
        """
        persistent = self.train_module.state_dict(keep_vars=True)
        for name, buffer in self.train_module.named_buffers():
            if name in persistent:
                broadcast_(buffer)
        if self.sharded:
            gather_into(self.train_module, self.task)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Context with ``task`` ready for evaluation. All ranks enter together; inside, no collective is needed."""
        self._gather_weights()
        averages = self.average.tensors() if self.average is not None else None
        self.task.to(self.accelerator.device).eval()
        with torch.no_grad(), self.accelerator.autocast(), swapped_weights(self.task, averages):
            yield
        if self.sharded:
            self.task.to("cpu")  # the device has the shards; full weights are there only during evaluation
        else:
            self.task.train()

    def _finalize(self) -> None:
        """Leave ``task`` on its device with the final weights (a collective)."""
        self._gather_weights()
        self.task.to(self.accelerator.device)
        if self.average is not None:
            copy_weights(self.task, self.average.tensors())


class BufferSnapshot:
    """Copy of a module's persistent buffers: a bad batch changes running statistics during the forward pass."""

    def __init__(self, module: nn.Module) -> None:
        persistent = module.state_dict().keys()
        self._buffers = [
            (submodule, name)
            for prefix, submodule in module.named_modules()
            for name, _ in submodule.named_buffers(recurse=False)
            if (f"{prefix}.{name}" if prefix else name) in persistent
        ]
        self._values: list[torch.Tensor] = []

    def capture(self) -> None:
        """Copy the buffers, before a step."""
        self._values = [getattr(submodule, name).clone() for submodule, name in self._buffers]

    def restore(self) -> None:
        """Set the buffers to the copies, after a bad step."""
        for (submodule, name), value in zip(self._buffers, self._values, strict=True):
            getattr(submodule, name).copy_(value)
