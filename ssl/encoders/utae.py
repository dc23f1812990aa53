"""U-TAE: the encoder of image time series, a U-Net whose bottleneck attends over dates.

Garnot & Landrieu, "Panoptic Segmentation of Satellite Image Time Series with Convolutional Temporal Attention
Networks" (arXiv 2107.07933), in the variant of IGN's FLAIR-HUB code: stride 1 and kernel 3, because its series are
10 x 10 pixels. Constructor arguments and parameters carry the official names, so official weights load strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from bocage.shards.errors import InputError
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.temporal import PackedDates, TemporalEncoder
from bocage.ssl.encoders.utae_arguments import GROUPS, Aggregation, Normalization, PaddingMode, check_arguments


class _Convolution(nn.Conv2d):
    """A convolution whose border also works on maps too narrow to reflect or wrap around."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        border = self.padding[0]
        assert isinstance(border, int)
        needed = {"reflect": border + 1, "circular": border}.get(self.padding_mode, 0)
        if min(maps.shape[-2:]) >= needed:
            return super().forward(maps)
        maps = functional.pad(maps, (border,) * 4, mode="replicate")
        return functional.conv2d(maps, self.weight, self.bias, self.stride)


class _InstanceNorm(nn.Module):
    """Each channel of each frame at mean 0 and variance 1, without parameters; a single pixel becomes 0."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(maps, maps.shape[1])


def _normalization(kind: Normalization, channels: int) -> list[nn.Module]:
    if kind == "group":
        return [nn.GroupNorm(GROUPS, channels)]
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    return [_InstanceNorm()] if kind == "instance" else []


class _Convolutions(nn.Module):
    """Convolution, normalisation, ReLU for each step of ``widths``; parameters ``conv.<i>``."""

    def __init__(
        self,
        widths: Sequence[int],
        norm: Normalization,
        padding_mode: PaddingMode,
        kernel: int = 3,
        stride: int = 1,
        border: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(len(widths) - 1):
            convolution = _Convolution(
                widths[i], widths[i + 1], kernel, stride=stride, padding=border, padding_mode=padding_mode
            )
            layers += [convolution, *_normalization(norm, widths[i + 1]), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.conv(maps)


class _ConvolutionBlock(nn.Module):
    """``_Convolutions`` one level deeper, as the official names have it: ``conv.conv.<i>``."""

    def __init__(self, widths: Sequence[int], norm: Normalization, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = _Convolutions(widths, norm, padding_mode)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.conv(maps)


class _DownBlock(nn.Module):
    """Strided convolution, then one plain and one residual convolution."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        norm: Normalization,
        padding_mode: PaddingMode,
        kernel: int,
        stride: int,
        border: int,
    ) -> None:
        super().__init__()
        self.down = _Convolutions((d_in, d_in), norm, padding_mode, kernel, stride, border)
        self.conv1 = _Convolutions((d_in, d_out), norm, padding_mode)
        self.conv2 = _Convolutions((d_out, d_out), norm, padding_mode)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = self.conv1(self.down(maps))
        return maps + self.conv2(maps)


class _UpBlock(nn.Module):
    """Transposed convolution, joined with the temporally aggregated skip, then one plain and one residual one."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_skip: int,
        padding_mode: PaddingMode,
        kernel: int,
        stride: int,
        border: int,
    ) -> None:
        super().__init__()
        self.skip_conv = nn.Sequential(nn.Conv2d(d_skip, d_skip, 1), nn.BatchNorm2d(d_skip), nn.ReLU(inplace=True))
        transposed = nn.ConvTranspose2d(d_in, d_out, kernel, stride=stride, padding=border)
        self.up = nn.Sequential(transposed, nn.BatchNorm2d(d_out), nn.ReLU(inplace=True))
        self.conv1 = _Convolutions((d_out + d_skip, d_out), "batch", padding_mode)
        self.conv2 = _Convolutions((d_out, d_out), "batch", padding_mode)

    def forward(self, maps: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        transposed, *rest = self.up
        # Odd sizes lose a row on the way down; the skip says how many come back.
        maps = transposed(maps, output_size=skip.shape[-2:])
        for layer in rest:
            maps = layer(maps)
        maps = self.conv1(torch.cat((maps, self.skip_conv(skip)), dim=1))
        return maps + self.conv2(maps)


class UTAEOutput(NamedTuple):
    """What U-TAE computes.

    Attributes:
        maps: deepest first as in the official code, (B, decoder_widths[-1 - i], H_i, W_i).
        logits: (B, out_conv[-1], H, W) of the official head, or None without a head.
        attention: (n_head, B, T, h, w) weight of each date in each head at the deepest level, zero at padded dates,
            or None unless asked for. While training it carries the attention dropout.
    """

    maps: list[torch.Tensor]
    logits: torch.Tensor | None
    attention: torch.Tensor | None


class UTAE(Encoder):
    """U-TAE with packed dates: padded and masked dates cost nothing and leave no trace.

    Every date is encoded alone by shared convolutions (group normalisation: no statistics cross dates), so that a
    hidden date cannot leak; the deepest maps are pooled by ``TemporalEncoder`` and the skips by its attention.

    Args:
        input_dim: channels of a frame.
        encoder_widths, decoder_widths: channels by level, finest first; the last ones must be equal.
        out_conv: widths of the official head, ending in the number of classes; used with ``head``.
        str_conv_k, str_conv_s, str_conv_p: kernel, stride and border of the convolutions between levels.
        agg_mode: how skips are pooled over dates: by each head's attention on its group of channels, by the mean
            attention of all heads, or evenly.
        encoder_norm: normalisation of the frame encoder. ``batch`` mixes dates and samples; ``none`` stands for every
            other value of the official code, which then leaves the layer out.
        n_head, d_model, d_k: see ``TemporalEncoder``.
        pad_value: value of the official code's padded frames, for ``masked_norm`` off; padding itself is explicit.
        padding_mode: border of the convolutions.
        masked_norm: see ``TemporalEncoder``; off for official weights.
        head: whether to build the official head, whose logits end in a ReLU.

    Raises:
        InputError: an argument that cannot work, named.
    """

    def __init__(
        self,
        input_dim: int,
        encoder_widths: Sequence[int] = (64, 64, 64, 128),
        decoder_widths: Sequence[int] = (32, 32, 64, 128),
        out_conv: Sequence[int] = (32, 20),
        str_conv_k: int = 3,
        str_conv_s: int = 1,
        str_conv_p: int = 1,
        agg_mode: Aggregation = "att_group",
        encoder_norm: Normalization = "group",
        n_head: int = 16,
        d_model: int = 256,
        d_k: int = 4,
        pad_value: float = 0.0,
        padding_mode: PaddingMode = "reflect",
        masked_norm: bool = True,
        head: bool = False,
    ) -> None:
        # The first line of all: nothing but the arguments is local yet.
        check_arguments({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        super().__init__()
        levels = len(encoder_widths)
        self.agg_mode = agg_mode
        self.widths = tuple(decoder_widths)
        self.strides = tuple(str_conv_s**level for level in range(levels))

        self._between = between = (str_conv_k, str_conv_s, str_conv_p)
        self.in_conv = _ConvolutionBlock((input_dim, encoder_widths[0], encoder_widths[0]), encoder_norm, padding_mode)
        self.down_blocks = nn.ModuleList(
            _DownBlock(encoder_widths[i], encoder_widths[i + 1], encoder_norm, padding_mode, *between)
            for i in range(levels - 1)
        )
        self.temporal_encoder = TemporalEncoder(
            encoder_widths[-1], n_head, d_model, d_k, encoder_widths[-1], masked_norm, pad_value
        )
        self.up_blocks = nn.ModuleList(
            _UpBlock(decoder_widths[i], decoder_widths[i - 1], encoder_widths[i - 1], padding_mode, *between)
            for i in range(levels - 1, 0, -1)
        )
        self.out_conv = _ConvolutionBlock((decoder_widths[0], *out_conv), "batch", padding_mode) if head else None
        self.head_classes = out_conv[-1] if head else None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for timm's ``group_parameters``: down the U, through time, and up again."""
        return {
            "stem": r"^(?:in_conv|mask_token)",
            "down": r"^down_blocks" if coarse else r"^down_blocks\.(\d+)",
            "time": r"^temporal_encoder",
            "up": r"^up_blocks" if coarse else r"^up_blocks\.(\d+)",
            "head": r"^out_conv",
        }

    def _resized(self, attention: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Attention at the size of a skip; a wide border can make maps grow with depth, which att_group averages."""
        if self.agg_mode == "att_group" and attention.shape[-1] > size[-1] and attention.shape[-2] > size[-2]:
            return functional.interpolate(attention, size, mode="area")
        return functional.interpolate(attention, size, mode="bilinear", align_corners=False)

    def _pooled_skip(self, maps: torch.Tensor, attention: torch.Tensor, series: PackedDates) -> torch.Tensor:
        """(V, C, H, W) maps pooled over dates, (B, C, H, W); ``attention`` is (V, n_head, h, w), the deepest size."""
        channels = maps.shape[1]
        tokens = maps.permute(0, 2, 3, 1)
        if self.agg_mode == "mean":
            pooled = series.total(tokens) / series.counts.clamp_min(1).to(tokens.dtype).view(-1, 1, 1, 1)
        else:
            if self.agg_mode == "att_mean":
                attention = attention.mean(dim=1, keepdim=True)
            size = maps.shape[-2:]
            if not maps.shape[0]:  # torch refuses to interpolate an empty batch
                attention = attention.new_zeros(0, attention.shape[1], *size)
            elif attention.shape[-2:] != size:
                attention = self._resized(attention, size)
            # A product with a 0/1 matrix spreads each head over its channels faster than a broadcast of 4 does.
            heads = attention.shape[1]
            spread = torch.eye(heads, dtype=tokens.dtype, device=tokens.device).repeat_interleave(channels // heads, 1)
            pooled = series.total((attention.permute(0, 2, 3, 1) @ spread).to(tokens.dtype) * tokens)
        return pooled.permute(0, 3, 1, 2)

    def _check_size(self, height: int, width: int) -> None:
        kernel, stride, border = self._between
        side = min(height, width)
        for _ in self.down_blocks:
            side = (side + 2 * border - kernel) // stride + 1
            if side < 1:
                raise InputError(
                    f"U-TAE: series of {height} x {width} px are too small for {len(self.down_blocks)} convolutions "
                    f"with str_conv_k = {kernel}, str_conv_s = {stride}, str_conv_p = {border}; use larger windows or "
                    "fewer levels"
                )

    def _encoded(self, values: torch.Tensor, series: PackedDates) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps, deepest first, and the (V, n_head, h, w) attention of the rows of ``series``."""
        self._check_size(values.shape[-2], values.shape[-1])
        skips = [self.in_conv(series.gather(values).contiguous(memory_format=torch.channels_last))]
        for block in self.down_blocks:
            skips.append(block(skips[-1]))
        embedding, attention = self.temporal_encoder(skips.pop(), series)
        maps = [embedding]
        for block, skip in zip(self.up_blocks, reversed(skips)):
            maps.append(block(maps[-1], self._pooled_skip(skip, attention, series)))
        return maps, attention

    def forward(
        self, x: torch.Tensor, dates: torch.Tensor, pad_mask: torch.Tensor | None = None, *, attention: bool = False
    ) -> UTAEOutput:
        """Maps, logits with a head, and on request the attention.

        Args:
            x: (B, T, C, H, W) float; what padded dates hold is never read.
            dates: (B, T) days.
            pad_mask: (B, T) bool, True where there is no date; None is the same as all False. T = 0 and series
                without any valid date are fine: their maps are constants of the weights.
            attention: whether to return the attention.

        Raises:
            InputError: the frames are too small for the convolutions between levels.
        """
        series = PackedDates.of(dates, pad_mask)
        maps, weights = self._encoded(x, series)
        logits = None if self.out_conv is None else self.out_conv(maps[-1])
        return UTAEOutput(maps, logits, series.scatter(weights).permute(2, 0, 1, 3, 4) if attention else None)

    def features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """See ``Encoder.features``; masked dates go into ``padding``. Maps are (B, C, H, W), shallowest first.

        Raises:
            InputError: see ``forward``.
            TypeError: no dates, or a mask, which is of images.
        """
        if dates is None:
            raise TypeError("U-TAE needs dates")
        if mask is not None:
            raise TypeError("U-TAE takes masked dates through `padding`, not `mask`")
        return self._encoded(values, PackedDates.of(dates, padding))[0][::-1]
