"""Draw random masks: blocks of images, dates or space-time cubes of series, whole modalities, feature maps.

Masks of different modalities are independent unless ``MaskingConfig.joint`` is set, so a masked sensor is predicted
from the other sensors and from its own visible parts. Each sample keeps at least one visible modality, and each
visible modality keeps a visible part. All random numbers depend on the sample's seed alone (``shards.counter_rng``).
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
from bocage.shards.read.windows import explain_mismatch, format_sides, valid_sides

_CUBES_PER_PATCH = 4  # default number of cubes along a side of a patch: cubes of 25.6 m in FLAIR-HUB


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """What is masked, and how masked images are encoded.

    Attributes:
        images: ``packed`` keeps one random block of every 2 x 2 and packs the visible quarter into an image of half the
            side, which an unmodified Swin encodes (uniform sampling of UM-MAE, arXiv 2205.10063). ``mask_token``
            encodes the whole image and replaces masked tokens by a learned one (SimMIM, arXiv 2111.09886). Published
            weights have the same format under both.
        ratio: masked fraction of the blocks under ``mask_token``; ``packed`` masks 0.75.
        date_ratio: masked fraction of the dates of a series.
        ratios: masked fraction of single modalities, by name; replaces ``ratio`` and ``date_ratio``.
        units: side of a mask unit of an image or series, in pixels, by modality; others have that of the shards.
        blocks: side of the masked blocks of an image, in metres, by modality: a multiple of its mask unit, which is
            the default.
        joint: mask the same ground in all images of a sample, in blocks of the largest of their sides. Masked ground
            must then be predicted from its surroundings and from the series.
        gap_probability: probability that the masked dates form one gap instead of scattered dates; a gap wraps around
            the end of the year.
        cube_probability: probability that a series is masked in cubes of space and time instead of whole dates: each
            ground cell has its own gap of dates. Masked pixels of a frame are set to the mean, as holes are.
        cube: side of a cube on the ground, in metres; null for a quarter of a patch.
        modality_ratio: probability that a whole modality is masked.
        map_ratio: probability, in training, that a feature map of a sample is left out of the tokens of the objectives
            (``tokens.georeferenced_tokens``); at least one map stays. If all maps are always summed, the deepest map
            need not carry information: a constant vector outgrows it and features collapse
            (docs/explanation/design-choices.md).

    Raises:
        ValueError: a fraction or probability lies outside [0, 1], a side is not positive, or ``ratio`` is not 0.75
            under ``packed``.
    """

    images: Literal["packed", "mask_token"] = "packed"
    ratio: float = 0.75
    date_ratio: float = 0.6
    ratios: dict[str, float] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    joint: bool = False
    gap_probability: float = 0.3
    cube_probability: float = 0.0
    cube: float | None = None
    modality_ratio: float = 0.25
    map_ratio: float = 0.5

    def __post_init__(self) -> None:
        keys = ("ratio", "date_ratio", "gap_probability", "cube_probability", "modality_ratio", "map_ratio")
        fractions = {key: getattr(self, key) for key in keys}
        fractions |= {f"ratios.{name}": value for name, value in self.ratios.items()}
        for key, value in fractions.items():
            if not 0 <= value <= 1:
                raise ValueError(f"masking.{key}={value} must lie between 0 and 1")
        for key, side in (("cube", self.cube), *((f"blocks.{name}", side) for name, side in self.blocks.items())):
            if side is not None and not 0 < side < math.inf:
                raise ValueError(f"masking.{key}={side} must be a positive number of metres")
        if self.images == "packed" and self.ratio != 0.75:
            raise ValueError(
                "masking.ratio must be 0.75 with masking.images=packed, which keeps one block of every 2 x 2"
            )


@dataclass
class Mask:
    """Mask of one modality, for B samples.

    Attributes:
        dropped: (B,) bool, True where the whole modality is masked or absent; the decoder must ignore its tokens.
        units: images: (B, U, U) bool, True where a mask unit is masked.
        block: units along a side of a masked block.
        packed: images: whether the encoder reads the visible blocks only, packed into an image of half the side.
        dates: series: (B, T) bool, True where an existing date is masked.
        cubes: series: (B, T, H, W) bool, True where a pixel of another date is masked; None without cubes.
    """

    dropped: torch.Tensor
    units: torch.Tensor | None = None
    block: int = 1
    packed: bool = False
    dates: torch.Tensor | None = None
    cubes: torch.Tensor | None = None

    def pixel_mask(self, padding: torch.Tensor, pixels: int) -> torch.Tensor:
        """Combine the masks of a series: dates, cubes and, where the modality is dropped, all existing dates.

        Args:
            padding: (B, T) bool, True for missing dates.
            pixels: pixels along a side of the series.

        Returns:
            (B, T, pixels, pixels) bool, True where masked.
        """
        assert self.dates is not None
        dates = self.dates | (self.dropped[:, None] & ~padding)
        masked = dates[:, :, None, None].expand(-1, -1, pixels, pixels)
        return masked if self.cubes is None else masked | self.cubes


def is_single_unit(modality: Modality) -> bool:
    """Whether an image is a single mask unit, such as one pixel: it is masked as a whole or not at all."""
    return modality.role == "image" and modality.size == modality.unit


def block_sizes(modalities: Mapping[str, Modality], config: MaskingConfig) -> dict[str, int]:
    """Units along a side of the masked blocks of each image, by modality.

    Raises:
        InputError: ``config`` names an unknown modality or one of the wrong role, or the side of a block is not a
            multiple of the mask unit.
    """
    images = {name: item for name, item in modalities.items() if item.role == "image"}
    for key, names, valid_names in (("ratios", config.ratios, modalities), ("blocks", config.blocks, images)):
        if unknown := sorted(set(names) - set(valid_names)):
            raise InputError(
                f"masking.{key}.{unknown[0]}: not one of {', '.join(valid_names)}"
                if valid_names
                else f"masking.{key}.{unknown[0]}: it applies to images, and modalities has none"
            )
    image_ratios = sorted(set(config.ratios) & set(images))
    if config.images == "packed" and image_ratios:
        raise InputError(f"masking.ratios.{image_ratios[0]} needs masking.images=mask_token: packed images mask 0.75")
    if config.joint and image_ratios:
        raise InputError(
            f"masking.ratios.{image_ratios[0]}: with masking.joint, masking.ratio applies to all images; remove it"
        )
    sides = {name: config.blocks.get(name, item.unit * item.gsd) for name, item in images.items()}
    divided = [name for name, item in images.items() if not is_single_unit(item)]
    if config.joint and divided:
        sides |= dict.fromkeys(divided, max(sides[name] for name in divided))
    blocks = {}
    for name, side in sides.items():
        unit = images[name].unit * images[name].gsd
        blocks[name] = max(1, round(side / unit))
        if not math.isclose(blocks[name] * unit, side, rel_tol=1e-6):
            keys = " and ".join(f"masking.blocks.{key}" for key in config.blocks)
            raise InputError(f"{keys}: {side:g} m is not a multiple of the {unit:g} m mask unit of {name}")
    return blocks


def _image_mismatch(modality: Modality, pixels: int, block: int, images: str) -> str:
    """Reason why an image of ``pixels`` x ``pixels`` cannot be masked in such blocks; empty if it can."""
    side = modality.unit * block
    metres = side * modality.gsd
    multiple = side * (2 if images == "packed" else 1)
    if pixels % multiple:
        pairs = "pairs of " if images == "packed" else ""
        return (
            f"{modality.name} is masked in {pairs}blocks of {metres:g} m ({side} px, masking.images={images}), which "
            f"do not divide {pixels * modality.gsd:g} m"
        )
    if pixels == side:
        return f"{modality.name} is a single block of {metres:g} m, so nothing can be masked"
    return ""


def check_window(
    modalities: Mapping[str, Modality], side: float | None, config: MaskingConfig, *, reconstructed: bool
) -> None:
    """Check that windows can be cut and divide into masked blocks.

    Args:
        modalities: modalities of the run.
        side: side of the ground window, in metres; None for whole patches.
        config: masking.
        reconstructed: whether the run has the objective ``masked``, which also divides series into mask units.

    Raises:
        InputError: the window does not fit (the message lists windows that fit), or ``masking`` is invalid, see
            ``block_sizes``.
    """
    blocks = block_sizes(modalities, config)
    sides = valid_sides(modalities.values())
    side = sides[-1] if side is None else side

    def mismatch(window: float) -> str:
        if reason := explain_mismatch(window, sides):
            return reason
        for name, modality in modalities.items():
            pixels = round(window / modality.gsd)
            if modality.role == "image":
                if is_single_unit(modality) and pixels == modality.size and len(modalities) > 1:  # masked as a whole
                    continue
                if reason := _image_mismatch(modality, pixels, blocks[name], config.images):
                    return reason
            elif reconstructed and pixels % modality.unit:
                unit = modality.unit * modality.gsd
                return f"{name} is reconstructed in units of {unit:g} m, which do not divide {window:g} m"
        return ""

    if not (reason := mismatch(side)):
        return
    fitting = [window for window in sides if not mismatch(window)]
    if not fitting:
        keys = " or ".join(f"masking.blocks.{name}" for name in config.blocks) or "modalities"
        raise InputError(f"window={side:g}: no window fits, {mismatch(sides[-1])}; change {keys}")
    raise InputError(f"window={side:g}: {reason}; windows that fit are {format_sides(fitting)} wide")


def _draw_packed_blocks(seeds: torch.Tensor, tag: str, grid: int) -> torch.Tensor:
    """Mask all but one random block of every 2 x 2: (B, grid, grid) bool."""
    pairs = grid // 2
    scores = uniform(seeds, tag, pairs, pairs, 4)
    visible = F.one_hot(scores.argmax(dim=-1), 4).bool().view(-1, pairs, pairs, 2, 2)
    return ~visible.permute(0, 1, 3, 2, 4).reshape(-1, grid, grid)


def _draw_scattered_blocks(seeds: torch.Tensor, tag: str, grid: int, ratio: float) -> torch.Tensor:
    """Mask a fraction of the blocks and leave at least one visible: (B, grid, grid) bool."""
    masked = min(round(ratio * grid * grid), grid * grid - 1)
    return (permutations(seeds, tag, grid * grid) < masked).view(-1, grid, grid)


def _masked_date_count(padding: torch.Tensor, ratio: float) -> torch.Tensor:
    """Number of masked dates of each sample, (B,): one date stays visible, and one is masked if two exist."""
    count = (~padding).sum(dim=1)
    target = (count * ratio).round().long()
    if ratio > 0:
        target = target.clamp(min=1)
    return torch.minimum(target, (count - 1).clamp(min=0))


def _draw_dates(
    seeds: torch.Tensor, name: str, padding: torch.Tensor, ratio: float, gap_probability: float
) -> torch.Tensor:
    """Mask a fraction of the existing dates, scattered or as one gap: (B, T) bool."""
    target = _masked_date_count(padding, ratio)[:, None]
    count, length = (~padding).sum(dim=1, keepdim=True), padding.shape[1]
    # Padding sorts last, so that ranks count existing dates only.
    scores = uniform(seeds, f"hidden dates/{name}", length).masked_fill(padding, 2.0)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    positions = (~padding).cumsum(dim=1) - 1
    start = (uniform(seeds, f"gap start/{name}")[:, None] * count).long()
    is_gap = uniform(seeds, f"gap/{name}")[:, None] < gap_probability
    return torch.where(is_gap, _in_gap(positions, start, target, count), ranks < target) & ~padding


def _in_gap(positions: torch.Tensor, start: torch.Tensor, length: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Whether positions among ``count`` dates lie in a gap that wraps around the end.

    Without wrapping, gaps of more than half of the dates would always mask the middle of the year.
    """
    return (positions - start) % count.clamp_min(1) < length


def _draw_cubes(
    seeds: torch.Tensor, name: str, padding: torch.Tensor, ratio: float, cells: int, pixels: int
) -> torch.Tensor:
    """Mask an independent gap of dates in each of ``cells`` x ``cells`` ground cells: (B, T, pixels, pixels) bool."""
    target = _masked_date_count(padding, ratio)[:, None, None]
    count = (~padding).sum(dim=1)[:, None, None]
    start = (uniform(seeds, f"cubes/{name}", cells, cells) * count).long()[:, None]
    positions = ((~padding).cumsum(dim=1) - 1)[:, :, None, None]
    masked = _in_gap(positions, start, target[:, None], count[:, None]) & ~padding[:, :, None, None]
    cell = torch.arange(pixels, device=seeds.device) * cells // pixels
    return masked[:, :, cell][..., cell]


def _draw_series_mask(
    seeds: torch.Tensor, modality: Modality, series: EncoderInput, dropped: torch.Tensor, config: MaskingConfig
) -> Mask:
    name, padding, pixels = modality.name, series.padding, series.values.shape[-1]
    assert padding is not None
    ratio = config.ratios.get(name, config.date_ratio)
    dates = _draw_dates(seeds, name, padding, ratio, config.gap_probability)
    if config.cube_probability == 0:
        return Mask(dropped, dates=dates)
    cube = config.cube or modality.patch_size / _CUBES_PER_PATCH
    cells = min(pixels, max(1, round(pixels * modality.gsd / cube)))
    cubes = _draw_cubes(seeds, name, padding, ratio, cells, pixels)
    has_cubes = uniform(seeds, f"cubed/{name}") < config.cube_probability
    # A date that is masked in every cell counts as a masked date.
    everywhere = cubes.all(dim=-1).all(dim=-1)
    dates = torch.where(has_cubes[:, None], everywhere, dates)
    return Mask(dropped, dates=dates, cubes=cubes & (has_cubes[:, None] & ~everywhere)[..., None, None])


def draw_masks(
    inputs: Mapping[str, EncoderInput],
    modalities: Mapping[str, Modality],
    blocks: Mapping[str, int],
    seeds: torch.Tensor,
    config: MaskingConfig,
) -> dict[str, Mask]:
    """Draw the masks of a batch. The window must fit the blocks (``check_window``).

    Args:
        inputs: encoder inputs, by modality.
        modalities: registry entries.
        blocks: units along a side of a masked block of each image (``block_sizes``).
        seeds: (B,) int64 sample seeds.
        config: masking.
    """
    names = list(inputs)
    present = torch.stack([inputs[name].present for name in names], dim=1)
    scores = torch.stack([uniform(seeds, f"whole/{name}") for name in names], dim=1)
    dropped = scores < config.modality_ratio
    # The present modality with the highest score always stays visible.
    kept = scores.masked_fill(~present, -1.0).argmax(dim=1)
    dropped &= ~F.one_hot(kept, len(names)).bool()
    dropped |= ~present
    masks: dict[str, Mask] = {}
    for index, name in enumerate(names):
        item, modality = inputs[name], modalities[name]
        if item.padding is not None:
            masks[name] = _draw_series_mask(seeds, modality, item, dropped[:, index], config)
            continue
        block, tag = blocks[name], "units" if config.joint else f"units/{name}"
        if is_single_unit(modality):
            masks[name] = Mask(dropped[:, index], units=seeds.new_zeros((len(seeds), 1, 1), dtype=torch.bool))
            continue
        grid = item.values.shape[-1] // (modality.unit * block)
        masked = (
            _draw_packed_blocks(seeds, tag, grid)
            if config.images == "packed"
            else _draw_scattered_blocks(seeds, tag, grid, config.ratios.get(name, config.ratio))
        )
        units = masked.repeat_interleave(block, 1).repeat_interleave(block, 2)
        masks[name] = Mask(dropped[:, index], units=units, block=block, packed=config.images == "packed")
    return masks


def draw_map_weights(seeds: torch.Tensor, name: str, maps: int, ratio: float) -> torch.Tensor:
    """Draw the weights of an encoder's feature maps: 0 for dropped maps, and weights that sum to ``maps`` for the rest.

    Args:
        seeds: (B,) int64 sample seeds.
        name: modality of the encoder.
        maps: number of feature maps.
        ratio: probability that a map is dropped; at least one stays.

    Returns:
        (B, maps) float.
    """
    scores = uniform(seeds, f"maps/{name}", maps)
    kept = (scores >= ratio) | F.one_hot(scores.argmax(dim=1), maps).bool()
    return kept * (maps / kept.sum(dim=1, keepdim=True))
