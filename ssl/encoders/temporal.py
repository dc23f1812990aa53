"""Lightweight temporal attention (L-TAE) over packed dates: the bottleneck of U-TAE.

Garnot & Landrieu, "Lightweight Temporal Self-Attention" (arXiv 2007.00586) and "Panoptic Segmentation of Satellite
Image Time Series with Convolutional Temporal Attention Networks" (arXiv 2107.07933). Parameters carry the official
names; the computation is rearranged so that nothing of size pixels x dates x ``d_model`` is ever built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from bocage.shards.errors import InputError

_PERIOD = 1000.0


@dataclass(frozen=True)
class PackedDates:
    """Where the V valid dates of a batch of B series come from.

    Attributes:
        sample: (V,) int64, the series of each date, ascending.
        slot: (V,) int64, its rank among the valid dates of its series.
        days: (V,) days, any real dtype.
        counts: (B,) int64, valid dates of each series.
        length: most valid dates of any series, L.
        padded_length: dates of a series with its padding, T.
    """

    sample: torch.Tensor
    slot: torch.Tensor
    days: torch.Tensor
    counts: torch.Tensor
    length: int
    padded_length: int

    @classmethod
    def of(cls, dates: torch.Tensor, padding: torch.Tensor | None) -> PackedDates:
        """The valid dates of (B, T) ``dates``; ``padding`` is (B, T) bool, True where there is none, or None."""
        batch, length = dates.shape
        if padding is None:
            slots = torch.arange(length, device=dates.device).repeat(batch)
            samples = torch.arange(batch, device=dates.device).repeat_interleave(length)
            counts = torch.full((batch,), length, device=dates.device)
            return cls(samples, slots, dates.flatten(), counts, length, length)
        valid = ~padding
        sample, position = valid.nonzero(as_tuple=True)
        counts = valid.sum(dim=1)
        slot = (valid.cumsum(dim=1) - 1)[sample, position]
        longest = int(counts.max()) if counts.numel() else 0
        return cls(sample, slot, dates[sample, position], counts, longest, length)

    @property
    def is_dense(self) -> bool:
        """Whether every series has L valid dates, so that packing is a plain view."""
        return len(self.sample) == len(self.counts) * self.length

    @property
    def valid(self) -> torch.Tensor:
        """(B, L) bool, True where a slot holds a date."""
        return torch.arange(self.length, device=self.counts.device) < self.counts[:, None]

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """(V, ...) rows as (B, L, ...), zeros in empty slots."""
        batch, shape = len(self.counts), rows.shape[1:]
        if not self.is_dense:
            empty = rows.new_zeros(batch * self.length, *shape)
            rows = empty.index_copy(0, self.sample * self.length + self.slot, rows)
        return rows.reshape(batch, self.length, *shape)

    def pack(self, slots: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) slots as (V, ...) rows: the inverse of ``unpack``."""
        rows = slots.flatten(0, 1)
        return rows if self.is_dense else rows.index_select(0, self.sample * self.length + self.slot)

    def total(self, rows: torch.Tensor) -> torch.Tensor:
        """(V, ...) rows summed over the dates of each series, (B, ...)."""
        if self.is_dense:
            return rows.reshape(len(self.counts), self.length, *rows.shape[1:]).sum(dim=1)
        return rows.new_zeros(len(self.counts), *rows.shape[1:]).index_add(0, self.sample, rows)


class SinusoidalPositions(nn.Module):
    """Sine and cosine encoding of dates, the same for every head.

    Position i of ``width`` has the wavelength 2 pi 1000^(2 floor(i / 2) / width) days (Vaswani et al. 2017).
    """

    exponents: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # Integers survive `.bfloat16()`: wavelengths rounded to 8 bits would displace dates by days.
        self.register_buffer("exponents", torch.arange(width) // 2 * 2, persistent=False)

    def forward(self, days: torch.Tensor) -> torch.Tensor:
        """(V,) days as a (V, width) table, float32, or float64 when the days are."""
        days = days if days.dtype == torch.float64 else days.to(torch.float32)
        angles = days[:, None] / _PERIOD ** (self.exponents.to(days.dtype) / len(self.exponents))
        return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=-1).flatten(1)


class AttentionHeads(nn.Module):
    """Parameters of the heads: a learned query each, ``Q`` (n_head, d_k), and the key projection ``fc1_k``."""

    def __init__(self, n_head: int, d_k: int, d_model: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.empty(n_head, d_k).normal_(0.0, math.sqrt(2.0 / d_k)))
        self.fc1_k = nn.Linear(d_model, n_head * d_k)
        nn.init.normal_(self.fc1_k.weight, 0.0, math.sqrt(2.0 / d_k))

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scaled score Q K^T / sqrt(d_k) as an affine function of a token: (n_head, d_model) and (n_head,)."""
        n_head, d_k = self.Q.shape
        query = self.Q[:, None] / math.sqrt(d_k)
        weight = torch.bmm(query, self.fc1_k.weight.view(n_head, d_k, -1))[:, 0]
        return weight, (query[:, 0] * self.fc1_k.bias.view(n_head, d_k)).sum(dim=1)


class TemporalEncoder(nn.Module):
    """L-TAE at every pixel of a packed series of maps.

    With x_t the group-normalised C channels of a pixel, e_t = W x_t + b + p_t its projection plus date encoding and
    u_h the query of head h folded into the key projection, the head's scores are u_h . e_t = (u_h W) . x_t + time, and
    its output is its slice of sum_t a_t e_t = W (sum_t a_t x_t) + b sum_t a_t + sum_t a_t p_t. So dates are pooled
    *before* the projection, exactly, also when dropout makes the attention sum to something else than 1. The group
    normalisation is an affine map that is constant over dates, hence folded on both sides in the same way.

    Args:
        in_channels: channels of the maps, C.
        n_head, d_model, d_k: heads, width of the projection, width of a key.
        out_channels: channels of the embedding.
        masked_norm: whether the statistics of ``in_norm`` leave padded dates out. The official code counts them as
            maps of ``pad_value``: off for its weights, on for everything else.
        pad_value: see ``masked_norm``.
    """

    ATTENTION_DROPOUT = 0.1
    DROPOUT = 0.2

    def __init__(
        self,
        in_channels: int,
        n_head: int,
        d_model: int,
        d_k: int,
        out_channels: int,
        masked_norm: bool,
        pad_value: float,
    ) -> None:
        super().__init__()
        for key, width in (("encoder_widths[-1]", in_channels), ("d_model", d_model)):
            if width % n_head:
                raise InputError(f"U-TAE: {key} = {width} is not a multiple of n_head = {n_head}")
        if d_model // n_head % 2:
            raise InputError(f"U-TAE: d_model / n_head = {d_model // n_head} must be even for the date encoding")
        self.n_head = n_head
        self.masked_norm = masked_norm
        self.pad_value = pad_value
        self.in_norm = nn.GroupNorm(n_head, in_channels)
        self.inconv = nn.Conv1d(in_channels, d_model, 1)
        self.positional_encoder = SinusoidalPositions(d_model // n_head)
        self.attention_heads = AttentionHeads(n_head, d_k, d_model)
        self.attention_dropout = nn.Dropout(self.ATTENTION_DROPOUT)
        self.mlp = nn.Sequential(nn.Linear(d_model, out_channels), nn.BatchNorm1d(out_channels), nn.ReLU())
        self.dropout = nn.Dropout(self.DROPOUT)
        self.out_norm = nn.GroupNorm(n_head, out_channels)

    def _normalization(self, sequence: torch.Tensor, series: PackedDates) -> tuple[torch.Tensor, torch.Tensor]:
        """``in_norm`` as x * scale + shift: (B P, L, C) tokens, empty slots zero, to two (B P, C)."""
        precise = torch.promote_types(sequence.dtype, torch.float32)
        tokens = sequence.to(precise)
        pixels = len(sequence) // max(len(series.counts), 1)
        groups, channels = self.n_head, sequence.shape[-1]
        sums = tokens.sum(dim=1).view(-1, groups, channels // groups).sum(dim=2)
        squares = (tokens * tokens).sum(dim=1).view(-1, groups, channels // groups).sum(dim=2)
        if self.masked_norm:
            frames = series.counts.to(precise)
        else:
            frames = torch.full_like(series.counts, series.padded_length, dtype=precise)
            padded = (series.padded_length - series.counts).to(precise)[:, None] * (channels // groups)
            padded = padded.repeat_interleave(pixels, dim=0)
            sums = sums + padded * self.pad_value
            squares = squares + padded * self.pad_value**2
        count = (frames * (channels // groups)).clamp_min(1)[:, None].repeat_interleave(pixels, dim=0)
        mean = sums / count
        variance = (squares / count - mean.square()).clamp_min(0)
        inverse = (variance + self.in_norm.eps).rsqrt()
        scale = inverse[:, :, None] * self.in_norm.weight.to(precise).view(groups, -1)
        shift = self.in_norm.bias.to(precise).view(groups, -1) - mean[:, :, None] * scale
        return scale.flatten(1), shift.flatten(1)

    def forward(self, maps: torch.Tensor, series: PackedDates) -> tuple[torch.Tensor, torch.Tensor]:
        """Summary of each series and the attention that made it.

        Args:
            maps: (V, C, H, W) packed maps, fastest in channels-last.
            series: where they come from.

        Returns:
            (B, out_channels, H, W) embedding, and (V, n_head, H, W) attention of every date, after dropout. A series
            without dates gets the embedding of attention zero, a constant.
        """
        count, channels, height, width = maps.shape
        batch, pixels = len(series.counts), height * width
        tokens = maps.permute(0, 2, 3, 1).reshape(count, pixels, channels)
        sequence = series.unpack(tokens).transpose(1, 2).reshape(batch * pixels, series.length, channels)
        scale, shift = (factor.to(sequence.dtype) for factor in self._normalization(sequence, series))

        projection = self.inconv.weight[:, :, 0]
        bias = self.inconv.bias
        assert bias is not None
        query, constant = self.attention_heads.folded()
        positions = self.positional_encoder(series.days.to(torch.promote_types(scale.dtype, torch.float32)))
        positions = positions.to(query.dtype)
        # All heads see the same encoding, so their slices of the folded query add up. The constant vanishes in the
        # softmax; it stays so that every parameter has a gradient under DistributedDataParallel.
        shared = query.view(self.n_head, self.n_head, -1).sum(dim=1)
        time = positions @ shared.mT + (query @ bias + constant)

        weight = (query @ projection)[None] * scale[:, None]
        scores = torch.bmm(weight.to(sequence.dtype), sequence.mT).view(batch, pixels, self.n_head, series.length)
        scores = scores + series.unpack(time).mT[:, None]
        if series.is_dense:
            attention = scores.softmax(dim=-1)
        else:
            empty = ~series.valid[:, None, None]
            attention = scores.masked_fill(empty, torch.finfo(scores.dtype).min).softmax(dim=-1)
            attention = attention.masked_fill(empty, 0.0)
        attention = self.attention_dropout(attention).to(sequence.dtype)

        pooled = torch.bmm(attention.view(batch * pixels, self.n_head, series.length), sequence)
        total = attention.sum(dim=-1).view(batch * pixels, self.n_head, 1)
        pooled = pooled * scale[:, None] + total * shift[:, None]
        heads = torch.einsum("nhc,hdc->nhd", pooled, projection.view(self.n_head, -1, channels))
        dated = torch.bmm(attention.flatten(1, 2), series.unpack(positions).to(attention.dtype))
        heads = heads + total * bias.view(self.n_head, -1) + dated.view_as(heads)
        embedding = self.out_norm(self.dropout(self.mlp(heads.flatten(1))))
        embedding = embedding.view(batch, height, width, self.out_norm.num_channels).permute(0, 3, 1, 2)
        dated_attention = series.pack(attention.permute(0, 3, 1, 2)).unflatten(1, (height, width))
        return embedding, dated_attention.permute(0, 3, 1, 2)
