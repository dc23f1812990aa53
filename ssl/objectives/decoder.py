"""Fusion decoder: self-attention over the visible tokens of all modalities, cross-attention from query positions.

The decoder is discarded after pretraining. Modalities interact only here, so each encoder can be published and used
alone. Queries attend to the fused visible tokens but not to each other (CrossMAE, arXiv 2401.14391), so the cost is
linear in the number of reconstructed positions. Attention scores depend on the offset between tokens in metres.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Wavelengths, in patch sides: the position encoding goes from about the smallest mask unit to four patches.
_SHORTEST_WAVE, _LONGEST_WAVE = 1 / 25, 4.0
_SHORTEST_ROTATION, _LONGEST_ROTATION = 1 / 12.8, 2.0  # patch sides, rotary embeddings
_SHORTEST_PERIOD, _LONGEST_PERIOD = 8.0, 730.0  # days, date encoding
_LOCALITY = 8.0  # initial score of a token at the position of the query, in the most local head


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Size of the fusion decoder.

    Attributes:
        width: channels of its tokens; a multiple of 4 times ``heads``.
        fusion_depth: self-attention blocks over the visible tokens.
        query_depth: cross-attention blocks from queries to the fused tokens.
        heads: attention heads.

    Raises:
        ValueError: a value is too small, or ``width`` is not a multiple of 4 times ``heads``.
    """

    width: int = 256
    fusion_depth: int = 2
    query_depth: int = 3
    heads: int = 8

    def __post_init__(self) -> None:
        for key, minimum in (("width", 4), ("heads", 1), ("fusion_depth", 0), ("query_depth", 1)):
            if getattr(self, key) < minimum:
                raise ValueError(f"decoder.{key}={getattr(self, key)} must be at least {minimum}")
        if self.width % (4 * self.heads):
            raise ValueError(f"decoder.width={self.width} must be a multiple of 4 * decoder.heads={4 * self.heads}")


def sinusoidal_encoding(values: torch.Tensor, width: int, shortest: float, longest: float) -> torch.Tensor:
    """Encode values by sines and cosines at geometrically spaced wavelengths (Vaswani et al. 2017, arXiv 1706.03762).

    Args:
        values: (...) numbers, in any unit.
        width: channels of the encoding, even.
        shortest: shortest wavelength, in the unit of ``values``.
        longest: longest wavelength.

    Returns:
        (..., width) float32.
    """
    count = width // 2
    exponents = torch.arange(count, device=values.device, dtype=torch.float32) / max(count - 1, 1)
    wavelengths = shortest * (longest / shortest) ** exponents
    angles = 2 * math.pi * values[..., None].float() / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def ground_encoding(centres: torch.Tensor, width: int, patch_size: float) -> torch.Tensor:
    """Encode ground positions by ``sinusoidal_encoding`` of each coordinate.

    Args:
        centres: (..., 2) metres from the left and the top of the ground window.
        width: channels, a multiple of 4.
        patch_size: side of a patch, in metres, with which the wavelengths scale.

    Returns:
        (..., width) float32.
    """
    waves = _SHORTEST_WAVE * patch_size, _LONGEST_WAVE * patch_size
    return torch.cat([sinusoidal_encoding(centres[..., axis], width // 2, *waves) for axis in (0, 1)], dim=-1)


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding of some positions, (B or 1, 1, N, channels of a head / 2) float32."""

    cosine: torch.Tensor
    sine: torch.Tensor


def ground_rotation(centres: torch.Tensor, channels: int, patch_size: float) -> Rotation:
    """Compute axial rotary embeddings of ground positions (RoPE, arXiv 2104.09864; axial: arXiv 2403.13298).

    Attention scores then depend on the offset between query and key in metres, direction included, whatever the pixel
    sizes of their sensors.

    Args:
        centres: ground positions in metres, (B or 1, N, 2).
        channels: channels of an attention head, a multiple of 4; half of the pairs rotate with x, half with y.
        patch_size: side of a patch, in metres, with which the wavelengths scale.
    """
    count = channels // 4
    exponents = torch.arange(count, device=centres.device, dtype=torch.float32) / max(count - 1, 1)
    waves = patch_size * _SHORTEST_ROTATION * (_LONGEST_ROTATION / _SHORTEST_ROTATION) ** exponents
    angles = (2 * math.pi * centres[..., None].float() / waves).flatten(-2)[:, None]
    return Rotation(angles.cos(), angles.sin())


def rotate(values: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate pairs of channels: (B, heads, N, channels) to the same shape and dtype."""
    first, second = values.float().chunk(2, dim=-1)
    cosine, sine = rotation
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1).to(values.dtype)


def date_encoding(days: torch.Tensor, width: int) -> torch.Tensor:
    """Encode days since 15 May by ``sinusoidal_encoding``: (...) to (..., width) float32."""
    return sinusoidal_encoding(days, width, _SHORTEST_PERIOD, _LONGEST_PERIOD)


def grid_centres(count: int, side: float, device: torch.device) -> torch.Tensor:
    """Centres of a ``count`` x ``count`` grid over a window of ``side`` metres: (count, count, 2), x then y."""
    steps = (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * (side / count)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([columns, rows], dim=-1)


class Neck(nn.Module):
    """Merge the feature maps of one encoder into one token per grid cell.

    Each map is normalised and projected. The convolution covers the cells of one token on finer maps; coarser maps are
    interpolated. The token is the sum over maps.

    Args:
        widths: channels of each map, finest first.
        strides: input pixels per feature cell of each map.
        unit: input pixels along a side of a token.
        width: channels of the tokens.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], unit: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in widths)
        kernels = [max(unit // stride, 1) for stride in strides]
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=kernel, stride=kernel)
            for channels, kernel in zip(widths, kernels, strict=True)
        )

    def forward(self, maps: list[torch.Tensor], grid: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the tokens of a ``grid`` x ``grid`` arrangement.

        Args:
            maps: feature maps, finest first, (B, width, h, w).
            grid: tokens along a side.
            weights: (B, maps) weight of each map; None weighs all by 1.

        Returns:
            (B, grid, grid, width).
        """
        total = None
        for index, (features, norm, projection) in enumerate(zip(maps, self.norms, self.projections, strict=True)):
            normed = norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            cells = projection(normed)
            if cells.shape[-1] != grid:
                cells = F.interpolate(cells, size=(grid, grid), mode="bilinear", align_corners=False)
            if weights is not None:
                cells = cells * weights[:, index, None, None, None].to(cells.dtype)
            total = cells if total is None else total + cells
        assert total is not None
        return total.permute(0, 2, 3, 1)


class _RotaryAttention(nn.Module):
    """Multi-head attention between tokens with rotary embeddings of their ground positions.

    Heads are initialised with a preference for near tokens, from none in the first head to strong in the last: the
    biases of queries and keys are one constant vector, whose rotated product is a sum of cosines of the offset, with
    its maximum at 0. Without it, series are reconstructed much later.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        channels = width // heads
        strength = torch.linspace(0, _LOCALITY, heads) if heads > 1 else torch.full((1,), _LOCALITY)
        # The score of two such vectors at one place is channels / 2 * value^2 / sqrt(channels).
        value = (2 * strength / math.sqrt(channels)).sqrt()
        local = torch.cat([value[:, None].expand(heads, channels // 2), torch.zeros(heads, channels // 2)], dim=1)
        with torch.no_grad():
            self.query.bias.copy_(local.flatten())
            self.key_value.bias[:width] = local.flatten()

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        query_rotation: Rotation,
        key_rotation: Rotation,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        batch, count, width = queries.shape
        shape = (batch, -1, self.heads, width // self.heads)
        query = rotate(self.query(queries).view(shape).transpose(1, 2), query_rotation)
        key, value = (part.view(shape).transpose(1, 2) for part in self.key_value(keys).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, rotate(key, key_rotation), value, attn_mask=attention_mask)
        return self.output(attended.transpose(1, 2).reshape(batch, count, width))


class _Block(nn.Module):
    """Pre-norm attention and MLP: self-attention, or cross-attention to a context."""

    def __init__(self, width: int, heads: int, *, cross: bool) -> None:
        super().__init__()
        self.norm_queries = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width) if cross else None
        self.attention = _RotaryAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: torch.Tensor, rotation: Rotation, context: Context) -> torch.Tensor:
        queries = self.norm_queries(tokens)
        keys = queries if self.norm_context is None else self.norm_context(context.tokens)
        tokens = tokens + self.attention(queries, keys, rotation, context.rotation, context.attention_mask)
        return tokens + self.mlp(self.norm_mlp(tokens))


@dataclass
class Context:
    """Fused visible tokens.

    Attributes:
        tokens: (B, N, width).
        rotation: rotary embeddings of their ground positions.
        attention_mask: (B, 1, 1, N) bool, False where attention ignores the token.
        parts: which of the N tokens belong to a modality, by name.
    """

    tokens: torch.Tensor
    rotation: Rotation
    attention_mask: torch.Tensor
    parts: Mapping[str, slice]


class FusionDecoder(nn.Module):
    """Joint decoder over the visible tokens of all modalities.

    Args:
        names: modalities.
        config: sizes.
        patch_size: side of a patch, in metres, with which the wavelengths of positions scale.
    """

    def __init__(self, names: Sequence[str], config: DecoderConfig, patch_size: float) -> None:
        super().__init__()
        self.width, self.head_width, self.patch_size = config.width, config.width // config.heads, patch_size
        self.modality_embeddings = nn.ParameterDict({name: nn.Parameter(torch.zeros(config.width)) for name in names})
        self.query_embeddings = nn.ParameterDict({name: nn.Parameter(torch.zeros(config.width)) for name in names})
        # A sample may have no visible token; attention needs at least one key.
        self.register_token = nn.Parameter(torch.zeros(config.width))
        self.fusion_blocks = nn.ModuleList(
            _Block(config.width, config.heads, cross=False) for _ in range(config.fusion_depth)
        )
        self.query_blocks = nn.ModuleList(
            _Block(config.width, config.heads, cross=True) for _ in range(config.query_depth)
        )
        self.norm = nn.LayerNorm(config.width)
        for parameter in (*self.modality_embeddings.values(), *self.query_embeddings.values(), self.register_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def encode_context(
        self,
        tokens: Mapping[str, torch.Tensor],
        centres: Mapping[str, torch.Tensor],
        dropped: Mapping[str, torch.Tensor],
        side: float,
    ) -> Context:
        """Fuse the visible tokens of all modalities by self-attention.

        Args:
            tokens: tokens (B, N, width), by modality.
            centres: ground coordinates of the tokens in metres, (B or 1, N, 2), by modality.
            dropped: (B,) bool by modality, True for samples whose modality is masked as a whole or absent.
            side: side of the ground window, in metres.
        """
        batch = len(next(iter(tokens.values())))
        first_centres = next(iter(centres.values()))
        all_tokens = [self.register_token.expand(batch, 1, -1)]
        all_centres = [torch.full_like(first_centres[:, :1], side / 2).expand(batch, -1, -1)]
        masks = [next(iter(dropped.values())).new_zeros((batch, 1))]
        parts, start = {}, 1
        for name, values in tokens.items():
            parts[name] = slice(start, start + values.shape[1])
            start += values.shape[1]
            position = ground_encoding(centres[name], self.width, self.patch_size).to(values.dtype)
            all_tokens.append(values + position + self.modality_embeddings[name])
            all_centres.append(centres[name].expand(batch, -1, -1))
            masks.append(dropped[name][:, None].expand(-1, values.shape[1]))
        rotation = ground_rotation(torch.cat(all_centres, dim=1), self.head_width, self.patch_size)
        context = Context(torch.cat(all_tokens, dim=1), rotation, ~torch.cat(masks, dim=1)[:, None, None], parts)
        for block in self.fusion_blocks:
            context.tokens = block(context.tokens, rotation, context)
        return context

    def decode_queries(
        self,
        centres: Mapping[str, torch.Tensor],
        context: Context,
        own_tokens: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Decode features at query positions by cross-attention to the context.

        Args:
            centres: ground coordinates of the queries in metres, (N, 2), by modality.
            context: fused visible tokens.
            own_tokens: fused tokens that are added to the queries, (B, N, width), by modality. Others begin with their
                position and modality alone.

        Returns:
            Features (B, N, width), by modality.
        """
        batch = len(context.tokens)
        queries = []
        for name, positions in centres.items():
            query = ground_encoding(positions, self.width, self.patch_size) + self.query_embeddings[name]
            query = query.expand(batch, -1, -1).to(context.tokens.dtype)
            queries.append(query + own_tokens[name] if own_tokens and name in own_tokens else query)
        outputs = torch.cat(queries, dim=1)
        rotation = ground_rotation(torch.cat(list(centres.values()))[None], self.head_width, self.patch_size)
        for block in self.query_blocks:
            outputs = block(outputs, rotation, context)
        outputs = self.norm(outputs)
        counts = [len(positions) for positions in centres.values()]
        return dict(zip(centres, outputs.split(counts, dim=1), strict=True))
