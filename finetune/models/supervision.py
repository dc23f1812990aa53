"""How a segmentation model learns, which a finished one need not know: losses, frozen stages, sensors left out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from bocage.finetune.models.losses import LossConfig
from bocage.shards.counter_rng import uniform
from bocage.shards.errors import InputError
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.ssl.encoders.base import Encoder


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One label of a run.

    Attributes:
        level: which band of the label raster, from 1; LPIS has three.
        grouping: what its classes are put together into (``shards.classes.GROUPINGS``), e.g. ``flair_challenge``.
        weight: weight of its loss beside those of other labels.
        loss: how it is learned.

    Raises:
        ValueError: ``weight`` is not positive.
    """

    level: int = 1
    grouping: str = ""
    weight: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be a positive number")


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What ``FinetuneConfig`` says of learning, by its keys.

    Attributes:
        freeze: encoders that do not learn, ``MODALITY``, or only from some stage on, ``MODALITY:STAGES``.
        modality_dropout: by modality, the probability that a sample is learned from without it.
        auxiliary_weight: weight of the mean of the auxiliary decoders' losses beside the main one.
        label_stride: every which pixel of labels, along both axes, is learned from.
        tasks: by label; those not named are as ``TaskConfig`` has it.
    """

    freeze: Collection[str] = ()
    modality_dropout: Mapping[str, float] = field(default_factory=dict)
    auxiliary_weight: float = 0.4
    label_stride: int = 1
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)


def freeze(encoders: Mapping[str, Encoder], words: Collection[str]) -> None:
    """Let parameters of encoders have no gradient.

    Args:
        encoders: by modality.
        words: ``MODALITY`` freezes all of an encoder, ``MODALITY:2`` its stem and first two stages: those of Swin, or
            of U-TAE the way down, attention over dates, and the way up.

    Raises:
        InputError: a modality without encoder, or a number of stages that it does not have.
    """
    for word in words:
        name, separator, count = word.partition(":")
        if name not in encoders:
            raise InputError(f"freeze: {name} not among the modalities {', '.join(encoders)}")
        if not separator:
            encoders[name].requires_grad_(False)
            continue
        encoder: Any = encoders[name]
        layers = group_parameters(encoder, encoder.group_matcher(coarse=True), reverse=True)
        stages = max(layers.values())
        if not count.isdecimal() or not 0 <= int(count) <= stages:
            raise InputError(f"freeze: {word}: the encoder of {name} has 0 to {stages} stages after its stem")
        for parameter, layer in layers.items():
            if layer <= int(count):
                encoders[name].get_parameter(parameter).requires_grad_(False)


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The largest modules in ``module`` that have parameters and learn none of them."""
    parameters = list(module.parameters())
    if not parameters:
        return []
    if not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [part for child in module.children() for part in frozen_parts(child)]


def without_some(
    inputs: Mapping[str, EncoderInput], seeds: torch.Tensor, rates: Mapping[str, float]
) -> dict[str, EncoderInput]:
    """Inputs of which each sample lacks some more, drawn from its seed; one that it has always stays.

    Modality dropout (ModDrop, Neverova et al., arXiv 1501.00102), but where all that a sample has would go, the one
    nearest to staying stays.

    Args:
        inputs: by modality.
        seeds: (B,) int64.
        rates: by modality, the probability that it goes; those not named stay.
    """
    names = list(inputs)
    present = torch.stack([inputs[name].present for name in names], dim=1)
    draws = torch.stack([uniform(seeds, f"modality_dropout/{name}") for name in names], dim=1).to(present.device)
    margin = draws - torch.tensor([rates.get(name, 0.0) for name in names], device=present.device)
    kept = present & (margin >= 0)
    last = torch.where(present, margin, -torch.inf).argmax(dim=1)
    spare = torch.zeros_like(present).scatter_(1, last[:, None], True) & present
    kept = torch.where(kept.any(dim=1, keepdim=True), kept, spare)
    return {name: replace(inputs[name], present=kept[:, column]) for column, name in enumerate(names)}
