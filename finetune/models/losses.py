"""Segmentation losses over scored pixels: cross-entropy or focal, plus an optional Dice or Lovasz term."""

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

IGNORE_INDEX = -100
PixelLoss = Literal["cross_entropy", "focal"]
Overlap = Literal["", "dice", "lovasz"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss of one label.

    Attributes:
        pixels: per-pixel loss: ``cross_entropy``, or ``focal`` (Lin et al. 2017, arXiv 1708.02002; one-vs-rest,
            averaged over classes).
        class_weights: weights in the per-pixel loss by class name; the default is 1. Pixels of a class with weight 0
            are ignored.
        gamma: focusing parameter of ``focal``; a larger value gives easy pixels less weight.
        overlap: second loss that weighs classes equally, however rare they are: ``dice`` (Milletari et al. 2016, arXiv
            1606.04797) or ``lovasz`` (Lovasz-Softmax, Berman et al. 2018, arXiv 1705.08790); empty for none.
        overlap_weight: weight of ``overlap`` relative to the per-pixel loss.

    Raises:
        ValueError: the loss is unknown, or a number is negative or not finite.
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
                raise ValueError(f"loss.{key}={value} must be finite and not negative")


def scored_targets(labels: torch.Tensor, present: torch.Tensor, scheme: ClassScheme) -> torch.Tensor:
    """Return the label values, with ``IGNORE_INDEX`` for unscored classes and for samples without the label.

    Args:
        labels: (B, H, W) uint8 class values of ``scheme``. Sharding has checked them; another value raises
            ``IndexError``.
        present: (B,) bool, whether a sample has the label.
        scheme: classes of the label.

    Returns:
        (B, H, W) int64.
    """
    table = torch.arange(len(scheme), device=labels.device)
    table[list(scheme.unscored)] = IGNORE_INDEX
    return torch.where(present.view(-1, 1, 1), table[labels.long()], IGNORE_INDEX)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ``IGNORE_INDEX``; 0 with a zero gradient if there are none.

    Args:
        logits: (B, classes, H, W) logits of any float dtype; the loss is computed in float32.
        targets: (B, H, W) int64 classes.
        weights: (classes,) float32 class weights for a weighted mean.
    """
    total = functional.cross_entropy(logits.float(), targets, weights, ignore_index=IGNORE_INDEX, reduction="sum")
    scored = targets != IGNORE_INDEX
    if weights is None:
        return total / scored.sum().clamp_min(1)
    pixel_weights = weights[targets.clamp_min(0)] * scored
    return total / pixel_weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


class SegmentationLoss(nn.Module):
    """Loss of one label's logits. It has no parameters and nothing in its state dict.

    Args:
        config: loss to compute.
        scheme: classes of the label.
        key: configuration key that error messages name.

    Attributes:
        weights: (classes,) float32 class weights of the per-pixel loss; None without ``class_weights``.

    Raises:
        InputError: ``class_weights`` names a class that is not scored, all weights are 0, or the loss needs a library
            that is not installed.
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
            raise InputError(f"{key}.class_weights are all 0: give one class a positive weight")
        weights = [config.class_weights.get(name, 1.0) for name in scheme.classes]
        tensor = torch.tensor(weights) if config.class_weights else None
        self.register_buffer("weights", tensor, persistent=False)
        self._focal: Callable[..., torch.Tensor] | None = None
        self._overlap: Callable[..., torch.Tensor] | None = None
        settings: dict[str, Any] = {"mode": "multiclass", "ignore_index": IGNORE_INDEX}
        if config.pixels == "focal":
            # Unscored classes have logits too, so the weights cover all classes and not only the scored ones.
            focal_weights = weights if config.class_weights else None
            focal = _smp_losses(f"{key}.pixels=focal").FocalLoss
            self._focal = focal(gamma=config.gamma, class_weights=focal_weights, **settings)
        if config.overlap == "dice":
            dice = _smp_losses(f"{key}.overlap=dice").DiceLoss
            self._overlap = dice(classes=[value for value in scheme.scored if weights[value]], **settings)
        elif config.overlap == "lovasz":
            self._overlap = _smp_losses(f"{key}.overlap=lovasz").LovaszLoss(**settings)
        self._overlap_weight = config.overlap_weight
        self._zero_weight_classes = [value for value in scheme.scored if weights[value] == 0]

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss; 0 with a zero gradient if no pixel is scored.

        Args:
            logits: (B, classes, H, W) logits of any float dtype; the loss is computed in float32.
            targets: (B, H, W) int64 classes, see ``scored_targets``.
        """
        for value in self._zero_weight_classes:
            targets = torch.where(targets == value, IGNORE_INDEX, targets)
        if self._focal is None and self._overlap is None:
            return cross_entropy(logits, targets, self.weights)
        if not (targets != IGNORE_INDEX).any():  # the library returns NaN for the mean over no pixels
            return 0.0 * logits.float().sum()
        if self._focal is None:
            pixels = cross_entropy(logits, targets, self.weights)
        else:
            pixels = self._focal(logits.float(), targets)
        if self._overlap is None:
            return pixels
        return pixels + self._overlap_weight * self._overlap(logits.float(), targets)


def _smp_losses(setting: str) -> Any:
    """Import the losses of segmentation-models-pytorch, which ``setting`` needs."""
    try:
        from segmentation_models_pytorch import losses
    except ImportError as error:
        raise InputError(f"{setting} needs segmentation-models-pytorch: pip install 'bocage[losses]'") from error
    return losses
