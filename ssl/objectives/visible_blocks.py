"""What encoders may see of masked images: heights without hidden ones, and visible blocks packed into less."""

from __future__ import annotations

import torch

from bocage.ssl.objectives.masking import Mask


def recentred(values: torch.Tensor, channel: int, centre: float, valid: torch.Tensor, mask: Mask) -> torch.Tensor:
    """An image whose ``channel`` has the mean ``centre`` over what is visible of it.

    Relief is a height above the mean of the whole window, which tells of hidden units: an encoder may only see
    heights above the mean of its visible ones.

    Args:
        values: (B, C, H, W).
        channel: which channel.
        centre: its mean over a whole window.
        valid: (B, C, H, W) bool; holes do not count, and stay as they are.
        mask: hides units.
    """
    assert mask.units is not None
    unit = values.shape[-1] // mask.units.shape[-1]
    seen = ~mask.units.repeat_interleave(unit, 1).repeat_interleave(unit, 2) & valid[:, channel]
    count = seen.sum(dim=(1, 2)).clamp_min(1)
    # Hidden values are cut out, not multiplied by zero: they must not reach the sum even as rounding.
    level = torch.where(seen, values[:, channel], 0.0).sum(dim=(1, 2)) / count
    moved = values.clone()
    shifted = values[:, channel] - level[:, None, None] + centre
    moved[:, channel] = torch.where(valid[:, channel], shifted, values[:, channel])
    return moved


def pack_visible_blocks(values: torch.Tensor, units: torch.Tensor, block: int) -> torch.Tensor:
    """The visible blocks of units of an image, one of every 2 x 2, as an image of half the side.

    Args:
        values: (B, C, H, W).
        units: (B, U, U) bool, hidden units: whole blocks of them, all but one of every 2 x 2 blocks (``Mask.units``).
        block: units along a side of a block (``Mask.block``).

    Returns:
        (B, C, H / 2, W / 2).
    """
    batch, channels = values.shape[:2]
    hidden = units[:, ::block, ::block]
    blocks = hidden.shape[1] // 2
    unit = values.shape[-1] // hidden.shape[1]
    # (B, blocks, blocks, 4): which of the four units of a block is visible.
    chosen = (~hidden).view(batch, blocks, 2, blocks, 2).permute(0, 1, 3, 2, 4).reshape(batch, blocks, blocks, 4)
    chosen = chosen.long().argmax(dim=-1)
    units = values.view(batch, channels, blocks, 2, unit, blocks, 2, unit).permute(0, 2, 5, 3, 6, 1, 4, 7)
    units = units.reshape(batch, blocks, blocks, 4, channels, unit, unit)
    index = chosen.view(batch, blocks, blocks, 1, 1, 1, 1).expand(-1, -1, -1, 1, channels, unit, unit)
    visible = units.gather(3, index).squeeze(3)
    return visible.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, blocks * unit, blocks * unit)
