"""Configuration of the training loop."""

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
    """How to train. The batch size belongs to the source of batches.

    Attributes:
        steps: optimiser steps of the whole run.
        accumulation: micro-batches a rank averages the gradient over in each step. It multiplies the batch of losses
            that are means over samples; it adds no negatives to contrastive ones.
        precision: of the forward pass; weights and optimiser stay float32.
        compile: backend of ``torch.compile`` for the blocks that the model repeats; ``none`` runs them as they are.
        parallel: ``ddp`` gives each rank all weights; ``fsdp`` (FSDP2) divides weights, gradients and optimiser state
            among them, for models that do not fit beside their activations. Tasks must use the same
            weights on every rank in every step, as pretraining and fine-tuning do.
        checkpoint: with ``fsdp``, ``sharded`` has every rank write its part of the optimiser's state into a file of its
            own; ``full`` gathers it on rank 0. Weights are always whole, and either resumes on any number of ranks,
            under ``ddp`` too.
        activation_checkpointing: Swin encoders compute the activations of their blocks again in the backward pass: less
            memory for about a third more time.
        clip_norm: largest norm of the whole gradient; 0 does not clip.
        seed: of the global random generators; rank r uses ``seed + r``.
        optimizer: see ``OptimizerConfig``.
        ema_decay: decay per step of a moving average of weights and running statistics, in [0, 1); evaluation, exports
            and what the run ends with use it. It spans about ``1 / (1 - ema_decay)`` steps; 0 keeps none.
        resume: ``auto`` continues from the newest intact checkpoint of the output folder; ``never`` starts anew and
            refuses a folder that has checkpoints.
        resume_allow: keys of the configuration, ``*`` standing for any text, that a resumed run may change although
            they matter, e.g. ``[engine.optimizer.*]``; changes of other keys are refused.
        save_every: steps between checkpoints; 0 saves only the last, the best and what a signal stops.
        save_minutes: minutes after which a checkpoint is written whatever the step; 0 leaves that to ``save_every``.
        keep: newest checkpoints to keep, beside the best one and milestones.
        milestone_every: checkpoints of multiples of so many steps are kept for good; 0 keeps none. They are written
            also where ``save_every`` would not.
        log_every: steps between records of the metrics.
        evaluate_every: steps between evaluations; 0 evaluates only at the end.
        max_bad_steps: abort after so many steps in a row whose loss or gradient is not finite.
        dump_bad_steps: bad steps of a run whose weights, batches and random state are kept in ``output/bad_steps`` for
            ``bocage replay``; 0 keeps none.
        least_feature_std, least_rankme: a message tells when the features of an encoder vary less than that between
            places in three records in a row over at least 100 steps (``collapse.feature_std``, 1 when spread evenly;
            ``collapse.rankme``); 0 never tells.
        profile_steps: steps of rank 0 that torch's profiler records, from the fourth of the process on, into
            ``output/profile``; 0 records none.
        rank_timeout: seconds after which ranks give up waiting for one that is dead or hangs, and name it; longer than
            any save or evaluation, during which the others wait for rank 0.
        tracker: ``metrics.jsonl`` is always written; ``wandb`` (offline when there is no API key) and ``tensorboard``
            come in addition.
        project: name of the tracker's project.

    Raises:
        ValueError: a number out of its range, an unknown choice, or choices that exclude each other.
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
    keep: int = 2
    milestone_every: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    max_bad_steps: int = 10
    dump_bad_steps: int = 3
    least_feature_std: float = 0.05
    least_rankme: float = 2.0
    profile_steps: int = 0
    rank_timeout: float = 1800.0
    tracker: TrackerName = "none"
    project: str = "bocage"

    def __post_init__(self) -> None:
        for key in ("steps", "accumulation", "keep", "log_every", "max_bad_steps"):
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
            "least_feature_std",
            "least_rankme",
            "profile_steps",
        ):
            if not getattr(self, key) >= 0:
                raise ValueError(f"engine.{key} must not be negative, not {getattr(self, key)}")
        if not self.rank_timeout > 0:
            raise ValueError(f"engine.rank_timeout is in seconds and positive, not {self.rank_timeout}")
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
            raise ValueError(f"engine.project={self.project!r} is not a plain name: it is W&B's project and a folder")
        if self.checkpoint == "sharded" and self.parallel != "fsdp":
            raise ValueError("engine.checkpoint=sharded needs engine.parallel=fsdp: without it nothing is divided")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"engine.optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds engine.steps ({self.steps}): "
                "lower it, e.g. engine.optimizer.warmup_steps=0"
            )
