"""What is hidden from the encoders: blocks of images, dates of series or cubes of space and time, whole modalities.

Masks are drawn for each modality independently, unless they are joint, so that one sensor must be inferred from the
others as well as from its own visible parts. A sample always keeps at least one visible modality, and each modality
that is not hidden as a whole a visible part. Every draw depends on the sample's seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from bocage.shards.counter_rng import permutations, uniform
from bocage.shards.errors import InputError
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.shards.read.windows import explain_mismatch, shown_sides, valid_sides


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How much is hidden, and how images are encoded.

    Attributes:
        images: ``packed`` keeps one block of every 2 x 2, at random, and repacks the visible quarter into an image of
            half the side, which the unmodified Swin encodes (uniform sampling of UM-MAE, arXiv 2205.10063);
            ``mask_token`` encodes the whole image with hidden tokens replaced by a learned one (SimMIM,
            arXiv 2111.09886). Published weights have the same form.
        ratio: share of hidden blocks under ``mask_token``; ``packed`` hides 0.75.
        date_ratio: share of the dates of a series that is hidden.
        ratios: by modality, in place of these two.
        blocks: by modality, side in metres of the blocks of an image that are hidden at once: a multiple of its mask
            unit, which is the default.
        joint: hide the same ground from all images of a sample, in blocks of the largest of their sides, so that only
            what surrounds it and the series tell of it; otherwise each image has blocks of its own.
        gap_share: probability that hidden dates are one gap rather than scattered; a gap goes on in the new year.
        cube_share: probability that a series lacks cubes of space and time instead of whole dates: at each place a gap
            of its own. Where it is hidden a frame holds the mean, as in holes.
        cube: side of a cube on the ground, metres.
        modality_ratio: probability that a modality is hidden as a whole.
        map_ratio: probability, in training, that a feature map of a sample is hidden from the objectives that read
            tokens (``ground.ground_tokens``); one stays.
            When all maps always add up, the deepest need not say anything: a vector that is the same everywhere
            outgrows what they know, and features collapse (docs/design-choices.md).

    Raises:
        ValueError: a share outside [0, 1], a side that is not positive, or ``packed`` with another ``ratio`` than 0.75.
    """

    images: Literal["packed", "mask_token"] = "packed"
    ratio: float = 0.75
    date_ratio: float = 0.6
    ratios: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    joint: bool = False
    gap_share: float = 0.3
    cube_share: float = 0.0
    cube: float = 25.6
    modality_ratio: float = 0.25
    map_ratio: float = 0.5

    def __post_init__(self) -> None:
        shares = {
            key: getattr(self, key)
            for key in ("ratio", "date_ratio", "gap_share", "cube_share", "modality_ratio", "map_ratio")
        }
        for key, value in (*shares.items(), *((f"ratios.{name}", value) for name, value in self.ratios.items())):
            if not 0 <= value <= 1:
                raise ValueError(f"masking.{key}={value} must lie between 0 and 1")
        for key, side in (("cube", self.cube), *((f"blocks.{name}", side) for name, side in self.blocks.items())):
            if not 0 < side < math.inf:
                raise ValueError(f"masking.{key}={side} must be a positive number of metres")
        if self.images == "packed" and self.ratio != 0.75:
            raise ValueError("masking.ratio must be 0.75 with masking.images=packed: one block of every 2 x 2 is kept")


@dataclass
class Mask:
    """What is hidden of one modality, for B samples.

    Attributes:
        whole: (B,) bool, True where the whole modality is hidden or absent: nothing of it may reach the decoder.
        units: for images, (B, U, U) bool, True where a unit is hidden.
        block: units along a side of what is hidden at once.
        dates: for series, (B, T) bool, True where an existing date is hidden.
        cubes: for series, (B, T, H, W) bool, True where a pixel of another date is hidden; None without any.
    """

    whole: torch.Tensor
    units: torch.Tensor | None = None
    block: int = 1
    dates: torch.Tensor | None = None
    cubes: torch.Tensor | None = None

    def places(self, padding: torch.Tensor, pixels: int) -> torch.Tensor:
        """(B, T, pixels, pixels) bool: all that is hidden of a series, whose missing dates are ``padding`` (B, T)."""
        assert self.dates is not None
        dates = self.dates | (self.whole[:, None] & ~padding)
        hidden = dates[:, :, None, None].expand(-1, -1, pixels, pixels)
        return hidden if self.cubes is None else hidden | self.cubes


def blocks_of(modalities: Mapping[str, Modality], config: MaskingConfig) -> dict[str, int]:
    """Units along a side of the blocks in which each image is hidden, by modality.

    Raises:
        InputError: a name that is none of the modalities, or one of the wrong kind; a side that is not a multiple of
            the unit.
    """
    images = {name: item for name, item in modalities.items() if item.role == "image"}
    for key, named, kind in (
        ("ratios", config.ratios, modalities),
        ("blocks", config.blocks, images),
    ):
        if unknown := sorted(set(named) - set(kind)):
            raise InputError(
                f"masking.{key}.{unknown[0]}: not one of {', '.join(kind)}"
                if kind
                else f"masking.{key}.{unknown[0]}: it is for images, and modalities has none"
            )
    if config.images == "packed" and (given := sorted(set(config.ratios) & set(images))):
        raise InputError(f"masking.ratios.{given[0]} needs masking.images=mask_token: packed images hide 0.75")
    if config.joint and (given := sorted(set(config.ratios) & set(images))):
        raise InputError(f"masking.ratios.{given[0]}: with masking.joint all images hide masking.ratio of the ground")
    sides = {name: config.blocks.get(name, item.unit * item.gsd) for name, item in images.items()}
    if config.joint and sides:
        sides = dict.fromkeys(sides, max(sides.values()))
    found = {}
    for name, side in sides.items():
        unit = images[name].unit * images[name].gsd
        found[name] = max(1, round(side / unit))
        if not math.isclose(found[name] * unit, side, rel_tol=1e-6):
            blamed = " and ".join(f"masking.blocks.{key}" for key in config.blocks)
            raise InputError(f"{blamed}: {side:g} m is not a multiple of the {unit:g}-m mask unit of {name}")
    return found


def block_grid(modality: Modality, pixels: int, block: int, images: str) -> int:
    """Blocks along a side of an image of this many pixels.

    Raises:
        InputError: the image is not a whole number of blocks, or, when packed, not of pairs of blocks.
    """
    if misfit := _misfit(modality, pixels, block, images):
        raise InputError(f"window: {misfit}")
    return pixels // (modality.unit * block)


def _misfit(modality: Modality, pixels: int, block: int, images: str) -> str:
    """Why an image of this many pixels cannot be hidden in such blocks; empty when it can."""
    side = modality.unit * block
    metres = side * modality.gsd
    multiple = side * (2 if images == "packed" else 1)
    if pixels % multiple:
        pairs = "pairs of " if images == "packed" else ""
        return (
            f"{modality.name} is {pixels * modality.gsd:g} m wide there and is masked in {pairs}blocks of {metres:g} m "
            f"({side} px, masking.images={images})"
        )
    if pixels == side:
        return f"{modality.name} is one block of {metres:g} m there, of which nothing could be hidden"
    return ""


def check_window(
    modalities: Mapping[str, Modality], side: float, config: MaskingConfig, *, reconstructed: bool
) -> None:
    """Check that windows of ``side`` metres can be cut, and divide into what is hidden of them.

    Args:
        modalities: those of a run.
        side: metres.
        config: how they are hidden.
        reconstructed: whether series are divided into mask units, too, which ``masked`` reconstructs.

    Raises:
        InputError: they cannot or do not; the message gives windows that fit, if there are any.
    """
    blocks = blocks_of(modalities, config)
    cut = valid_sides(modalities.values())

    def why_not(window: float) -> str:
        if found := explain_mismatch(window, cut):
            return found
        for name, modality in modalities.items():
            pixels = round(window / modality.gsd)
            if modality.role == "image":
                if why := _misfit(modality, pixels, blocks[name], config.images):
                    return why
            elif reconstructed and pixels % modality.unit:
                unit = modality.unit * modality.gsd
                return f"{name} is {window:g} m wide there and is reconstructed in units of {unit:g} m"
        return ""

    if not (why := why_not(side)):
        return
    fitting = [window for window in cut if not why_not(window)]
    if not fitting:
        blamed = " or ".join(f"masking.blocks.{name}" for name in config.blocks) or "modalities"
        raise InputError(f"window={side:g}: no window fits, {why_not(cut[-1])}; change {blamed}")
    raise InputError(f"window={side:g}: {why}; windows that fit are {shown_sides(fitting)} wide")


def _packed(seeds: torch.Tensor, tag: str, grid: int) -> torch.Tensor:
    """One visible block, at random, in every 2 x 2."""
    pairs = grid // 2
    draws = uniform(seeds, tag, pairs, pairs, 4)
    visible = F.one_hot(draws.argmax(dim=-1), 4).bool().view(-1, pairs, pairs, 2, 2)
    return ~visible.permute(0, 1, 3, 2, 4).reshape(-1, grid, grid)


def _scattered(seeds: torch.Tensor, tag: str, grid: int, ratio: float) -> torch.Tensor:
    """A share of the blocks; at least one stays."""
    hidden = min(round(ratio * grid * grid), grid * grid - 1)
    return (permutations(seeds, tag, grid * grid) < hidden).view(-1, grid, grid)


def _number_hidden(padding: torch.Tensor, ratio: float) -> torch.Tensor:
    """(B,) of the existing dates: at least one stays, and one is hidden if it can."""
    count = (~padding).sum(dim=1)
    target = (count * ratio).round().long()
    if ratio > 0:
        target = target.clamp(min=1)
    return torch.minimum(target, (count - 1).clamp(min=0))


def _hidden_dates(
    seeds: torch.Tensor, name: str, padding: torch.Tensor, ratio: float, gap_share: float
) -> torch.Tensor:
    """A share of the existing dates, scattered or in one gap: (B, T) bool."""
    target = _number_hidden(padding, ratio)[:, None]
    count, length = (~padding).sum(dim=1, keepdim=True), padding.shape[1]
    # Ranks are counted among existing dates only: padding goes last.
    scattered = uniform(seeds, f"hidden dates/{name}", length).masked_fill(padding, 2.0)
    scattered_rank = scattered.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    place = (~padding).cumsum(dim=1) - 1
    start = (uniform(seeds, f"gap start/{name}")[:, None] * count).long()
    gap = uniform(seeds, f"gap/{name}")[:, None] < gap_share
    return torch.where(gap, _in_gap(place, start, target, count), scattered_rank < target) & ~padding


def _in_gap(place: torch.Tensor, start: torch.Tensor, length: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which of ``count`` places lie in a gap that goes on at the beginning when it reaches the end.

    Otherwise gaps of more than half of the dates would hide those in the middle of the year always.
    """
    return (place - start) % count.clamp_min(1) < length


def _hidden_cubes(
    seeds: torch.Tensor, name: str, padding: torch.Tensor, ratio: float, cells: int, pixels: int
) -> torch.Tensor:
    """A gap in the existing dates at each of ``cells`` x ``cells`` places: (B, T, pixels, pixels) bool."""
    target = _number_hidden(padding, ratio)[:, None, None]
    count = (~padding).sum(dim=1)[:, None, None]
    start = (uniform(seeds, f"cubes/{name}", cells, cells) * count).long()[:, None]
    place = ((~padding).cumsum(dim=1) - 1)[:, :, None, None]
    hidden = _in_gap(place, start, target[:, None], count[:, None]) & ~padding[:, :, None, None]
    cell = torch.arange(pixels, device=seeds.device) * cells // pixels
    return hidden[:, :, cell][..., cell]


def _series_mask(
    seeds: torch.Tensor, modality: Modality, given: EncoderInput, whole: torch.Tensor, config: MaskingConfig
) -> Mask:
    name, padding, pixels = modality.name, given.padding, given.values.shape[-1]
    assert padding is not None
    ratio = config.ratios.get(name, config.date_ratio)
    dates = _hidden_dates(seeds, name, padding, ratio, config.gap_share)
    if config.cube_share == 0:
        return Mask(whole, dates=dates)
    cells = min(pixels, max(1, round(pixels * modality.gsd / config.cube)))
    cubes = _hidden_cubes(seeds, name, padding, ratio, cells, pixels)
    cubed = uniform(seeds, f"cubed/{name}") < config.cube_share
    # A date that is hidden everywhere is a hidden date.
    everywhere = cubes.all(dim=-1).all(dim=-1)
    dates = torch.where(cubed[:, None], everywhere, dates)
    return Mask(whole, dates=dates, cubes=cubes & (cubed[:, None] & ~everywhere)[..., None, None])


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
    blocks = blocks_of({name: modalities[name] for name in names}, config)
    present = torch.stack([inputs[name].present for name in names], dim=1)
    order = torch.stack([uniform(seeds, f"whole/{name}") for name in names], dim=1)
    hidden = order < config.modality_ratio
    # Of the present modalities the one with the highest draw always stays.
    keeper = order.masked_fill(~present, -1.0).argmax(dim=1)
    hidden &= ~F.one_hot(keeper, len(names)).bool()
    masks: dict[str, Mask] = {}
    for index, name in enumerate(names):
        whole = hidden[:, index] | ~present[:, index]
        if inputs[name].padding is not None:
            masks[name] = _series_mask(seeds, modalities[name], inputs[name], whole, config)
            continue
        block, tag = blocks[name], "units" if config.joint else f"units/{name}"
        grid = block_grid(modalities[name], inputs[name].values.shape[-1], block, config.images)
        hidden_blocks = (
            _packed(seeds, tag, grid)
            if config.images == "packed"
            else _scattered(seeds, tag, grid, config.ratios.get(name, config.ratio))
        )
        masks[name] = Mask(
            whole, units=hidden_blocks.repeat_interleave(block, 1).repeat_interleave(block, 2), block=block
        )
    return masks


def draw_map_weights(seeds: torch.Tensor, name: str, maps: int, ratio: float) -> torch.Tensor:
    """(B, maps) float: 0 for hidden maps; the others of a sample share the weight of all, ``maps``."""
    draws = uniform(seeds, f"maps/{name}", maps)
    kept = (draws >= ratio) | F.one_hot(draws.argmax(dim=1), maps).bool()
    return kept * (maps / kept.sum(dim=1, keepdim=True))
