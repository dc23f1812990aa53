"""The optimiser: AdamW, which parameters decay, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ParameterGroups = Callable[[nn.Module], list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with linear warm-up and a cosine (arXiv 1608.03983).

    Attributes:
        learning_rate: peak rate, reached at the end of the warm-up.
        weight_decay: decoupled decay of weight matrices and kernels; see ``decay_groups`` for what never decays.
        betas: AdamW's moving averages.
        warmup_steps: optimiser steps of linear warm-up.
        final_learning_rate: where the cosine ends, as a fraction of ``learning_rate``.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    final_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), not {self.betas}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must not be negative, not {self.warmup_steps}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"optimizer.final_learning_rate is a fraction in [0, 1], not {self.final_learning_rate}")


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of update ``step`` (0, 1, ..., steps - 1) as a fraction of the peak rate.

    A function of the step and nothing else: there is no scheduler state to save or to get out of step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (1.0 - config.final_learning_rate) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to ``factor`` times its own peak rate; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def undecayed_names(task: nn.Module) -> set[str]:
    """Full names of the trainable parameters that weight decay must leave alone.

    These are biases, the scales of norms and every other vector, tokens stored as (1, 1, C), embedding tables,
    relative-position bias tables, and whatever a sub-module's own ``no_weight_decay()`` (timm's convention) names.
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
        # timm's features_only wrapper hides the backbone's no_weight_decay(), hence the table's name here.
        if (
            parameter.ndim <= 1
            or leaf in ("bias", "relative_position_bias_table")
            or (leaf != "weight" and parameter.squeeze().ndim <= 1)
        ):
            names.add(name)
    return names & {name for name, parameter in task.named_parameters() if parameter.requires_grad}


def decay_groups(task: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: those that decay and those that do not (``undecayed_names``)."""
    undecayed = undecayed_names(task)
    trainable = [(name, parameter) for name, parameter in task.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trainable if name not in undecayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trainable if name in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    task: nn.Module, config: OptimizerConfig, parameter_groups: ParameterGroups | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of ``task``.

    Args:
        task: the module to train.
        config: see ``OptimizerConfig``.
        parameter_groups: replaces ``decay_groups``; each group may set its own peak ``lr`` and ``weight_decay``.
    """
    groups = parameter_groups(task) if parameter_groups is not None else decay_groups(task, config.weight_decay)
    if not groups:
        raise ValueError(f"{type(task).__name__} has no parameter to train")
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
