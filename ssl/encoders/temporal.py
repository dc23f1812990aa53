"""Lightweight temporal attention (L-TAE) over packed dates, the bottleneck of U-TAE.

Garnot & Landrieu, "Lightweight Temporal Self-Attention" (arXiv 2007.00586) and "Panoptic Segmentation of Satellite
Image Time Series with Convolutional Temporal Attention Networks" (arXiv 2107.07933). Parameters have the official
names. The computation is rearranged so that no tensor of size pixels x dates x ``d_model`` is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

_PERIOD = 1000.0
_FIRST_DAY, _YEAR = -134, 365  # 1 January in days since 15 May, days of a year
# Initialisation of the heads: highest score of a head's own season, ridge of the fit, and size of the random keys.
_SEASON_SCORE, _RIDGE, _RANDOM_KEYS = 4.0, 1e-3, 0.1


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation that also trains on a single vector: it then uses the running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise vectors (B, C)."""
        return _running_norm(self, input) if _is_single(self, input) else super().forward(input)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that also trains on a single pixel: it then uses the running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise maps (B, C, H, W)."""
        return _running_norm(self, input) if _is_single(self, input) else super().forward(input)


def _is_single(norm: nn.BatchNorm1d | nn.BatchNorm2d, values: torch.Tensor) -> bool:
    """Whether a batch in training has one value per channel, whose variance is 0 (torch refuses to normalise it)."""
    return norm.training and values.numel() == values.shape[1]


def _running_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, values: torch.Tensor) -> torch.Tensor:
    return functional.batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@dataclass(frozen=True)
class PackedDates:
    """Index between padded (B, T) dates, V packed rows (one per valid date), and (B, L) slots of the rows by series.

    L is the largest number of valid dates of a series. The rows of each series fill its first slots.

    While ``torch.export`` traces, sizes must not depend on values. So nothing is packed: the rows are all B x T dates,
    and the padded dates are the empty slots. Sizes are read from ``shape``, because ``len`` would make them constants.

    Attributes:
        dates: days since 15 May, (B, T), any real dtype.
        padding: True at padded dates, (B, T) bool, or None.
        rows: index of each row among the B x T dates, (V,) int64, ascending; None: rows are all dates.
        slots: index of each row among the B x L slots, (V,) int64; None: V = B L, in order.
        counts: number of valid dates of each series, (B,) int64.
        length: slots of a series, L.
        valid: True where a slot holds a valid date, (B, L) bool; None: everywhere.
    """

    dates: torch.Tensor
    padding: torch.Tensor | None
    rows: torch.Tensor | None
    slots: torch.Tensor | None
    counts: torch.Tensor
    length: int
    valid: torch.Tensor | None

    @classmethod
    def from_dates(cls, dates: torch.Tensor, padding: torch.Tensor | None) -> PackedDates:
        """Pack the valid dates of a batch.

        Args:
            dates: days since 15 May, (B, T).
            padding: True at padded dates, (B, T) bool; None equals all False.
        """
        batch, length = dates.shape
        if padding is None and torch.compiler.is_exporting():
            # Unpadded tensors have other strides, which would prevent one program for every B and T.
            padding = torch.zeros_like(dates, dtype=torch.bool)
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
        """Days of the rows, (V,)."""
        days = self.dates.flatten()
        return days if self.rows is None else days.index_select(0, self.rows)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Select the (V, ...) rows of (B, T, ...) values; values at padded dates, NaN included, are dropped."""
        rows = values.flatten(0, 1)
        if self.rows is not None:
            return rows.index_select(0, self.rows)
        if self.padding is None:
            return rows
        return rows.masked_fill(self.padding.flatten().view(-1, *(1,) * (rows.ndim - 1)), 0.0)

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """Invert ``gather``: (V, ...) rows to (B, T, ...), with zeros at padded dates."""
        if self.rows is None:
            return self.unpack(rows)
        scattered = rows.new_zeros(self.dates.numel(), *rows.shape[1:]).index_copy(0, self.rows, rows)
        return scattered.unflatten(0, self.dates.shape)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """Arrange (V, ...) rows by series, (B, L, ...), with zeros in empty slots."""
        batch, shape = self.counts.shape[0], rows.shape[1:]
        if self.slots is not None:
            rows = rows.new_zeros(batch * self.length, *shape).index_copy(0, self.slots, rows)
        elif self.valid is not None:
            rows = rows.masked_fill(~self.valid.flatten().view(-1, *(1,) * len(shape)), 0.0)
        return rows.reshape(batch, self.length, *shape)

    def pack(self, slots: torch.Tensor) -> torch.Tensor:
        """Invert ``unpack``: (B, L, ...) slots to (V, ...) rows."""
        rows = slots.flatten(0, 1)
        return rows if self.slots is None else rows.index_select(0, self.slots)

    def sum_over_dates(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum (V, ...) rows over the dates of each series, (B, ...)."""
        if self.slots is None:
            return self.unpack(rows).sum(dim=1)
        series = torch.repeat_interleave(self.counts, output_size=rows.shape[0])
        return rows.new_zeros(self.counts.shape[0], *rows.shape[1:]).index_add(0, series, rows)


class SinusoidalPositions(nn.Module):
    """Sinusoidal encoding of dates, the same for every head.

    Column i of ``width`` has the wavelength 2 pi 1000^(2 floor(i / 2) / width) days (Vaswani et al. 2017).

    Attributes:
        exponents: even numbers below ``width``, (N,) int64.
    """

    exponents: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        # Integers, because `.bfloat16()` does not round them: wavelengths of 8 bits would shift dates by days.
        self.register_buffer("exponents", torch.arange(0, width, 2), persistent=False)

    def forward(self, days: torch.Tensor) -> torch.Tensor:
        """Encode (...) days as (..., width), float32, or float64 if the days are."""
        days = days if days.dtype == torch.float64 else days.to(torch.float32)
        angles = days[..., None] / _PERIOD ** (self.exponents.to(days.dtype) / self.width)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.width]


class AttentionHeads(nn.Module):
    """Parameters of the heads: one learned query per head, ``Q`` (n_head, d_k), and the key projection ``fc1_k``."""

    def __init__(self, n_head: int, d_k: int, d_model: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.empty(n_head, d_k))  # registered before it is filled, see ``limited_memory``
        nn.init.normal_(self.Q, 0.0, math.sqrt(2.0 / d_k))
        self.fc1_k = nn.Linear(d_model, n_head * d_k)
        nn.init.normal_(self.fc1_k.weight, 0.0, math.sqrt(2.0 / d_k))

    def fold_query(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the score Q K^T / sqrt(d_k) as an affine function of a token: (n_head, d_model) and (n_head,)."""
        n_head, d_k = self.Q.shape
        query = self.Q[:, None] / math.sqrt(d_k)
        weight = torch.bmm(query, self.fc1_k.weight.view(n_head, d_k, -1))[:, 0]
        return weight, (query[:, 0] * self.fc1_k.bias.view(n_head, d_k)).sum(dim=1)


class TemporalEncoder(nn.Module):
    """L-TAE at every pixel of packed maps.

    Let x_t be the C group-normalised channels of a pixel at date t, p_t the date encoding, e_t = W x_t + b + p_t the
    token, and u_h the query of head h folded into the key projection. Head h has the scores
    u_h . e_t = (u_h W) . x_t + u_h . (b + p_t). It outputs its slice of
    sum_t a_t e_t = W (sum_t a_t x_t) + b sum_t a_t + sum_t a_t p_t. So the dates are pooled *before* the projection.
    This is exact, even where dropout makes the sum of the attention differ from 1. The group normalisation is an affine
    map that is constant over dates, so it is folded into both equations in the same way.

    Args:
        in_channels: channels of the maps, C.
        n_head: heads; must divide C and ``d_model``.
        d_model: width of the projection.
        d_k: width of a key.
        out_channels: channels of the embedding.
        masked_norm: whether the statistics of ``in_norm`` exclude padded dates. The official code counts them as maps
            of ``pad_value``, so official weights need False; everything else uses True.
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
        self.mlp = nn.Sequential(nn.Linear(d_model, out_channels), BatchNorm1d(out_channels), nn.ReLU())
        self.dropout = nn.Dropout(self.DROPOUT)
        self.out_norm = nn.GroupNorm(n_head, out_channels)
        if n_head > 1:
            self._prefer_seasons()

    def _prefer_seasons(self) -> None:
        """Initialise each head with a preference for its own part of the year, a cosine fitted by the date encoding.

        Random keys prefer single days, because the shortest wavelength of the encoding is 6 days. What a head then
        pools depends on the days that a series happens to have, and features of two series cannot be compared.
        """
        heads = self.attention_heads
        days = torch.arange(_FIRST_DAY, _FIRST_DAY + _YEAR, dtype=torch.float64)
        terms = torch.cat([self.positional_encoder(days), torch.ones_like(days)[:, None]], dim=1)
        middles = _FIRST_DAY + _YEAR * (torch.arange(self.n_head, dtype=torch.float64) + 0.5) / self.n_head
        scores = _SEASON_SCORE * torch.cos(2 * math.pi * (days[:, None] - middles) / _YEAR)
        ridge = _RIDGE * _YEAR * torch.eye(terms.shape[1], dtype=torch.float64)
        fitted = torch.linalg.solve(terms.mT @ terms + ridge, terms.mT @ scores)[:-1].mT
        with torch.no_grad():
            query = heads.Q.double()
            # The smallest keys whose product with the query gives these scores. All slices of a token contain the date
            # encoding, so each contributes an equal part.
            keys = query * math.sqrt(query.shape[1]) / query.square().sum(dim=1, keepdim=True) / self.n_head
            keys = keys[:, :, None] * fitted.repeat(1, self.n_head)[:, None]
            heads.fc1_k.weight.mul_(_RANDOM_KEYS).add_(keys.flatten(0, 1).to(heads.fc1_k.weight.dtype))

    def _normalization(self, sequence: torch.Tensor, series: PackedDates) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute ``in_norm`` as x * scale + shift: two (B P, 1, C) of (B, P, L, C) tokens, zero in empty slots."""
        precise = torch.promote_types(sequence.dtype, torch.float32)
        tokens = sequence.to(precise)
        groups, group_size = self.n_head, sequence.shape[-1] // self.n_head
        sums = tokens.sum(dim=2).unflatten(2, (groups, group_size)).sum(dim=3)
        squares = (tokens * tokens).sum(dim=2).unflatten(2, (groups, group_size)).sum(dim=3)
        counts = series.counts.to(precise)[:, None, None]
        if not self.masked_norm:
            padded = series.dates.shape[1] - counts
            sums = sums + padded * group_size * self.pad_value
            squares = squares + padded * group_size * self.pad_value**2
            counts = counts + padded
        counts = (counts * group_size).clamp_min(1)
        mean = sums / counts
        variance = (squares / counts - mean.square()).clamp_min(0)
        inverse = (variance + self.in_norm.eps).rsqrt()
        scale = inverse[..., None] * self.in_norm.weight.to(precise).view(groups, group_size)
        shift = self.in_norm.bias.to(precise).view(groups, group_size) - mean[..., None] * scale
        return scale.flatten(2).flatten(0, 1)[:, None], shift.flatten(2).flatten(0, 1)[:, None]

    def _positions(self, days: torch.Tensor) -> torch.Tensor:
        """Encode days in the dtype of the weights, rounding at the end only."""
        precise = torch.promote_types(self.inconv.weight.dtype, torch.float32)
        return self.positional_encoder(days.to(precise)).to(self.inconv.weight.dtype)

    def _attention(
        self, sequence: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor, series: PackedDates
    ) -> torch.Tensor:
        """Compute (B, P, n_head, L) attention from (B, P, L, C) tokens, their norm's scale and (V, width) positions."""
        query, constant = self.attention_heads.fold_query()
        bias = self.inconv.bias
        assert bias is not None
        # All heads share the date encoding, so the slices of the folded query add up. The softmax cancels the constant,
        # which stays because DistributedDataParallel needs a gradient for every parameter.
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
        """Pool the maps of each series over dates.

        Args:
            maps: packed maps, (V, C, H, W), fastest in channels-last memory.
            series: index of the packed dates.

        Returns:
            Embedding, (B, out_channels, H, W), and attention of every date after dropout, (V, n_head, H, W). Series
            without valid dates get a constant embedding, that of zero attention. Without ``masked_norm`` they get the
            output of the official code, which attends equally to the T padded dates, unless T = 0.
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
        pooled_positions = torch.bmm(attention.flatten(1, 2), series.unpack(positions).to(attention.dtype))
        pooled_positions = pooled_positions.unflatten(1, (pixels, self.n_head))
        length = series.dates.shape[1]
        if series.padding is not None and not self.masked_norm and length:
            # The official code masks scores with -1000 instead of minus infinity, so all T padded dates weigh the same.
            empty = (series.counts == 0)[:, None, None, None]
            pooled, total = pooled.masked_fill(empty, self.pad_value), total.masked_fill(empty, 1.0)
            mean_position = self._positions(series.dates).mean(dim=1)
            pooled_positions = torch.where(
                empty, mean_position[:, None, None].to(pooled_positions.dtype), pooled_positions
            )
        pooled = pooled.flatten(0, 1) * scale + total.flatten(0, 1) * shift
        bias = self.inconv.bias
        assert bias is not None
        heads = torch.einsum("nhc,hdc->nhd", pooled, self.inconv.weight.view(self.n_head, -1, channels))
        heads = heads + total.flatten(0, 1) * bias.view(self.n_head, -1) + pooled_positions.flatten(0, 1)
        embedding = self.out_norm(self.dropout(self.mlp(heads.flatten(1))))
        embedding = embedding.view(batch, height, width, self.out_norm.num_channels).permute(0, 3, 1, 2)
        rows = series.pack(attention.permute(0, 3, 1, 2)).unflatten(1, (height, width))
        return embedding, rows.permute(0, 3, 1, 2)
