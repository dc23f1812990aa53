"""What is hidden from the encoders: image units, acquisition dates, whole modalities.

Masks are drawn for each modality independently, so that one sensor must be inferred from the others as well as from
its own visible parts, and a sample always keeps at least one visible modality. Every draw depends on the sample's
seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from bocage.shards.draws import permutations, uniform
from bocage.shards.errors import InputError
from bocage.shards.inputs import EncoderInput
from bocage.shards.modality import Modality


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How much is hidden, and how images are encoded.

    Attributes:
        images: ``packed`` keeps one unit of every 2 x 2, at random, and repacks the visible quarter into an image of
            half the side, which the unmodified Swin encodes (uniform sampling of UM-MAE, arXiv 2205.10063);
            ``mask_token`` encodes the whole image with hidden tokens replaced by a learned one (SimMIM,
            arXiv 2111.09886). Published weights have the same form.
        ratio: share of hidden units under ``mask_token``; ``packed`` hides 0.75.
        date_ratio: share of the dates of a series that is hidden.
        gap_share: probability that hidden dates are one contiguous gap rather than scattered.
        modality_ratio: probability that a modality is hidden as a whole.
    """

    images: Literal["packed", "mask_token"] = "packed"
    ratio: float = 0.75
    date_ratio: float = 0.6
    gap_share: float = 0.3
    modality_ratio: float = 0.25

    def __post_init__(self) -> None:
        for key in ("ratio", "date_ratio", "gap_share", "modality_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"masking.{key}={getattr(self, key)} must lie between 0 and 1")
        if self.images == "packed" and self.ratio != 0.75:
            raise ValueError("masking.ratio must be 0.75 with masking.images=packed: one unit of every 2 x 2 is kept")


@dataclass
class Mask:
    """What is hidden of one modality, for B samples.

    Attributes:
        units: for images, (B, U, U) bool, True where a unit is hidden.
        dates: for series, (B, T) bool, True where an existing date is hidden.
        whole: (B,) bool, True where the whole modality is hidden or absent: nothing of it may reach the decoder.
    """

    whole: torch.Tensor
    units: torch.Tensor | None = None
    dates: torch.Tensor | None = None


def unit_grid(modality: Modality, pixels: int, images: str) -> int:
    """Mask units along a side of an image of this many pixels.

    Raises:
        InputError: the image is not a whole number of units, or, when packed, not of pairs of units.
    """
    multiple = modality.unit * (2 if images == "packed" else 1)
    if pixels % multiple:
        raise InputError(
            f"window: {modality.name} is {pixels} px wide there, not a multiple of {multiple} px "
            f"(mask unit {modality.unit} px, masking.images={images})"
        )
    return pixels // modality.unit


def _packed_units(seeds: torch.Tensor, name: str, grid: int) -> torch.Tensor:
    """One visible unit, at random, in every 2 x 2."""
    blocks = grid // 2
    draws = uniform(seeds, f"units/{name}", blocks, blocks, 4)
    visible = F.one_hot(draws.argmax(dim=-1), 4).bool().view(-1, blocks, blocks, 2, 2)
    return ~visible.permute(0, 1, 3, 2, 4).reshape(-1, grid, grid)


def _scattered_units(seeds: torch.Tensor, name: str, grid: int, ratio: float) -> torch.Tensor:
    ranks = permutations(seeds, f"units/{name}", grid * grid)
    return (ranks < round(ratio * grid * grid)).view(-1, grid, grid)


def _hidden_dates(seeds: torch.Tensor, name: str, padding: torch.Tensor, config: MaskingConfig) -> torch.Tensor:
    """A share of the existing dates, scattered or in one gap; at least one date stays, and one is hidden if it can."""
    count = (~padding).sum(dim=1)
    target = (count * config.date_ratio).round().long()
    if config.date_ratio > 0:
        target = target.clamp(min=1)
    target = torch.minimum(target, (count - 1).clamp(min=0))[:, None]
    length = padding.shape[1]
    # Ranks are counted among existing dates only: padding goes last.
    scattered = uniform(seeds, f"dates/{name}", length).masked_fill(padding, 2.0)
    scattered_rank = scattered.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    place = (~padding).cumsum(dim=1) - 1
    start = (uniform(seeds, f"gap start/{name}")[:, None] * (count[:, None] - target + 1)).long()
    gap = uniform(seeds, f"gap/{name}")[:, None] < config.gap_share
    return torch.where(gap, (place >= start) & (place < start + target), scattered_rank < target) & ~padding


def draw_masks(
    inputs: Mapping[str, EncoderInput],
    modalities: Mapping[str, Modality],
    seeds: torch.Tensor,
    config: MaskingConfig,
) -> dict[str, Mask]:
    """The masks of a batch.

    Args:
        inputs: what each encoder would read, by modality.
        modalities: their registry entries.
        seeds: (B,) int64.
        config: how much is hidden.
    """
    names = list(inputs)
    present = torch.stack([inputs[name].present for name in names], dim=1)
    order = torch.stack([uniform(seeds, f"whole/{name}") for name in names], dim=1)
    hidden = order < config.modality_ratio
    # Of the present modalities the one with the highest draw always stays.
    keeper = order.masked_fill(~present, -1.0).argmax(dim=1)
    hidden &= ~F.one_hot(keeper, len(names)).bool()
    masks: dict[str, Mask] = {}
    for index, name in enumerate(names):
        whole = hidden[:, index] | ~present[:, index]
        padding = inputs[name].padding
        if padding is not None:
            masks[name] = Mask(whole, dates=_hidden_dates(seeds, name, padding, config))
            continue
        grid = unit_grid(modalities[name], inputs[name].values.shape[-1], config.images)
        units = (
            _packed_units(seeds, name, grid)
            if config.images == "packed"
            else _scattered_units(seeds, name, grid, config.ratio)
        )
        masks[name] = Mask(whole, units=units)
    return masks


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


def pack(values: torch.Tensor, hidden: torch.Tensor, unit: int) -> torch.Tensor:
    """The visible units of an image, one of every 2 x 2, as an image of half the side.

    Args:
        values: (B, C, H, W).
        hidden: (B, U, U) bool with exactly one visible unit in every 2 x 2.
        unit: side of a unit, pixels; U * unit = H.

    Returns:
        (B, C, H / 2, W / 2).
    """
    batch, channels = values.shape[:2]
    blocks = hidden.shape[1] // 2
    # (B, blocks, blocks, 4): which of the four units of a block is visible.
    chosen = (~hidden).view(batch, blocks, 2, blocks, 2).permute(0, 1, 3, 2, 4).reshape(batch, blocks, blocks, 4)
    chosen = chosen.long().argmax(dim=-1)
    units = values.view(batch, channels, blocks, 2, unit, blocks, 2, unit).permute(0, 2, 5, 3, 6, 1, 4, 7)
    units = units.reshape(batch, blocks, blocks, 4, channels, unit, unit)
    index = chosen.view(batch, blocks, blocks, 1, 1, 1, 1).expand(-1, -1, -1, 1, channels, unit, unit)
    visible = units.gather(3, index).squeeze(3)
    return visible.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, blocks * unit, blocks * unit)
