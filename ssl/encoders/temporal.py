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

_PERIOD = 1000.0


@dataclass(frozen=True)
class PackedDates:
    """Where V rows, one for each valid date of a batch of B series, come from, and where they stand by series.

    By series, rows stand in L slots each, the first ones filled. While ``torch.export`` traces, sizes may not depend
    on values: then nothing is packed, rows are all B x T dates, and empty slots are the padded dates. (It is also why
    sizes are read from ``shape``: ``len`` of a tensor would fix them.)

    Attributes:
        dates: (B, T) days, any real dtype.
        padding: (B, T) bool, True where there is no date, or None.
        rows: (V,) int64, the place of each row among the B x T dates, ascending; None: all of them.
        slots: (V,) int64, the place of each row among the B x L slots; None: V = B L, in order.
        counts: (B,) int64, valid dates of each series.
        length: slots of a series, L.
        valid: (B, L) bool, True where a slot holds a valid date; None: everywhere.
    """

    dates: torch.Tensor
    padding: torch.Tensor | None
    rows: torch.Tensor | None
    slots: torch.Tensor | None
    counts: torch.Tensor
    length: int
    valid: torch.Tensor | None

    @classmethod
    def of(cls, dates: torch.Tensor, padding: torch.Tensor | None) -> PackedDates:
        """The valid dates of (B, T) ``dates``; ``padding`` is (B, T) bool, True where there is none, or None."""
        batch, length = dates.shape
        if padding is None and torch.compiler.is_exporting():
            padding = torch.zeros_like(
                dates, dtype=torch.bool
            )  # one program for every B and T: unpadded strides differ
        if padding is None:
            counts = torch.full((batch,), length, device=dates.device)
            return cls(dates, None, None, None, counts, length, None)
        valid = ~padding
        counts = valid.sum(dim=1)
        if torch.compiler.is_exporting():
            return cls(dates, padding, None, None, counts, length, valid)
        rows = valid.flatten().nonzero()[:, 0]
        longest = int(counts.max()) if batch else 0
        if rows.shape[0] == batch * longest:
            return cls(dates, padding, rows, None, counts, longest, None)
        filled = torch.arange(longest, device=dates.device) < counts[:, None]
        return cls(dates, padding, rows, filled.flatten().nonzero()[:, 0], counts, longest, filled)

    @property
    def days(self) -> torch.Tensor:
        """(V,) days of the rows."""
        days = self.dates.flatten()
        return days if self.rows is None else days.index_select(0, self.rows)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) values of every date as (V, ...) rows; what padded dates hold, NaN included, is not kept."""
        rows = values.flatten(0, 1)
        if self.rows is not None:
            return rows.index_select(0, self.rows)
        if self.padding is None:
            return rows
        return rows.masked_fill(self.padding.flatten().view(-1, *(1,) * (rows.ndim - 1)), 0.0)

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """(V, ...) rows as (B, T, ...), zeros at padded dates: the inverse of ``gather``."""
        if self.rows is None:
            return self.unpack(rows)
        dated = rows.new_zeros(self.dates.numel(), *rows.shape[1:]).index_copy(0, self.rows, rows)
        return dated.unflatten(0, self.dates.shape)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """(V, ...) rows by series, (B, L, ...), zeros in empty slots."""
        batch, shape = self.counts.shape[0], rows.shape[1:]
        if self.slots is not None:
            rows = rows.new_zeros(batch * self.length, *shape).index_copy(0, self.slots, rows)
        elif self.valid is not None:
            rows = rows.masked_fill(~self.valid.flatten().view(-1, *(1,) * len(shape)), 0.0)
        return rows.reshape(batch, self.length, *shape)

    def pack(self, slots: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) slots as (V, ...) rows: the inverse of ``unpack``."""
        rows = slots.flatten(0, 1)
        return rows if self.slots is None else rows.index_select(0, self.slots)

    def total(self, rows: torch.Tensor) -> torch.Tensor:
        """(V, ...) rows summed over the dates of each series, (B, ...)."""
        if self.slots is None:
            return self.unpack(rows).sum(dim=1)
        series = torch.repeat_interleave(self.counts, output_size=rows.shape[0])
        return rows.new_zeros(self.counts.shape[0], *rows.shape[1:]).index_add(0, series, rows)


class SinusoidalPositions(nn.Module):
    """Sine and cosine encoding of dates, the same for every head.

    Column i of ``width`` has the wavelength 2 pi 1000^(2 floor(i / 2) / width) days (Vaswani et al. 2017).

    Attributes:
        exponents: (N,) int64, the N even numbers below ``width``.
    """

    exponents: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        # Integers survive `.bfloat16()`: wavelengths rounded to 8 bits would displace dates by days.
        self.register_buffer("exponents", torch.arange(0, width, 2), persistent=False)

    def forward(self, days: torch.Tensor) -> torch.Tensor:
        """(...) days as a (..., width) table, float32, or float64 when the days are."""
        days = days if days.dtype == torch.float64 else days.to(torch.float32)
        angles = days[..., None] / _PERIOD ** (self.exponents.to(days.dtype) / self.width)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.width]


class AttentionHeads(nn.Module):
    """Parameters of the heads: a learned query each, ``Q`` (n_head, d_k), and the key projection ``fc1_k``."""

    def __init__(self, n_head: int, d_k: int, d_model: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.empty(n_head, d_k))  # registered before it is filled: see ``limits``
        nn.init.normal_(self.Q, 0.0, math.sqrt(2.0 / d_k))
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
        n_head, d_model, d_k: heads, which divide C and ``d_model``, width of the projection, width of a key.
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
        """``in_norm`` as x * scale + shift: (B, P, L, C) tokens, empty slots zero, to two (B P, 1, C)."""
        precise = torch.promote_types(sequence.dtype, torch.float32)
        tokens = sequence.to(precise)
        groups, members = self.n_head, sequence.shape[-1] // self.n_head
        sums = tokens.sum(dim=2).unflatten(2, (groups, members)).sum(dim=3)
        squares = (tokens * tokens).sum(dim=2).unflatten(2, (groups, members)).sum(dim=3)
        counts = series.counts.to(precise)[:, None, None]
        if not self.masked_norm:
            padded = series.dates.shape[1] - counts
            sums = sums + padded * members * self.pad_value
            squares = squares + padded * members * self.pad_value**2
            counts = counts + padded
        counts = (counts * members).clamp_min(1)
        mean = sums / counts
        variance = (squares / counts - mean.square()).clamp_min(0)
        inverse = (variance + self.in_norm.eps).rsqrt()
        scale = inverse[..., None] * self.in_norm.weight.to(precise).view(groups, members)
        shift = self.in_norm.bias.to(precise).view(groups, members) - mean[..., None] * scale
        return scale.flatten(2).flatten(0, 1)[:, None], shift.flatten(2).flatten(0, 1)[:, None]

    def _positions(self, days: torch.Tensor) -> torch.Tensor:
        """Encoding of days in the dtype of the weights, rounded only at the end."""
        precise = torch.promote_types(self.inconv.weight.dtype, torch.float32)
        return self.positional_encoder(days.to(precise)).to(self.inconv.weight.dtype)

    def _attention(
        self, sequence: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor, series: PackedDates
    ) -> torch.Tensor:
        """(B, P, n_head, L) weights from (B, P, L, C) tokens, the scale of their norm and (V, width) positions."""
        query, constant = self.attention_heads.folded()
        bias = self.inconv.bias
        assert bias is not None
        # All heads see the same encoding, so their slices of the folded query add up. The constant vanishes in the
        # softmax; it stays so that every parameter has a gradient under DistributedDataParallel.
        shared = query.view(self.n_head, self.n_head, -1).sum(dim=1)
        time = series.unpack(positions @ shared.mT + (query @ bias + constant))
        weight = (query @ self.inconv.weight[:, :, 0])[None] * scale
        scores = torch.bmm(weight.to(sequence.dtype), sequence.flatten(0, 1).mT)
        scores = scores.unflatten(0, sequence.shape[:2]) + time.mT[:, None]
        if series.valid is None:
            return scores.softmax(dim=-1)
        empty = ~series.valid[:, None, None]
        weights = scores.masked_fill(empty, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return weights.masked_fill(empty, 0.0)

    def forward(self, maps: torch.Tensor, series: PackedDates) -> tuple[torch.Tensor, torch.Tensor]:
        """Summary of each series and the attention that made it.

        Args:
            maps: (V, C, H, W) packed maps, fastest in channels-last.
            series: where they come from.

        Returns:
            (B, out_channels, H, W) embedding, and (V, n_head, H, W) attention of every date, after dropout. A series
            without valid dates gets a constant as embedding: that of attention zero; or without ``masked_norm`` what
            the official code computes, which attends evenly over the T padded dates. T = 0 leaves nothing to attend
            to: attention zero in either case.
        """
        count, channels, height, width = maps.shape
        batch, pixels = series.counts.shape[0], height * width
        tokens = maps.permute(0, 2, 3, 1).reshape(count, pixels, channels)
        sequence = series.unpack(tokens).transpose(1, 2).contiguous()
        scale, shift = (factor.to(sequence.dtype) for factor in self._normalization(sequence, series))
        positions = self._positions(series.days)
        attention = self.attention_dropout(self._attention(sequence, scale, positions, series)).to(sequence.dtype)

        pooled = torch.bmm(attention.flatten(0, 1), sequence.flatten(0, 1)).unflatten(0, (batch, pixels))
        total = attention.sum(dim=-1, keepdim=True)
        dated = torch.bmm(attention.flatten(1, 2), series.unpack(positions).to(attention.dtype))
        dated = dated.unflatten(1, (pixels, self.n_head))
        length = series.dates.shape[1]
        if series.padding is not None and not self.masked_norm and length:
            # Every official score is then -1000, not minus infinity: all T padded dates weigh the same.
            empty = (series.counts == 0)[:, None, None, None]
            pooled, total = pooled.masked_fill(empty, self.pad_value), total.masked_fill(empty, 1.0)
            evenly = self._positions(series.dates).mean(dim=1)
            dated = torch.where(empty, evenly[:, None, None].to(dated.dtype), dated)
        pooled = pooled.flatten(0, 1) * scale + total.flatten(0, 1) * shift
        bias = self.inconv.bias
        assert bias is not None
        heads = torch.einsum("nhc,hdc->nhd", pooled, self.inconv.weight.view(self.n_head, -1, channels))
        heads = heads + total.flatten(0, 1) * bias.view(self.n_head, -1) + dated.flatten(0, 1)
        embedding = self.out_norm(self.dropout(self.mlp(heads.flatten(1))))
        embedding = embedding.view(batch, height, width, self.out_norm.num_channels).permute(0, 3, 1, 2)
        rows = series.pack(attention.permute(0, 3, 1, 2)).unflatten(1, (height, width))
        return embedding, rows.permute(0, 3, 1, 2)
