"""The fusion decoder: visible tokens of all modalities, joined on the ground, answer for what is hidden.

Thrown away after pretraining. Encoders meet only here, so that any subset of them can be published and used. Hidden
places are queries that look at the fused visible tokens but not at each other (CrossMAE, arXiv 2401.14391), which
keeps the cost linear in what is to be reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

_LONGEST = 400.0  # metres: longest wavelength of the position encoding, four patches
_SHORTEST = 4.0  # metres: shortest wavelength, about the smallest mask unit
_NEAREST, _FARTHEST = 4.0, 100.0  # metres: reach of the most local and of the widest attention head at the start
_LONGEST_DAYS, _SHORTEST_DAYS = 730.0, 8.0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Size of the fusion decoder.

    Attributes:
        width: channels of its tokens; a multiple of 4 and of ``heads``.
        fusion_depth: self-attention blocks over the visible tokens.
        query_depth: cross-attention blocks from queries to the fused tokens.
        heads: attention heads.

    Raises:
        ValueError: a number that is too small, or a ``width`` that is not such a multiple.
    """

    width: int = 256
    fusion_depth: int = 2
    query_depth: int = 1
    heads: int = 8

    def __post_init__(self) -> None:
        for key, least in (("width", 4), ("heads", 1), ("fusion_depth", 0), ("query_depth", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"decoder.{key}={getattr(self, key)} must be at least {least}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"decoder.width={self.width} must be a multiple of 4 and of decoder.heads={self.heads}")


def waves(values: torch.Tensor, width: int, shortest: float, longest: float) -> torch.Tensor:
    """Sine and cosine of ``values`` at geometrically spaced wavelengths: (..., width) float32.

    Vaswani et al. 2017, arXiv 1706.03762, with wavelengths from ``shortest`` to ``longest`` in the unit of ``values``.
    """
    count = width // 2
    exponents = torch.arange(count, device=values.device, dtype=torch.float32) / max(count - 1, 1)
    wavelengths = shortest * (longest / shortest) ** exponents
    angles = 2 * math.pi * values[..., None].float() / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def ground_encoding(centres: torch.Tensor, width: int) -> torch.Tensor:
    """Position encoding of places: ``waves`` of either coordinate.

    Args:
        centres: (..., 2) metres from the left and the top of the ground window.
        width: channels, a multiple of 4.

    Returns:
        (..., width) float32.
    """
    return torch.cat([waves(centres[..., axis], width // 2, _SHORTEST, _LONGEST) for axis in (0, 1)], dim=-1)


def date_encoding(days: torch.Tensor, width: int) -> torch.Tensor:
    """Encoding (..., width) of days since 15 May, by ``waves``."""
    return waves(days, width, _SHORTEST_DAYS, _LONGEST_DAYS)


def grid_centres(count: int, side: float, device: torch.device) -> torch.Tensor:
    """Centres of a ``count`` x ``count`` grid over a window of ``side`` metres: (count, count, 2), x then y."""
    steps = (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * (side / count)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([columns, rows], dim=-1)


class Neck(nn.Module):
    """Feature maps of one encoder to one token per cell of a grid.

    Each map is normalised and projected, finer maps by a convolution over the cells of a token, coarser ones
    interpolated, and the token is the sum over maps.

    Args:
        widths: channels of each map, finest first.
        strides: input pixels per feature cell of each map.
        unit: input pixels along a side of a token.
        width: channels of the tokens.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], unit: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in widths)
        spans = [max(unit // stride, 1) for stride in strides]
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=span, stride=span)
            for channels, span in zip(widths, spans, strict=True)
        )

    def forward(self, maps: list[torch.Tensor], grid: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """(B, grid, grid, width) tokens of a ``grid`` x ``grid`` arrangement; ``weights`` (B, maps) of each map."""
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


class _Attention(nn.Module):
    """Multi-head attention in which what lies far on the ground weighs less.

    Each head subtracts its own multiple of the distance in metres from the attention scores (ALiBi, arXiv 2108.12409,
    on the ground instead of along a text; the multiples are learned). Tokens of all sensors are thus neighbours from
    the first step on, whatever their pixel size.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        # Reach of the heads: from one mask unit to about the whole patch.
        reach = torch.logspace(math.log10(_NEAREST), math.log10(_FARTHEST), heads)
        self.log_slope = nn.Parameter(-reach.log())

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, distances: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        batch, count, width = queries.shape
        shape = (batch, -1, self.heads, width // self.heads)
        query = self.query(queries).view(shape).transpose(1, 2)
        key, value = (part.view(shape).transpose(1, 2) for part in self.key_value(keys).chunk(2, dim=-1))
        bias = -self.log_slope.exp()[None, :, None, None] * distances[:, None]
        bias = bias.masked_fill(hidden[:, None, None], -torch.inf).to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.output(attended.transpose(1, 2).reshape(batch, count, width))


class _Block(nn.Module):
    """Pre-norm attention and MLP; attends to itself, or to a memory when one is given."""

    def __init__(self, width: int, heads: int, *, cross: bool) -> None:
        super().__init__()
        self.norm_queries = nn.LayerNorm(width)
        self.norm_memory = nn.LayerNorm(width) if cross else None
        self.attention = _Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        tokens: torch.Tensor,
        distances: torch.Tensor,
        hidden: torch.Tensor,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries = self.norm_queries(tokens)
        keys = queries if memory is None or self.norm_memory is None else self.norm_memory(memory)
        tokens = tokens + self.attention(queries, keys, distances, hidden)
        return tokens + self.mlp(self.norm_mlp(tokens))


@dataclass
class Context:
    """Fused visible tokens: (B, N, width), their centres (B, N, 2) in metres, and which of them (B, N) to leave out."""

    tokens: torch.Tensor
    centres: torch.Tensor
    hidden: torch.Tensor


class FusionDecoder(nn.Module):
    """Joint decoder over the visible tokens of all modalities.

    Args:
        names: modalities.
        config: sizes.
    """

    def __init__(self, names: Sequence[str], config: DecoderConfig) -> None:
        super().__init__()
        self.width = config.width
        self.embeddings = nn.ParameterDict({name: nn.Parameter(torch.zeros(config.width)) for name in names})
        self.queries = nn.ParameterDict({name: nn.Parameter(torch.zeros(config.width)) for name in names})
        # A sample may have nothing visible on a rank; attention needs one key that is always there.
        self.register = nn.Parameter(torch.zeros(config.width))
        self.fusion = nn.ModuleList(_Block(config.width, config.heads, cross=False) for _ in range(config.fusion_depth))
        self.reading = nn.ModuleList(_Block(config.width, config.heads, cross=True) for _ in range(config.query_depth))
        self.norm = nn.LayerNorm(config.width)
        for parameter in (*self.embeddings.values(), *self.queries.values(), self.register):
            nn.init.trunc_normal_(parameter, std=0.02)

    def fuse(
        self,
        tokens: Mapping[str, torch.Tensor],
        centres: Mapping[str, torch.Tensor],
        hidden: Mapping[str, torch.Tensor],
        side: float,
    ) -> Context:
        """The fused memory.

        Args:
            tokens: by modality, (B, N, width).
            centres: by modality, (B or 1, N, 2) metres.
            hidden: by modality, (B,) bool: no token of this sample's modality may be seen.
            side: side of the ground window, metres.
        """
        batch = len(next(iter(tokens.values())))
        first = next(iter(centres.values()))
        parts = [self.register.expand(batch, 1, -1)]
        places = [torch.full_like(first[:, :1], side / 2).expand(batch, -1, -1)]
        masks = [next(iter(hidden.values())).new_zeros((batch, 1))]
        for name, values in tokens.items():
            place = ground_encoding(centres[name], self.width).to(values.dtype)
            parts.append(values + place + self.embeddings[name])
            places.append(centres[name].expand(batch, -1, -1))
            masks.append(hidden[name][:, None].expand(-1, values.shape[1]))
        memory = Context(torch.cat(parts, dim=1), torch.cat(places, dim=1), torch.cat(masks, dim=1))
        distances = torch.cdist(memory.centres, memory.centres)
        for block in self.fusion:
            memory.tokens = block(memory.tokens, distances, memory.hidden)
        return memory

    def read(self, centres: Mapping[str, torch.Tensor], memory: Context) -> dict[str, torch.Tensor]:
        """What the memory says about places: by modality (B, N, width) for centres (N, 2)."""
        batch = len(memory.tokens)
        queries = [ground_encoding(places, self.width) + self.queries[name] for name, places in centres.items()]
        answers = torch.cat(queries).expand(batch, -1, -1).to(memory.tokens.dtype)
        distances = torch.cdist(torch.cat(list(centres.values())).expand(batch, -1, -1), memory.centres)
        for block in self.reading:
            answers = block(answers, distances, memory.hidden, memory.tokens)
        answers = self.norm(answers)
        counts = [len(places) for places in centres.values()]
        return dict(zip(centres, answers.split(counts, dim=1), strict=True))
