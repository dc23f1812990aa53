"""Swin v1's tables of relative position biases, resized between windows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional

from bocage.shards.errors import InputError
from bocage.ssl.encoders.swin import SwinEncoder

_TABLE = "relative_position_bias_table"


def resize_bias_tables(weights: Mapping[str, torch.Tensor], encoder: SwinEncoder) -> dict[str, torch.Tensor]:
    """The weights with each table at the size of ``encoder``'s window, larger or smaller; all else is untouched.

    A table, (N, heads), holds a bias for each head and each of the N = (2h - 1) x (2w - 1) offsets between two tokens
    of an h x w window. Where the windows differ it is resized bicubically, as the code of the Swin paper does (Liu et
    al. 2021, arXiv 2103.14030). Encoders built for any size keep whole windows; those built at a ``fixed_size`` have
    smaller ones wherever the map is smaller.

    Swin v2 needs none of this and passes unchanged: its biases are a function of the offset, computed for any window.

    Args:
        weights: by the names of ``encoder.state_dict()``; names that it lacks are passed on.
        encoder: what the weights shall fit.

    Raises:
        InputError: a table that is not one of a square window, and not of the encoder's window either.
    """
    resized = dict(weights)
    for name, module in encoder.named_modules():
        key = f"{name}.{_TABLE}"
        if key in resized and hasattr(module, _TABLE):
            height, width = module.window_size
            resized[key] = _resized(key, resized[key], 2 * height - 1, 2 * width - 1)
    return resized


def _resized(name: str, table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(offsets, heads) at ``height`` x ``width`` offsets."""
    if table.ndim != 2 or not table.shape[1]:
        raise InputError(f"{name} has the shape {list(table.shape)}, not (offsets, heads)")
    side = math.isqrt(len(table))
    if side == height == width or (side * side != len(table) and len(table) == height * width):
        return table
    if side % 2 == 0 or side * side != len(table):
        raise InputError(f"{name} has {len(table)} offsets, which are not those of a square window")
    grid = table.T.reshape(1, -1, side, side)
    # In float32 at least: CPUs have no bicubic kernel for half precision.
    wide = grid if grid.dtype == torch.float64 else grid.float()
    grid = functional.interpolate(wide, (height, width), mode="bicubic", align_corners=False)
    return grid.reshape(-1, height * width).T.to(table.dtype).contiguous()
