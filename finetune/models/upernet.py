"""UPerNet: decode a pyramid of feature maps into class logits (Xiao et al. 2018, arXiv 1807.10221).

Parameters have the names and shapes of segmentation-models-pytorch 0.4.0, as the official FLAIR-HUB weights do, so that
those weights can be read and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.functional import interpolate, pad

Norm = Literal["batch", "group"]

_POOL_SIZES = (1, 2, 3, 6)
_GROUP_COUNTS = (8, 4, 2)
_MIN_GROUP_WIDTH = 4


@dataclass(frozen=True, kw_only=True)
class UPerNetConfig:
    """Architecture of a decoder.

    Attributes:
        pyramid_width: channels of every level of the feature pyramid.
        width: channels of the input of the last, linear layer.
        norm: ``batch`` for BatchNorm as in the official models (needs two samples per rank), or ``group`` for
            GroupNorm, which trains with one.

    Raises:
        ValueError: a width is below 1, or the norm is unknown.
    """

    pyramid_width: int = 256
    width: int = 64
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        if self.pyramid_width < 1 or self.width < 1:
            raise ValueError("decoder.pyramid_width and decoder.width must be positive")
        if self.norm not in get_args(Norm):
            raise ValueError(f"decoder.norm = {self.norm!r} is not one of {', '.join(get_args(Norm))}")


def resize(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resample maps (B, C, h, w) bilinearly to the grid ``size``, without aligning corners."""
    if values.shape[-2:] == size:
        return values
    return interpolate(values, size=size, mode="bilinear", align_corners=False)


def _groups(channels: int) -> int:
    """Number of GroupNorm groups, of at least four channels: a group of one value (a 1 x 1 map) normalises to 0."""
    valid_counts = (count for count in _GROUP_COUNTS if channels % count == 0 and channels // count >= _MIN_GROUP_WIDTH)
    return next(valid_counts, 1)


def _convolution(inputs: int, outputs: int, kernel: int, norm: Norm) -> nn.Sequential:
    layer = nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(_groups(outputs), outputs)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), layer, nn.ReLU(inplace=True)
    )


class PyramidPooling(nn.Module):
    """Pyramid pooling of the coarsest map over 1, 2 x 2, 3 x 3 and 6 x 6 regions (PSPNet, Zhao et al. 2017)."""

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        branch = inputs // len(_POOL_SIZES)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), _convolution(inputs, branch, 1, norm)) for size in _POOL_SIZES
        )
        self.out_conv = _convolution(inputs + branch * len(_POOL_SIZES), outputs, 1, norm)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        size = (values.shape[-2], values.shape[-1])
        return self.out_conv(torch.cat([values, *(resize(block(values), size) for block in self.blocks)], dim=1))


class PyramidStage(nn.Module):
    """One top-down step of the feature pyramid: the upsampled coarser level plus the projected map of this level."""

    def __init__(self, inputs: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.skip_conv = _convolution(inputs, width, 1, norm)

    def forward(self, coarser: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Combine (B, width, h, w) and (B, inputs, H, W) into (B, width, H, W)."""
        return resize(coarser, (values.shape[-2], values.shape[-1])) + self.skip_conv(values)


def _smooth(values: torch.Tensor) -> torch.Tensor:
    """Filter (B, C, H, W) with the kernel (1, 6, 1) / 8 along both axes.

    The last level of the official decoder has no parameters: it upsamples the finest level twofold, bilinearly, and
    downsamples it again. This filter gives the same result without the map of four times the size.
    """
    padded = pad(values, (1, 1, 1, 1), mode="replicate")
    rows = 0.125 * (padded[:, :, :-2] + padded[:, :, 2:]) + 0.75 * padded[:, :, 1:-1]
    return 0.125 * (rows[..., :-2] + rows[..., 2:]) + 0.75 * rows[..., 1:-1]


class PyramidDecoder(nn.Module):
    """UPerNet without its last layer."""

    def __init__(self, widths: Sequence[int], config: UPerNetConfig) -> None:
        super().__init__()
        *finer, coarsest = widths
        width, norm = config.pyramid_width, config.norm
        self.psp = PyramidPooling(coarsest, width, norm)
        # The official decoder has two levels finer than the finest map: one without parameters, and one for the image
        # itself that no forward pass reads. Its weights are kept so that official checkpoints round-trip.
        unused = PyramidStage(1, width, norm).requires_grad_(False)
        stages = [PyramidStage(inputs, width, norm) for inputs in reversed(finer)]
        self.fpn_stages = nn.ModuleList([*stages, nn.Identity(), unused])
        self.fpn_bottleneck = _convolution((len(widths) + 1) * width, config.width, 3, norm)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode maps, finest first, into one map (B, config.width, H, W) on the grid of the finest."""
        *finer, coarsest = maps
        levels = [self.psp(coarsest)]
        for stage, values in zip(self.fpn_stages, reversed(finer), strict=False):
            levels.append(stage(levels[-1], values))
        size = (maps[0].shape[-2], maps[0].shape[-1])
        levels.append(_smooth(levels[-1]))
        return self.fpn_bottleneck(torch.cat([resize(level, size) for level in levels], dim=1))


class UPerNet(nn.Module):
    """Decoder from a pyramid of feature maps to class logits.

    Args:
        widths: channels of each map, finest first.
        classes: number of classes.
        config: widths and norm of the decoder.
    """

    def __init__(self, widths: Sequence[int], classes: int, config: UPerNetConfig) -> None:
        super().__init__()
        self.decoder = PyramidDecoder(widths, config)
        self.segmentation_head = nn.Sequential(nn.Conv2d(config.width, classes, 1))

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode maps (B, widths[i], H_i, W_i), finest first, into logits (B, classes, H_0, W_0)."""
        return self.segmentation_head(self.decoder(maps))
