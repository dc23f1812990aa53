"""Remove masked pixels from images: re-centre relief on visible pixels, pack visible blocks into a smaller image."""

from __future__ import annotations

import torch

from bocage.ssl.objectives.masking import Mask


def recentre_relief(values: torch.Tensor, channel: int, centre: float, valid: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Shift one channel so that its mean over the visible pixels is ``centre``.

    Relief is a height above the mean of the whole window, and that mean leaks the masked units. The encoder must only
    see heights above the mean of the visible pixels.

    Args:
        values: (B, C, H, W) images.
        channel: index of the relief channel.
        centre: mean of the channel over a whole window, in standardised units.
        valid: (B, C, H, W) bool, False in holes; holes do not count and keep their value.
        mask: mask of an image.

    Returns:
        (B, C, H, W), a copy.
    """
    assert mask.units is not None
    unit = values.shape[-1] // mask.units.shape[-1]
    visible = ~mask.units.repeat_interleave(unit, 1).repeat_interleave(unit, 2) & valid[:, channel]
    count = visible.sum(dim=(1, 2)).clamp_min(1)
    # ``where`` rather than a product with zero: masked values must not reach the sum even as rounding errors.
    mean = torch.where(visible, values[:, channel], 0.0).sum(dim=(1, 2)) / count
    recentred = values.clone()
    shifted = values[:, channel] - mean[:, None, None] + centre
    recentred[:, channel] = torch.where(valid[:, channel], shifted, values[:, channel])
    return recentred


def pack_visible_blocks(values: torch.Tensor, units: torch.Tensor, block: int) -> torch.Tensor:
    """Pack the visible block of every 2 x 2 blocks into an image of half the side.

    Args:
        values: (B, C, H, W).
        units: (B, U, U) bool, masked units: all but one of every 2 x 2 blocks (``Mask.units``).
        block: units along a side of a block (``Mask.block``).

    Returns:
        (B, C, H / 2, W / 2).
    """
    batch, channels = values.shape[:2]
    masked = units[:, ::block, ::block]
    pairs = masked.shape[1] // 2
    side = values.shape[-1] // masked.shape[1]  # pixels or cells along a side of a block
    # (B, pairs, pairs): which of the four blocks of each 2 x 2 is visible.
    visible = (~masked).view(batch, pairs, 2, pairs, 2).permute(0, 1, 3, 2, 4).reshape(batch, pairs, pairs, 4)
    visible = visible.long().argmax(dim=-1)
    blocks = values.view(batch, channels, pairs, 2, side, pairs, 2, side).permute(0, 2, 5, 3, 6, 1, 4, 7)
    blocks = blocks.reshape(batch, pairs, pairs, 4, channels, side, side)
    index = visible.view(batch, pairs, pairs, 1, 1, 1, 1).expand(-1, -1, -1, 1, channels, side, side)
    packed = blocks.gather(3, index).squeeze(3)
    return packed.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, pairs * side, pairs * side)
