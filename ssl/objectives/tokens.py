"""What encoders saw, as tokens with their places on the ground: where sensors of any pixel size meet."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bocage.shards.modality import Modality
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.objectives.decoder import Neck, grid_centres
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks


class GeoreferencedTokens(NamedTuple):
    """Tokens of one modality.

    Attributes:
        values: (B, N, width).
        centres: (B or 1, N, 2) metres from the left and the top of the ground window.
        seen: (B or 1, N) bool, False where the encoder saw only a mask token. It says nothing of samples whose
            modality is hidden as a whole (``Mask.whole``).
    """

    values: torch.Tensor
    centres: torch.Tensor
    seen: torch.Tensor


def build_neck(encoder: Encoder, modality: Modality, width: int) -> Neck:
    """The neck whose tokens ``georeferenced_tokens`` places: one a mask unit of an image, one a pixel of a series."""
    return Neck(encoder.widths, encoder.strides, 1 if modality.role == "series" else modality.unit, width)


def georeferenced_tokens(view: EncodedBatch, name: str, neck: Neck) -> GeoreferencedTokens:
    """Tokens of what the encoder of a modality saw: of mask units of images, of pixels of series.

    Args:
        view: encodings of a batch.
        name: the modality.
        neck: ``build_neck`` its encoder.
    """
    given, mask = view.inputs[name], view.masks[name]
    device, weights = given.values.device, view.map_weights.get(name)
    if mask.units is None:
        pixels = given.values.shape[-1]
        centres = grid_centres(pixels, view.side, device).flatten(0, 1)[None]
        return GeoreferencedTokens(
            neck(view.maps[name], pixels, weights).flatten(1, 2),
            centres,
            centres.new_ones(centres.shape[:2], dtype=torch.bool),
        )
    units = mask.units.shape[1]
    centres = grid_centres(units, view.side, device)
    if not view.packed:
        tokens = neck(view.maps[name], units, weights).flatten(1, 2)
        return GeoreferencedTokens(tokens, centres.flatten(0, 1)[None], ~mask.units.flatten(1))
    tokens = neck(view.maps[name], units // 2, weights).flatten(1, 2)
    # The places of visible units, packed as the units were.
    places = pack_visible_blocks(centres.permute(2, 0, 1).expand(len(tokens), -1, -1, -1), mask.units, mask.block)
    places = places.flatten(2).transpose(1, 2)
    return GeoreferencedTokens(tokens, places, places.new_ones(places.shape[:2], dtype=torch.bool))


def cell_means(tokens: GeoreferencedTokens, side: float, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the seen tokens whose centres lie in each cell of a ``cells`` x ``cells`` grid over the window.

    Returns:
        (B, cells * cells, width), and (B, cells * cells) bool: whether there is any.
    """
    batch, _, width = tokens.values.shape
    place = (tokens.centres * (cells / side)).long().clamp(0, cells - 1)
    index = (place[..., 1] * cells + place[..., 0]).expand(batch, -1)
    values = tokens.values.float()  # sums of 16 bits stick
    weight = tokens.seen.expand(batch, -1).to(values.dtype)
    counts = weight.new_zeros(batch, cells * cells).scatter_add(1, index, weight)
    sums = values.new_zeros(batch, cells * cells, width)
    sums = sums.scatter_add(1, index[..., None].expand(-1, -1, width), values * weight[..., None])
    return sums / counts.clamp_min(1)[..., None], counts > 0
