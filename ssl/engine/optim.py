"""Build the optimiser (AdamW or LARS), its parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from bocage.shards.errors import InputError

OptimizerName = Literal["adamw", "lars"]
Schedule = Literal["cosine", "one_cycle"]
_ONE_CYCLE = (1e-3, 1e-7)  # first and last rate of one_cycle, as fractions of the peak
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
# Fused AdamW on the CPU is several times faster, and gives the same bits in every run and for any number of threads.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
ParameterGroups = Callable[[nn.Module], list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or LARS with linear warm-up and a cosine schedule (arXiv 1608.03983).

    Attributes:
        name: ``adamw`` (Loshchilov & Hutter, arXiv 1711.05101), or ``lars`` (You et al., arXiv 1708.03888) for global
            batches of thousands. LARS needs learning rates about a thousand times as high. It does not scale the step
            of parameters without weight decay.
        learning_rate: peak learning rate, reached at the end of the warm-up.
        base_batch_size: global batch size, in samples, for which ``learning_rate`` is set. The peak rate scales
            linearly with the batch of a step over all ranks and micro-batches (Goyal et al., arXiv 1706.02677).
            0: no scaling.
        layer_decay: factor of the learning rate from each layer of an encoder to the layer below. Modules on top of the
            encoders keep the full rate (Clark et al., arXiv 2003.10555; Bao et al., arXiv 2106.08254). 1: off.
        weight_decay: decoupled weight decay of weight matrices and kernels; see ``decay_groups`` for the exceptions.
        betas: coefficients of AdamW's moving averages; LARS takes the first as momentum and ignores the second.
        decay_all: whether biases, norm scales and tables decay too, as in the official FLAIR-HUB code.
        schedule: ``cosine`` after a linear warm-up; or ``one_cycle``, which warms up along a cosine from a thousandth
            of the peak and ends at a ten-millionth of it (Smith & Topin, arXiv 1708.07120, with the numbers of the
            official FLAIR-HUB code).
        warmup_steps: optimiser steps of warm-up. A run with fewer steps ends before the peak, with a warning.
        min_lr_ratio: last learning rate of ``cosine``, as a fraction of ``learning_rate``.

    Raises:
        ValueError: an unknown name or schedule, a number out of range, or ``one_cycle`` with ``min_lr_ratio``.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    base_batch_size: int = 0
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    decay_all: bool = False
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, not {self.name!r}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"optimizer.schedule must be one of {', '.join(get_args(Schedule))}, not {self.schedule!r}"
            )
        if self.schedule == "one_cycle" and self.min_lr_ratio:
            raise ValueError("optimizer.min_lr_ratio applies to schedule=cosine only: one_cycle has its own last rate")
        if self.base_batch_size < 0:
            raise ValueError(f"optimizer.base_batch_size must not be negative, not {self.base_batch_size}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay must be in (0, 1], not {self.layer_decay}")
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), not {self.betas}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must not be negative, not {self.warmup_steps}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio must be a fraction in [0, 1], not {self.min_lr_ratio}")


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of update ``step`` (0, 1, ..., steps - 1) as a fraction of the peak rate.

    The rate depends on the step only, so there is no scheduler state to save. ``OptimizerConfig`` cites the schedules.
    """
    if config.schedule == "one_cycle":
        # Like torch's OneCycleLR, this reaches the peak at the last step of the warm-up.
        peak = config.warmup_steps - 1
        if step < peak:
            return _cosine(_ONE_CYCLE[0], 1.0, step / peak)
        return _cosine(1.0, _ONE_CYCLE[1], min(1.0, (step - peak) / max(1, steps - 1 - peak)))
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return _cosine(1.0, config.min_lr_ratio, min(1.0, progress))


def _cosine(start: float, end: float, progress: float) -> float:
    """Interpolate from ``start`` to ``end`` along half a cosine, for ``progress`` from 0 to 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float, step: int) -> float:
    """Set every group to ``factor`` times its peak rate, or to 0 before its first step; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor if step >= group["first_step"] else 0.0
    return float(optimizer.param_groups[0]["lr"])


def undecayed_names(task: nn.Module) -> set[str]:
    """Full names of the trainable parameters without weight decay.

    These are biases, norm scales and all other vectors, tokens stored as (1, 1, C), embedding tables,
    relative-position bias tables, and the names that ``no_weight_decay()`` of a sub-module returns (timm's convention).
    """
    names: set[str] = set()
    for prefix, module in task.named_modules():
        start = f"{prefix}." if prefix else ""
        if callable(named := getattr(module, "no_weight_decay", None)):
            names.update(start + name for name in named())
        if isinstance(module, nn.Embedding):
            names.add(f"{start}weight")
    for name, parameter in task.named_parameters():
        leaf = name.rpartition(".")[2]
        # timm's features_only wrapper hides the backbone's no_weight_decay(), so the table is named here.
        if (
            parameter.ndim <= 1
            or leaf in ("bias", "relative_position_bias_table")
            or (leaf != "weight" and parameter.squeeze().ndim <= 1)
        ):
            names.add(name)
    return names & {name for name, parameter in task.named_parameters() if parameter.requires_grad}


def layer_scales(task: nn.Module, layer_decay: float) -> dict[str, float]:
    """Layer-wise learning rates of the encoders of ``task``: fraction of the peak rate by full parameter name.

    An encoder is a module with timm's ``group_matcher``, which numbers layers from the input. Layer i of L (0 is the
    stem) has ``layer_decay ** (L - i)``. Parameters outside encoders are not listed and have 1.

    Raises:
        InputError: ``layer_decay`` is not 1 and ``task`` has no encoder.
    """
    scales: dict[str, float] = {}
    if layer_decay == 1:
        return scales
    from timm.models import group_parameters  # importing timm takes longer than starting a small run

    for prefix, module in task.named_modules():
        matcher = getattr(module, "group_matcher", None)
        start = f"{prefix}." if prefix else ""
        if matcher is None or any(name.startswith(start) for name in scales):
            continue
        layers = group_parameters(module, matcher(coarse=False), reverse=True)
        count = max(layers.values()) + 1
        scales.update((start + name, layer_decay ** (count - layer)) for name, layer in layers.items())
    if not scales:
        raise InputError(
            f"engine.optimizer.layer_decay={layer_decay}: {type(task).__name__} has no encoder with layers; use 1"
        )
    return scales


def decay_groups(task: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate (``layer_scales``, highest first), then with and without decay.

    Each group has ``params``, ``weight_decay`` and ``lr_scale``, a fraction of the peak rate.
    """
    undecayed = set() if config.decay_all else undecayed_names(task)
    scales = layer_scales(task, config.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((-scales.get(name, 1.0), name in undecayed), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else config.weight_decay, "lr_scale": -key[0]}
        for key in sorted(groups)
    ]


def build_optimizer(
    task: nn.Module,
    config: OptimizerConfig,
    *,
    global_batch: int,
    device: torch.device,
    parameter_groups: ParameterGroups | None = None,
) -> torch.optim.Optimizer:
    """Build the optimiser of the trainable parameters of ``task``.

    Args:
        task: module to train.
        config: optimiser and schedule.
        global_batch: samples per step over all ranks and micro-batches, for ``base_batch_size``.
        device: device of the task. AdamW uses one fused kernel on devices that have it.
        parameter_groups: function that replaces ``decay_groups``; each group may set ``weight_decay``, ``lr_scale`` and
            ``first_step``, the first update of its parameters.

    Raises:
        ValueError: ``task`` has no parameter to train.
    """
    groups = parameter_groups(task) if parameter_groups is not None else decay_groups(task, config)
    if not groups:
        raise ValueError(f"{type(task).__name__} has no parameter to train")
    peak = config.learning_rate * (global_batch / config.base_batch_size if config.base_batch_size else 1.0)
    groups = [{**group, "lr": peak * group.get("lr_scale", 1.0)} for group in groups]
    for group in groups:
        group.pop("lr_scale", None)
        group["initial_lr"] = group["lr"]
        group.setdefault("first_step", 0)
    if config.name == "lars":
        from timm.optim import Lars

        return Lars(groups, lr=peak, momentum=config.betas[0], weight_decay=config.weight_decay)
    fused = device.type in _FUSED_DEVICES
    return torch.optim.AdamW(groups, lr=peak, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
