"""Targets of masked reconstruction: standardised values, normalised in each mask unit by groups of correlated bands.

Patch-group-wise normalisation follows MAESTRO (arXiv 2508.10894). The bands of a group share one mean and one standard
deviation per unit, which keeps the ratios between bands and removes the brightness of the unit. Small units, such as
the single pixels of some series, are not normalised: one band of one pixel would always become 0.
"""

from __future__ import annotations

import torch

from bocage.shards.modality import Modality

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
        units: (..., C, unit, unit) float.
        valid: (..., C, unit, unit) bool, False in holes.
        modality: registry entry, which defines the groups.

    Returns:
        Two tensors (..., C, 1, 1); the bands of a group share their values. They are 0 and 1 for groups with fewer than
        16 values in a unit.
    """
    weights = valid.to(units.dtype)
    mean = torch.zeros_like(units[..., :1, :1])
    std = torch.ones_like(mean)
    for group in modality.groups:
        if len(group) * units.shape[-1] ** 2 < _MIN_VALUES:
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
