"""Segmentation losses over the pixels whose class is scored: cross-entropy or focal, and overlap beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError

IGNORED = -100
PixelLoss = Literal["cross_entropy", "focal"]
Overlap = Literal["", "dice", "lovasz"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How a model learns a label.

    Attributes:
        pixels: loss of each pixel: ``cross_entropy``, or ``focal`` (Lin et al. 2017, arXiv 1708.02002; one class
            against the rest, its mean over classes).
        class_weights: weights of classes in the pixels' loss, by name; 1 for those not named. Of a class of weight 0
            nothing is learned.
        gamma: of ``focal``: how much pixels that are told easily are played down.
        overlap: a loss beside it that counts classes alike, however rare: ``dice`` (Milletari et al. 2016, arXiv
            1606.04797) or ``lovasz`` (Lovasz-Softmax, Berman et al. 2018, arXiv 1705.08790); empty for none.
        overlap_weight: its weight beside the pixels' loss.

    Raises:
        ValueError: an unknown loss, or a number that is negative or infinite.
    """

    pixels: PixelLoss = "cross_entropy"
    class_weights: dict[str, float] = field(default_factory=dict)
    gamma: float = 2.0
    overlap: Overlap = ""
    overlap_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.pixels not in get_args(PixelLoss):
            raise ValueError(f"loss.pixels={self.pixels!r} is not one of {', '.join(get_args(PixelLoss))}")
        if self.overlap not in get_args(Overlap):
            raise ValueError(f"loss.overlap={self.overlap!r} is not one of {', '.join(get_args(Overlap)[1:])}")
        numbers = {"gamma": self.gamma, "overlap_weight": self.overlap_weight}
        numbers |= {f"class_weights.{name}": weight for name, weight in self.class_weights.items()}
        for key, value in numbers.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"loss.{key}={value} must be a number that is not negative")


def scored_targets(labels: torch.Tensor, present: torch.Tensor, scheme: ClassScheme) -> torch.Tensor:
    """Label values with ``IGNORED`` in unscored classes and in samples without the label.

    Args:
        labels: (B, H, W) uint8, values of ``scheme`` (sharding has checked them; another one raises ``IndexError``).
        present: (B,) bool.
        scheme: the classes.

    Returns:
        (B, H, W) int64.
    """
    table = torch.arange(len(scheme), device=labels.device)
    table[list(scheme.unscored)] = IGNORED
    return torch.where(present.view(-1, 1, 1), table[labels.long()], IGNORED)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ``IGNORED``; 0 with a zero gradient when there is none.

    Args:
        logits: (B, classes, H, W); computed in float32 whatever their dtype.
        targets: (B, H, W) int64.
        weights: (classes,) float32; the mean is then a weighted one.
    """
    total = functional.cross_entropy(logits.float(), targets, weights, ignore_index=IGNORED, reduction="sum")
    scored = targets != IGNORED
    if weights is None:
        return total / scored.sum().clamp_min(1)
    shares = weights[targets.clamp_min(0)] * scored
    return total / shares.sum().clamp_min(torch.finfo(torch.float32).tiny)


class SegmentationLoss(nn.Module):
    """Loss of the logits of one label; it has neither parameters nor state.

    Args:
        config: which loss.
        scheme: the classes of the label.
        key: the key of the configuration, for messages.

    Attributes:
        weights: (classes,) float32, of the pixels' loss; None without ``class_weights``.

    Raises:
        InputError: a weight of a class that is not scored, or a loss of a library that is not installed.
    """

    weights: torch.Tensor | None

    def __init__(self, config: LossConfig, scheme: ClassScheme, key: str) -> None:
        super().__init__()
        scored = [scheme.classes[value] for value in scheme.scored]
        if unknown := [name for name in config.class_weights if name not in scored]:
            raise InputError(
                f"{key}.class_weights: {', '.join(unknown)} not among the scored classes {', '.join(scored)}"
            )
        if scored and not any(config.class_weights.get(name, 1.0) for name in scored):
            raise InputError(f"{key}.class_weights are all 0: nothing would be learned")
        weights = [config.class_weights.get(name, 1.0) for name in scheme.classes]
        tensor = torch.tensor(weights) if config.class_weights else None
        self.register_buffer("weights", tensor, persistent=False)
        self._focal: Callable[..., torch.Tensor] | None = None
        self._overlap: Callable[..., torch.Tensor] | None = None
        settings: dict[str, Any] = {"mode": "multiclass", "ignore_index": IGNORED}
        if config.pixels == "focal":
            # Unscored classes are outputs too, to be told from the rest.
            own = weights if config.class_weights else None
            self._focal = _library(f"{key}.pixels=focal").FocalLoss(gamma=config.gamma, class_weights=own, **settings)
        if config.overlap == "dice":
            dice = _library(f"{key}.overlap=dice").DiceLoss
            self._overlap = dice(classes=[value for value in scheme.scored if weights[value]], **settings)
        elif config.overlap == "lovasz":
            self._overlap = _library(f"{key}.overlap=lovasz").LovaszLoss(**settings)
        self._overlap_weight = config.overlap_weight
        self._idle = [value for value in scheme.scored if weights[value] == 0]

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A scalar, 0 with a zero gradient where no pixel is scored.

        Args:
            logits: (B, classes, H, W); computed in float32 whatever their dtype.
            targets: (B, H, W) int64, see ``scored_targets``.
        """
        for value in self._idle:
            targets = torch.where(targets == value, IGNORED, targets)
        if self._focal is None and self._overlap is None:
            return cross_entropy(logits, targets, self.weights)
        if not (targets != IGNORED).any():  # means over nothing are not a number in the library
            return 0.0 * logits.float().sum()
        if self._focal is None:
            pixels = cross_entropy(logits, targets, self.weights)
        else:
            pixels = self._focal(logits.float(), targets)
        if self._overlap is None:
            return pixels
        return pixels + self._overlap_weight * self._overlap(logits.float(), targets)


def _library(wanted: str) -> Any:
    try:
        from segmentation_models_pytorch import losses
    except ImportError as error:
        raise InputError(f"{wanted} needs segmentation-models-pytorch: pip install 'bocage[losses]'") from error
    return losses
