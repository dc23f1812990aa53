"""Project feature maps to tokens with ground coordinates in metres, and decode features at grid positions from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from bocage.shards.modality import Modality
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.objectives.decoder import FusionDecoder, Neck, grid_centres
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks


class GeoreferencedTokens(NamedTuple):
    """Tokens of one modality.

    Attributes:
        values: (B, N, width).
        centres: (B or 1, N, 2) metres from the left and the top of the ground window.
        visible: (B or 1, N) bool, False where the encoder only saw a mask token. It does not account for samples whose
            modality is dropped (``Mask.dropped``).
    """

    values: torch.Tensor
    centres: torch.Tensor
    visible: torch.Tensor


def build_neck(encoder: Encoder, modality: Modality, width: int) -> Neck:
    """Build the neck of an encoder: one token per mask unit of an image, one per pixel of a series."""
    return Neck(encoder.widths, encoder.strides, 1 if modality.role == "series" else modality.unit, width)


def georeferenced_tokens(encoded: EncodedBatch, name: str, neck: Neck) -> GeoreferencedTokens:
    """Compute the tokens of one modality and their ground coordinates.

    Args:
        encoded: encodings of a batch.
        name: modality.
        neck: neck of its encoder (``build_neck``).
    """
    mask, device, weights = encoded.masks[name], encoded.seeds.device, encoded.map_weights.get(name)
    if mask.units is None:
        pixels = encoded.inputs[name].values.shape[-1]
        centres = grid_centres(pixels, encoded.side, device).flatten(0, 1)[None]
        tokens = neck(encoded.features[name], pixels, weights).flatten(1, 2)
        return GeoreferencedTokens(tokens, centres, centres.new_ones(centres.shape[:2], dtype=torch.bool))
    units = mask.units.shape[1]
    centres = grid_centres(units, encoded.side, device)
    if not mask.packed:
        tokens = neck(encoded.features[name], units, weights).flatten(1, 2)
        return GeoreferencedTokens(tokens, centres.flatten(0, 1)[None], ~mask.units.flatten(1))
    tokens = neck(encoded.features[name], units // 2, weights).flatten(1, 2)
    # The centres are packed in the same order as the visible units.
    centres = pack_visible_blocks(centres.permute(2, 0, 1).expand(len(tokens), -1, -1, -1), mask.units, mask.block)
    centres = centres.flatten(2).transpose(1, 2)
    return GeoreferencedTokens(tokens, centres, centres.new_ones(centres.shape[:2], dtype=torch.bool))


def decode_hidden(encoded: EncodedBatch, necks: nn.ModuleDict, decoder: FusionDecoder) -> dict[str, torch.Tensor]:
    """Decode features of every mask unit and series pixel, masked or not, from the visible tokens of all modalities.

    Args:
        encoded: encodings of a batch.
        necks: neck of each encoder, by modality.
        decoder: fusion decoder.

    Returns:
        By modality, (B, N, width): N mask units of an image or pixels of a series, in row-major order.
    """
    tokens, centres = {}, {}
    for name, neck in necks.items():
        assert isinstance(neck, Neck)
        tokens[name], centres[name], _ = georeferenced_tokens(encoded, name, neck)
    dropped = {name: encoded.masks[name].dropped for name in tokens}
    context = decoder.encode_context(tokens, centres, dropped, encoded.side)
    queries = {
        name: grid_centres(encoded.grid_size(name), encoded.side, context.tokens.device).flatten(0, 1)
        for name in encoded.masks
    }
    # Each pixel of a series is visible at some dates. What is known of it then need not pass through attention.
    own_tokens = {
        name: context.tokens[:, context.parts[name]].masked_fill(dropped[name][:, None, None], 0.0)
        for name, mask in encoded.masks.items()
        if mask.units is None
    }
    return decoder.decode_queries(queries, context, own_tokens)


def cell_means(tokens: GeoreferencedTokens, side: float, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the visible tokens in each cell of a ``cells`` x ``cells`` grid over the ground window.

    Args:
        tokens: tokens of one modality.
        side: side of the ground window, in metres.
        cells: cells along a side.

    Returns:
        Means (B, cells * cells, width), and (B, cells * cells) bool: whether the cell has any visible token.
    """
    batch, _, width = tokens.values.shape
    position = (tokens.centres * (cells / side)).long().clamp(0, cells - 1)
    index = (position[..., 1] * cells + position[..., 0]).expand(batch, -1)
    values = tokens.values.float()  # sums of many values lose precision in 16 bits
    weight = tokens.visible.expand(batch, -1).to(values.dtype)
    counts = weight.new_zeros(batch, cells * cells).scatter_add(1, index, weight)
    sums = values.new_zeros(batch, cells * cells, width)
    sums = sums.scatter_add(1, index[..., None].expand(-1, -1, width), values * weight[..., None])
    return sums / counts.clamp_min(1)[..., None], counts > 0
