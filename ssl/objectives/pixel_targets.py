"""What the masked objective reconstructs: standardised values, normalised in each unit by groups of correlated bands.

Patch-group-wise normalisation follows MAESTRO (arXiv 2508.10894): inside a unit, each group of bands is centred and
scaled together, so that ratios between its bands remain while brightness common to the unit does not.
"""

from __future__ import annotations

import torch

from bocage.shards.modality import Modality

_VARIANCE_FLOOR = 1e-3  # of standardised values: a constant unit becomes zeros, not amplified rounding


def to_units(values: torch.Tensor, unit: int) -> torch.Tensor:
    """(..., C, H, W) as units: (..., H / unit, W / unit, C, unit, unit)."""
    *lead, channels, height, width = values.shape
    units = values.reshape(*lead, channels, height // unit, unit, width // unit, unit)
    order = len(lead)
    return units.permute(*range(order), order + 1, order + 3, order, order + 2, order + 4)


def from_units(units: torch.Tensor) -> torch.Tensor:
    """The inverse of ``to_units``: (..., H / unit, W / unit, C, unit, unit) to (..., C, H, W)."""
    *lead, rows, columns, channels, unit, _ = units.shape
    order = len(lead)
    values = units.permute(*range(order), order + 2, order, order + 3, order + 1, order + 4)
    return values.reshape(*lead, channels, rows * unit, columns * unit)


def group_statistics(units: torch.Tensor, valid: torch.Tensor, modality: Modality) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each unit and band group, holes left out.

    Args:
        units: (..., C, unit, unit) float.
        valid: same shape, bool.
        modality: names the groups.

    Returns:
        Two tensors (..., C, 1, 1); the bands of a group share their values.
    """
    weights = valid.to(units.dtype)
    mean = torch.zeros_like(units[..., :1, :1])
    std = torch.ones_like(mean)
    for group in modality.groups:
        index = [modality.channels.index(name) for name in group]
        weight = weights[..., index, :, :]
        chosen = units[..., index, :, :]
        count = weight.sum(dim=(-3, -2, -1), keepdim=True).clamp_min(1.0)
        centre = (chosen * weight).sum(dim=(-3, -2, -1), keepdim=True) / count
        variance = ((chosen - centre).square() * weight).sum(dim=(-3, -2, -1), keepdim=True) / count
        mean[..., index, :, :] = centre
        std[..., index, :, :] = (variance + _VARIANCE_FLOOR).sqrt()
    return mean, std
