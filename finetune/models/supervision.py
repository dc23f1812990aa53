"""Training settings of a segmentation model: losses of the labels, frozen stages, and modality dropout."""

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
    """Settings of one label.

    Attributes:
        level: band of the label raster, counted from 1; FLAIR-HUB's LPIS has three.
        grouping: name of a grouping of FLAIR-HUB's classes (``shards.classes.GROUPINGS``), e.g. ``flair_challenge``;
            empty for none.
        weight: weight of the label's loss in the sum over labels.
        loss: loss of the label.

    Raises:
        ValueError: ``weight`` is not a positive finite number.
    """

    level: int = 1
    grouping: str = ""
    weight: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be positive and finite")


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """Training settings of a segmentation model; the attributes are keys of ``FinetuneConfig``.

    Attributes:
        freeze: frozen encoders: ``MODALITY`` freezes all of one, ``MODALITY:STAGES`` its stem and first stages.
        modality_dropout: probability of dropping a modality from a training sample, by modality.
        auxiliary_weight: weight of the mean loss of the auxiliary decoders in the total loss.
        label_stride: stride of the label pixels, along both axes, that the training loss uses.
        tasks: settings by label; a label that is not listed has the defaults of ``TaskConfig``.
    """

    freeze: Collection[str] = ()
    modality_dropout: Mapping[str, float] = field(default_factory=dict)
    auxiliary_weight: float = 0.4
    label_stride: int = 1
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)


def freeze_encoders(encoders: Mapping[str, Encoder], entries: Collection[str]) -> None:
    """Set ``requires_grad`` to False for parameters of encoders.

    Args:
        encoders: encoders by modality.
        entries: encoders to freeze. ``MODALITY`` freezes all of an encoder, ``MODALITY:2`` its stem and first two
            stages. Stages of a U-TAE are the down path, the attention over dates, and the up path.

    Raises:
        InputError: an entry names a modality without encoder, or more stages than the encoder has.
    """
    for entry in entries:
        name, separator, count = entry.partition(":")
        if name not in encoders:
            raise InputError(f"freeze: {name} is not among the modalities {', '.join(encoders)}")
        if not separator:
            encoders[name].requires_grad_(False)
            continue
        encoder: Any = encoders[name]
        layers = group_parameters(encoder, encoder.group_matcher(coarse=True), reverse=True)
        stages = max(layers.values())
        if not count.isdecimal() or not 0 <= int(count) <= stages:
            raise InputError(f"freeze: {entry}: the encoder of {name} has 0 to {stages} stages after its stem")
        for parameter, layer in layers.items():
            if layer <= int(count):
                encoders[name].get_parameter(parameter).requires_grad_(False)


def frozen_modules(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules in ``module`` that have parameters, all of them frozen."""
    parameters = list(module.parameters())
    if not parameters:
        return []
    if not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [frozen for child in module.children() for frozen in frozen_modules(child)]


def apply_modality_dropout(
    inputs: Mapping[str, EncoderInput], seeds: torch.Tensor, rates: Mapping[str, float]
) -> dict[str, EncoderInput]:
    """Drop modalities of each sample at random, but never all of them.

    The method is ModDrop (Neverova et al., arXiv 1501.00102), with one change. Where every modality of a sample would
    be dropped, the one whose random number exceeds its rate most (or falls short least) is kept.

    Args:
        inputs: encoder inputs by modality.
        seeds: (B,) int64 sample seeds, which determine the random numbers.
        rates: dropout probability by modality; a modality that is not listed is never dropped.

    Returns:
        The inputs with an updated ``present``.
    """
    names = list(inputs)
    present = torch.stack([inputs[name].present for name in names], dim=1)
    random = torch.stack([uniform(seeds, f"modality_dropout/{name}") for name in names], dim=1).to(present.device)
    margin = random - torch.tensor([rates.get(name, 0.0) for name in names], device=present.device)
    kept = present & (margin >= 0)
    best = torch.where(present, margin, -torch.inf).argmax(dim=1)
    only_best = torch.zeros_like(present).scatter_(1, best[:, None], True) & present
    kept = torch.where(kept.any(dim=1, keepdim=True), kept, only_best)
    return {name: replace(inputs[name], present=kept[:, column]) for column, name in enumerate(names)}
