"""Random views of a sample, drawn from its seed alone and applied on the training device."""

from __future__ import annotations

import torch

from bocage.shards.draws import uniform


def orient(values: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Each sample in one of the eight orientations of the square.

    The orientation depends on the seed only, so that all modalities and labels of a sample turn together.

    Args:
        values: (B, ..., H, W) with H = W, float or uint8.
        seeds: (B,) int64.
    """
    bits = uniform(seeds, "orientation", 3) < 0.5
    shape = (-1, *[1] * (values.ndim - 1))
    flip_columns, flip_rows, transpose = (bits[:, index].view(shape) for index in range(3))
    values = torch.where(flip_columns, values.flip(-1), values)
    values = torch.where(flip_rows, values.flip(-2), values)
    return torch.where(transpose, values.transpose(-1, -2), values)
