"""Configuration of the engine: the keys ``engine.*`` of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from bocage.ssl.engine.logging.trackers import TrackerName
from bocage.ssl.engine.optim import OptimizerConfig
from bocage.ssl.engine.parallel.block_compile import COMPILE_BACKENDS, CompileBackend
from bocage.ssl.engine.parallel.distributed import Precision


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of a training run. The batch size belongs to the source of batches.

    Attributes:
        steps: optimiser steps of the whole run.
        accumulation: micro-batches per step and rank, whose gradients are averaged. It enlarges the batch of losses
            that are means over samples; it adds no negatives to contrastive losses.
        precision: precision of the forward pass; weights and optimiser state stay float32.
        compile: backend of ``torch.compile`` for the repeated blocks of the model; ``none``: no compilation.
        parallel: ``ddp`` replicates the weights on every rank; ``fsdp`` (FSDP2) shards weights, gradients and optimiser
            state over ranks, for models that do not fit beside their activations. With ``fsdp`` a task must use the
            same weights on every rank in every step, as pretraining and fine-tuning do.
        checkpoint: format of the optimiser state with ``fsdp``. With ``sharded`` each rank writes its shard to its own
            file; with ``full`` rank 0 writes the gathered state. Weights are always saved in full. Either format
            resumes on any number of ranks, and under ``ddp``.
        activation_checkpointing: whether Swin encoders recompute activations in the backward pass: less memory for
            about a third more time.
        clip_norm: maximum norm of the whole gradient; 0: no clipping.
        seed: seed of the global random generators; rank r uses ``seed + r``.
        optimizer: optimiser and learning-rate schedule.
        ema_decay: decay per step of an exponential moving average of weights and running statistics, in [0, 1); 0: no
            average. It spans about ``1 / (1 - ema_decay)`` steps. Evaluation, exports and the finished run use it.
        resume: ``auto`` continues from the newest intact checkpoint of the output folder; ``never`` starts a new run
            and refuses a folder with checkpoints.
        resume_allow: keys of the configuration that a resumed run may change although they affect training, e.g.
            ``[engine.optimizer.*]``; ``*`` stands for any text. Changes of other keys are refused.
        save_every: steps between checkpoints; 0 saves only at the end, at the best evaluation and on a signal.
        save_minutes: minutes between checkpoints, whatever the step; 0: only ``save_every`` counts.
        keep_last: number of newest checkpoints to keep, beside the best one and the milestones.
        milestone_every: steps between checkpoints that are never deleted; 0: none. They are written even where
            ``save_every`` would not write one.
        log_every: steps between records of the metrics.
        evaluate_every: steps between evaluations; 0 evaluates only at the end.
        max_bad_steps: consecutive steps with a non-finite loss or gradient after which the run aborts.
        dump_bad_steps: number of bad steps per run whose weights, batches and random state go to ``output/bad_steps``
            for ``bocage replay``; 0: none.
        min_feature_std, min_rankme: smallest healthy spread (``metrics.feature_std``, 1 when spread evenly) and
            effective rank (``metrics.rankme``) of an encoder's features. Lower values in three consecutive records over
            at least 100 steps print a warning; 0: no warning.
        min_explained: smallest healthy value of ``explained``, 1 - loss / loss of the best constant. Lower values in
            all records of 500 steps print a warning; 0: no warning.
        profile_steps: steps of rank 0 that torch's profiler records in ``output/profile``, from the fourth step of the
            process on; 0: none.
        rank_timeout: seconds after which ranks stop waiting for a dead or hanging rank, and name it. It must exceed
            every save and evaluation, during which other ranks wait for rank 0.
        tracker: experiment tracker beside ``metrics.jsonl``, which is always written: ``wandb`` (offline without an API
            key), ``tensorboard`` or ``none``.
        project: name of the tracker's project.

    Raises:
        ValueError: a number out of range, an unknown choice, or choices that exclude each other.
    """

    steps: int = 10_000
    accumulation: int = 1
    precision: Precision = "fp32"
    compile: CompileBackend = "none"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpoint: Literal["full", "sharded"] = "full"
    activation_checkpointing: bool = False
    clip_norm: float = 1.0
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float = 0.0
    resume: Literal["auto", "never"] = "auto"
    resume_allow: list[str] = field(default_factory=list)
    save_every: int = 1000
    save_minutes: float = 0.0
    keep_last: int = 2
    milestone_every: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    max_bad_steps: int = 10
    dump_bad_steps: int = 3
    min_feature_std: float = 0.05
    min_rankme: float = 2.0
    min_explained: float = 0.05
    profile_steps: int = 0
    rank_timeout: float = 1800.0
    tracker: TrackerName = "none"
    project: str = "bocage"

    def __post_init__(self) -> None:
        for key in ("steps", "accumulation", "keep_last", "log_every", "max_bad_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"engine.{key} must be at least 1, not {getattr(self, key)}")
        for key in (
            "clip_norm",
            "seed",
            "save_every",
            "save_minutes",
            "milestone_every",
            "evaluate_every",
            "dump_bad_steps",
            "min_feature_std",
            "min_rankme",
            "min_explained",
            "profile_steps",
        ):
            if not getattr(self, key) >= 0:
                raise ValueError(f"engine.{key} must not be negative, not {getattr(self, key)}")
        if not self.rank_timeout > 0:
            raise ValueError(f"engine.rank_timeout must be a positive number of seconds, not {self.rank_timeout}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"engine.ema_decay must be in [0, 1), not {self.ema_decay}")
        for key, allowed in (
            ("precision", ("fp32", "bf16", "fp16")),
            ("compile", COMPILE_BACKENDS),
            ("parallel", ("ddp", "fsdp")),
            ("checkpoint", ("full", "sharded")),
            ("resume", ("auto", "never")),
            ("tracker", ("none", "wandb", "tensorboard")),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"engine.{key} must be one of {', '.join(allowed)}, not {getattr(self, key)!r}")
        if not re.fullmatch(r"[\w. -]{1,128}", self.project):
            raise ValueError(
                f"engine.project={self.project!r} is not a plain name: it names W&B's project and a folder"
            )
        if self.checkpoint == "sharded" and self.parallel != "fsdp":
            raise ValueError("engine.checkpoint=sharded needs engine.parallel=fsdp: ddp has no optimiser shards")
