"""Targets of masked reconstruction: pixels, statistics, gradients and a random projection of each mask unit.

``pixels`` are standardised values, normalised in each unit by groups of correlated bands (``normalize_pixels``).
Patch-group-wise normalisation follows MAESTRO (arXiv 2508.10894). The bands of a group share one mean and one standard
deviation per unit, which keeps the ratios between bands and removes the brightness of the unit. A unit of a series has
one mean and standard deviation for all its dates. With one per date, as in MAESTRO, the
seasonal curve would not be in the target. Small units are not normalised: one band of one pixel would always become 0.

``statistics`` are means and logarithms of standard deviations, and ``gradients`` are orientations and strengths of
edges, of cells in each unit. They describe colour and texture without the exact position of every detail, which no
context predicts. MaskFeat (arXiv 2112.09133) found histograms of gradients to be better targets than pixels.

``discrimination`` is a random linear projection of the standardised values. The prediction must resemble it more than
those of the other masked units of the sample (OlmoEarth, arXiv 2511.13655).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bocage.shards.modality import Modality

CHANNELS = {"pixels": 1, "statistics": 2, "gradients": 3}
"""Channels of each target per channel of the modality."""

TARGETS = (*CHANNELS, "discrimination")
"""Names of the targets."""

PROJECTION_WIDTH = 128
"""Channels of ``discrimination``, whatever the channels of the modality."""

_VARIANCE_FLOOR = 1e-3  # of standardised values: a constant unit becomes zeros instead of amplified rounding errors
_MIN_VALUES = 16  # of a group in a unit; mean and standard deviation would take two of fewer degrees of freedom


def to_units(values: torch.Tensor, unit: int) -> torch.Tensor:
    """Split (..., C, H, W) into units: (..., H / unit, W / unit, C, unit, unit)."""
    *lead, channels, height, width = values.shape
    units = values.reshape(*lead, channels, height // unit, unit, width // unit, unit)
    order = len(lead)
    return units.permute(*range(order), order + 1, order + 3, order, order + 2, order + 4)


def from_units(units: torch.Tensor) -> torch.Tensor:
    """Invert ``to_units``: (..., H / unit, W / unit, C, unit, unit) to (..., C, H, W)."""
    *lead, rows, columns, channels, unit, _ = units.shape
    order = len(lead)
    values = units.permute(*range(order), order + 2, order, order + 3, order + 1, order + 4)
    return values.reshape(*lead, channels, rows * unit, columns * unit)


def group_statistics(units: torch.Tensor, valid: torch.Tensor, modality: Modality) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and standard deviation of each unit and band group over valid pixels.

    Args:
        units: (..., C, height, width) float.
        valid: (..., C, height, width) bool, False in holes.
        modality: registry entry, which defines the groups.

    Returns:
        Two tensors (..., C, 1, 1); the bands of a group share their values. They are 0 and 1 for groups with fewer than
        16 values in a unit.
    """
    weights = valid.to(units.dtype)
    mean = units.new_zeros(*units.shape[:-2], 1, 1)
    std = torch.ones_like(mean)
    for group in modality.groups:
        if len(group) * units.shape[-2] * units.shape[-1] < _MIN_VALUES:
            continue
        index = [modality.channels.index(name) for name in group]
        weight = weights[..., index, :, :]
        values = units[..., index, :, :]
        count = weight.sum(dim=(-3, -2, -1), keepdim=True).clamp_min(1.0)
        group_mean = (values * weight).sum(dim=(-3, -2, -1), keepdim=True) / count
        variance = ((values - group_mean).square() * weight).sum(dim=(-3, -2, -1), keepdim=True) / count
        mean[..., index, :, :] = group_mean
        std[..., index, :, :] = (variance + _VARIANCE_FLOOR).sqrt()
    return mean, std


def cells_per_unit(unit: int) -> int:
    """Cells along a side of a unit, of 2 pixels or more: 4 if they divide it, otherwise 2 or 1."""
    return next(count for count in (4, 2, 1) if unit % count == 0 and unit // count >= min(2, unit))


def _cell_means(values: torch.Tensor, weights: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of the cells of units (..., C, u, u), and their weights: (..., C, cells, cells) each."""
    *lead, unit, _ = values.shape
    shape = (*lead, cells, unit // cells, cells, unit // cells)
    total = weights.view(shape).sum(dim=(-3, -1))
    return (values * weights).view(shape).sum(dim=(-3, -1)) / total.clamp_min(1.0), total


def cell_statistics(units: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the means and the logarithms of the standard deviations of cells over valid pixels.

    Args:
        units: (..., C, unit, unit) float, standardised values.
        valid: (..., C, unit, unit) bool, False in holes.

    Returns:
        Target (..., 2 * C, cells, cells): all means, then all logarithms; and bool of this shape, False for cells of
        which less than half is valid.
    """
    cells = cells_per_unit(units.shape[-1])
    weights = valid.to(units.dtype)
    mean, count = _cell_means(units, weights, cells)
    square, _ = _cell_means(units.square(), weights, cells)
    log_std = 0.5 * ((square - mean.square()).clamp_min(0.0) + _VARIANCE_FLOOR).log()
    is_valid = 2 * count >= (units.shape[-1] // cells) ** 2
    return torch.cat([mean, log_std], dim=-3), torch.cat([is_valid, is_valid], dim=-3)


def cell_gradients(values: torch.Tensor, valid: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the orientation and strength of the edges in cells.

    The orientation is the mean of the gradient's direction with the angle doubled, weighted by its square (structure
    tensor, Bigun & Granlund 1987): its length is 1 if all edges are parallel, and 0 if they have no direction.

    Args:
        values: images, (B, C, H, W) float, standardised values.
        valid: (B, C, H, W) bool, False in holes.
        unit: pixels along a side of a unit.

    Returns:
        Target (B, H / unit, W / unit, 3 * C, cells, cells): both components of the orientation, then the logarithm of
        the root mean square of the gradient; and bool of this shape.
    """
    across = values[..., 1:-1, 2:] - values[..., 1:-1, :-2]
    down = values[..., 2:, 1:-1] - values[..., :-2, 1:-1]
    inner = valid[..., 1:-1, 2:] & valid[..., 1:-1, :-2] & valid[..., 2:, 1:-1] & valid[..., :-2, 1:-1]
    pad = (1, 1, 1, 1)
    parts = (across.square() - down.square(), 2 * across * down, across.square() + down.square())
    cells = cells_per_unit(unit)
    weights = to_units(F.pad(inner, pad).to(values.dtype), unit)
    (cosine, count), (sine, _), (energy, _) = (
        _cell_means(to_units(F.pad(part, pad), unit), weights, cells) for part in parts
    )
    scale = energy + _VARIANCE_FLOOR
    is_valid = 2 * count >= (unit // cells) ** 2
    target = torch.cat([cosine / scale, sine / scale, 0.5 * scale.log()], dim=-3)
    return target, torch.cat([is_valid] * 3, dim=-3)


class RandomProjection(nn.Module):
    """Random linear projection of units, never trained.

    Args:
        channels: channels of the modality.
        unit: pixels along a side of a unit.
    """

    weight: torch.Tensor

    def __init__(self, channels: int, unit: int) -> None:
        super().__init__()
        values = channels * unit**2
        self.register_buffer("weight", torch.randn(values, PROJECTION_WIDTH) / values**0.5)

    def forward(self, units: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project units (..., C, unit, unit), holes counting as the mean.

        Returns:
            Target (..., PROJECTION_WIDTH, 1, 1), and bool of this shape, False for units of which less than half is
            valid.
        """
        projected = (units * valid).flatten(-3).to(self.weight.dtype) @ self.weight
        is_valid = valid.flatten(-3).to(projected.dtype).mean(dim=-1, keepdim=True) >= 0.5
        return projected[..., None, None], is_valid.expand_as(projected)[..., None, None]
